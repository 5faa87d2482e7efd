"""The loop: exact resume, signals, NaN, and the files of the run directory."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from support.toy import STEPS, Linear

from pjrlhf.errors import UserError
from pjrlhf.training import loop
from pjrlhf.training.loop import LoopSettings
from pjrlhf.training.workdir import Workdir

TOY = pathlib.Path(__file__).parents[1] / "support" / "toy.py"


def train(folder, method=None, steps=STEPS, **settings):
    settings = LoopSettings(**{"checkpoint_every": 5, "log_every": 1, **settings})
    return loop.run(method or Linear(), Workdir(folder), "fit", steps, settings)


def lines(folder):
    return [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]


def bits(state):
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), state.replace(rng=jax.random.key_data(state.rng)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (final state as bytes, metric lines)."""
    folder = tmp_path_factory.mktemp("whole")
    return bits(train(folder)), lines(folder)


class Stopping(Linear):
    """Sends a signal to this process during step `at`."""

    def __init__(self, at, number):
        super().__init__()
        self.at, self.number = at, number

    def step(self, state, batch):
        if int(state.step) + 1 == self.at:
            os.kill(os.getpid(), self.number)
        return super().step(state, batch)


class Crashing(Linear):
    """Raises in step `at`."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def step(self, state, batch):
        if int(state.step) + 1 == self.at:
            raise RuntimeError("crash")
        return super().step(state, batch)


def test_checkpoints_elsewhere(tmp_path, whole):
    """A stage resumes from the given folder and keeps no checkpoint in the run directory."""
    there = str(tmp_path / "there")
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path / "run", Crashing(8), checkpoints=there)
    place = tmp_path / "there" / Workdir(tmp_path / "run").id / "fit"
    assert [path.name for path in place.iterdir()] == ["5"]
    assert bits(train(tmp_path / "run", checkpoints=there)) == whole[0]
    assert lines(tmp_path / "run") == whole[1]
    assert not (tmp_path / "run" / "fit" / "checkpoints").exists()


def test_runs_that_keep_checkpoints_in_one_folder_do_not_meet(tmp_path, whole):
    there = str(tmp_path / "there")
    for name in ("a/seed0", "b/seed0", "a/seed1"):
        assert bits(train(tmp_path / name, checkpoints=there)) == whole[0]
        assert lines(tmp_path / name) == whole[1], "it trained"


def test_checkpoints_of_another_config_or_input_are_refused_by_name(tmp_path):
    def started(seed, data="1"):
        workdir = Workdir(tmp_path)
        workdir.check_config(
            {"seed": seed, "log_every": seed, "methods": {"a": {"x": seed}, "b": 1}}, ("log_every", "methods")
        )
        workdir.check_contents({"data": {"path": "p", "hash": data}})
        return workdir

    def run(workdir, stage="fit", method=None):
        return loop.run(method or Linear(), workdir, stage, STEPS, LoopSettings(checkpoint_every=5))

    for stage in ("fit", "methods/a", "methods/b"):
        with pytest.raises(RuntimeError):
            run(started(0), stage, Crashing(8))
    (tmp_path / "config.json").unlink()
    (tmp_path / "inputs.json").unlink()
    for workdir, message in ((started(1), "seed: 0 -> 1"), (started(0, "2"), 'contents of data: "1" -> "2"')):
        with pytest.raises(UserError, match=f"fit/checkpoints/5: was written by .*{message}.*; undo the change"):
            run(workdir)
    # What may change may change, but for the settings of the entry itself.
    free = started(0)
    free.check_config({"seed": 0, "log_every": 7, "methods": {"a": {"x": 1}, "b": 1}}, ("log_every", "methods"))
    run(free)
    run(free, "methods/b")
    with pytest.raises(UserError, match=r"methods.a.x: 0 -> 1"):
        run(free, "methods/a")


@pytest.mark.parametrize("checkpoint_every", [10, 5])  # nothing is being written, or perhaps a checkpoint is
def test_a_run_directory_that_is_deleted_while_training(tmp_path, checkpoint_every):
    class Deleting(Linear):
        def step(self, state, batch):
            if int(state.step) == 7:
                (tmp_path / "run").rename(tmp_path / "gone")  # at once, also while a checkpoint is being written
            return super().step(state, batch)

    with pytest.raises(UserError, match=f"{tmp_path}/run.*: .*deleted .*; start the run again|and start the run again"):
        workdir = Workdir(tmp_path / "run")
        workdir.check_config({"seed": 0})  # as every run does: a writer may make the folder again, but not this file
        loop.run(Deleting(), workdir, "fit", STEPS, LoopSettings(checkpoint_every=checkpoint_every))
    assert checkpoint_every == 5 or not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_and_saves_the_step_and_the_rerun_is_bit_equal(tmp_path, whole, number, code):
    before = signal.getsignal(number)
    with pytest.raises(loop.Interrupted, match=f"step 7 of {STEPS}.*{tmp_path}") as stopped:
        train(tmp_path, Stopping(7, number))
    assert stopped.value.code == code
    assert signal.getsignal(number) is before
    assert (tmp_path / "fit/checkpoints/7").is_dir()
    state = train(tmp_path)
    assert (bits(state), lines(tmp_path)) == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_the_last_step_is_saved_stops_the_run(tmp_path, whole, number, code, monkeypatch):
    """It came after the last look at the signals, and the next stage once began."""
    save = loop.Checkpoints.save

    def signalled(self, step, *arguments):
        if step == STEPS:
            os.kill(os.getpid(), number)
        save(self, step, *arguments)

    monkeypatch.setattr(loop.Checkpoints, "save", signalled)
    with pytest.raises(loop.Interrupted, match=f"after step {STEPS} of {STEPS}, which is saved") as stopped:
        train(tmp_path)
    assert stopped.value.code == code
    monkeypatch.undo()
    assert (bits(train(tmp_path)), lines(tmp_path)) == whole


def test_a_crash_goes_back_to_the_last_checkpoint_without_duplicate_lines(tmp_path, whole):
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path, Crashing(9))
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, 8))  # step 8 was never settled
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "other", "step": 9}\n{"stage": "fit", "st')
    state = train(tmp_path)
    assert bits(state) == whole[0]
    assert [row for row in lines(tmp_path) if row["stage"] == "fit"] == whole[1]
    assert {"stage": "other", "step": 9} in lines(tmp_path)


def start(folder, *arguments):
    """The toy run in a subprocess."""
    env = {**os.environ, "PYTHONPATH": str(TOY.parents[2])}
    return subprocess.Popen(
        [sys.executable, str(TOY), str(folder), *arguments], env=env, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_killed_in_the_middle_of_saving_again_and_again(tmp_path, whole):
    """A checkpoint after every step, and SIGKILL as soon as a new one appears, complete or not."""
    checkpoints, kills = tmp_path / "fit" / "checkpoints", 0
    while kills < 4:
        process = start(tmp_path, "0.0", "1")
        before = set(os.listdir(checkpoints)) if checkpoints.is_dir() else set()
        while process.poll() is None:
            if checkpoints.is_dir() and len(set(os.listdir(checkpoints)) - before) > 1:
                process.kill()
                kills += 1
                break
        process.communicate()
        if process.returncode == 0:
            break  # finished before the kill
    assert kills, "nothing was killed"
    assert bits(train(tmp_path)) == whole[0]
    assert lines(tmp_path) == whole[1]


@pytest.mark.slow
def test_files_that_cannot_grow(tmp_path, whole):
    """A file size limit acts like a full disk and is lifted later."""
    process = start(tmp_path, "0.0", "5", "700")
    _, errors = process.communicate(timeout=120)
    assert process.returncode not in (0, 143), errors
    assert bits(train(tmp_path)) == whole[0]
    assert lines(tmp_path) == whole[1]


def test_sigterm_to_a_process(tmp_path, whole):
    process = start(tmp_path, "0.3")
    deadline = time.monotonic() + 60
    while not (tmp_path / "metrics.jsonl").exists() or len(lines(tmp_path)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    saved = [int(path.name) for path in (tmp_path / "fit/checkpoints").iterdir()]
    assert saved and max(saved) == lines(tmp_path)[-1]["step"] < STEPS
    state = train(tmp_path)
    assert (bits(state), lines(tmp_path)) == whole


def test_a_finished_stage_returns_its_state_without_a_step(tmp_path, whole):
    train(tmp_path)
    assert bits(train(tmp_path, Crashing(1))) == whole[0]


@pytest.mark.parametrize("step", [6, STEPS])
def test_nan_stops_with_the_batch_saved_and_no_checkpoint_after_it(tmp_path, step):
    method = Linear(poison=step - 1)
    path = tmp_path / f"fit/nan_batch_{step}.npz"
    with pytest.raises(UserError, match=f"fit: loss is nan at step {step}; its batch is in {path}"):
        train(tmp_path, method, checkpoint_every=6)
    saved = np.load(path)
    assert saved["x"].shape == (4, 4) and np.isnan(saved["y"]).all()
    assert not (tmp_path / f"fit/checkpoints/{step}").exists()


def test_evaluation_joins_the_line_of_its_step(tmp_path):
    seen = []

    class Evaluated(Linear):
        def evaluate(self, state):
            seen.append(int(state.step))
            return {"held": 0.5}

    train(tmp_path, Evaluated(), log_every=4, eval_every=3)
    assert seen == [3, 6, 9, 12]
    assert [row["step"] for row in lines(tmp_path)] == [1, 3, 4, 6, 8, 9, 12]
    assert lines(tmp_path)[-1].keys() == {"stage", "step", "loss", "mean", "eval/held"}


def test_step_n_is_dispatched_before_the_metrics_of_the_step_before_are_fetched(tmp_path, monkeypatch):
    events = []

    class Recording(Linear):
        def step(self, state, batch):
            events.append("dispatch")
            return super().step(state, batch)

    fetch = loop.to_host
    monkeypatch.setattr(loop, "to_host", lambda x: events.append("fetch") or fetch(x))
    monkeypatch.setattr(loop, "to_floats", lambda metrics, ingredients=(): {"loss": 1.0})
    train(tmp_path, Recording(), steps=4, checkpoint_every=0)
    assert events == ["dispatch", *["dispatch", "fetch"] * 3, "fetch"]


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("orbax.checkpoint.v1.training.Checkpointer.save_checkpointables_async", full)
    with pytest.raises(UserError, match="fit/checkpoints: cannot be written, the disk is full"):
        train(tmp_path)


def test_data_that_ends_early_is_reported(tmp_path):
    method = Linear()
    method.batches = iter([next(method.batches)])
    with pytest.raises(UserError, match=f"data ended at step 1 of {STEPS}"):
        train(tmp_path, method)
