"""Where the time of a run goes (steps, compilation, saving), and how near the devices come to their peak."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from pjrlhf.parallel.roofline import CHIPS, product_cost

# Part of a device's kind -> bf16 FLOP/s without sparsity, from the vendors' data sheets.
PEAKS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6": CHIPS["v6e"].flops,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


# How many programs this process has compiled, or found in the compilation cache.
_compiled = [0]


def _listen(event: str, duration: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled[0] += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


def peak_flops(kind: str) -> float | None:
    """bf16 FLOP/s of a device of this kind; None where we do not know it, as of CPUs."""
    return next((peak for name, peak in PEAKS.items() if name in kind), None)


class RecompiledWarning(UserWarning):
    """A program was compiled again for arguments like those it had been compiled for: time lost at every such call."""


class Program:
    """A jitted step that keeps account of what it compiles.

    Args:
      step: what to compile.
      turns: how often a loop of no fixed length (sampling) runs at most, to count FLOPs.
      options: of `jax.jit`.

    Attributes:
      compiles: programs made so far, one for each shape of the arguments; `seconds` that took.
      flops: of the matrix products of the program called last, on all devices, rematerialised ones included; 0 where
        the peak of these devices is not known.
    """

    def __init__(self, step: Callable[..., Any], *, turns: int = 1, **options: Any):
        self._jitted = jax.jit(step, **options)
        self._turns, self._flops = turns, {}
        self.name = getattr(step, "__qualname__", repr(step))
        self.compiles, self.seconds, self.flops = 0, 0.0, 0.0
        self._counts = peak_flops(jax.devices()[0].device_kind) is not None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        before, started = _compiled[0], time.perf_counter()
        # Before the call, which may take the arguments' memory.
        traced = self._jitted.trace(*arguments, **keywords) if self._counts and not self.compiles else None
        result = self._jitted(*arguments, **keywords)
        if _compiled[0] > before:
            self.compiles += 1
            self.seconds += time.perf_counter() - started
            leaves, tree = jax.tree.flatten((arguments, keywords))
            like = tree, tuple((getattr(x, "shape", x), str(getattr(x, "dtype", ""))) for x in leaves)
            if like in self._flops:
                warnings.warn(
                    f"{self.name}: compiled again for arguments of the same shapes; they live elsewhere, or are of "
                    "another kind, than before",
                    RecompiledWarning,
                    stacklevel=2,
                )
            self._flops[like] = product_cost(traced.jaxpr.jaxpr, self._turns).flops if traced else self.flops
            self.flops = self._flops[like]
        return result


class Performance:
    """The account of one stage, from when it is made.

    Args:
      programs: what the steps run; a list that may still grow.
    """

    def __init__(self, programs: Sequence[Program] = ()):
        self.programs = programs
        self._started = self._last = time.perf_counter()
        self._aside = self._last_aside = 0.0
        self._compiled = self._last_compiled = self._compile_seconds()
        self._last_step = 0
        self._peak = peak_flops(jax.devices()[0].device_kind)

    def _compile_seconds(self) -> float:
        return sum(program.seconds for program in self.programs)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside is no training: starting, saving, evaluating."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._aside += time.perf_counter() - started

    def begin(self, step: int) -> None:
        """The first step to be counted comes after `step`."""
        self._last_step, self._last, self._last_aside = step, time.perf_counter(), self._aside
        self._last_compiled = self._compile_seconds()

    def row(self, step: int) -> dict[str, float]:
        """Since the last row: "perf/seconds_per_step", without compilation and what was aside; "perf/mfu", the FLOPs of
        the step's matrix products / (seconds x devices x peak bf16 FLOP/s), where the peak is known. Since the start:
        "perf/goodput", the share of the wall time that went into steps, "perf/compiles" and "perf/compile_seconds".
        """
        now, compiled = time.perf_counter(), self._compile_seconds()
        spent = now - self._last - (compiled - self._last_compiled) - (self._aside - self._last_aside)
        per_step = max(spent, 0.0) / max(step - self._last_step, 1)
        wall = now - self._started
        values = {
            "perf/seconds_per_step": per_step,
            "perf/goodput": max(wall - (compiled - self._compiled) - self._aside, 0.0) / wall,
            "perf/compiles": float(sum(program.compiles for program in self.programs)),
            "perf/compile_seconds": compiled - self._compiled,
        }
        flops = max((program.flops for program in self.programs), default=0.0)
        if self._peak and flops and per_step:
            values["perf/mfu"] = flops / (per_step * jax.device_count() * self._peak)
        self._last, self._last_step, self._last_aside, self._last_compiled = now, step, self._aside, compiled
        return values
