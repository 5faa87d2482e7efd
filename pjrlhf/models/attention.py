"""Attention over a (possibly cached) key/value sequence, with one switch for the implementation.

Shapes: B batch, T query tokens, S key tokens, H query heads, G key/value heads, C head width.
"""

import functools

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import NamedSharding

from pjrlhf.errors import UserError
from pjrlhf.models import splash
from pjrlhf.models.blockwise import BLOCK, attend_blocks

CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # what JAX calls its primitive
IMPLEMENTATIONS = ("auto", "blocks", "einsum", "xla", "cudnn", "splash")


@functools.lru_cache
def choose(requested: str, backend: str, dtype: str, devices: int) -> str:
    """Resolves `auto` for so many devices of a backend ("cpu", "gpu", "tpu") and logs the choice once.

    `einsum` is the plain form with fp32 softmax; `blocks` the same block by block, fastest on a CPU, but on one device
    only, as its loop goes through the rows of a batch; `xla` is `jax.nn.dot_product_attention`; `cudnn` the same
    function on cuDNN's fused kernel, which takes half precision only; `splash` JAX's kernel for TPUs.
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


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap` tanh(x / `cap`), or `x` where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    implementation: str = "auto",
    softcap: float | None = None,
    rows: NamedSharding | None = None,
) -> jax.Array:
    """Grouped-query attention.

    Args:
      query: [B, T, H, C].
      key, value: [B, S, G, C], H a multiple of G.
      mask: bool [B, T, S], True where a query may look; where T = S, never at a later slot. What a query row with no
        True entry gives is finite, and nothing else is said of it.
      implementation: one of `IMPLEMENTATIONS`.
      softcap: scores are bounded to c tanh(score / c), which `xla` and `cudnn` cannot do: `einsum` takes their place.
      rows: where the rows of a batch live, on several devices, for `splash`; `xla` takes its place for few tokens, or
        rows that do not divide evenly.

    Returns:
      [B, T, H, C] in the dtype of `query`.
    """
    if implementation not in IMPLEMENTATIONS[1:]:
        implementation = choose(implementation, jax.default_backend(), query.dtype.name, jax.device_count())
    if implementation == "blocks" and query.shape[1] > BLOCK:
        return attend_blocks(query, key, value, mask, softcap)
    if implementation == "splash":
        if not (reason := splash.unfit(query.shape, rows)):
            return splash.attend_splash(query, key, value, mask, softcap, rows)
        _log_once(f"attention: xla takes the place of splash: {reason}")
        implementation = "xla"
    if implementation in ("xla", "cudnn") and softcap is None:
        # The mask has it already, but cuDNN then leaves out the half that nobody sees.
        causal = implementation == "cudnn" and query.shape[1] == key.shape[1]
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask[:, None], is_causal=causal, implementation=implementation
        )
    return attend_cached(query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask, softcap)


def attend_cached(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, softcap: float | None = None
) -> jax.Array:
    """The same in the plain form, for keys and values as they lie in a cache, [B, G, S, C]. Few query tokens read each
    of them once, and leave nothing to fuse.
    """
    B, T, H, C = query.shape
    G = key.shape[1]
    query = query.reshape(B, T, G, H // G, C) * C**-0.5
    scores = jnp.einsum("btghc,bgsc->bgths", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, :, None], soft_cap(scores, softcap), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bgths,bgsc->btghc", weights, value).reshape(B, T, H, C)
