"""Accounting of a run's time (steps, compilation, saving) and of its model FLOPs utilisation (MFU)."""

import contextlib
import pathlib
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import logging

from pjrlhf.parallel.roofline import CHIPS, matmul_cost
from pjrlhf.types import Tree

# Substring of a device kind -> peak bf16 FLOP/s without sparsity, from the vendors' data sheets.
PEAKS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6": CHIPS["v6e"].flops,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


# What makes a step fit into memory.
SMALLER = (
    "lower its batch_size or rollouts, raise its accumulation_steps, shorten texts with --config.data.max_prompt and "
    "--config.data.max_completion, or recompute activations with --config.model.remat=full"
)


# Number of programs that this process has compiled or loaded from the compilation cache.
_compiled = [0]


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled[0] += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


def peak_flops(kind: str) -> float | None:
    """Peak bf16 FLOP/s of a device kind; None where it is unknown, as for CPUs."""
    return next((peak for name, peak in PEAKS.items() if name in kind), None)


def free_memory(root: str = "/") -> int | None:
    """Bytes that this machine, or the container of this process, can still give; None where the system does not say.

    Args:
      root: of the file system.
    """
    found = {}
    for name in ("proc/meminfo", *(f"sys/fs/cgroup/memory.{name}" for name in ("max", "current", "stat"))):
        with contextlib.suppress(OSError):
            found[name.rpartition(".")[2]] = (pathlib.Path(root) / name).read_text()
    limits = []
    if available := re.search(r"MemAvailable: *(\d+) kB", found.get("proc/meminfo", "")):
        limits.append(1024 * int(available[1]))
    if found.get("max", "").strip().isdecimal() and "current" in found:
        cached = re.search(r"^inactive_file (\d+)", found.get("stat", ""), re.MULTILINE)  # can be given back
        limits.append(int(found["max"]) - int(found["current"]) + int(cached[1] if cached else 0))
    return min(limits, default=None)


class RecompiledWarning(UserWarning):
    """A program was compiled again for arguments of the same shapes and dtypes, which wastes time."""


class Program:
    """`jax.jit` of a step that counts compilations, their time, and the FLOPs of the step.

    Args:
      step: the function to compile.
      trip_count: maximum trip count of loops without a static length (sampling), for counting FLOPs.
      options: of `jax.jit`.

    Attributes:
      compiles: number of compilations so far, one for each shape of the arguments.
      seconds: time these took.
      flops: FLOPs of the matmuls of the last call, on all devices, rematerialisation included; 0 where the peak of the
        devices is unknown.
    """

    def __init__(self, step: Callable[..., Tree], *, trip_count: int = 1, **options: Any):
        self._jitted = jax.jit(step, **options)
        self._trip_count, self._flops = trip_count, {}
        self.name = getattr(step, "__qualname__", repr(step))
        self.compiles, self.seconds, self.flops = 0, 0.0, 0.0
        self._counts = peak_flops(jax.devices()[0].device_kind) is not None

    def __call__(self, *arguments: Tree, **keywords: Tree) -> Tree:
        before, started = _compiled[0], time.perf_counter()
        # Traced before the call, which may donate the arguments.
        traced = self._jitted.trace(*arguments, **keywords) if self._counts and not self.compiles else None
        result = self._jitted(*arguments, **keywords)
        if _compiled[0] > before:
            self.compiles += 1
            self.seconds += time.perf_counter() - started
            leaves, tree = jax.tree.flatten((arguments, keywords))
            like = tree, tuple((getattr(x, "shape", x), str(getattr(x, "dtype", ""))) for x in leaves)
            if like in self._flops:
                warnings.warn(
                    f"{self.name}: compiled again for arguments of the same shapes; their sharding or kind "
                    "differs from before",
                    RecompiledWarning,
                    stacklevel=2,
                )
            if jax.default_backend() == "cpu":
                self._check_memory(arguments, keywords)
            self._flops[like] = matmul_cost(traced.jaxpr.jaxpr, self._trip_count).flops if traced else self.flops
            self.flops = self._flops[like]
        return result

    def _check_memory(self, arguments: tuple[Tree, ...], keywords: dict[str, Tree]) -> None:
        """Warns of a program that takes more memory than there is: the system would end the process without a word.
        (An accelerator raises an error.) What was just compiled is not compiled again here.
        """
        memory = self._jitted.trace(*arguments, **keywords).lower().compile().memory_analysis()
        free = free_memory()
        if memory is None or free is None:
            return
        needed = jax.local_device_count() * (memory.temp_size_in_bytes + memory.output_size_in_bytes)
        if needed > free:
            logging.warning(
                "%s takes %.1f GB of memory, and %.1f GB are free, so the system may end this process; %s",
                *(self.name, needed / 1e9, free / 1e9, SMALLER),
            )


class Performance:
    """Time accounting of one stage, starting at construction.

    Args:
      programs: the programs that steps run; the list may still grow.
    """

    def __init__(self, programs: Sequence[Program] = ()):
        self.programs = programs
        self._started = self._last = time.perf_counter()
        self._excluded = self._last_excluded = 0.0
        self._compiled = self._last_compiled = self._compile_seconds()
        self._last_step = 0
        self._peak = peak_flops(jax.devices()[0].device_kind)

    def _compile_seconds(self) -> float:
        return sum(program.seconds for program in self.programs)

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Excludes the time of the block from step times and goodput: starting, saving, evaluating."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._excluded += time.perf_counter() - started

    def begin(self, step: int) -> None:
        """Starts counting steps after `step`."""
        self._last_step, self._last, self._last_excluded = step, time.perf_counter(), self._excluded
        self._last_compiled = self._compile_seconds()

    def row(self, step: int) -> dict[str, float]:
        """Metrics after `step`.

        Returns:
          Since the last row: "perf/seconds_per_step", without compilation and excluded time, and where the peak is
          known "perf/mfu", FLOPs of the step's matmuls / (seconds x devices x peak bf16 FLOP/s). Since the start:
          "perf/goodput", the fraction of wall time spent in steps, "perf/compiles" and "perf/compile_seconds".
        """
        now, compiled = time.perf_counter(), self._compile_seconds()
        spent = now - self._last - (compiled - self._last_compiled) - (self._excluded - self._last_excluded)
        per_step = max(spent, 0.0) / max(step - self._last_step, 1)
        wall = now - self._started
        values = {
            "perf/seconds_per_step": per_step,
            "perf/goodput": max(wall - (compiled - self._compiled) - self._excluded, 0.0) / wall,
            "perf/compiles": float(sum(program.compiles for program in self.programs)),
            "perf/compile_seconds": compiled - self._compiled,
        }
        flops = max((program.flops for program in self.programs), default=0.0)
        if self._peak and flops and per_step:
            values["perf/mfu"] = flops / (per_step * jax.device_count() * self._peak)
        self._last, self._last_step, self._last_excluded, self._last_compiled = now, step, self._excluded, compiled
        return values
