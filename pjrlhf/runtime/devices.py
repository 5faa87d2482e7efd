"""The mesh of a run, and the arrays and programs on it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from pjrlhf.parallel.mesh import constrain_state, make_mesh, round_up_rows, shard_batch, shard_params, sharded
from pjrlhf.paths import user_cache
from pjrlhf.settings import Settings, setting
from pjrlhf.training.performance import Program
from pjrlhf.training.state import State
from pjrlhf.types import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings(Settings):
    """Number of devices along every axis of the mesh; -1 uses all that are left."""

    data: int = setting(-1, "replicas of the model", low=-1)
    fsdp: int = setting(1, "shards of the parameters, which also split the rows of a batch", low=-1)
    tensor: int = setting(1, "shards of every layer", low=-1)


def compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that later runs start fast. A folder that
    `jax_compilation_cache_dir` names stays.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Devices:
    """The mesh, and the programs that run on it.

    Args:
      settings: sizes of the mesh.
      trip_count: iterations of a sampling loop at most (tokens), for counts of FLOPs.

    Raises:
      UserError: the sizes do not match the number of devices.
    """

    def __init__(self, settings: MeshSettings, trip_count: int):
        self.mesh = self.make_mesh(settings)
        self.trip_count = trip_count

    def make_mesh(self, settings: MeshSettings) -> jax.sharding.Mesh:
        """The mesh of all devices."""
        return make_mesh(settings.to_dict())

    def create(self, make: Callable[..., Any], *arguments: Tree, donate: tuple[int, ...] = ()) -> Any:
        """`make(*arguments)`, sharded by the partition rules; see `parallel.mesh.sharded`."""
        return sharded(self.mesh, make, *arguments, donate=donate)

    def place(self, batch: Tree) -> Any:
        """A batch with rows split over the devices; see `parallel.mesh.shard_batch`."""
        return shard_batch(self.mesh, batch)

    def shard(self, tree: Tree) -> Any:
        """Parameters sharded by the partition rules."""
        return shard_params(self.mesh, tree)

    def even(self, rows: int) -> int:
        """The smallest number of rows, at least `rows`, that splits evenly over the devices."""
        return round_up_rows(self.mesh, rows)

    def training_step(self, step: Callable[..., Any], **options: Any) -> Program:
        """A program of `step`, (state, ...) -> (state, metrics), that donates the state."""

        @functools.wraps(step)
        def in_place(state: State, *arguments: Tree, **keywords: Tree) -> tuple[State, Any]:
            state, metrics = step(state, *arguments, **keywords)
            return constrain_state(self.mesh, state), metrics

        return self.program(in_place, donate_argnums=0, **options)

    def program(self, step: Callable[..., Any], **options: Any) -> Program:
        """A program of `step`, compiled at its first call; `options` are those of `jax.jit`."""
        return Program(step, trip_count=self.trip_count, **options)
