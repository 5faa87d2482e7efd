"""Attention on TPUs by JAX's splash attention kernel, which never writes attention scores to HBM."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float

from pjrlhf.parallel.mesh import num_shards
from pjrlhf.types import Array

BLOCK = 512  # tokens


def unsupported(shape: tuple[int, ...], batch_sharding: NamedSharding | None) -> str:
    """The reason not to use the kernel for queries of `shape` [B, T, Hq, Dh] in this sharding, "" if there is none."""
    B, T, _, _ = shape
    if T < BLOCK:
        return f"{T} tokens are fewer than a block of {BLOCK}"
    devices = 1 if batch_sharding is None else num_shards(batch_sharding)
    return f"{B} rows do not divide over {devices} devices" if B % devices else ""


def attend_splash(
    query: Float[Array, "B T Hq Dh"],
    key: Float[Array, "B T Hkv Dh"],
    value: Float[Array, "B T Hkv Dh"],
    mask: Bool[Array, "B T T"],
    softcap: float | None = None,
    batch_sharding: NamedSharding | None = None,
    block: int = BLOCK,
    interpret: bool = False,
) -> Float[Array, "B T Hq Dh"]:
    """`attention.attend` without a cache (M = T), one batch row at a time.

    Args:
      query, key, value, softcap: as in `attention.attend`.
      mask: True where a query may attend; the kernel skips blocks in which it is False throughout.
      batch_sharding: on several devices, sharding of the batch axis, whose number of shards must divide B. Heads are
        split as well where the mesh axis `tensor` divides them.
      block: tokens per block, a multiple of 128.
      interpret: emulate the kernel on other backends.
    """
    T, Dh = query.shape[1], query.shape[3]
    more = -T % block
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash_attention.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block))
    query = query * jnp.asarray(Dh**-0.5, query.dtype)
    # A query that may attend nowhere attends to itself: the kernel would divide by 0.
    mask = jnp.pad(mask, ((0, 0), (0, more), (0, more))) | jnp.eye(T + more, dtype=bool)

    def row(arrays):
        mask, *heads = arrays
        kernel = splash_attention.make_splash_mha(
            mask[None],
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
        # make_splash_mha (jax 0.10) turns this flag into an array, but the kernel branches on it in Python.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        query, key, value = (jnp.pad(x, ((0, more), (0, 0), (0, 0))).swapaxes(0, 1) for x in heads)
        return jnp.asarray(kernel(query, key, value)).swapaxes(0, 1)[:T]

    def local(*arrays):
        return jax.lax.map(row, arrays)

    if batch_sharding is None:
        return local(mask, query, key, value)
    mesh, rows = batch_sharding.mesh, batch_sharding.spec[0]
    tensor = mesh.shape["tensor"]
    heads = P(rows, None, "tensor" if query.shape[2] % tensor == key.shape[2] % tensor == 0 else None)
    specs = P(rows), heads, heads, heads
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(mask, query, key, value)
