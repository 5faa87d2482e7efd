"""The device mesh and where arrays live on it: the one list of rules that every stage uses.

Axes: `data` (copies of the model, rows split), `fsdp` (rows split and parameters split), `tensor` (parameters split
within a layer). Rows of a batch are split over data x fsdp, and so are those of user tables.
"""

import collections
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pjrlhf.errors import UserError
from pjrlhf.parallel.processes import to_devices

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
Axis = str | tuple[str, ...] | None

# (pattern on the "/"-joined path, spec of the last axes of the leaf); the first match counts, no match is
# replicated. Leading axes (layers, adapters) are never split. A tuple splits one axis over several of the mesh.
RULES: tuple[tuple[str, tuple[Axis, ...]], ...] = (
    (r"embed/embedding$", ("tensor", "fsdp")),
    (r"position/embedding$", (None, "fsdp")),
    (r"(query|key|value|gate|up|head)/kernel$", ("fsdp", "tensor")),
    (r"(output|down)/kernel$", ("tensor", "fsdp")),
    (r"(query|key|value|gate|up|head)/(bias|scale)$", ("tensor",)),
    (r"(query|key|value|gate|up)/a$", ("fsdp", None)),
    (r"(query|key|value|gate|up)/b$", (None, "tensor")),
    (r"(output|down)/a$", ("tensor", None)),
    (r"(output|down)/b$", (None, "fsdp")),
    # Tables of user models and their row-wise moments and counts. Unlike a layer, which every example needs whole, a
    # table is asked for the rows of a batch alone: to gather them is an all-reduce of that many rows however many
    # devices share the table, and each device writes the rows it owns. So data, which layers are copied over, splits
    # tables too.
    (r"table/(rows/(mu|nu)/)?offset$", (ROWS, None, None)),
    (r"table/(rows/(mu|nu)/)?weights$", (ROWS, None)),
    (r"table/rows/count$", (ROWS,)),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, or those given; one size may be -1 for "the rest".

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
    # `jax.make_mesh` refuses an axis that is a part of one of the torus, such as 4 of 16x16.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _parts(mesh: Mesh, axis: Axis) -> int:
    """Into how many parts an axis split so falls."""
    return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis or ()))


def row_parts(rows: NamedSharding) -> int:
    """Into how many parts the rows of a batch that lives so fall."""
    return _parts(rows.mesh, rows.spec[0])


def even_rows(mesh: Mesh, count: int) -> int:
    """The smallest number of rows, `count` at least, that divides evenly over data x fsdp."""
    return count + -count % _parts(mesh, ROWS)


def leaf_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where the parameter (or optimizer moment) at `path` lives; an axis that does not divide evenly stays whole."""
    for pattern, last in RULES:
        if re.search(pattern, path) and len(shape) >= len(last):
            spec = [None] * (len(shape) - len(last)) + [
                axis if size % _parts(mesh, axis) == 0 else None
                for axis, size in zip(last, shape[-len(last) :], strict=True)
            ]
            return NamedSharding(mesh, P(*spec))
    return NamedSharding(mesh, P())


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Where every leaf of `tree` lives by `RULES`; leaves need only a shape."""

    def of(path, leaf):
        return leaf_sharding(mesh, jax.tree_util.keystr(path, simple=True, separator="/"), np.shape(leaf))

    return jax.tree_util.tree_map_with_path(of, tree)


def shard_params(mesh: Mesh, tree: Any) -> Any:
    """Places parameters, adapter banks, heads or a whole training state by `RULES`.

    On one device too: a step whose result lives elsewhere than its argument would be compiled twice.
    """
    return jax.tree.map(to_devices, tree, shardings(mesh, tree))


def bytes_per_device(tree: Any) -> int:
    """What the arrays of `tree` take on that device of this process which holds most of them."""
    held: collections.Counter[jax.Device] = collections.Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values(), default=0)


def sharded(mesh: Mesh, make: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
    """`make(*arguments)`, computed where `RULES` place its result: no device ever holds more than its part.

    `donate` numbers the arguments whose memory the result may take.
    """
    where = shardings(mesh, jax.eval_shape(make, *arguments))
    return jax.jit(make, out_shardings=where, donate_argnums=donate)(*arguments)


def stay(mesh: Mesh, tree: Any) -> Any:
    """Inside a compiled program: the same, placed by `RULES`. So what a step returns can take the memory of what it was
    given, and be given to it again without compiling anew.
    """
    return tree if mesh.size == 1 else jax.lax.with_sharding_constraint(tree, shardings(mesh, tree))


def row_sharding(mesh: Mesh, rows: int = 0) -> NamedSharding:
    """Axis 0 split over data x fsdp. Raises UserError where `rows` cannot be split evenly."""
    count = _parts(mesh, ROWS)
    if rows % count:
        raise UserError(
            f"batch of {rows} rows: cannot be split over data x fsdp = {count} devices; make it a multiple of {count}"
        )
    return NamedSharding(mesh, P(ROWS))


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Splits axis 0 of every array over data x fsdp. Several processes give the same batch; each takes its rows.

    Raises:
      UserError: the rows cannot be split evenly.
    """
    if mesh.size == 1:
        return batch
    return jax.tree.map(lambda x: to_devices(x, row_sharding(mesh, x.shape[0])), batch)
