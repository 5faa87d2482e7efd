"""Checkpoints of a stage: Orbax v1 behind one small class.

A checkpoint is `<folder>/<step>/` with the state and, as JSON, the data iterator's state and one checksum per array.
Orbax writes into a temporary folder and renames it when complete, so a half-written checkpoint is never seen. What was
committed and damaged later (a truncated or altered file) is found on restore, and the checkpoint before it is used, by
all processes or by none.
"""

import base64
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from pjrlhf.errors import UserError
from pjrlhf.parallel.processes import everywhere, on_process_zero, to_host
from pjrlhf.paths import bucket_errors, is_remote
from pjrlhf.training.workdir import disk_errors

log = logging.getLogger(__name__)
_absl = logging.getLogger("absl")


def _quiet(record: logging.LogRecord) -> bool:
    """Drops Orbax's errors: each of its threads logs a full traceback of what is then raised here anyway."""
    return record.levelno < logging.ERROR or "/orbax/" not in record.pathname.replace("\\", "/")


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and placement of `tree`, without values; an array not committed to a device has sharding None."""

    def one(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if getattr(x, "committed", True) else None)

    return jax.tree.map(one, tree)


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_impl(x: jax.ShapeDtypeStruct) -> Any:
    """Which generator an abstract PRNG key belongs to: JAX tells it of arrays and tracers only."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), x)
    return found[0]


def _plain_abstract(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The data of an abstract PRNG key, placed like the key; other arrays as they are."""
    return jax.eval_shape(jax.random.key_data, x).update(sharding=x.sharding) if _is_key(x) else x


def _with_keys(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.random.wrap_key_data(x, impl=_key_impl(like)) if _is_key(like) else x


def _checksums(tree: Any) -> jax.Array:
    """uint32 [leaves]: the sum of each array's bits as machine words, the same for every sharding."""

    def one(x):
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
        return words.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jnp.stack([one(x) for x in jax.tree.leaves(tree)])


_checksums_jit = jax.jit(_checksums)


def _pack(value: Any) -> str:
    """JSON text of an iterator state; bytes anywhere inside it survive."""
    return json.dumps(value, default=lambda x: {"__bytes__": base64.b64encode(x).decode()})


def _unpack(text: str) -> Any:
    return json.loads(text, object_hook=lambda d: base64.b64decode(d["__bytes__"]) if "__bytes__" in d else d)


class Checkpoints:
    """The checkpoints in `folder`, of which the `max_to_keep` newest stay, and the best one if `best` says by which
    metric: "loss" for the least, "max rewards/accuracies" for the greatest. A context manager: it exits when all is
    written. The folder may be in a bucket.

    All processes of a run must make the same calls. With several processes the iterator state kept is that of process
    0, so it must be a position that means the same on all of them.
    """

    def __init__(self, folder: str | os.PathLike, max_to_keep: int = 2, best: str = ""):
        self.folder = epath.Path(folder) if is_remote(folder) else pathlib.Path(folder).absolute()
        self._greatest, self._metric = best.startswith("max "), best.removeprefix("max ")
        policies = ocp.training.preservation_policies
        preserved = [policies.LatestN(max_to_keep)]
        if best:
            # Sorted by it, the last of them stay.
            order = {"get_metric_fn": lambda metrics: metrics[self._metric], "reverse": not self._greatest}
            preserved.append(policies.BestN(n=1, keep_checkpoints_without_metrics=False, **order))
        context = ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry()
        context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name="host")
        # Each process reads for itself: one that meets a damaged file does not leave the others waiting for it.
        self._alone = ocp.Context(context)
        self._alone.multiprocessing.primary_host = jax.process_index()
        self._alone.multiprocessing.active_processes = {jax.process_index()}
        with bucket_errors(self.folder), disk_errors(self.folder):
            self._orbax = ocp.training.Checkpointer(
                self.folder,
                context=context,
                preservation_policy=policies.AnyPreservationPolicy(preserved),
                cleanup_tmp_directories=True,
            )

    def __enter__(self) -> "Checkpoints":
        _absl.addFilter(_quiet)
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            with disk_errors(self.folder):
                self._orbax.close()
        finally:
            _absl.removeFilter(_quiet)

    def wait(self) -> None:
        """Returns when everything saved is committed. Raises UserError where the disk is full or unwritable."""
        with disk_errors(self.folder):
            self._orbax.wait()

    def steps(self) -> list[int]:
        """Steps of the checkpoints committed or being written, ascending."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def latest(self) -> int | None:
        """The newest of `steps`."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step of the best checkpoint by the metric, None where none was saved with it."""
        found = {
            checkpoint.step: checkpoint.metrics[self._metric]
            for checkpoint in self._orbax.checkpoints
            if checkpoint.metrics and self._metric in checkpoint.metrics
        }
        choose = max if self._greatest else min
        return choose(found, key=found.get) if found else None

    def save(
        self,
        step: int,
        state: Any,
        iterator_state: Any,
        wait: bool = False,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves in the background; `state` may be donated as soon as this returns.

        Args:
          step: name of the checkpoint; an existing one of that name is replaced.
          state: pytree of arrays, typed PRNG keys included.
          iterator_state: bytes, or JSON values with bytes anywhere inside.
          wait: return only when the checkpoint is committed.
          metrics: of this step, among them the one to be best by.

        Raises:
          UserError: the disk is full or unwritable (also for the save before this one), or that metric is missing.
        """
        plain = jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, state)
        host = {"iterator": _pack(iterator_state), "checksums": to_host(_checksums_jit(plain)).tolist()}
        ranked = None
        if self._metric:
            if self._metric not in (metrics or {}):
                raise UserError(
                    f"keep_best: step {step} has no metric {self._metric!r}; it has {', '.join(sorted(metrics or {}))}"
                )
            ranked = {self._metric: float(metrics[self._metric])}
        with disk_errors(self.folder):
            self._orbax.save_checkpointables_async(
                step, {"state": plain, "host": host}, force=True, overwrite=True, metrics=ranked
            )
        if wait:
            self.wait()

    def restore(self, template: Any, step: int | None = None) -> tuple[Any, Any]:
        """`(state, iterator_state)`, bit for bit, placed as `template` says; the number of devices may have changed.

        Args:
          template: state or `abstract(state)` with the saved structure, shapes and dtypes.
          step: which checkpoint. None takes the newest one that is readable: a damaged one is reported, renamed to
            `<step>.damaged`, and passed over. What one process cannot read, none uses.

        Raises:
          UserError: there is no checkpoint, or none that can be read.
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
                loaded = self._load(candidate, plain)
            except Exception as error:  # a damaged file surfaces as almost any type
                reason = _reason(error)
            if everywhere(loaded is not None):
                state, host = loaded
                if to_host(_checksums_jit(state)).tolist() == host["checksums"]:
                    self._pass_over(damaged, candidate)
                    return jax.tree.map(_with_keys, state, template), _unpack(host["iterator"])
                reason = "its contents are not what was saved"
            damaged[candidate] = reason
            loaded = state = None  # before the next one comes in
        newest = self.folder / str(candidates[0])
        raise UserError(
            f"{newest}: this checkpoint cannot be read ({damaged[candidates[0]]}); if this version wrote it "
            f"with this config it is damaged: delete {newest if step is not None else self.folder} to go on without it"
        )

    def _pass_over(self, damaged: Mapping[int, str], step: int) -> None:
        """Reports checkpoints that cannot be read and puts them aside."""
        for bad, reason in damaged.items():
            path = self.folder / str(bad)
            log.warning("%s cannot be read (%s); going on from step %d", path, reason, step)
            on_process_zero(path.rename)(path.with_name(f"{bad}.damaged"))
        if damaged:
            self._orbax.reload()

    def _load(self, step: int, template: Any) -> tuple[Any, Any]:
        """Plain arrays where `template` (abstract, without PRNG keys) says, and what was saved beside them."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda x: x.update(sharding=x.sharding or here), template)
        with self._alone:
            loaded = ocp.load_checkpointables(self.folder / str(step), {"state": target, "host": None})
        state = jax.tree.map(
            lambda x, like: x if like.sharding is not None else jnp.asarray(np.asarray(x)), loaded["state"], template
        )
        return state, loaded["host"]


def _reason(error: BaseException) -> str:
    """The innermost error on one line, shortened."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return " ".join(str(error).split())[:300] or type(error).__name__
