"""Attention in blocks that stay in the cache of a processor, those that nobody looks at left out.

FlashAttention (arXiv 2205.14135, algorithms 1 and 4; normalised at the end as in 2307.08691) as a loop in XLA: of the
scores [T, S] there is one block at a time, forwards and backwards. A causal mask leaves out half of the blocks, packed
rows and padding more. On a CPU that is several times faster than softmax over whole rows.

Shapes: B batch, T tokens, H query heads, G key/value heads, C head width, N tokens of a block, n = B T / N blocks,
M = H / G N queries that share a key/value head.
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
    """Grouped-query attention of tokens among themselves, see `attention.attend`; scores and sums in float32.

    Args:
      query: [B, T, H, C]. key, value: [B, T, G, C]. mask: bool [B, T, T].
      block: N; T is padded to a multiple of it.

    Returns:
      [B, T, H, C] in the dtype of `query`; zeros where a query may look nowhere.
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
    """(numbers of the pairs of blocks in which somebody looks at somebody, int32 [B (T / N)^2] the first of which are
    meant, their count); number i T / N + j is of query block i, of all rows, and key block j, of that row.
    """
    B, T, _ = mask.shape
    seen = mask.reshape(B, T // N, N, T // N, N).any((2, 4)).ravel()
    return jnp.nonzero(seen, size=seen.size, fill_value=0)[0].astype(jnp.int32), seen.sum(dtype=jnp.int32)


def _over_pairs(mask, N, step, carry):
    """`carry` after `step(carry, query block, key block, mask [heads of a group 1, N, N])` for every pair of blocks."""
    rows, (numbers, count) = mask.shape[1] // N, _pairs(mask, N)

    def body(t, carry):
        i, j = numbers[t] // rows, numbers[t] % rows
        row = i // rows
        some = jax.lax.dynamic_slice(mask, (row, i % rows * N, j * N), (1, N, N))
        return step(carry, i, row * rows + j, some)

    return jax.lax.fori_loop(0, count, body, carry)


def _scores(query, key, softcap):
    """Float32 [G, M, N] and, of capped ones, what their gradient is multiplied by."""
    slope, scores = None, jnp.einsum("gmc,gnc->gmn", query, key, preferred_element_type=jnp.float32)
    if softcap is not None:
        bent = jnp.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent * bent
    return scores, slope


def _masked(x, mask, instead):
    """`x` [G, M, N] where `mask` [1, N, N] is True."""
    G, M, N = x.shape
    return jnp.where(mask, x.reshape(G, M // N, N, N), instead).reshape(G, M, N)


def _forward(query, key, value, mask, softcap, N):
    G = key.shape[2]
    q, k, v = _split(query, G, N), _split(key, G, N), _split(value, G, N)

    def step(carry, i, j, some):
        out, top, total = carry
        scores, _ = _scores(_at(q, i), _at(k, j), softcap)
        scores = _masked(scores, some, _LOWEST)
        before = _at(top, i)
        now = jnp.maximum(before, scores.max(-1))
        shrink = jnp.exp(before - now)
        weights = _masked(jnp.exp(scores - now[..., None]), some, 0.0)
        found = jnp.einsum("gmn,gnc->gmc", weights.astype(v.dtype), _at(v, j), preferred_element_type=jnp.float32)
        out = _put(out, _at(out, i) * shrink[..., None] + found, i)
        return out, _put(top, now, i), _put(total, _at(total, i) * shrink + weights.sum(-1), i)

    none = jnp.zeros(q.shape[:-1], jnp.float32)
    out, top, total = _over_pairs(mask, N, step, (jnp.zeros(q.shape, jnp.float32), none + _LOWEST, none))
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    out = (out / total[..., None]).astype(query.dtype)
    return _join(out, query.shape, N), (query, key, value, mask, out, top + jnp.log(total))


def _backward(softcap, N, saved, gradient):
    query, key, value, mask, out, log_total = saved
    G = key.shape[2]
    q, k, v, g = _split(query, G, N), _split(key, G, N), _split(value, G, N), _split(gradient, G, N)
    shared = (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(-1)

    def step(carry, i, j, some):
        dq, dk, dv = carry
        qi, kj, vj, gi = _at(q, i), _at(k, j), _at(v, j), _at(g, i)
        scores, slope = _scores(qi, kj, softcap)
        weights = _masked(jnp.exp(scores - _at(log_total, i)[..., None]), some, 0.0)
        of_weights = jnp.einsum("gmc,gnc->gmn", gi, vj, preferred_element_type=jnp.float32)
        of_scores = weights * (of_weights - _at(shared, i)[..., None])
        of_scores = (of_scores if slope is None else of_scores * slope).astype(q.dtype)
        sums = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        dq = _put(dq, _at(dq, i) + sums("gmn,gnc->gmc", of_scores, kj), i)
        dk = _put(dk, _at(dk, j) + sums("gmn,gmc->gnc", of_scores, qi), j)
        return dq, dk, _put(dv, _at(dv, j) + sums("gmn,gmc->gnc", weights.astype(g.dtype), gi), j)

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    found = _over_pairs(mask, N, step, start)
    return *(_join(d, x.shape, N).astype(x.dtype) for d, x in zip(found, (query, key, value), strict=True)), None


_attend.defvjp(_forward, _backward)
