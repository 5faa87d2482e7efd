"""Blockwise attention that keeps one block of scores in the processor's cache and skips fully masked blocks.

FlashAttention (arXiv 2205.14135, algorithms 1 and 4; normalised at the end as in 2307.08691) as an XLA loop: forward
and backward pass hold one block of the scores [T, T] at a time. A causal mask skips half of the blocks; packing and
padding skip more. On a CPU it is several times faster than a softmax over whole rows.

Shapes of the blocks: `block` tokens each, `blocks` = B T / block of them over all rows, and `shared` = block Hq / Hkv
queries of a block for each key/value head.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pjrlhf.types import Array

BLOCK = 128  # tokens
_LOWEST = jnp.finfo(jnp.float32).min


def attend_blocks(
    query: Float[Array, "B T Hq Dh"],
    key: Float[Array, "B T Hkv Dh"],
    value: Float[Array, "B T Hkv Dh"],
    mask: Bool[Array, "B T T"],
    softcap: float | None = None,
    block: int = BLOCK,
) -> Float[Array, "B T Hq Dh"]:
    """Grouped-query self-attention, see `attention.attend`; scores and sums are float32.

    Args:
      query, key, value, softcap: as in `attention.attend`.
      mask: True where a query may attend.
      block: tokens per block; T is padded to a multiple of it.

    Returns:
      Values mixed by attention, in the dtype of `query`; zeros where a query may attend nowhere.
    """
    T = query.shape[1]
    if more := -T % block:
        query, key, value = [jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (query, key, value)]
        mask = jnp.pad(mask, ((0, 0), (0, more), (0, more)))
    out = cast(Array, _attend(query * query.shape[-1] ** -0.5, key, value, mask, softcap, block))
    return out[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, mask, softcap, block) -> Array:
    return _forward(query, key, value, mask, softcap, block)[0]


def _split(x: Float[Array, "B T heads Dh"], groups: int, block: int) -> Float[Array, "blocks groups shared Dh"]:
    """Splits rows into blocks, and the heads into groups that share a key/value head."""
    B, T, heads, Dh = x.shape
    x = x.reshape(B * T // block, block, groups, heads // groups, Dh)
    return x.transpose(0, 2, 3, 1, 4).reshape(B * T // block, groups, -1, Dh)


def _join(
    x: Float[Array, "blocks groups shared Dh"], shape: tuple[int, ...], block: int
) -> Float[Array, "B T heads Dh"]:
    """Inverse of `_split`; `shape` is that of the result."""
    blocks, groups, shared, Dh = x.shape
    return x.reshape(blocks, groups, shared // block, block, Dh).transpose(0, 3, 1, 2, 4).reshape(shape)


def _at(x: Array, i: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x: Array, value: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, i, 0)


def _pairs(mask: Bool[Array, "B T T"], block: int) -> tuple[Int[Array, " pairs"], Int[Array, ""]]:
    """The pairs of a query and a key block that the mask does not hide: (indices [B (T / block)^2], their count).

    Index i T / block + j stands for query block i, counted over all rows, and key block j of the same row. Entries
    beyond the count are meaningless.
    """
    B, T, _ = mask.shape
    seen = mask.reshape(B, T // block, block, T // block, block).any((2, 4)).ravel()
    return jnp.nonzero(seen, size=seen.size, fill_value=0)[0].astype(jnp.int32), seen.sum(dtype=jnp.int32)


def _over_pairs(mask, block, step, carry):
    """Folds `step(carry, query block, key block, mask [1, block, block])` over every visible pair of blocks."""
    per_row, (indices, count) = mask.shape[1] // block, _pairs(mask, block)

    def body(t, carry):
        i, j = indices[t] // per_row, indices[t] % per_row
        row = i // per_row
        block_mask = jax.lax.dynamic_slice(mask, (row, i % per_row * block, j * block), (1, block, block))
        return step(carry, i, row * per_row + j, block_mask)

    return jax.lax.fori_loop(0, count, body, carry)


def _scores(query, key, softcap):
    """(scores float32 [Hkv, shared, block], derivative of the soft cap at them, None without a cap)."""
    slope, scores = None, jnp.einsum("gmc,gnc->gmn", query, key, preferred_element_type=jnp.float32)
    if softcap is not None:
        tanh = jnp.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh * tanh
    return scores, slope


def _masked(x, mask, fill):
    """`x` [Hkv, shared, block] where `mask` [1, block, block] is True, `fill` elsewhere."""
    groups, shared, block = x.shape
    return jnp.where(mask, x.reshape(groups, shared // block, block, block), fill).reshape(groups, shared, block)


def _forward(query, key, value, mask, softcap, block):
    q, k, v = (_split(x, key.shape[2], block) for x in (query, key, value))

    def step(carry, i, j, block_mask):
        out, maximum, total = carry
        scores, _ = _scores(_at(q, i), _at(k, j), softcap)
        scores = _masked(scores, block_mask, _LOWEST)
        old_max = _at(maximum, i)
        new_max = jnp.maximum(old_max, scores.max(-1))
        rescale = jnp.exp(old_max - new_max)
        weights = _masked(jnp.exp(scores - new_max[..., None]), block_mask, 0.0)
        update = jnp.einsum("gmn,gnc->gmc", weights.astype(v.dtype), _at(v, j), preferred_element_type=jnp.float32)
        out = _put(out, _at(out, i) * rescale[..., None] + update, i)
        return out, _put(maximum, new_max, i), _put(total, _at(total, i) * rescale + weights.sum(-1), i)

    zeros = jnp.zeros(q.shape[:-1], jnp.float32)
    out, maximum, total = _over_pairs(mask, block, step, (jnp.zeros(q.shape, jnp.float32), zeros + _LOWEST, zeros))
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    out = (out / total[..., None]).astype(query.dtype)
    return _join(out, query.shape, block), (query, key, value, mask, out, maximum + jnp.log(total))


def _backward(softcap, block, residuals, gradient):
    query, key, value, mask, out, log_total = residuals
    q, k, v, g = (_split(x, key.shape[2], block) for x in (query, key, value, gradient))
    delta = (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(-1)

    def step(carry, i, j, block_mask):
        dq, dk, dv = carry
        qi, kj, vj, gi = _at(q, i), _at(k, j), _at(v, j), _at(g, i)
        scores, slope = _scores(qi, kj, softcap)
        weights = _masked(jnp.exp(scores - _at(log_total, i)[..., None]), block_mask, 0.0)
        d_weights = jnp.einsum("gmc,gnc->gmn", gi, vj, preferred_element_type=jnp.float32)
        d_scores = weights * (d_weights - _at(delta, i)[..., None])
        d_scores = (d_scores if slope is None else d_scores * slope).astype(q.dtype)
        einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        dq = _put(dq, _at(dq, i) + einsum("gmn,gnc->gmc", d_scores, kj), i)
        dk = _put(dk, _at(dk, j) + einsum("gmn,gmc->gnc", d_scores, qi), j)
        return dq, dk, _put(dv, _at(dv, j) + einsum("gmn,gmc->gnc", weights.astype(g.dtype), gi), j)

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    gradients = _over_pairs(mask, block, step, start)
    inputs = query, key, value
    return *(_join(d, x.shape, block).astype(x.dtype) for d, x in zip(gradients, inputs, strict=True)), None


_attend.defvjp(_forward, _backward)
