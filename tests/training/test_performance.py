"""Compilations, step times and utilisation."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import toy

from pjrlhf.training import loop, performance
from pjrlhf.training.loop import LoopSettings
from pjrlhf.training.performance import Performance, Program, RecompiledWarning, peak_flops
from pjrlhf.training.workdir import Workdir


def test_every_shape_compiles_once():
    program = Program(lambda x, n: x * n, static_argnames="n")
    for length in (3, 4, 3, 4):
        program(jnp.ones(length), n=2)
    program(jnp.ones(3), n=5)
    assert program.compiles == 3 and program.seconds > 0


def test_recompilation_for_the_same_shapes_warns():
    """The second argument has another sharding, as when a step places its result differently from its argument."""
    program = Program(lambda x: x + 1)
    program(jax.device_put(np.ones(3), jax.devices()[0]))
    with pytest.warns(RecompiledWarning, match="lambda.*compiled again for arguments of the same shapes"):
        program(jax.device_put(np.ones(3), jax.devices()[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program(jax.device_put(np.ones(4), jax.devices()[1]))


@pytest.mark.parametrize(("free", "warned"), [(10**6, True), (10**12, False), (None, False)])
def test_a_program_that_takes_more_memory_than_there_is_warns_once_it_is_compiled(free, warned, monkeypatch, caplog):
    monkeypatch.setattr(performance, "free_memory", lambda: free)
    program = Program(lambda x: jnp.sort(x @ x.T, axis=0) @ x, donate_argnums=0)
    with caplog.at_level("WARNING"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            program(jnp.ones((1000, 10)))
    assert program.compiles == 1
    assert len(caplog.messages) == warned
    if warned:
        assert (
            "lambda" in caplog.text and "0.0 GB are free" in caplog.text and "--config.model.remat=full" in caplog.text
        )


def test_free_memory_is_that_of_the_machine_or_of_its_container(tmp_path):
    assert performance.free_memory(str(tmp_path)) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:    50 kB\n")
    assert performance.free_memory(str(tmp_path)) == 50 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    for limit, wanted in (("max", 50 * 1024), ("10000", 10000 - 4000 + 1000)):
        for name, text in {"max": limit, "current": "4000", "stat": "anon 3000\ninactive_file 1000\n"}.items():
            (group / f"memory.{name}").write_text(f"{text}\n")
        assert performance.free_memory(str(tmp_path)) == wanted


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        *[
            ("TPU v5 lite", 197e12),
            ("TPU v5p", 459e12),
            ("TPU v5", 459e12),
            ("TPU v6 lite", 918e12),
            ("TPU v4", 275e12),
        ],
        *[("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("cpu", None)],
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


def test_utilisation_is_matmul_flops_over_peak(monkeypatch):
    """2 m k n FLOPs a step on 8 devices with a peak of 1,000 FLOP/s each, and a fake clock."""
    clock = iter(range(0, 10_000, 1))
    monkeypatch.setattr(performance, "peak_flops", lambda kind: 1000.0)
    monkeypatch.setattr(performance.time, "perf_counter", lambda: float(next(clock)))
    program = Program(lambda x, y: x @ y)
    account = Performance([program])  # at 0
    account.begin(10)
    program(jnp.ones((2, 3)), jnp.ones((3, 4)))
    assert program.flops == 2 * 2 * 3 * 4 and program.seconds == 1
    with account.excluded():
        pass
    row = account.row(12)
    # From `begin` to `row` 5 ticks, of which 1 compiled and 1 was excluded; 2 steps.
    assert row["perf/compiles"] == 1 and row["perf/compile_seconds"] == 1
    assert row["perf/seconds_per_step"] == 1.5
    assert row["perf/mfu"] == pytest.approx(48 / (1.5 * 8 * 1000))
    assert 0 < row["perf/goodput"] < 1


def test_a_stage_leaves_its_account(tmp_path):
    method = toy.Linear()
    loop.run(method, Workdir(tmp_path), "fit", toy.STEPS, LoopSettings(log_every=4, checkpoint_every=5))
    rows = [json.loads(line) for line in (tmp_path / "performance.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 4, 8, 12] and {row["stage"] for row in rows} == {"fit"}
    for row in rows:
        assert 0 <= row["perf/goodput"] <= 1 and row["perf/seconds_per_step"] >= 0


def test_profile(tmp_path):
    loop.run(toy.Linear(), Workdir(tmp_path), "fit", 6, LoopSettings(profile=True))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
