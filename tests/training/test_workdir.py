"""The run directory and its errors."""

import errno
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from pjrlhf.errors import UserError
from pjrlhf.training import workdir as module
from pjrlhf.training.workdir import Workdir, disk_errors, refuse_inside_run, write_json

CONFIG = {"seed": 1, "optimizer": {"learning_rate": 0.1, "betas": (0.9, 0.99)}, "log_every": 5, "report": {"dpi": 80}}


def started(folder, config=CONFIG, **options):
    workdir = Workdir(folder)
    workdir.check_config(config, **options)
    return workdir


def test_the_same_config_continues_and_ignored_keys_may_change(tmp_path):
    started(tmp_path / "a/b").keep()
    changed = {**CONFIG, "log_every": 9, "report": {"dpi": 120}}
    started(tmp_path / "a/b", changed, ignore=("log_every", "report")).keep()
    assert json.loads((tmp_path / "a/b/config.json").read_text())["log_every"] == 9


def test_another_config_is_refused_with_the_differences(tmp_path):
    started(tmp_path).keep()
    changed = {"seed": 1, "optimizer": {"learning_rate": 0.2, "betas": [0.9, 0.99]}, "log_every": 6, "new": {}}
    with pytest.raises(UserError) as error:
        started(tmp_path, changed, ignore=("log_every",))
    message = str(error.value)
    assert str(tmp_path) in message and "another --workdir" in message
    assert "new: (absent) -> {}; optimizer.learning_rate: 0.1 -> 0.2; report.dpi: 80 -> (absent))" in message
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
    assert "betas" not in message and "log_every" not in message


def test_finished_stages_are_remembered(tmp_path):
    workdir = Workdir(tmp_path)
    assert workdir.finished("sft") is None
    workdir.mark_finished("sft", 1.5, steps=3)
    workdir.mark_finished("reward", 2.0)
    assert Workdir(tmp_path).finished("sft") == {"seconds": 1.5, "steps": 3}
    assert workdir.stage("sft").is_dir()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(UserError, match=f"{path}: cannot be written, the disk is full"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_broken_config_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"seed"')
    with pytest.raises(UserError, match=r"config\.json: not readable as JSON"):
        started(tmp_path)


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "f").write_text("")
    for path in (tmp_path / "f", tmp_path / "f/below"):
        with pytest.raises(UserError, match=f"{path}: cannot be written, a file stands"):
            Workdir(path)


def test_disk_errors_reads_wrapped_messages_and_leaves_others_alone(tmp_path):
    with pytest.raises(UserError, match="read-only"), disk_errors(tmp_path):
        raise ValueError(f"RESOURCE_EXHAUSTED: writing: {os.strerror(errno.EROFS)} [/x]")
    with pytest.raises(KeyError), disk_errors(tmp_path):
        raise KeyError("other")


def test_the_folder_belongs_to_a_config_when_there_is_something_to_keep(tmp_path):
    workdir = started(tmp_path)
    started(tmp_path, {**CONFIG, "seed": 2})
    assert not (tmp_path / "config.json").exists()
    workdir.mark_finished("sft", 1.0)
    with pytest.raises(UserError, match="seed: 1 -> 2"):
        started(tmp_path, {**CONFIG, "seed": 2})


def test_many_differences_are_not_all_listed(tmp_path):
    started(tmp_path, {f"s{i:02}": 0 for i in range(30)}).keep()
    with pytest.raises(UserError, match=r"s07: 0 -> 1; and 22 more\)"):
        started(tmp_path, {f"s{i:02}": 1 for i in range(30)})


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "inputs.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"3", b'{"stages": []}', b'{"stages": {"sft": 3}}', b'{"outputs": 1}', b"\xff\xfe", b"{" * 10**5],
    ids=["empty", "list", "number", "stages", "entry", "outputs", "bytes", "deep"],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    inputs = {"model.path": {"path": "base", "hash": "1"}}
    try:
        workdir = started(tmp_path, {"stages": ["sft"]})
        workdir.check_contents(inputs)
        workdir.finished("sft")
        workdir.check_outputs("sft")
    except UserError as error:
        assert str(tmp_path / name) in str(error) or "another config" in str(error)
        assert "\n" not in str(error)
    else:
        assert b'"' in content, "what is no object cannot be read"


def test_a_name_that_is_not_utf8(tmp_path):
    with pytest.raises(UserError, match="the name is not UTF-8; choose another --workdir"):
        Workdir(tmp_path / "x\udcff")


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"{tmp_path}: no permission to read and write there"):
        Workdir(tmp_path)


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(pathlib.Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"manifest.json: cannot be read \(Permission denied\)"):
        Workdir(tmp_path).finished("sft")


def test_a_place_where_no_folder_can_be_made(tmp_path):
    def refuse():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    message = r"no folder can be made there, or it was deleted .* choose another --workdir"
    with pytest.raises(UserError, match=message), disk_errors(tmp_path):
        refuse()


def test_a_deleted_folder_is_not_made_again(tmp_path):
    workdir = started(tmp_path / "run")
    workdir.keep()
    shutil.rmtree(tmp_path / "run")
    for write in (workdir.keep, lambda: workdir.stage("sft"), lambda: workdir.mark_finished("sft", 1.0)):
        with pytest.raises(UserError, match=f"{tmp_path}/run.*: .*deleted while the run used it; start the run again"):
            write()
    assert not (tmp_path / "run").exists()


# ---- inputs and outputs


def inputs(**hashes):
    return {name: {"path": f"/data/{name}", "hash": value} for name, value in hashes.items()}


def test_other_contents_of_an_input_are_refused_by_name(tmp_path):
    workdir = started(tmp_path)
    workdir.check_contents(inputs(data="1", base="2"))
    workdir.keep()
    again = started(tmp_path)
    again.check_contents(inputs(data="1", base="2", bank="3"))  # a stage that was added
    again.keep()
    with pytest.raises(
        UserError, match=r"has changed since it started \(base: /data/base; bank: /data/bank\); put back"
    ):
        started(tmp_path).check_contents(inputs(data="1", base="9", bank="4"))
    moved = {"base": {"path": "/elsewhere", "hash": "9"}}  # the config says so, and is compared itself
    started(tmp_path).check_contents(moved)


def test_an_input_that_is_met_late_is_kept_too(tmp_path):
    workdir = started(tmp_path)
    workdir.keep()
    workdir.check_contents(inputs(hub="1"))
    with pytest.raises(UserError, match="hub"):
        started(tmp_path).check_contents(inputs(hub="2"))
    with pytest.raises(UserError, match="hub"):
        workdir.check_contents(inputs(hub="2"))


def test_the_files_of_a_finished_stage_are_checked(tmp_path):
    workdir = started(tmp_path)
    folder = workdir.stage("methods/one")
    for name in ("bank.bin", "checkpoints/5/state", ".half", "nan_batch_3.npz"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    workdir.mark_finished("methods/one", 1.0)
    workdir.mark_finished("methods", 1.0)
    for name in ("checkpoints/5/state", ".half", "nan_batch_3.npz"):
        (folder / name).unlink()
    again = started(tmp_path)
    for stage in ("methods/one", "methods"):
        again.check_outputs(stage)
        assert again.finished(stage)
    (folder / "bank.bin").write_text("bank.bim")
    with pytest.raises(
        UserError, match=f"{folder}/bank.bin: has changed since the stage wrote it; .* delete {folder} to"
    ):
        again.check_outputs("methods")
    (folder / "bank.bin").unlink()
    with pytest.raises(UserError, match=f"{folder}/bank.bin: is missing; restore it, or delete {folder} to"):
        again.check_outputs("methods/one")
    shutil.rmtree(folder)
    assert not again.finished("methods/one") and not again.finished("methods"), "what was deleted runs again"


# ---- the id


def test_the_id_is_the_runs_own_and_stays(tmp_path):
    ids = [Workdir(tmp_path / place / "seed 0").id for place in ("a", "b")]
    assert ids[0] != ids[1] and all(name.startswith("seed-0-") for name in ids)
    (tmp_path / "a").rename(tmp_path / "c")
    assert Workdir(tmp_path / "c" / "seed 0").id == ids[0]
    (tmp_path / "c" / "seed 0" / "run_id").write_text("../x")
    with pytest.raises(UserError, match="run_id: holds no id"):
        _ = Workdir(tmp_path / "c" / "seed 0").id


# ---- the lock

HOLD = """
import sys, time
from pjrlhf.training.workdir import Workdir
with Workdir(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        who = f"{tmp_path}: process {other.pid} on {socket.gethostname()} has been running there since 20"
        with pytest.raises(UserError, match=who), Workdir(tmp_path).locked():
            raise AssertionError("entered")
        other.send_signal(signal.SIGKILL)
        other.wait()
    refused = pytest.raises(UserError, match=f"process {os.getpid()} ")
    with Workdir(tmp_path).locked(), refused, Workdir(tmp_path).locked():
        raise AssertionError("entered")
    with Workdir(tmp_path).locked():
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "lock").read_text() == ""


@pytest.mark.parametrize("alive", [True, False])
def test_the_lock_of_another_host_counts_while_it_shows_signs_of_life(tmp_path, monkeypatch, alive):
    """Over a network, the kernel may not know of it."""
    note = {"pid": 1, "host": "elsewhere", "since": "2026-01-01", "beat": 3}
    path = tmp_path / "lock"
    path.write_text(json.dumps(note))

    def wait(seconds):
        if alive:
            path.write_text(json.dumps({**note, "beat": 4}))

    monkeypatch.setattr(module.time, "sleep", wait)
    if alive:
        with pytest.raises(UserError, match="process 1 on elsewhere"), Workdir(tmp_path).locked():
            raise AssertionError("entered")
    else:
        with Workdir(tmp_path).locked():
            assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    monkeypatch.setattr(module, "BEAT", 0.05)
    refused = pytest.raises(UserError, match=f"process {os.getpid()} ")
    with Workdir(tmp_path).locked(), refused, Workdir(tmp_path).locked():
        raise AssertionError("entered")


def test_a_folder_or_a_broken_link_in_place_of_a_file(tmp_path):
    for name, write in (("lock", lambda workdir: workdir.locked().__enter__()), ("manifest.json", Workdir._manifest)):
        path = tmp_path / name
        path.mkdir()
        with pytest.raises(UserError, match=f"{path}: cannot be (written, a folder stands|read .Is a directory)"):
            write(Workdir(tmp_path))
        path.rmdir()
        path.symlink_to(path)
        with pytest.raises(UserError, match=f"{path}: cannot be (written, a link there|read .Too many levels)"):
            write(Workdir(tmp_path))
        path.unlink()


def test_a_refused_run_leaves_nothing_behind(tmp_path):
    """What stood there before stays, and so does what a run wrote before it failed."""
    for name, before, written, left in (
        ("new", None, (), None),
        ("empty", (), (), []),
        ("in use", ("notes",), (), ["lock", "notes"]),
        ("begun", None, ("sft",), ["lock", "sft"]),
    ):
        folder = tmp_path / name
        for path in (folder, *(folder / one for one in before)) if before is not None else ():
            path.mkdir()
        workdir = Workdir(folder)
        with pytest.raises(UserError, match="no such model"), workdir.locked():
            for one in written:
                workdir.stage(one)
            raise UserError("no such model")
        assert (sorted(os.listdir(folder)) if folder.exists() else None) == left
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="no such model"), Workdir(tmp_path / "runs" / "today" / "soups").locked():
        raise UserError("no such model")
    assert (tmp_path / "runs").is_dir() and not os.listdir(tmp_path / "runs")
    with pytest.raises(UserError, match="was deleted"), Workdir(tmp_path / "gone").locked():
        shutil.rmtree(tmp_path / "gone")
        raise UserError("was deleted")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\x00"])
def test_a_lock_that_says_nothing(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    with Workdir(tmp_path).locked():
        pass


def test_a_run_inside_another_one_is_refused(tmp_path):
    """Also through a link, and while the other one is in its first stage."""
    outer = started(tmp_path / "runs" / "outer")
    refuse_inside_run(outer.path / "policy")
    outer.check_contents({})
    outer.keep()
    (tmp_path / "link").symlink_to(outer.stage("policy"))
    for finished in (False, True):
        if finished:
            outer.mark_finished("policy", 1.0)
            (outer.path / "inputs.json").unlink()
        for inside in (outer.path / "policy", outer.path / "policy" / "a" / "b", tmp_path / "link" / "x"):
            with pytest.raises(UserError, match=r"is inside the run .*/outer, .*; choose another --workdir"):
                refuse_inside_run(inside)
        refuse_inside_run(outer.path)
        refuse_inside_run(outer.path.parent / "other")


def test_the_folder_of_several_seeds_holds_runs(tmp_path):
    seeds = started(tmp_path)
    seeds.keep()
    refuse_inside_run(seeds.path / "seed1")


@pytest.mark.parametrize("manifest", ["{}", "[]", "no JSON", '{"version": 3}'])
def test_a_project_with_such_files_is_no_run(tmp_path, manifest):
    for name, content in (("config.json", "{}"), ("manifest.json", manifest)):
        (tmp_path / name).write_text(content)
    refuse_inside_run(tmp_path / "runs" / "mine")
