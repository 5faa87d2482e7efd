"""What a step of policies logs about its rewards."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pjrlhf.algorithms.targets import Targets
from pjrlhf.training.metrics import Metrics
from pjrlhf.types import Array


def reward_metrics(targets: Targets, scores: Float[Array, "K n S"], objectives: Int[Array, "K n S"]) -> Metrics:
    """Mean and standard deviation of every reward, the share of answers that its source says nothing about, and how
    the rewards of an answer go together, [K] each, of `scores` of these `objectives`; NaN is no reward. Nothing
    where every policy has one objective, of a reward model: its mean is objective/scores.
    """
    audience, S = targets.audience, scores.shape[2]
    if S == 1 and not audience.sources:
        return {}
    metrics, known = {}, ~jnp.isnan(scores)
    scores = jnp.where(known, scores, 0.0)
    for i, name in enumerate(audience.rewards):
        if name in audience.sources:
            asked = objectives == i
            metrics[f"rewards/{name}/none"] = ((asked & ~known).sum((1, 2)), asked.sum((1, 2)))
        own = ((objectives == i) & known).astype(jnp.float32)
        count = own.sum((1, 2))
        mean = (scores * own).sum((1, 2)) / jnp.maximum(count, 1)
        squares = jnp.square(scores - mean[:, None, None]) * own
        spread = jnp.sqrt(squares.sum((1, 2)) / jnp.maximum(count, 1))
        seen = (count > 0).astype(jnp.float32)
        metrics |= {f"rewards/{name}/mean": (mean * seen, seen), f"rewards/{name}/std": (spread * seen, seen)}
    if targets.objectives is not None and S > 1:
        metrics["rewards/correlation"] = jax.vmap(correlations)(scores, known)
    return metrics


def correlations(scores: Float[Array, "n S"], known: Bool[Array, "n S"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of the correlations of two rewards, over the answers for which both are known; number of pairs of rewards
    that have two such answers). A constant reward has correlation 0.
    """
    m = known.astype(jnp.float32)
    centred = jnp.where(known, scores - (scores * m).sum(0) / jnp.maximum(m.sum(0), 1), 0.0)
    count = m.T @ m
    # Entry [s, t] is of reward s over the answers for which t is known too.
    total, squares = centred.T @ m / jnp.maximum(count, 1), jnp.square(centred).T @ m
    covariance = centred.T @ centred - count * total * total.T
    spread = jnp.sqrt(jnp.maximum(squares - count * jnp.square(total), 0.0))
    found = covariance / jnp.maximum(spread * spread.T, 1e-12)
    counted = jnp.triu(count >= 2, 1)
    return jnp.where(counted, found, 0.0).sum(), counted.sum().astype(jnp.float32)
