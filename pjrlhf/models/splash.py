"""Attention on TPUs by JAX's library kernel (splash attention), which keeps the scores of a block on the chip.

Shapes: B batch, T tokens, H query heads, G key/value heads, C head width.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pjrlhf.parallel.mesh import row_parts

BLOCK = 512  # tokens


def unfit(shape: tuple[int, ...], rows: NamedSharding | None) -> str:
    """Why queries [B, T, H, C] of rows that live as `rows` says had better not go through the kernel, or nothing."""
    B, T, _, _ = shape
    if T < BLOCK:
        return f"{T} tokens are fewer than a block of {BLOCK}"
    devices = 1 if rows is None else row_parts(rows)
    return f"{B} rows do not divide over {devices} devices" if B % devices else ""


def attend_splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    softcap: float | None = None,
    rows: NamedSharding | None = None,
    block: int = BLOCK,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attend` of tokens that are all there is to see (S = T), row by row.

    The mask is given as blocks, of which the kernel skips those that hide everything; `block` is a multiple of 128. On
    several devices each takes its own rows as `rows` says, of which B must be a multiple, and its own heads where
    `tensor` divides them. `interpret` runs the kernel where there is no TPU.
    """
    T, C = query.shape[1], query.shape[3]
    more = -T % block
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash_attention.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block))
    query = query * jnp.asarray(C**-0.5, query.dtype)
    # A token that may see nothing sees itself, for the kernel would divide by 0.
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
        # Which the maker (jax 0.10) turns into an array that cannot be asked.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        query, key, value = (jnp.pad(x, ((0, more), (0, 0), (0, 0))).swapaxes(0, 1) for x in heads)
        return kernel(query, key, value).swapaxes(0, 1)[:T]

    def local(*arrays):
        return jax.lax.map(row, arrays)

    if rows is None:
        return local(mask, query, key, value)
    tensor = rows.mesh.shape["tensor"]
    heads = P(rows.spec[0], None, "tensor" if query.shape[2] % tensor == key.shape[2] % tensor == 0 else None)
    specs = P(rows.spec[0]), heads, heads, heads
    return jax.shard_map(local, mesh=rows.mesh, in_specs=specs, out_specs=heads, check_vma=False)(
        mask, query, key, value
    )
