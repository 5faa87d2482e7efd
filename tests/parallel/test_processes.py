"""Runs of several real processes (gloo on this machine): the numbers of one process, and the loss of a process."""

import contextlib
import json
import os
import pathlib
import pickle
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from support import tiny, tiny_judge, tiny_users
from support.chat_server import ChatServer
from support.small_policies import close
from support.tiny_classifiers import gpt2_folder

from pjrlhf.algorithms.reward import SCALE
from pjrlhf.data.tokenization import RewrittenTurns
from pjrlhf.errors import UserError
from pjrlhf.models.storage import load_tree
from pjrlhf.parallel import processes

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = 4
CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from support import {module}
def get_config():
    return {module}.settings(**{changes!r})
"""
# Short, with batches that four devices can split: only agreement of the numbers matters.
# Adam divides by the gradient plus eps: with the usual 1e-8, rounding of a gradient near zero becomes a step.
SMALL = {
    "policy__rollouts": 4,
    "methods__pmorl__rollouts": 4,
    "policy__steps": 2,
    "reward__steps": 3,
    "reward__optimizer__eps": 1e-5,
    "sft__steps": 40,
    "sft__optimizer__eps": 1e-5,
}


def launch(tmp_path, workdir, count, *, devices=None, module="tiny", **changes):
    """`launch/local.sh -p count` of a tiny config, DEVICES devices in all, in a process group of its own."""
    config = tmp_path / "config.py"
    tests = ROOT / "tests"
    changes = SMALL | changes if module == "tiny" else changes
    config.write_text(CONFIG.format(tests=str(tests), module=module, changes=changes))
    command = [str(ROOT / "launch" / "local.sh"), "-p", str(count), "-d", str(devices or DEVICES // count), str(config)]
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    environment = {
        **os.environ,
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([*command, f"--workdir={workdir}"], env=environment, **pipes)


def ended(process, seconds=500):
    """(exit status, standard error) of a launch."""
    try:
        _, errors = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, errors


def run(tmp_path, name, count, **changes):
    status, errors = ended(launch(tmp_path, tmp_path / name, count, **changes))
    assert status == 0, errors[-4000:]
    return tmp_path / name


def assert_same_numbers(one, other):
    """Metrics equal to 1e-5, and the same texts: not one sampled token differs."""
    got, want = tiny.lines(other), tiny.lines(one)
    assert [(row["stage"], row["step"]) for row in got] == [(row["stage"], row["step"]) for row in want]
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[k] for k in b if k != "stage"], [b[k] for k in b if k != "stage"], 1e-5, 1e-5)
    assert (other / "comparisons/comparisons.jsonl").read_text() == (one / "comparisons/comparisons.jsonl").read_text()


def files(folder):
    """All files but those inside checkpoints, which Orbax splits by process."""
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    return {str(path) for path in found if "checkpoints" not in path.parts[:-2]}


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    """Training, sampling, checkpoints, evaluation and the report of the whole main job."""
    one, two = (run(tmp_path, str(count), count) for count in (1, 2))
    assert_same_numbers(one, two)
    banks = [load_tree(folder / "policy" / "bank.safetensors")[0] for folder in (one, two)]
    close(*banks, 1e-4)
    reports = [json.loads((folder / "report" / "summary.json").read_text()) for folder in (one, two)]
    assert reports[0]["combos"] == reports[1]["combos"]
    assert files(one) == files(two)


@pytest.mark.slow
def test_two_processes_know_people_as_one_does(tmp_path):
    """User tables are split over the processes; all of them read the reference cache, or all compute it."""
    changes = {
        "sft__optimizer__eps": 1e-5,
        "preference__optimizer__eps": 1e-5,
    }
    one, two = (run(tmp_path, str(count), count, module="tiny_users", **changes) for count in (1, 2))
    reports = [json.loads((folder / "report" / "summary.json").read_text()) for folder in (one, two)]
    for name, found in reports[0]["accuracy"].items():
        assert found["mean"] == pytest.approx(reports[1]["accuracy"][name]["mean"], abs=0.02), name
    got, want = (tiny.lines(folder, "preference/individualized") for folder in (two, one))
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] for row in want], rel=1e-4)


@pytest.mark.slow
def test_four_processes_give_the_numbers_of_one(tmp_path):
    stages = ("sft", "comparisons", "reward")
    one, four = (run(tmp_path, str(count), count, stages=stages) for count in (1, 4))
    assert_same_numbers(one, four)


@pytest.mark.slow
def test_two_processes_judge_as_one_does(tmp_path):
    """Process 0 asks the server for answers; both run the judge on their mesh."""
    server = ChatServer(lambda body: f"it holds air . {'it can burn . ' * (body['seed'] % 3)}")
    judge = tiny_judge.make(tmp_path / "judge")
    found = []
    with server.running() as url:
        for count in (1, 2):
            changes = {"path": str(judge), "base_url": url, "sft__steps": 10}
            folder = run(tmp_path, str(count), count, module="tiny_judge", **changes)
            found.append(
                [json.loads(line) for line in (folder / "comparisons/comparisons.jsonl").read_text().splitlines()]
            )
            assert len(server.bodies) == 24 * count, "one process asks"
    for a, b in zip(*found, strict=True):
        assert a.pop("preference") == pytest.approx(b.pop("preference"), abs=1e-4)
        assert a == b


@pytest.mark.slow
def test_two_processes_ask_a_classifier_on_the_mesh_together(tmp_path):
    """Beside a function, which process 0 asks alone."""
    folder = gpt2_folder(tmp_path / "classifier")
    rewards = {"P2A": {"kind": "classifier", "path": str(folder)}, "P1B": "support.toy_extensions:brevity"}
    changes = {"rewards": rewards, "stages": ("sft", "comparisons", "reward", "policy")}
    one, two = (run(tmp_path, str(count), count, **changes) for count in (1, 2))
    found = [json.loads((folder / "manifest.json").read_text())["stages"]["reward"]["models"] for folder in (one, two)]
    for name in rewards:
        assert found[0][name]["std"] > 1e-3
        close({key: found[0][name][key] for key in SCALE}, {key: found[1][name][key] for key in SCALE}, 1e-4)
    close(*(load_tree(folder / "policy" / "bank.safetensors")[0] for folder in (one, two)), 1e-4)


TOKENIZE = """
import dataclasses, hashlib, json, sys
sys.path.insert(0, {tests!r})
from support import tiny_users
from pjrlhf.data.schema import Example
from pjrlhf.data.token_table import Lengths, tokenize
from pjrlhf.data.tokenization import load_tokenizer
from pjrlhf.errors import UserError
from pjrlhf.parallel import processes

folder, coordinator, count, index = sys.argv[1:]
if int(count) > 1:
    processes.initialize("on", coordinator, int(count), int(index))
tokenizer = load_tokenizer(folder)
texts = ["it holds air .", "it can burn . " * 9, "it can burn ."]
examples = [
    Example(prompt="what is rain ? " * (i % 4 + 1), chosen=texts[i % 3], rejected="it .", where=f"line {{i}}")
    for i in range(13)
]
encoded = []
def shared(examples, encode):
    return processes.in_shares(examples, lambda own: encoded.append(len(own)) or encode(own))
limits = Lengths(prompt=20, completion=20)
table = tokenize(examples, "preference", tokenizer, limits, max_bad_fraction=0.9, shared=shared)
ids = {{name: [x.tolist() for x in rows] for name, rows in table.tokens.items()}}
found = {{"ids": ids, "rows": [e.where for e in table.examples], "bad": table.bad.items, "encoded": encoded}}
try:
    strict = dataclasses.replace(limits, prompt=15, long_prompt="error")
    tokenize(examples, "preference", tokenizer, strict, shared=shared)
except UserError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_each_process_tokenizes_its_share_and_has_the_table_of_one(tmp_path):
    base, script = tiny_users.save_base(tmp_path), tmp_path / "shares.py"
    script.write_text(TOKENIZE.format(tests=str(ROOT / "tests")))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

    def run_on(count):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        started = [
            subprocess.Popen(
                [sys.executable, str(script), str(base), coordinator, str(count), str(i)],
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
            )
            for i in range(count)
        ]
        return [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in started]

    (one,), two = run_on(1), run_on(2)
    assert one["bad"] and one["rows"] and "line 3" in one["error"]
    assert one.pop("encoded") == [13, 13]
    assert [found.pop("encoded") for found in two] == [[6, 6], [7, 7]]
    assert two == [one, one]


def test_a_mistake_in_one_share_is_everybodys(monkeypatch):
    """Three processes, one after the other: first what each would send, then what each makes of all."""
    sent = {}

    def as_process(index, items, work, others=None):
        def exchanged(data):
            sent[index] = data
            return others or [data]

        monkeypatch.setattr(processes.jax, "process_count", lambda: 3)
        monkeypatch.setattr(processes.jax, "process_index", lambda: index)
        monkeypatch.setattr(processes, "_from_all", exchanged)
        return processes.in_shares(items, work)

    def work(items):
        if 9 in items:
            raise UserError("nine is too much")
        return [RewrittenTurns() if x == 1 else 10 * x for x in items]

    for items in ([0, 1, 2, 3], [0, 1], []):
        for index in range(3):
            as_process(index, items, work)
        whole = [as_process(index, items, work, [sent[i] for i in range(3)]) for index in range(3)]
        for found in whole:
            assert [str(x) for x in found] == [str(x) for x in work(items)]
    for index in range(2):
        with contextlib.suppress(UserError):
            as_process(index, range(5, 13), work)
    for index in range(3):
        with pytest.raises(UserError, match="nine is too much"):
            as_process(index, range(5, 13), work, [sent[0], sent[1], pickle.dumps(UserError("later"))])


def test_pieces_of_what_processes_exchange_are_put_together(monkeypatch):
    monkeypatch.setattr(processes, "PIECE", 4)
    data = [b"", b"0123456789", b"abc"]

    def gathered(own):
        """As every process would have it, for the process with ten bytes."""
        if own.ndim == 0:
            return np.array([len(x) for x in data])
        start = next(i for i in range(0, 10, 4) if data[1][i : i + 4] == own.tobytes()[: len(data[1][i : i + 4])])
        rows = [np.frombuffer(x[start : start + 4].ljust(len(own), b"\0"), np.uint8) for x in data]
        assert rows[1].tobytes() == own.tobytes()
        return np.stack(rows)

    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gathered)
    assert processes._from_all(data[1]) == data


def children(process):
    """The child processes of a launch."""
    return [int(pid) for pid in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for(process, path, text, seconds=200):
    """Waits until the output file of the launch contains `text`."""
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        if path.is_file() and text in path.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"{text!r} never came; status {process.poll()}")


LONG = {"stages": ("sft",), "sft__steps": 200, "checkpoint_every": 10}


@pytest.mark.slow
def test_a_lost_process_ends_the_job_and_the_job_goes_on(tmp_path):
    undisturbed = run(tmp_path, "undisturbed", 2, **LONG)
    folder = tmp_path / "lost"
    process = launch(tmp_path, folder, 2, **LONG)
    wait_for(process, folder / "metrics.jsonl", '"step": 25,')
    os.kill(children(process)[1], signal.SIGKILL)
    killed = time.time()
    status, errors = ended(process, 60)
    assert status not in (0, 143) and time.time() - killed < 30
    assert "a process ended with status 137; stopping the others" in errors, errors[-3000:]
    last = max(int(path.name) for path in (folder / "sft" / "checkpoints").iterdir() if path.name.isdigit())
    assert last % 10 == 0 and 0 < last < 200
    status, errors = ended(launch(tmp_path, folder, 2, **LONG))
    assert status == 0, errors[-3000:]
    assert tiny.lines(folder) == tiny.lines(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("writer", [0, 1])
def test_what_one_process_cannot_read_none_uses(tmp_path, writer):
    """A truncated file of one process makes both fall back to the checkpoint before."""
    changes = {**LONG, "sft__steps": 30, "mesh__data": 1, "mesh__fsdp": -1}
    folder = run(tmp_path, "run", 2, **changes)
    metrics, model = (folder / name for name in ("metrics.jsonl", "sft/model/model.safetensors"))
    want = metrics.read_bytes(), model.read_bytes()
    checkpoints = folder / "sft" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["20", "30"]
    parts = [p for p in checkpoints.glob(f"30/state/ocdbt.process_{writer}/**/*") if p.is_file()]
    largest = max(parts, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    (folder / "manifest.json").unlink()
    status, errors = ended(launch(tmp_path, folder, 2, **changes))
    assert status == 0, errors[-3000:]
    found = re.findall(r"checkpoints/30 cannot be read \((.*)\); going on from step 20", errors)
    assert len(found) == 2 and "another process cannot read its part" in found, errors[-3000:]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["20", "30", "30.damaged"]
    assert (metrics.read_bytes(), model.read_bytes()) == want


@pytest.mark.slow
def test_all_processes_stop_after_one_step_and_another_number_goes_on(tmp_path):
    """SIGTERM to one of two, as in a preemption: both save the same step. Then a single process resumes."""
    folder = tmp_path / "stopped"
    process = launch(tmp_path, folder, 2, **LONG)
    wait_for(process, folder / "metrics.jsonl", '"step": 25,')
    os.kill(children(process)[1], signal.SIGTERM)
    status, errors = ended(process, 100)
    assert status == 143, errors[-3000:]
    found = re.findall(r"sft: stopped by SIGTERM after step (\d+) of 200, which is saved", errors)
    assert len(found) == 2 and found[0] == found[1], errors[-3000:]
    assert [path.name for path in sorted((folder / "sft" / "checkpoints").iterdir())][-1] == found[0]
    assert run(tmp_path, "stopped", 1, **LONG) == folder
    assert [row["step"] for row in tiny.lines(folder)] == list(range(1, 201))


@pytest.mark.slow
def test_a_mistake_ends_all_processes_with_one_message(tmp_path):
    started = time.time()
    status, errors = ended(launch(tmp_path, tmp_path / "mistake", 2, stages=("sft", "nonsense")))
    assert status == 2 and time.time() - started < 60
    assert "error: stages: 'nonsense' is unknown" in errors and "Traceback" not in errors, errors[-3000:]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # in the batch script itself, before srun
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, False),  # srun -n 1
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"JAX_COORDINATOR_ADDRESS": "host-0:1234"}, True),
    ],
)
def test_what_the_environment_says(environment, expected):
    assert processes.is_multiprocess(environment) is expected


def test_start_up_mistakes(monkeypatch):
    with pytest.raises(UserError, match="--distributed=maybe: unknown; choose one of auto, on, off"):
        processes.initialize("maybe")
    with pytest.raises(UserError, match=r"did not find each other .*--process_id"):
        processes.initialize("on", "127.0.0.1:1", 2, 5)
    for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert processes.initialize("off", "127.0.0.1:1", 2, 0) is None
    assert processes.initialize() is None


def test_one_process_writes_and_gets_what_it_wrote(tmp_path):
    assert processes.on_process_zero(lambda value: value + 1)(1) == 2
    assert processes.is_process_zero() and processes.broadcast_from_zero(np.ones(2)).tolist() == [1, 1]
