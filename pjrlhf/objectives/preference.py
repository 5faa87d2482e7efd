"""Losses on preference pairs, on arrays."""

import jax
import jax.numpy as jnp


def bradley_terry_loss(
    chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0, weight: jax.Array | None = None
) -> jax.Array:
    """-log sigmoid(r(chosen) - r(rejected) - margin), averaged with `weight` (Ouyang et al. 2022, eq. 1; Llama 2,
    eq. 2).

    Args:
      chosen, rejected: rewards [B].
      margin: [B] or scalar, how much better chosen must be.
      weight: [B], 0 leaves a pair out; None counts every pair once.
    """
    losses = -jax.nn.log_sigmoid(chosen - rejected - margin)
    if weight is None:
        return losses.mean()
    return (losses * weight).sum() / jnp.maximum(weight.sum(), 1)


def accuracy(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """1 where chosen is strictly better, 0 where it is not; NaN where either reward is NaN, so that it cannot pass
    for 0.
    """
    margin = chosen - rejected
    return jnp.where(jnp.isnan(margin), jnp.nan, (margin > 0).astype(jnp.float32))
