"""Sharding constraints on activations, so that XLA communicates the smaller operand of each matmul."""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Shaped

from pjrlhf.parallel.mesh import num_shards
from pjrlhf.types import Array


def constrain_batch(x: Shaped[Array, "B ..."], sharding: NamedSharding | None) -> Shaped[Array, "B ..."]:
    """`x` with its batch axis constrained to `sharding`; unchanged where B does not divide evenly.

    Without the constraint, XLA may split the contraction over D when weights are sharded, and communicate activations
    instead of weights: seven times as many bytes for an 8B model.
    """
    if sharding is None or x.shape[0] % num_shards(sharding):
        return x
    return jax.lax.with_sharding_constraint(x, sharding)


def layer_sharding(shape: tuple[int, ...], sharding: NamedSharding | None) -> NamedSharding | None:
    """Sharding of activations of `shape` [B, T, D] between layers, given the batch's `sharding` (data x fsdp).

    Usually `sharding` itself. In decoding (T = 1) with a small batch, activations are smaller than kernels, so the
    batch is split by data and D by fsdp: kernels stay in place and activations are communicated (arXiv 2211.05102,
    section 3.2.2). An all-reduce of [B, F] sends 2 B F elements; gathering the kernel would send D F. Keys and values
    stay split by `sharding`.
    """
    if sharding is None or len(shape) != 3 or shape[1] > 1:
        return sharding
    data, fsdp = sharding.spec[0]
    if shape[2] % sharding.mesh.shape[fsdp] or 2 * shape[0] >= shape[2] * sharding.mesh.shape[data]:
        return sharding
    return NamedSharding(sharding.mesh, P(data, None, fsdp))


def constrain_reshard(
    x: Shaped[Array, "B ..."], source: NamedSharding | None, target: NamedSharding | None
) -> Shaped[Array, "B ..."]:
    """`x` with its batch axis constrained to `source` and then to `target`, where they differ.

    The other axes are left to the compiler.
    """
    if source is None or target is None or source == target:
        return x
    for sharding in (source, target):
        if x.shape[0] % num_shards(sharding) == 0:
            spec = P(sharding.spec[0], *[P.UNCONSTRAINED] * (x.ndim - 1))
            x = jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, spec))
    return x
