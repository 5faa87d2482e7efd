"""The training loop of all methods; a method supplies `init`, `batches` and `step`."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import signal
import threading
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from pjrlhf.errors import UserError, ending_signals
from pjrlhf.parallel.processes import is_process_zero, to_host
from pjrlhf.settings import Settings, setting
from pjrlhf.training.checkpoint import Checkpoints, abstract
from pjrlhf.training.completions import Row, print_rows
from pjrlhf.training.divergence import Divergence
from pjrlhf.training.metrics import LOGGERS, Metrics, MetricWriter, logger_factory, to_floats
from pjrlhf.training.performance import Performance, Program
from pjrlhf.training.progress import progress
from pjrlhf.training.state import State
from pjrlhf.training.workdir import Workdir, disk_errors
from pjrlhf.types import Json, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings(Settings):
    """How a stage is trained, whatever it trains."""

    checkpoints: str = setting(
        "",
        "where checkpoints go if not into the run directory: a folder or gs://, s3://; every run has its own below it",
        path=True,
    )
    checkpoint_every: int = setting(100, "steps; 0 saves the last step alone", low=0)
    max_to_keep: int = setting(2, "how many of the newest checkpoints stay", low=1, high=10**6)
    keep_best: str = setting(
        "", 'the best checkpoint stays too: "loss" by the least, "max rewards/accuracies" by the greatest value'
    )
    log_every: int = setting(5, "steps; 0 logs the first and the last step alone", low=0)
    eval_every: int = setting(0, "steps between evaluations on held-out data; 0 is never", low=0)
    log_completions: int = setting(
        0,
        "steps between tables: answers of the model in training, with rewards or margins; 0 is never",
        low=0,
    )
    completion_prompts: int = setting(
        16, "held-out prompts or pairs of a table, where a step samples nothing itself", low=1, high=2**20
    )
    num_completions_to_print: int = setting(8, "answers of a table that are printed; 0 for none", low=0, high=2**20)
    loggers: tuple[str, ...] = setting((), "beside metrics.jsonl", choices=lambda: tuple(LOGGERS), extensible=True)
    profile: bool = setting(False, "a trace of steps 3 to 5 of every stage, for XProf")

    def check(self) -> None:
        for logger in self.loggers:
            logger_factory(logger)


class Batches(Protocol):
    """An endless iterator with a checkpointable position: JSON values or bytes, the same on every process."""

    def __next__(self) -> Tree: ...

    def get_state(self) -> Json: ...

    def set_state(self, state: Json) -> None: ...


class Method:
    """What a stage hands to `run`: `init`, `step` and `batches`, and what to show of its metrics.

    Attributes:
      ingredients: K names for [K] metrics.
      show: metrics on the progress bar.
      watch: metrics (`name` or anything under `name/`) that must be finite.
      programs: what the steps run, whose compilations performance.jsonl counts.
      rates: setting, such as optimizer.learning_rate -> learning rate, to name where training diverges.
    """

    batches: Batches
    ingredients: Sequence[str] = ()
    show: Sequence[str] = ("loss",)
    watch: Collection[str] = ("loss", "grad_norm")
    programs: Sequence[Program] = ()
    rates: Mapping[str, float] = types.MappingProxyType({})

    def init(self) -> State:
        """The state before the first step, with its final shardings."""
        raise NotImplementedError

    def step(self, state: State, batch: Tree) -> tuple[State, Metrics]:
        """One update, dispatched asynchronously; adds 1 to `state.step` and may donate `state`."""
        raise NotImplementedError

    def step_with_rows(self, state: State, batch: Tree) -> tuple[State, Metrics, Callable[[], Sequence[Row]]]:
        """The same update, and what makes a table for it before the next one: of what was sampled for the update, or by
        default `rows`. All processes must call it.
        """
        state, metrics = self.step(state, batch)
        return state, metrics, functools.partial(self.rows, state)

    def rows(self, state: State) -> Sequence[Row]:
        """A table of held-out data, of the same data each time; empty by default."""
        return ()

    def evaluate(self, state: State) -> Mapping[str, float]:
        """Values on held-out data, logged as eval/<name> every `eval_every` steps; none by default."""
        return {}


class Interrupted(SystemExit):
    """Raised after a signal once a checkpoint is saved. Exit code 128 + its number; `str()` says how to resume."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.code = 128 + number


class _Stop:
    """Catches the first SIGTERM, SIGINT or SIGHUP; the second one has its usual effect.

    Several processes must stop after the same step, which JAX's preemption service chooses; it handles SIGTERM itself.
    """

    number: int | None = None

    def __enter__(self) -> "_Stop":
        self._old: dict[int, Any] = {}
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._catch) for number in ending_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _frame: types.FrameType | None) -> None:
        self.number = number
        self.__exit__()

    def after(self, step: int) -> int | None:
        """The signal to stop for after `step`, None to continue. Every process must call it once per step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.number = signal.SIGTERM
        return self.number


def run(
    method: Method,
    workdir: Workdir,
    stage: str,
    steps: int,
    settings: LoopSettings = LoopSettings(),
    on_start: Callable[[State], None] | None = None,
) -> State:
    """Trains `stage` up to `steps` steps, resuming from its last checkpoint, and returns the final state.

    Step N is dispatched before the metrics of step N - 1 are fetched, so the device never waits for the host. The last
    step always commits a checkpoint. An interrupted and resumed run gives the same numbers bit for bit.

    Args:
      method: what to train; see `Method`.
      stage: name of the folder in `workdir` and of the stage in metrics.jsonl.
      on_start: called with the state, new or restored, before the first step.

    Raises:
      UserError: a watched metric is NaN or infinite (the batch is saved beside the checkpoints), the data ended early,
        no checkpoint is readable, the last one is of a run with another config or inputs, or the disk is full or
        unwritable.
      Interrupted: SIGTERM, SIGINT or SIGHUP was received; the current step was completed and saved.
    """
    checkpoint_every, max_to_keep, keep_best = settings.checkpoint_every, settings.max_to_keep, settings.keep_best
    log_completions = settings.log_completions
    log_every, eval_every, profile = settings.log_every, settings.eval_every, settings.profile
    ingredients, show, watch, checkpoints = method.ingredients, method.show, method.watch, settings.checkpoints
    on_eval = method.evaluate if eval_every else None
    folder, performance = workdir.stage(stage), Performance(method.programs)
    fetched_always = {*show, *watch}

    def settle(step: int, metrics: Metrics, batch: Tree) -> dict[str, float]:
        """Fetches a step's metrics, checks and displays them; returns those to write, {} where none are due."""
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
        divergence.update(step, pooled)
        measured.clear()
        measured.update(pooled | values)
        return values if due else {}

    divergence = Divergence(stage, method.rates)
    measured: dict[str, float] = {}  # latest metrics, by which `keep_best` ranks a checkpoint
    place = f"{checkpoints.rstrip('/')}/{workdir.id}/{stage}" if checkpoints else folder / "checkpoints"
    with Checkpoints(place, max_to_keep, keep_best, workdir.origin(stage)) as saved:
        with performance.excluded():
            state = method.init()
            done = saved.latest() or 0
            if done:
                template, state = abstract(state), None  # frees the initial arrays before loading
                state, position = saved.restore(template)
                method.batches.set_state(position)
                done = int(state.step)
        if done >= steps:
            return state
        if on_start is not None:
            on_start(state)

        writer = MetricWriter(workdir, stage, loggers=settings.loggers, after=done)
        bar = progress(stage, steps, show, start=done, patience=0.0, note="compiling")
        with contextlib.closing(writer), bar, _Stop() as stop:
            pending, first = None, done + 1
            performance.begin(done)
            while done < steps:
                if profile and done + 1 == first + 2:
                    jax.profiler.start_trace(workdir.path / "profile")
                try:
                    batch = next(method.batches)
                except StopIteration:
                    raise UserError(f"{stage}: the data ended at step {done} of {steps}; ask for fewer steps") from None
                table: Callable[[], Sequence[Row]] | None = None
                if log_completions and (done + 1) % log_completions == 0:
                    state, metrics, table = method.step_with_rows(state, batch)
                else:
                    state, metrics = method.step(state, batch)
                done += 1
                if table:
                    jax.block_until_ready(state)  # the step itself counts
                    with performance.excluded():
                        rows = table()
                        if rows and is_process_zero():
                            bar.hide()
                            print_rows(stage, done, rows, settings.num_completions_to_print)
                            writer.table(done, rows)
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
                # Check that this step's metrics are finite before evaluating or saving.
                row = settle(*pending)
                pending = None
                if evaluate and on_eval is not None:
                    with performance.excluded():
                        row |= {f"eval/{name}": value for name, value in on_eval(state).items()}
                    measured.update(row)
                if row:
                    writer.write(done, row, performance.row(done))
                if save:
                    if int(state.step) != done:
                        raise RuntimeError(f"{stage}: state.step is {int(state.step)} after {done} steps")
                    last = bool(stopped_by) or done == steps
                    with performance.excluded():
                        workdir.keep()
                        saved.save(done, state, method.batches.get_state(), last, measured)
                if stopped_by:
                    break
    # Also a signal that came after the last step was counted, for example while it was saved.
    if stop.number:
        name = signal.Signals(stop.number).name
        raise Interrupted(
            f"{stage}: stopped by {name} after step {done} of {steps}, which is saved; "
            f"the same command with --workdir={workdir.path} goes on from there",
            stop.number,
        )
    return state


def _under(name: str, parents: Collection[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}/") for parent in parents)


def _save_batch(path: pathlib.Path, batch: Tree) -> pathlib.Path:
    """Saves a batch as .npz, leaves named by their paths; bfloat16 becomes float32."""

    def plain(x):
        if isinstance(x, jax.Array):
            x = to_host(jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        x = np.asarray(x)
        return x.astype(np.float32) if x.dtype == jax.numpy.bfloat16 else x.astype(str) if x.dtype == object else x

    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    arrays = {jax.tree_util.keystr(keys, simple=True, separator="/") or "batch": plain(x) for keys, x in leaves}
    if is_process_zero():
        with disk_errors(path):
            np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    return path
