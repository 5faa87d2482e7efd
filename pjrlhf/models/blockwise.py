"""Blockwise attention that keeps one block of scores in the processor's cache and skips fully masked blocks.

FlashAttention (arXiv 2205.14135, algorithms 1 and 4; normalised at the end as in 2307.08691) as an XLA loop: forward
and backward pass hold one block of the scores [T, T] at a time. A causal mask skips half of the blocks; packing and
padding skip more. On a CPU it is several times faster than a softmax over whole rows.

Shapes: B batch, T tokens, H query heads, G key/value heads, C head width, N tokens per block, n = B T / N blocks,
M = N H / G queries of a block that share a key/value head.
"""

import functools

import jax
import jax.numpy as jnp

BLOCK = 128  # tokens
_LOWEST = jnp.finfo(jnp.float32).min


def attend_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    softcap: float | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """Grouped-query self-attention, see `attention.attend`; scores and sums are float32.

    Args:
      query: [B, T, H, C].
      key, value: [B, T, G, C].
      mask: bool [B, T, T].
      softcap: as in `attention.attend`.
      block: N; T is padded to a multiple of it.

    Returns:
      [B, T, H, C] in the dtype of `query`; zeros where a query may attend nowhere.
    """
    T = query.shape[1]
    if more := -T % block:
        query, key, value = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (query, key, value))
        mask = jnp.pad(mask, ((0, 0), (0, more), (0, more)))
    return _attend(query * query.shape[-1] ** -0.5, key, value, mask, softcap, block)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, mask, softcap, N):
    return _forward(query, key, value, mask, softcap, N)[0]


def _split(x: jax.Array, groups: int, N: int) -> jax.Array:
    """[B, T, heads, C] to [n, G, heads / G N, C]."""
    B, T, heads, C = x.shape
    x = x.reshape(B * T // N, N, groups, heads // groups, C)
    return x.transpose(0, 2, 3, 1, 4).reshape(B * T // N, groups, -1, C)


def _join(x: jax.Array, shape: tuple[int, ...], N: int) -> jax.Array:
    """[n, G, heads / G N, C] to `shape` [B, T, heads, C]."""
    n, groups, M, C = x.shape
    return x.reshape(n, groups, M // N, N, C).transpose(0, 3, 1, 2, 4).reshape(shape)


def _at(x: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x: jax.Array, value: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, i, 0)


def _pairs(mask: jax.Array, N: int) -> tuple[jax.Array, jax.Array]:
    """The pairs of a query and a key block that the mask does not hide: (indices int32 [B (T / N)^2], their count).

    Index i T / N + j stands for query block i, counted over all rows, and key block j of the same row. Entries beyond
    the count are meaningless.
    """
    B, T, _ = mask.shape
    seen = mask.reshape(B, T // N, N, T // N, N).any((2, 4)).ravel()
    return jnp.nonzero(seen, size=seen.size, fill_value=0)[0].astype(jnp.int32), seen.sum(dtype=jnp.int32)


def _over_pairs(mask, N, step, carry):
    """Folds `step(carry, query block, key block, mask [1, N, N])` over every pair of blocks that is not masked."""
    per_row, (indices, count) = mask.shape[1] // N, _pairs(mask, N)

    def body(t, carry):
        i, j = indices[t] // per_row, indices[t] % per_row
        row = i // per_row
        block_mask = jax.lax.dynamic_slice(mask, (row, i % per_row * N, j * N), (1, N, N))
        return step(carry, i, row * per_row + j, block_mask)

    return jax.lax.fori_loop(0, count, body, carry)


def _scores(query, key, softcap):
    """(scores float32 [G, M, N], derivative of the soft cap at them, None without a cap)."""
    slope, scores = None, jnp.einsum("gmc,gnc->gmn", query, key, preferred_element_type=jnp.float32)
    if softcap is not None:
        tanh = jnp.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh * tanh
    return scores, slope


def _masked(x, mask, fill):
    """`x` [G, M, N] where `mask` [1, N, N] is True, `fill` elsewhere."""
    G, M, N = x.shape
    return jnp.where(mask, x.reshape(G, M // N, N, N), fill).reshape(G, M, N)


def _forward(query, key, value, mask, softcap, N):
    G = key.shape[2]
    q, k, v = _split(query, G, N), _split(key, G, N), _split(value, G, N)

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
    out, maximum, total = _over_pairs(mask, N, step, (jnp.zeros(q.shape, jnp.float32), zeros + _LOWEST, zeros))
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    out = (out / total[..., None]).astype(query.dtype)
    return _join(out, query.shape, N), (query, key, value, mask, out, maximum + jnp.log(total))


def _backward(softcap, N, residuals, gradient):
    query, key, value, mask, out, log_total = residuals
    G = key.shape[2]
    q, k, v, g = _split(query, G, N), _split(key, G, N), _split(value, G, N), _split(gradient, G, N)
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
    gradients = _over_pairs(mask, N, step, start)
    return *(_join(d, x.shape, N).astype(x.dtype) for d, x in zip(gradients, (query, key, value), strict=True)), None


_attend.defvjp(_forward, _backward)
