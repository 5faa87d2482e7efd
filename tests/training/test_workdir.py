"""The run directory and its errors."""

import errno
import json
import os

import pytest

from pjrlhf.errors import UserError
from pjrlhf.training import workdir as module
from pjrlhf.training.workdir import Workdir, disk_errors, write_json

CONFIG = {"seed": 1, "optimizer": {"learning_rate": 0.1, "betas": (0.9, 0.99)}, "log_every": 5, "report": {"dpi": 80}}


def test_the_same_config_continues_and_ignored_keys_may_change(tmp_path):
    Workdir(tmp_path / "a/b").write_config(CONFIG)
    changed = {**CONFIG, "log_every": 9, "report": {"dpi": 120}}
    Workdir(tmp_path / "a/b").write_config(changed, ignore=("log_every", "report"))
    assert json.loads((tmp_path / "a/b/config.json").read_text())["log_every"] == 9


def test_another_config_is_refused_with_the_differences(tmp_path):
    Workdir(tmp_path).write_config(CONFIG)
    changed = {"seed": 1, "optimizer": {"learning_rate": 0.2, "betas": [0.9, 0.99]}, "log_every": 6, "new": {}}
    with pytest.raises(UserError) as error:
        Workdir(tmp_path).write_config(changed, ignore=("log_every",))
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
        Workdir(tmp_path).write_config(CONFIG)


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
