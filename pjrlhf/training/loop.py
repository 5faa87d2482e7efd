"""The one training loop. It does not know which method runs: a method supplies `init`, `batches` and `step`."""

import contextlib
import math
import pathlib
import signal
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from pjrlhf.errors import UserError
from pjrlhf.parallel.processes import is_process_zero, to_host
from pjrlhf.training.checkpoint import Checkpoints, abstract
from pjrlhf.training.metrics import Metrics, MetricWriter, to_floats
from pjrlhf.training.performance import Performance, Program
from pjrlhf.training.progress import progress
from pjrlhf.training.state import State
from pjrlhf.training.workdir import Workdir, disk_errors


class Batches(Protocol):
    """An endless iterator whose position can be saved: JSON values or bytes, the same on every process."""

    def __next__(self) -> Any: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Method(Protocol):
    """What a stage hands to `run`."""

    batches: Batches

    def init(self) -> State:
        """The state before the first step, placed on the devices where it shall live."""

    def step(self, state: State, batch: Any) -> tuple[State, Metrics]:
        """One step; adds 1 to `state.step`, and may donate `state`. Returns without waiting for the device."""


class Interrupted(SystemExit):
    """SIGTERM or SIGINT came and a checkpoint was saved. Exit code 143 or 130; `str()` says how to go on."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.code = 128 + number


class _Stop:
    """Catches the first SIGTERM or SIGINT; the second one acts as usual.

    With several processes all must stop after the same step: JAX's preemption service, which itself listens for
    SIGTERM, chooses it.
    """

    number: int | None = None

    def __enter__(self) -> "_Stop":
        self._old: dict[int, Any] = {}
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._catch) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _frame: Any) -> None:
        self.number = number
        self.__exit__()

    def after(self, step: int) -> int | None:
        """The signal that says to stop after `step`, if any. Every process asks once per step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.number = signal.SIGTERM
        return self.number


def run(
    method: Method,
    workdir: Workdir,
    stage: str,
    *,
    steps: int,
    checkpoints: str = "",
    checkpoint_every: int = 0,
    max_to_keep: int = 2,
    keep_best: str = "",
    log_every: int = 1,
    eval_every: int = 0,
    on_eval: Callable[[State, int], Mapping[str, float] | None] | None = None,
    on_start: Callable[[State], None] | None = None,
    ingredients: Sequence[str] = (),
    show: Sequence[str] = ("loss",),
    watch: Collection[str] = ("loss", "grad_norm"),
    loggers: Collection[str] = (),
    programs: Sequence[Program] = (),
    profile: bool = False,
) -> State:
    """Trains `stage` up to `steps` steps, from its last checkpoint where there is one, and returns the final state.

    Step N is dispatched before the metrics of step N - 1 are fetched, so the device never waits for the host. The last
    step always ends in a committed checkpoint. An interrupted run, started again, gives the same numbers bit for bit.

    Args:
      method: see `Method`.
      stage: name of the folder in `workdir` and of the stage in metrics.jsonl.
      checkpoints: where they go, each stage into a folder of its name; <workdir>/<stage>/checkpoints by default.
      checkpoint_every, log_every, eval_every: in steps; 0 means never. Besides, the first and last step are logged.
      max_to_keep: how many of the newest checkpoints stay, beside the best one by `keep_best`, see `Checkpoints`.
      on_eval: called as `on_eval(state, step)`; the values it returns join the metrics of that step.
      on_start: called with the state, new or restored, before the first step.
      ingredients: K names for [K] metrics.
      show: metrics on the progress bar.
      watch: metrics (`name` or anything under `name/`) that must be finite.
      loggers: see `MetricWriter`.
      programs: what the steps run, whose compilations performance.jsonl counts.
      profile: record steps 3 to 5 after the start for XProf, in <workdir>/profile.

    Raises:
      UserError: a watched metric is NaN or infinite (the batch is saved beside the checkpoints), the data ended early,
        no checkpoint is readable, or the disk is full or unwritable.
      Interrupted: SIGTERM or SIGINT came; the step was finished and saved.
    """
    folder, performance = workdir.stage(stage), Performance(programs)
    fetched_always = {*show, *watch}

    def settle(step: int, metrics: Metrics, batch: Any) -> dict[str, float]:
        """Waits for a step's metrics, checks and shows them; returns those to be written."""
        due = step in (1, steps) or (log_every and step % log_every == 0)
        if not (due or keep_best):
            metrics = {name: pair for name, pair in metrics.items() if _under(name, fetched_always)}
        metrics = to_host(dict(metrics))
        values = to_floats(metrics, ingredients)
        bad = {name: value for name, value in values.items() if _under(name, watch) and not math.isfinite(value)}
        if bad:
            path = _save_batch(folder / f"nan_batch_{step}.npz", batch)
            found = ", ".join(f"{name} is {value}" for name, value in bad.items())
            raise UserError(
                f"{stage}: {found} at step {step}; its batch is in {path}; lower the learning rate or mend the data, "
                "and start again in another --workdir"
            )
        pooled = to_floats(metrics)
        bar.update(step, pooled)
        measured.clear()
        measured.update(pooled | values)
        return values if due else {}

    measured: dict[str, float] = {}  # what the step settled last is ranked by
    place = f"{checkpoints.rstrip('/')}/{stage}" if checkpoints else folder / "checkpoints"
    with Checkpoints(place, max_to_keep, keep_best) as saved:
        with performance.aside():
            state = method.init()
            done = saved.latest() or 0
            if done:
                template, state = abstract(state), None  # frees the initial arrays before the saved ones come in
                state, position = saved.restore(template)
                method.batches.set_state(position)
                done = int(state.step)
        if done >= steps:
            return state
        if on_start is not None:
            on_start(state)

        writer = MetricWriter(workdir, stage, loggers=loggers, after=done)
        with contextlib.closing(writer), progress(stage, steps, show, start=done) as bar, _Stop() as stop:
            pending, first = None, done + 1
            performance.begin(done)
            while done < steps:
                if profile and done + 1 == first + 2:
                    jax.profiler.start_trace(workdir.path / "profile")
                try:
                    batch = next(method.batches)
                except StopIteration:
                    raise UserError(f"{stage}: the data ended at step {done} of {steps}; ask for fewer steps") from None
                state, metrics = method.step(state, batch)
                done += 1
                if pending and (row := settle(*pending)):
                    writer.write(pending[0], row, performance.row(pending[0]))
                pending = (done, metrics, batch)
                if profile and done in (first + 4, steps) and done >= first + 2:
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                    profile = False

                stopped_by = stop.after(done)
                evaluate = on_eval is not None and eval_every and done % eval_every == 0
                save = stopped_by or done == steps or (checkpoint_every and done % checkpoint_every == 0)
                if not (evaluate or save):
                    continue
                # Nothing is evaluated or saved before this step's metrics are known to be finite.
                row = settle(*pending)
                pending = None
                if evaluate:
                    with performance.aside():
                        row |= on_eval(state, done) or {}
                    measured.update(row)
                if row:
                    writer.write(done, row, performance.row(done))
                if save:
                    if int(state.step) != done:
                        raise RuntimeError(f"{stage}: state.step is {int(state.step)} after {done} steps")
                    last = bool(stopped_by) or done == steps
                    with performance.aside():
                        saved.save(done, state, method.batches.get_state(), last, measured)
                if stopped_by:
                    name = signal.Signals(stopped_by).name
                    raise Interrupted(
                        f"{stage}: stopped by {name} after step {done} of {steps}, which is saved; "
                        f"the same command with --workdir={workdir.path} goes on from there",
                        stopped_by,
                    )
    return state


def _under(name: str, parents: Collection[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}/") for parent in parents)


def _save_batch(path: pathlib.Path, batch: Any) -> pathlib.Path:
    """Writes a batch as .npz with flattened paths as names; bfloat16 becomes float32."""

    def plain(x):
        if isinstance(x, jax.Array):
            x = to_host(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        x = np.asarray(x)
        return x.astype(np.float32) if x.dtype == jax.numpy.bfloat16 else x.astype(str) if x.dtype == object else x

    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    arrays = {jax.tree_util.keystr(keys, simple=True, separator="/") or "batch": plain(x) for keys, x in leaves}
    if is_process_zero():
        with disk_errors(path):
            np.savez(path, **arrays)
    return path
