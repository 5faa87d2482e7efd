"""The device mesh, and the partition rules that all stages use to shard arrays over it.

Mesh axes: `data` replicates parameters, `fsdp` splits them and gathers them where they are used, `tensor` splits the
matmuls of a layer. Batch rows and rows of user tables are split over data x fsdp.
"""

import collections
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pjrlhf.errors import UserError
from pjrlhf.parallel.processes import to_devices
from pjrlhf.types import Device, Tree

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
Axis: TypeAlias = str | tuple[str, ...] | None

# (pattern on the "/"-joined path, partition spec of the last axes of the leaf). The first match counts; a leaf without
# a match is replicated. Leading axes (layers, adapters) are never split. A tuple splits an axis over several mesh axes.
RULES: tuple[tuple[str, tuple[Axis, ...]], ...] = (
    (r"embed/embedding$", ("tensor", "fsdp")),
    (r"position/embedding$", (None, "fsdp")),
    (r"(query|key|value|gate|up|head)/kernel$", ("fsdp", "tensor")),
    (r"(output|down)/kernel$", ("tensor", "fsdp")),
    (r"(query|key|value|gate|up|head)/(bias|scale)$", ("tensor",)),
    # In 4 bits: whole blocks of inputs, and their scales.
    (r"(query|key|value|gate|up)/codes$", ("fsdp", None, "tensor")),
    (r"(output|down)/codes$", ("tensor", None, "fsdp")),
    (r"(query|key|value|gate|up)/absmax$", ("fsdp", "tensor")),
    (r"(output|down)/absmax$", ("tensor", "fsdp")),
    (r"(query|key|value|gate|up)/a$", ("fsdp", None)),
    (r"(query|key|value|gate|up)/b$", (None, "tensor")),
    (r"(output|down)/a$", ("tensor", None)),
    (r"(output|down)/b$", (None, "fsdp")),
    # Tables of user models, with their row-wise moments and counts. A step reads only the rows of its batch: gathering
    # them is an all-reduce of that many rows for any number of devices, and each device writes the rows it owns. So
    # tables are split over data too, which replicates layers.
    (r"table/(rows/(mu|nu)/)?offset$", (BATCH_AXES, None, None)),
    (r"table/(rows/(mu|nu)/)?weights$", (BATCH_AXES, None)),
    (r"table/rows/count$", (BATCH_AXES,)),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Device] | None = None) -> Mesh:
    """A mesh over `devices`, by default all.

    Args:
      sizes: mesh axis -> size, 1 where absent; one size may be -1 for the remaining devices.

    Raises:
      UserError: unknown axis, more than one -1, or sizes that do not multiply to the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise UserError(f"mesh: unknown axis {sorted(unknown)[0]!r}; the axes are {', '.join(AXES)}")
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if shape.count(-1) > 1:
        raise UserError(f"mesh: more than one axis is -1 in {dict(sizes)}; give all sizes but one")
    if -1 in shape:
        known = -math.prod(shape)
        shape[shape.index(-1)] = count // known if known > 0 and count % known == 0 else 0
    if min(shape) < 1 or math.prod(shape) != count:
        raise UserError(f"mesh: {dict(sizes)} does not fit {count} devices; the sizes must multiply to {count}")
    # `jax.make_mesh` does not allow an axis that splits a physical axis of the torus, such as 4 of 16x16.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _axis_size(mesh: Mesh | AbstractMesh, axis: Axis) -> int:
    """Number of shards along `axis`."""
    return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis or ()))


def num_shards(sharding: NamedSharding) -> int:
    """Number of shards along axis 0 of an array with this sharding."""
    return _axis_size(sharding.mesh, sharding.spec[0])


def round_up_rows(mesh: Mesh, count: int) -> int:
    """The smallest number of rows >= `count` that divides evenly over data x fsdp."""
    return count + -count % _axis_size(mesh, BATCH_AXES)


def leaf_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of the parameter or optimizer moment at `path`; an axis that does not divide evenly is not split."""
    for pattern, last in RULES:
        if re.search(pattern, path) and len(shape) >= len(last):
            spec = [None] * (len(shape) - len(last)) + [
                axis if size % _axis_size(mesh, axis) == 0 else None
                for axis, size in zip(last, shape[-len(last) :], strict=True)
            ]
            return NamedSharding(mesh, P(*spec))
    return NamedSharding(mesh, P())


def shardings(mesh: Mesh, tree: Tree) -> Tree:
    """The shardings of all leaves of `tree` by `RULES`; leaves need only a shape."""

    def of(path, leaf):
        return leaf_sharding(mesh, jax.tree_util.keystr(path, simple=True, separator="/"), np.shape(leaf))

    return jax.tree_util.tree_map_with_path(of, tree)


def shard_params(mesh: Mesh, tree: Tree) -> Tree:
    """Places parameters, adapter banks, heads or a whole training state on devices by `RULES`.

    Also on one device: a step would be compiled twice if its result were placed differently from its argument.
    """
    return jax.tree.map(to_devices, tree, shardings(mesh, tree))


def bytes_per_device(tree: Tree) -> int:
    """Bytes that the arrays of `tree` take on the device of this process that holds the most."""
    held: collections.Counter[Device] = collections.Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values(), default=0)


def sharded(mesh: Mesh, make: Callable[..., Tree], *arguments: Tree, donate: tuple[int, ...] = ()) -> Tree:
    """`make(*arguments)`, jitted with its result sharded by `RULES`: no device ever holds more than its shards.

    `donate` lists the positions of arguments whose buffers the result may reuse.
    """
    out_shardings = shardings(mesh, jax.eval_shape(make, *arguments))
    return jax.jit(make, out_shardings=out_shardings, donate_argnums=donate)(*arguments)


def constrain_state(mesh: Mesh, tree: Tree) -> Tree:
    """Inside `jax.jit`: constrains the leaves of `tree` to `RULES`.

    A step that constrains its output to the shardings of its input can donate the input, and is not compiled again
    when it gets its own output.
    """
    return tree if mesh.size == 1 else jax.lax.with_sharding_constraint(tree, shardings(mesh, tree))


def batch_sharding(mesh: Mesh, rows: int = 0) -> NamedSharding:
    """Splits axis 0 over data x fsdp.

    Raises:
      UserError: `rows`, where given, cannot be split evenly.
    """
    count = _axis_size(mesh, BATCH_AXES)
    if rows % count:
        raise UserError(
            f"batch of {rows} rows: cannot be split over data x fsdp = {count} devices; make it a multiple of {count}"
        )
    return NamedSharding(mesh, P(BATCH_AXES))


def shard_batch(mesh: Mesh, batch: Tree) -> Tree:
    """Splits axis 0 of every array over data x fsdp. All processes pass the same batch, and each places its rows.

    Raises:
      UserError: the rows cannot be split evenly.
    """
    if mesh.size == 1:
        return batch
    return jax.tree.map(lambda x: to_devices(x, batch_sharding(mesh, x.shape[0])), batch)
