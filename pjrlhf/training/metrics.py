"""Metrics as (sum, count) pairs, which average correctly over micro-batches and groups, and their writer.

    metrics = {"loss": (sum of losses, number of losses), "rewards/accuracies": (hits [K], comparisons [K])}

The value of a metric is sum / count. A pair of arrays [K] has one value per ingredient.
"""

import importlib
import json
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from pjrlhf.errors import UserError
from pjrlhf.parallel.processes import is_process_zero, to_host
from pjrlhf.paths import atomic_write, install
from pjrlhf.registry import Registry, callable_as
from pjrlhf.training.completions import Row, drop_after, file_of, markdown, write_rows
from pjrlhf.training.workdir import Workdir, disk_errors, end_line
from pjrlhf.types import Array, Json

Metrics: TypeAlias = Mapping[str, tuple[Array, Array]]
log = logging.getLogger(__name__)


class Logger(Protocol):
    """A further destination of the metrics of one stage.

    Its class or factory takes (workdir, stage, after), where `after` is the step from which the stage continues and
    `workdir.id` names the run, for places that several runs share. An attribute `module` of the class names a Python
    module that it needs. Where it has a method `table(step, rows)` it also gets the tables of sampled answers, whose
    rows have the columns of `training.completions`.
    """

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


LoggerFactory: TypeAlias = Callable[[Workdir, str, int], Logger]


LOGGERS: Registry[LoggerFactory] = Registry("logger", callable_as("a class or function of workdir, stage and step"))


@LOGGERS.register("tensorboard")
class TensorBoard:
    """Events in <workdir>/tensorboard/<stage>."""

    module = "tensorboardX"

    def __init__(self, workdir: Workdir, stage: str, after: int):
        folder = str(workdir.path / "tensorboard" / stage)
        self._writer = importlib.import_module(self.module).SummaryWriter(folder, purge_step=after + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def table(self, step: int, rows: Sequence[Row]) -> None:
        self._writer.add_text("completions", markdown(rows), step)

    def close(self) -> None:
        self._writer.close()


@LOGGERS.register("wandb")
class WeightsAndBiases:
    """A run of project pjrlhf with the name of the run directory, and the run's own id."""

    module = "wandb"

    def __init__(self, workdir: Workdir, stage: str, after: int):
        self.stage = stage
        self._run = importlib.import_module(self.module).init(
            project="pjrlhf", name=workdir.path.name, id=workdir.id, resume="allow", dir=str(workdir.path)
        )
        # Every stage counts its steps from 1, so each needs its own axis.
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{self.stage}/{name}": value for name, value in ({**values, "step": step}).items()})

    def table(self, step: int, rows: Sequence[Row]) -> None:
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = importlib.import_module(self.module).Table(
            columns=["step", *names], data=[[step, *(row.get(name) for name in names)] for row in rows]
        )
        self._run.log({f"{self.stage}/completions": table, f"{self.stage}/step": step})

    def close(self) -> None:
        self._run.finish()


@LOGGERS.register("trackio")
class Trackio:
    """A run of project pjrlhf for every stage, since each counts its steps from 1."""

    module = "trackio"

    def __init__(self, workdir: Workdir, stage: str, after: int):
        self._trackio = importlib.import_module(self.module)
        self._run = self._trackio.init(project="pjrlhf", name=f"{workdir.id}/{stage}", resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def table(self, step: int, rows: Sequence[Row]) -> None:
        import pandas

        table = self._trackio.Table(dataframe=pandas.DataFrame([{"step": step, **row} for row in rows]))
        self._run.log({"completions": table}, step=step)

    def close(self) -> None:
        self._run.finish()


def logger_factory(name: str) -> LoggerFactory:
    """The factory of a logger, by its name in `LOGGERS` or "package.module:logger".

    Raises:
      UserError: an unknown logger, or one whose module is not installed.
    """
    module = None
    try:
        factory = LOGGERS.get(name)
        module = getattr(factory, "module", None)
        if module:
            importlib.import_module(module)
    except UserError as error:
        raise UserError(f"loggers: {error}") from error
    except ImportError as error:
        remedy = install(name) if name in LOGGERS else "install it"
        raise UserError(f"loggers: {name!r} needs {module}, which is not installed; {remedy}") from error
    return factory


def masked(
    values: Shaped[Array, "*shape"], mask: Shaped[Array, "*#shape"], axis: int | Sequence[int] | None = None
) -> tuple[Array, Array]:
    """The pair (sum, count) of the masked mean of `values` over `axis`; `mask` broadcasts and may hold weights."""
    mask = jnp.broadcast_to(mask, values.shape).astype(jnp.float32)
    # `where`, because a masked value may be infinite.
    return (jnp.where(mask > 0, values, 0.0) * mask).sum(axis), mask.sum(axis)


def to_floats(metrics: Metrics, ingredients: Sequence[str] = ()) -> dict[str, float]:
    """Values as Python floats; pairs with count 0 are omitted.

    Args:
      metrics: pairs of scalars, or of arrays [K].
      ingredients: K names, by which a pair [K] becomes K values `name/<ingredient>`. If empty, it is pooled over K.
    """
    values: dict[str, float] = {}
    for name, pair in to_host(dict(metrics)).items():
        total, count = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in pair))
        if ingredients and total.ndim:
            named = {f"{name}/{k}": (t, c) for k, t, c in zip(ingredients, total, count, strict=True)}
        else:
            named = {name: (total.sum(), count.sum())}
        values |= {key: float(t / c) for key, (t, c) in named.items() if c != 0}
    return values


class MetricWriter:
    """Appends one JSON line per step to `<workdir>/metrics.jsonl`, and logs to optional loggers. Process 0 writes.

    Timing goes to `performance.jsonl`, so that metrics.jsonl is reproducible; sampled answers go to `completions/`.

    Args:
      loggers: names in `LOGGERS`, or "package.module:logger".
      after: the step from which the stage continues. Its later lines, and a line cut short by a crash, are dropped.

    Raises:
      UserError: an unknown logger, one that is not installed, or a disk that is full or unwritable.
    """

    def __init__(self, workdir: Workdir, stage: str, *, loggers: Collection[str] = (), after: int = 0):
        self.path = workdir.path / "metrics.jsonl"
        self.stage = stage
        factories = [logger_factory(name) for name in loggers]
        self._active = is_process_zero()
        self._loggers: list[Logger] = []
        if factories:
            _ = workdir.id  # which all processes make together
        if not self._active:
            return
        with disk_errors(self.path):
            self._drop_after(after)
            drop_after(workdir.path, stage, after)
            end_line(workdir.path / "performance.jsonl")
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the stage runs)
            self._performance = open(workdir.path / "performance.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._loggers = [factory(workdir, stage, after) for factory in factories]

    def _drop_after(self, after: int) -> None:
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        kept, damaged = [], 0
        for line in lines:
            try:
                row = json.loads(line)
                stage, step = row["stage"], int(row["step"])
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                damaged += 1
                continue
            if stage != self.stage or step <= after:
                kept.append(line)
        if damaged:
            log.warning("%s: dropped %d damaged lines, perhaps cut short by a crash", self.path, damaged)
        if kept != lines:
            with atomic_write(self.path) as file:
                file.write_bytes(b"".join(line + b"\n" for line in kept))

    def write(self, step: int, values: Mapping[str, float], performance: Mapping[str, float] | None = None) -> None:
        """Writes one line per file. NaN and infinity become null, because JSON has neither."""
        if not self._active:
            return
        with disk_errors(self.path):
            for file, numbers in ((self._file, values), (self._performance, performance or {})):
                if numbers:
                    row: dict[str, Json] = {"stage": self.stage, "step": step}
                    row |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
                    file.write(json.dumps(row) + "\n")
                    file.flush()
        for logger in self._loggers:
            logger.write(step, {**values, **(performance or {})})

    def table(self, step: int, rows: Sequence[Row]) -> None:
        """Writes a table of sampled answers to <workdir>/completions/<stage>-<step>.parquet, and to the loggers."""
        if not self._active or not rows:
            return
        path = file_of(self.path.parent, self.stage, step)
        with disk_errors(path):
            write_rows(path, step, rows)
        for logger in self._loggers:
            if table := getattr(logger, "table", None):
                table(step, rows)

    def close(self) -> None:
        if self._active:
            with disk_errors(self.path):
                self._file.close()
                self._performance.close()
        for logger in self._loggers:
            logger.close()
