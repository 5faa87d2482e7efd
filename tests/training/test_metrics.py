"""Averages over micro-batches, and the metric files."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.errors import UserError
from pjrlhf.training.loop import LoopSettings
from pjrlhf.training.metrics import MetricWriter, masked, to_floats
from pjrlhf.training.workdir import Workdir


def rows(workdir):
    return [json.loads(line) for line in (workdir.path / "metrics.jsonl").read_text().splitlines()]


def test_micro_batches_of_unequal_mask_equal_the_whole_batch():
    values = jax.random.normal(jax.random.key(0), (6, 5, 2))
    mask = jnp.arange(5)[None, :, None] < jnp.array([5, 1, 0, 2, 4, 3])[:, None, None]

    def metrics(values, mask):
        return {"all": masked(values, mask), "each": masked(values, mask, axis=(0, 1))}

    _, stacked = jax.lax.scan(
        lambda _, x: (None, metrics(*x)), None, (values.reshape(3, 2, 5, 2), mask.reshape(3, 2, 5, 1))
    )
    micro, whole = (
        to_floats(jax.tree.map(lambda x: x.sum(0), stacked), ["x", "y"]),
        to_floats(metrics(values, mask), ["x", "y"]),
    )
    picked = np.asarray(values)[np.asarray(mask)[..., 0]]
    assert whole["each/y"] == pytest.approx(picked[:, 1].mean(), rel=1e-5)
    assert whole["all"] == pytest.approx(picked.mean(), rel=1e-5)
    assert micro == pytest.approx(whole, rel=1e-5)


def test_a_masked_infinity_does_not_count():
    total, count = masked(jnp.array([1.0, jnp.inf]), jnp.array([True, False]))
    assert (float(total), float(count)) == (1.0, 1.0)


def test_names_pooling_and_empty_pairs():
    metrics = {
        "loss": (jnp.array([2.0, 9.0]), jnp.array([1.0, 3.0])),
        "kl": (jnp.array([2.0, 4.0]), jnp.array(2.0)),
        "none": (jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0])),
        "lr": (jnp.array(0.5), jnp.array(1.0)),
    }
    assert to_floats(metrics, ["a", "b"]) == {
        "loss/a": 2.0,
        "loss/b": 3.0,
        "kl/a": 1.0,
        "kl/b": 2.0,
        "none/b": 1.0,
        "lr": 0.5,
    }
    assert to_floats(metrics) == {"loss": 2.75, "kl": 1.5, "none": 1.0, "lr": 0.5}
    with pytest.raises(ValueError):
        to_floats(metrics, ["a", "b", "c"])


def test_reopening_drops_the_later_lines_of_that_stage_only(tmp_path):
    workdir = Workdir(tmp_path)
    for stage in ("one", "two"):
        writer = MetricWriter(workdir, stage)
        for step in (1, 2, 3):
            writer.write(step, {"loss": float("nan") if step == 1 else 1.0})
        writer.close()
    MetricWriter(workdir, "one", after=2).close()
    assert [(row["stage"], row["step"]) for row in rows(workdir)] == [
        ("one", 1),
        ("one", 2),
        ("two", 1),
        ("two", 2),
        ("two", 3),
    ]
    assert rows(workdir)[0]["loss"] is None
    MetricWriter(workdir, "two").close()
    assert len(rows(workdir)) == 2


@pytest.mark.parametrize(
    "line",
    [b"3", b"null", b"[]", b"{}", b'{"stage": "two"}', b'{"stage": "two", "step": "x"}', b"\xff\x00", b"[" * 10**5],
)
def test_a_damaged_line_is_dropped_with_a_warning(tmp_path, caplog, line):
    good = b'{"stage": "two", "step": 1, "loss": 0.5}'
    (tmp_path / "metrics.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    (tmp_path / "performance.jsonl").write_bytes(b'{"stage": "two", "st')
    writer = MetricWriter(Workdir(tmp_path), "one")
    writer.write(1, {"loss": 1.0}, {"perf/goodput": 1.0})
    writer.close()
    assert [row["stage"] for row in rows(Workdir(tmp_path))] == ["two", "two", "one"]
    assert "metrics.jsonl: dropped 1 damaged lines" in caplog.text
    assert json.loads((tmp_path / "performance.jsonl").read_text().splitlines()[-1])["stage"] == "one"


def test_two_run_directories_of_one_name_are_two_runs_of_a_tracker(tmp_path, monkeypatch):
    made = []

    class Run:
        def define_metric(self, name, step_metric):
            pass

        def finish(self):
            pass

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **given: made.append(given) or Run()))
    for place, stage in (("a", "one"), ("b", "one"), ("a", "two")):
        MetricWriter(Workdir(tmp_path / place / "seed0"), stage, loggers=["wandb"]).close()
    ids = [given["id"] for given in made]
    assert ids[0] == ids[2] != ids[1], "the stages of a run are one run"
    assert {given["name"] for given in made} == {"seed0"} and all(given["resume"] == "allow" for given in made)


def test_missing_and_unknown_loggers_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="'wandb' needs wandb, which is not installed; pip install"):
        MetricWriter(Workdir(tmp_path), "s", loggers=["wandb"])
    with pytest.raises(UserError, match="loggers: logger 'mlflow': unknown; choose one of tensorboard, wandb, tr"):
        MetricWriter(Workdir(tmp_path), "s", loggers=["mlflow"])


def test_loggers_receive_the_values(tmp_path, monkeypatch):
    calls = []

    class Summary:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, *scalar):
            calls.append(scalar)

        def close(self):
            calls.append("closed")

    class Run:
        def define_metric(self, name, step_metric):
            calls.append((name, step_metric))

        def log(self, values):
            calls.append(values)

        def finish(self):
            calls.append("finished")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Summary))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: Run()))
    writer = MetricWriter(Workdir(tmp_path), "s", loggers=["tensorboard", "wandb"], after=4)
    writer.write(5, {"loss": 0.5})
    writer.close()
    assert calls == [
        (str(tmp_path / "tensorboard/s"), 5),
        ("s/*", "s/step"),
        ("loss", 0.5, 5),
        {"s/loss": 0.5, "s/step": 5},
        "closed",
        "finished",
    ]


def test_a_logger_of_other_code(tmp_path, monkeypatch):
    calls = []

    class Toy:
        def __init__(self, workdir, stage, after):
            calls.append((workdir.path, stage, after))

        def write(self, step, values):
            calls.append((step, values))

        def close(self):
            calls.append("closed")

    module = types.ModuleType("toy_loggers")
    module.Toy, module.number = Toy, 3
    monkeypatch.setitem(sys.modules, "toy_loggers", module)
    settings = LoopSettings(loggers=("toy_loggers:Toy",))
    writer = MetricWriter(Workdir(tmp_path), "s", loggers=settings.loggers, after=4)
    writer.write(5, {"loss": 0.5}, {"perf/goodput": 1.0})
    writer.close()
    assert calls == [(tmp_path, "s", 4), (5, {"loss": 0.5, "perf/goodput": 1.0}), "closed"]
    with pytest.raises(UserError, match="loggers: logger 'toy_loggers:number': is not a class or function"):
        LoopSettings(loggers=("toy_loggers:number",))
