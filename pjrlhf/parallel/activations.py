"""Where the rows of activations live while a decoder runs: asked for, so that the compiler sends what is small."""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pjrlhf.parallel.mesh import row_parts


def split_rows(x: jax.Array, rows: NamedSharding | None) -> jax.Array:
    """`x` [B, ...] with its rows on the devices that `rows` says, where B divides evenly.

    Without it a compiler that is given split weights may split the sum over D instead, and send activations where it
    should send weights: for an 8B model seven times as many bytes.
    """
    if rows is None or x.shape[0] % row_parts(rows):
        return x
    return jax.lax.with_sharding_constraint(x, rows)


def split_between(shape: tuple[int, ...], rows: NamedSharding | None) -> NamedSharding | None:
    """Where activations `shape` [B, T, D] live between layers, if the rows of a batch are split by `rows` (data x
    fsdp).

    Of many tokens as `rows` says. For so few, one a row, that sums over a D split by fsdp are smaller than kernels, by
    data and D: then kernels stay where they are and activations are sent (arXiv 2211.05102, section 3.2.2). An
    all-reduce of [B, F] sends 2 B F, where to gather a kernel takes D F. Keys and values stay split by `rows`.
    """
    if rows is None or len(shape) != 3 or shape[1] > 1:
        return rows
    data, fsdp = rows.spec[0]
    if shape[2] % rows.mesh.shape[fsdp] or 2 * shape[0] >= shape[2] * rows.mesh.shape[data]:
        return rows
    return NamedSharding(rows.mesh, P(data, None, fsdp))


def move_rows(x: jax.Array, source: NamedSharding | None, target: NamedSharding | None) -> jax.Array:
    """`x` [B, ...], first with its rows as those of `source` and then as those of `target`, where they differ; the
    other axes as the compiler likes.
    """
    if source == target:
        return x
    for place in (source, target):
        if x.shape[0] % row_parts(place) == 0:
            spec = P(place.spec[0], *[P.UNCONSTRAINED] * (x.ndim - 1))
            x = jax.lax.with_sharding_constraint(x, NamedSharding(place.mesh, spec))
    return x
