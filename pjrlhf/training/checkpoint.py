"""Checkpoints of a stage, on top of Orbax v1.

A checkpoint is `<folder>/<step>/` with the state and, as JSON, the data iterator's state and one checksum per array.
Orbax writes to a temporary folder and renames it when complete, so partial checkpoints are never visible. Later damage
(a truncated or altered file) is detected on restore; all processes then fall back to the same earlier checkpoint.
"""

import base64
import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import UInt32
from orbax.checkpoint import v1 as ocp

from pjrlhf.errors import UserError, reason_of
from pjrlhf.parallel.processes import on_all_processes, on_process_zero, to_host
from pjrlhf.paths import bucket_errors, is_remote
from pjrlhf.training.workdir import disk_errors, listed
from pjrlhf.types import Array, Json, Tree

log = logging.getLogger(__name__)
_absl = logging.getLogger("absl")


def _quiet(record: logging.LogRecord) -> bool:
    """Drops Orbax's error messages: each of its threads logs a traceback of an error that is raised here anyway."""
    return record.levelno < logging.ERROR or "/orbax/" not in record.pathname.replace("\\", "/")


def abstract(tree: Tree) -> Tree:
    """Shapes, dtypes and shardings of `tree`; the sharding of an uncommitted array is None."""

    def one(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if getattr(x, "committed", True) else None)

    return jax.tree.map(one, tree)


def _is_key(x: Array | jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_impl(x: jax.ShapeDtypeStruct) -> Any:
    """The PRNG implementation of an abstract key; JAX reveals it for arrays and tracers only."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), x)
    return found[0]


def _plain_abstract(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The abstract data of a PRNG key, sharded like the key; other arrays unchanged."""
    return jax.eval_shape(jax.random.key_data, x).update(sharding=x.sharding) if _is_key(x) else x


def _with_keys(x: Array, like: jax.ShapeDtypeStruct) -> Array:
    return jax.random.wrap_key_data(x, impl=_key_impl(like)) if _is_key(like) else x


@jax.jit
def checksums(tree: Tree) -> UInt32[Array, " leaves"]:
    """A checksum of the bits of each array, the same for every sharding.

    Sums hashes (the finaliser of MurmurHash3) of every machine word and its position. The sum needs no order, so each
    device hashes its shards; the positions make swapped words visible.
    """

    def one(x):
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32)
        position = jnp.uint32(0)
        for axis, size in enumerate(words.shape):
            position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        x = words + position * jnp.uint32(0x9E3779B9)
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return (x ^ (x >> 16)).sum(dtype=jnp.uint32)

    return jnp.stack([one(x) for x in jax.tree.leaves(tree)])


def _pack(value: Json) -> str:
    """JSON text of an iterator state, which may contain bytes anywhere."""
    return json.dumps(value, default=lambda x: {"__bytes__": base64.b64encode(x).decode()})


def _unpack(text: str) -> Json:
    return json.loads(text, object_hook=lambda d: base64.b64decode(d["__bytes__"]) if "__bytes__" in d else d)


class Checkpoints:
    """The checkpoints in `folder`, which may be in a bucket. A context manager that exits when everything is written.

    All processes of a run must make the same calls. The iterator state of process 0 is saved, so it must be valid on
    all processes.

    Args:
      folder: created if absent.
      max_to_keep: number of newest checkpoints to keep.
      best: metric by which to keep the best checkpoint as well: "loss" keeps the smallest, "max rewards/accuracies" the
        largest; "" keeps none.
      origin: what the states depend on, JSON values by name. It is saved, and compared in what a checkpoint has of it.

    Raises:
      UserError: the folder cannot be reached or written.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        max_to_keep: int = 2,
        best: str = "",
        origin: Mapping[str, Json] | None = None,
    ):
        self._origin = dict(origin or {})
        self.folder = epath.Path(folder) if is_remote(folder) else pathlib.Path(folder).absolute()
        self._greatest, self._metric = best.startswith("max "), best.removeprefix("max ")
        policies = ocp.training.preservation_policies
        preserved: list[Any] = [policies.LatestN(max_to_keep)]
        if best:
            # Orbax sorts by the metric and keeps the last.
            best_one = policies.BestN(
                n=1,
                get_metric_fn=lambda metrics: metrics[self._metric],
                reverse=not self._greatest,
                keep_checkpoints_without_metrics=False,
            )
            preserved.append(best_one)
        context = ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry()
        context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name="host")
        # Each process restores independently: one that finds a damaged file must not block the others.
        self._alone = ocp.Context(context)
        self._alone.multiprocessing.primary_host = jax.process_index()
        self._alone.multiprocessing.active_processes = {jax.process_index()}
        with bucket_errors(self.folder), disk_errors(self.folder):
            on_process_zero(_set_aside_unlisted)(epath.Path(self.folder))
            self._orbax = ocp.training.Checkpointer(
                os.fspath(self.folder),
                context=context,
                preservation_policy=policies.AnyPreservationPolicy(preserved),  # pyright: ignore[reportArgumentType]
                cleanup_tmp_directories=True,
            )

    def __enter__(self) -> "Checkpoints":
        _absl.addFilter(_quiet)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with self._writing():
                self._orbax.close()
        finally:
            _absl.removeFilter(_quiet)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns errors of writing into a UserError; threads of Orbax raise almost any type."""
        try:
            with disk_errors(self.folder):
                yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.folder}: the checkpoint cannot be written ({_reason(error)}); check the disk, and that nobody "
                "deleted the folder, and start the run again"
            ) from error

    def wait(self) -> None:
        """Returns when all saves are committed.

        Raises:
          UserError: the disk is full or unwritable.
        """
        with self._writing():
            self._orbax.wait()

    def steps(self) -> list[int]:
        """Steps of all checkpoints, committed or being written, ascending."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def latest(self) -> int | None:
        """The newest step, None without checkpoints."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step of the best checkpoint by the metric, None where none has it."""
        saved: list[tuple[int, Json]] = [
            (checkpoint.step, checkpoint.metrics) for checkpoint in self._orbax.checkpoints
        ]
        found = {step: float(metrics[self._metric]) for step, metrics in saved if metrics and self._metric in metrics}
        choose = max if self._greatest else min
        return choose(found, key=lambda step: found[step]) if found else None

    def save(
        self,
        step: int,
        state: Tree,
        iterator_state: Json,
        wait: bool = False,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves in the background; `state` may be donated as soon as this returns.

        Args:
          step: name of the checkpoint; an existing one of this step is replaced.
          state: pytree of arrays, including typed PRNG keys.
          iterator_state: bytes, or JSON values with bytes anywhere inside.
          wait: return only when the checkpoint is committed.
          metrics: metrics of this step, including the one that `best` names.

        Raises:
          UserError: the disk is full or unwritable (perhaps in the previous save), or the metric is missing.
        """
        plain = jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, state)
        host = {
            "iterator": _pack(iterator_state),
            "checksums": to_host(checksums(plain)).tolist(),
            "origin": self._origin,
        }
        ranked: Json = None
        if self._metric:
            metrics = metrics or {}
            if self._metric not in metrics:
                raise UserError(
                    f"keep_best: step {step} has no metric {self._metric!r}; it has {', '.join(sorted(metrics))}"
                )
            ranked = {self._metric: float(metrics[self._metric])}
        with self._writing():
            self._orbax.save_checkpointables_async(
                step, {"state": plain, "host": host}, force=True, overwrite=True, metrics=ranked
            )
        if wait:
            self.wait()

    def restore(self, template: Tree, step: int | None = None) -> tuple[Tree, Json]:
        """`(state, iterator_state)`, bit for bit. The number of devices may differ from that of the saving run.

        Args:
          template: state or `abstract(state)` with the saved structure, shapes and dtypes, and the shardings to restore
            to.
          step: the checkpoint to restore. None restores the newest one that all processes can read; damaged ones are
            reported, renamed to `<step>.damaged` and skipped.

        Raises:
          UserError: no checkpoint exists, none can be read, or it was written by a run with another config or inputs.
        """
        candidates = [step] if step is not None else self.steps()[::-1]
        if not candidates or candidates[0] not in self.steps():
            which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise UserError(f"{self.folder}: holds {which}; train this stage first")
        template = abstract(template)
        plain = jax.tree.map(_plain_abstract, template)
        damaged: dict[int, str] = {}
        for candidate in candidates:
            loaded, reason = None, "another process cannot read its part"
            try:
                host = self._host(candidate)
                position = _unpack(host["iterator"])
                self._check_origin(candidate, host.get("origin", {}))
                loaded = self._load(candidate, plain), host["checksums"], position
            except UserError:
                raise
            except Exception as error:  # a damaged file surfaces as almost any type
                reason = _reason(error)
            if on_all_processes(loaded is not None) and loaded is not None:
                state, saved, position = loaded
                if to_host(checksums(state)).tolist() == saved:
                    self._set_aside(damaged, candidate)
                    return jax.tree.map(_with_keys, state, template), position
                reason = "its contents are not what was saved"
            damaged[candidate] = reason
            loaded = state = None  # frees its arrays before the next one is loaded
        newest = self.folder / str(candidates[0])
        raise UserError(
            f"{newest}: this checkpoint cannot be read ({damaged[candidates[0]]}); if this version wrote it "
            f"with this config it is damaged: delete {newest if step is not None else self.folder} to go on without it"
        )

    def _check_origin(self, step: int, saved: Mapping[str, Json]) -> None:
        changed = [
            f"{name}: {json.dumps(saved[name])} -> {json.dumps(value)}"
            for name, value in sorted(self._origin.items())
            if name in saved and saved[name] != value
        ]
        if changed:
            raise UserError(
                f"{self.folder / str(step)}: was written by a run with another config or inputs ({listed(changed)}); "
                "undo the change, or choose another --workdir"
            )

    def _set_aside(self, damaged: Mapping[int, str], step: int) -> None:
        """Reports and renames checkpoints that cannot be read."""
        for bad, reason in damaged.items():
            path = self.folder / str(bad)
            log.warning("%s cannot be read (%s); going on from step %d", path, reason, step)
            on_process_zero(_move)(path, path.with_name(f"{bad}.damaged"))
        if damaged:
            self._orbax.reload()

    def _host(self, step: int) -> dict[str, Json]:
        """The JSON values of a checkpoint."""
        with self._alone:
            return ocp.load_checkpointables(os.fspath(self.folder / str(step)), {"host": None})["host"]

    def _load(self, step: int, template: Tree) -> Tree:
        """Arrays sharded like `template`, which is abstract and without PRNG keys."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda x: x.update(sharding=x.sharding or here), template)
        with self._alone:
            loaded = ocp.load_checkpointables(os.fspath(self.folder / str(step)), {"state": target})
        return jax.tree.map(
            lambda x, like: x if like.sharding is not None else jnp.asarray(np.asarray(x)), loaded["state"], template
        )


def _set_aside_unlisted(folder: epath.Path) -> None:
    """Renames checkpoints whose description is no JSON object: Orbax could not even list the folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        description = path / "_CHECKPOINT_METADATA"
        if not path.name.isdigit() or not description.is_file():
            continue
        with contextlib.suppress(ValueError):  # text that is no JSON at all, Orbax passes over
            if not isinstance(json.loads(description.read_text()), dict):
                log.warning("%s cannot be read (its description is damaged)", path)
                _move(path, path.with_name(f"{path.name}.damaged"))


def _move(path: epath.Path | pathlib.Path, to: epath.Path | pathlib.Path) -> None:
    """Renames a folder, in place of an earlier one."""
    with disk_errors(to):
        if to.exists():
            epath.Path(to).rmtree()
        path.rename(to)


def _reason(error: BaseException) -> str:
    """The innermost error on one line, shortened."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return reason_of(error, 300)
