"""The packages of trackers themselves, on this machine alone: what they keep of two stages, one of which goes on."""

import json
import sqlite3
import struct

import pytest

from pjrlhf.training.metrics import MetricWriter
from pjrlhf.training.workdir import Workdir

pytestmark = pytest.mark.slow  # they start servers and processes

# Tables have columns that only some rows have, no number, and text that is neither Latin nor one line.
ROWS = (
    {"policy": "P1A", "prompt": "what is rain ?", "completion": "it |holds| air\n水", "rewards/P1A": 0.25},
    {"policy": "P2B", "prompt": "what is rain ?", "completion": "", "rewards/P1A": None, "advantage": -1.5},
)


@pytest.fixture
def logged(tmp_path):
    """Logs a stage that stops after two steps and goes on after the first, and another one."""

    def log(name):
        workdir = Workdir(tmp_path / "run")
        for stage, after, steps in (("policy", 0, (1, 2)), ("policy", 1, (2, 3)), ("ric/round0", 0, (1,))):
            writer = MetricWriter(workdir, stage, loggers=[name], after=after)
            for step in steps:
                writer.table(step, ROWS)
                writer.write(step, {"loss": 0.5 * step, "rewards/P1A/mean": float("nan")})
            writer.close()
        return workdir.path

    return log


def test_tensorboard(logged):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    folder = logged("tensorboard") / "tensorboard"
    found = {}
    for file in sorted(folder.rglob("events.*")):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                found[str(file.parent.relative_to(folder)), value.tag, event.step] = value
    assert {step for stage, tag, step in found if (stage, tag) == ("policy", "loss")} == {1, 2, 3}
    assert found["policy", "loss", 3].simple_value == 1.5 and ("ric/round0", "loss", 1) in found
    (text,) = found["policy", "completions/text_summary", 3].tensor.string_val
    assert "| P1A | what is rain ? | it \\|holds\\| air<br>水 | 0.25 |  |" in text.decode()


def test_wandb(logged, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "DATA_DIR": tmp_path, "CACHE_DIR": tmp_path}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    folder = logged("wandb")
    tables = [json.loads(file.read_text()) for file in folder.rglob("*.table.json")]
    columns = ["step", "policy", "prompt", "completion", "rewards/P1A", "advantage"]
    assert len(tables) == 5 and all(table["columns"] == columns for table in tables)
    assert sorted(table["data"][0][0] for table in tables) == [1, 1, 2, 2, 3]
    for table in tables:
        assert [row[1:] for row in table["data"]] == [[row.get(name) for name in columns[1:]] for row in ROWS]
    records = b"".join(file.read_bytes() for file in folder.rglob("*.wandb"))
    assert b"policy/loss" in records and b"ric/round0/loss" in records


def test_trackio(logged, monkeypatch, tmp_path):
    pytest.importorskip("pandas")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    workdir = Workdir(logged("trackio"))
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        logs = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    losses = {(name, step, json.loads(metrics).get("loss")) for name, step, metrics in logs}
    for stage, steps in (("policy", (1, 2, 3)), ("ric/round0", (1,))):
        assert {(f"{workdir.id}/{stage}", step, 0.5 * step) for step in steps} <= losses
    assert sum("completions" in json.loads(metrics) for _, _, metrics in logs) == 5
