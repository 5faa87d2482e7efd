"""Grouped-query attention, with or without a key/value cache, in one of several implementations."""

import functools

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float

from pjrlhf.errors import UserError
from pjrlhf.models import splash
from pjrlhf.models.blockwise import BLOCK, attend_blocks
from pjrlhf.types import Array

CACHE_BLOCK = 128  # positions of the cache that `attend_used` reads at once
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # JAX's primitive for cuDNN attention
IMPLEMENTATIONS = ("auto", "blocks", "einsum", "xla", "cudnn", "splash")


@functools.lru_cache
def choose(requested: str, backend: str, dtype: str, devices: int) -> str:
    """Resolves `auto` for `devices` devices of a backend ("cpu", "gpu", "tpu"), and logs the choice once.

    Implementations:
      einsum: the plain form with a float32 softmax.
      blocks: blockwise (see `blockwise`). Fastest on a CPU, but only on one device, because it loops over batch rows.
      xla: `jax.nn.dot_product_attention`.
      cudnn: the same function on cuDNN's fused kernel, which needs half precision.
      splash: JAX's kernel for TPUs.

    Raises:
      UserError: an unknown implementation, or one that the backend lacks.
    """
    if requested not in IMPLEMENTATIONS:
        raise UserError(f"model.attention={requested!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if requested == "splash" and backend != "tpu":
        raise UserError(f"model.attention='splash' is a kernel for TPUs, not for {backend}; choose auto")
    if requested != "auto":
        choice = requested
    elif backend == "gpu" and dtype in ("bfloat16", "float16"):
        choice = "cudnn"
    elif backend == "tpu":
        choice = "splash"
    else:
        choice = "xla" if backend != "cpu" else "blocks" if devices == 1 else "einsum"
    logging.info("attention: %s (requested %s, backend %s, dtype %s)", choice, requested, backend, dtype)
    return choice


@functools.lru_cache
def _log_once(message: str) -> None:
    logging.info(message)


def soft_cap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """`cap` tanh(x / `cap`), or `x` where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    query: Float[Array, "B T Hq Dh"],
    key: Float[Array, "B M Hkv Dh"],
    value: Float[Array, "B M Hkv Dh"],
    mask: Bool[Array, "B T M"],
    implementation: str = "auto",
    softcap: float | None = None,
    batch_sharding: NamedSharding | None = None,
) -> Float[Array, "B T Hq Dh"]:
    """Grouped-query attention.

    Args:
      query, key, value: Hq must be a multiple of Hkv.
      mask: True where a query may attend; must be causal where T = M. The output of a query that may
        attend nowhere is finite but unspecified.
      implementation: one of `IMPLEMENTATIONS`.
      softcap: c of the capped scores c tanh(score / c), or None. `xla` and `cudnn` do not support it and fall back to
        `einsum`.
      batch_sharding: sharding of the batch axis over several devices, for `splash`. It falls back to `xla` for short
        sequences and for batches that do not divide evenly.

    Returns:
      Values mixed by attention, in the dtype of `query`.
    """
    if implementation not in IMPLEMENTATIONS[1:]:
        implementation = choose(implementation, jax.default_backend(), query.dtype.name, jax.device_count())
    if implementation == "blocks" and query.shape[1] > BLOCK:
        return attend_blocks(query, key, value, mask, softcap)
    if implementation == "splash":
        if not (reason := splash.unsupported(query.shape, batch_sharding)):
            return splash.attend_splash(query, key, value, mask, softcap, batch_sharding)
        _log_once(f"attention: falling back from splash to xla: {reason}")
        implementation = "xla"
    if implementation in ("xla", "cudnn") and softcap is None:
        # The mask is causal already; saying so lets cuDNN skip the masked half.
        causal = implementation == "cudnn" and query.shape[1] == key.shape[1]
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask[:, None], is_causal=causal, implementation=implementation
        )
    return attend_cached(query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask, softcap)


def attend_cached(
    query: Float[Array, "B T Hq Dh"],
    key: Float[Array, "B Hkv M Dh"],
    value: Float[Array, "B Hkv M Dh"],
    mask: Bool[Array, "B T M"],
    softcap: float | None = None,
) -> Float[Array, "B T Hq Dh"]:
    """The `einsum` implementation of `attend`, for keys and values in the layout of the cache.

    Decoding uses it everywhere: few queries read each key and value once, so a fused kernel would gain nothing.
    """
    B, T, Hq, Dh = query.shape
    Hkv = key.shape[1]
    query = query.reshape(B, T, Hkv, Hq // Hkv, Dh) * Dh**-0.5
    scores = jnp.einsum("btghd,bgmd->bgthm", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, :, None], soft_cap(scores, softcap), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bgthm,bgmd->btghd", weights, value).reshape(B, T, Hq, Dh)


def attend_used(
    query: Float[Array, "B T Hq Dh"],
    key: Float[Array, "B Hkv M Dh"],
    value: Float[Array, "B Hkv M Dh"],
    mask: Bool[Array, "B T M"],
    softcap: float | None = None,
) -> Float[Array, "B T Hq Dh"]:
    """`attend_cached` that reads the cache in blocks, up to the last position that any query may attend to.

    Its time follows the longest row, not M. A block in which a row may attend nowhere leaves the sums of that row as
    they are, bit for bit, so the result of a row does not depend on the lengths of others (online softmax, arXiv
    1805.02867). The output of a query that may attend nowhere is finite but unspecified.
    """
    M = key.shape[2]
    if M <= CACHE_BLOCK:
        return attend_cached(query, key, value, mask, softcap)
    B, T, Hq, Dh = query.shape
    Hkv, lowest = key.shape[1], jnp.finfo(jnp.float32).min
    query = query.reshape(B, T, Hkv, Hq // Hkv, Dh) * Dh**-0.5
    used = jnp.where(mask.any((0, 1)), jnp.arange(1, M + 1), 0).max()

    def block(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, mixed = sums
        start = jnp.minimum(i * CACHE_BLOCK, M - CACHE_BLOCK)  # the last block may overlap the one before
        own_key, own_value = (jax.lax.dynamic_slice_in_dim(x, start, CACHE_BLOCK, 2) for x in (key, value))
        allowed = jax.lax.dynamic_slice_in_dim(mask, start, CACHE_BLOCK, 2)
        allowed &= start + jnp.arange(CACHE_BLOCK) >= i * CACHE_BLOCK
        scores = jnp.einsum("btghd,bgmd->bgthm", query, own_key, preferred_element_type=jnp.float32)
        scores = jnp.where(allowed[:, None, :, None], soft_cap(scores, softcap), lowest)
        new = jnp.maximum(highest, scores.max(-1))
        weights, kept = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
        total, weights = total * kept + weights.sum(-1), weights.astype(value.dtype)
        part = jnp.einsum("bgthm,bgmd->bgthd", weights, own_value, preferred_element_type=jnp.float32)
        return new, total, mixed * kept[..., None] + part

    shape = B, Hkv, T, Hq // Hkv
    start = jnp.full(shape, lowest), jnp.zeros(shape), jnp.zeros((*shape, Dh))
    _, total, mixed = jax.lax.fori_loop(0, -(-used // CACHE_BLOCK), block, start)
    out = (mixed / total[..., None]).astype(value.dtype)
    return out.transpose(0, 2, 1, 3, 4).reshape(B, T, Hq, Dh)
