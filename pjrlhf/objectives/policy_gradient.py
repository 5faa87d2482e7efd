"""Policy-gradient maths on arrays: rewards per token, advantages, PPO losses, KL estimates.

Shapes: B examples, T response tokens; `mask` is 1 on real response tokens up to and including EOS, which are contiguous
from position 0. Every mean is over masked tokens. Values outside the mask change no result and no gradient, not even
NaN or infinity. `jax.vmap` adds leading axes, for example one for K policies.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from pjrlhf.types import Array


def zero_outside(x: Float[Array, "*batch"], mask: Shaped[Array, "*#batch"]) -> Float[Array, "*batch"]:
    """`x` where `mask`, 0 elsewhere; not a product, because 0 times infinity is NaN."""
    return jnp.where(mask > 0, x, 0.0)


def masked_mean(x: Float[Array, "*batch"], mask: Shaped[Array, "*batch"]) -> Float[Array, ""]:
    """Mean of `x` where `mask`; 0 for an empty mask."""
    return zero_outside(x, mask).sum() / jnp.maximum(mask.sum(), 1)


def kl_estimate(
    logps: Float[Array, "*batch"], reference: Float[Array, "*batch"], kind: str = "k1"
) -> Float[Array, "*batch"]:
    """Per-token estimate of KL(policy || reference) on samples of the policy (Schulman 2020).

    k1 = log p - log q is unbiased but may be negative; k2 = k1^2 / 2; k3 = exp(-k1) - 1 + k1 is unbiased and
    non-negative, with low variance while the two are near each other.
    """
    k1 = logps - reference
    if kind == "k1":
        return k1
    if kind == "k2":
        return 0.5 * k1**2
    if kind == "k3":
        return jnp.expm1(-k1) + k1
    raise ValueError(f"KL estimate {kind!r} is unknown; choose one of k1, k2, k3")


def last_token(mask: Shaped[Array, "B T"]) -> Float[Array, "B T"]:
    """One-hot of the last real token of each row, zeros for an empty row; found from the mask, never from ids."""
    following = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    return ((mask > 0) & ~(following > 0)).astype(jnp.float32)


def token_rewards(
    score: Float[Array, " B"], kl: Float[Array, "B T"], mask: Shaped[Array, "B T"], beta: Float[Array, ""] | float
) -> Float[Array, "B T"]:
    """r_t = -beta KL_t + 1[t last real token] score (Ziegler et al. 2019, eq. 2)."""
    return zero_outside(-beta * kl, mask) + jnp.where(last_token(mask) > 0, score[:, None], 0.0)


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    gamma: float = 1.0,
    lam: float | Float[Array, ""] = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) over masked tokens.

    Args:
      values: values[t] is the value of the state before token t. The state after the last real token is terminal, of
        value 0.

    Returns:
      advantages, and returns = advantages + values; zero outside the mask, not whitened.
    """
    rewards, values = zero_outside(rewards, mask), zero_outside(values, mask)
    # The mask is contiguous, so the value after the last real token is 0, and so is the advantage.
    delta = rewards + gamma * jnp.pad(values[:, 1:], ((0, 0), (0, 1))) - values

    def backward(carry, delta_t):
        carry = delta_t + gamma * lam * carry
        return carry, carry

    _, advantages = jax.lax.scan(backward, jnp.zeros_like(rewards[:, 0]), delta.T, reverse=True)
    return advantages.T, advantages.T + values


def whiten(x: Float[Array, "*batch"], mask: Shaped[Array, "*batch"], shift_mean: bool = True) -> Float[Array, "*batch"]:
    """(x - mean) / std over the mask (population variance), zero outside it; `shift_mean=False` adds the mean back."""
    x = zero_outside(x, mask)
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    white = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
    return zero_outside(white if shift_mean else white + mean, mask)


def ppo_policy_loss(
    logps: Float[Array, "B T"],
    old_logps: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    clip: float = 0.2,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Clipped surrogate of PPO (arXiv 1707.06347, eq. 7), averaged over the masked tokens of the whole batch.

    Returns:
      the loss, and masked means `policy/approxkl_avg` (half the mean squared log-ratio), `policy/clipfrac_avg`,
      `val/ratio`.
    """
    # Before the maths: after it, the gradient would be 0 times the slope there.
    log_ratio, advantages = zero_outside(logps - old_logps, mask), zero_outside(advantages, mask)
    log_ratio = jnp.clip(log_ratio, -20.0, 20.0)
    ratio = jnp.exp(log_ratio)
    unclipped, clipped = ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages
    loss = masked_mean(-jnp.minimum(unclipped, clipped), mask)
    return loss, {
        "policy/approxkl_avg": masked_mean(0.5 * log_ratio**2, mask),
        "policy/clipfrac_avg": masked_mean((clipped < unclipped).astype(jnp.float32), mask),
        "val/ratio": masked_mean(ratio, mask),
    }


def value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    clip: float = 0.2,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Clipped value loss of PPO (half the larger of the squared errors with and without clipping), and the fraction of
    clipped values.
    """
    values, old_values, returns = (zero_outside(x, mask) for x in (values, old_values, returns))
    # Clipped values, not clipped differences: values within the range keep every bit and count as not clipped.
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    plain, limited = (values - returns) ** 2, (clipped - returns) ** 2
    return 0.5 * masked_mean(jnp.maximum(plain, limited), mask), masked_mean(
        (limited > plain).astype(jnp.float32), mask
    )


def adapt_kl_coefficient(
    beta: Float[Array, "*K"], kl: Float[Array, "*K"], target: float, samples: int, horizon: float
) -> Float[Array, "*K"]:
    """Adaptive controller (Ziegler et al. 2019, section 2.2): beta (1 + clip(KL / target - 1, -0.2, 0.2) samples /
    horizon).

    `kl` is the mean per-sequence KL of the last batch in nats, `samples` its number of sequences.
    """
    return beta * (1 + jnp.clip(kl / target - 1, -0.2, 0.2) * samples / horizon)
