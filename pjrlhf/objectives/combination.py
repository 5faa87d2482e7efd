"""One rule from rewards of several objectives to one advantage, with everything a trainer has to know about it.

Shapes: n answers of one policy, T response tokens, S objectives that an answer is rewarded for, H heads (each with its
own values and advantages), M preference vectors trained on. `p` are preference weights [n, S].
"""

import dataclasses

import jax
import jax.numpy as jnp

from pjrlhf.objectives import multi_objective as mo

KINDS = ("sum", "tchebycheff", "gdpo", "pama", "min_norm")
HEADS = ("per_reward", "reward_sum+control", "per_reward+control", "control", "per_preference")
WEIGHTS = ("min_norm", "equal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combination:
    """How objectives become one advantage; static.

    Attributes:
      kind: "sum", one head of the weighted sum of rewards (RLHF, MORL, soups, CLP); "tchebycheff", one head of the
        weighted distance to `ideal`; "gdpo", a head per objective, each standardised, then their weighted sum; "pama",
        a head per objective, combined token by token; "min_norm", heads weighed by the least norm of their mixed
        policy gradient (MGDA with heads "per_reward", MOC with the others).
      heads: of "min_norm", see `multi_objective.moc_heads`; besides its readings, "per_reward" knows no p, "control" is
        the control reward alone (an ablation), and "per_preference" makes every trained preference vector's weighted
        sum an objective of its own.
      weights: of "min_norm", "min_norm" or, as an ablation, "equal".
      normalize: of "min_norm", see `multi_objective.gram_matrix`. For two heads "gradient" always gives equal weights.
      target, sided: of the control reward, see `multi_objective.control_reward`.
      control_weight: what the control reward is multiplied with. It is a mean of squares below 1, so by itself its
        gradient is the smallest, which min-norm weights favour: with 1 it gets nearly all weight.
      ideal, smoothing: of "tchebycheff", on the scale of the rewards.
      noon: of "pama".

    Raises ValueError for an unknown setting.
    """

    kind: str = "sum"
    heads: str = "reward_sum+control"
    weights: str = "min_norm"
    normalize: str = "none"
    target: str = "identity"
    sided: str = "two"
    control_weight: float = 1.0
    ideal: float = 1.0
    smoothing: float = 0.0
    noon: bool = True

    def __post_init__(self):
        for name, known in (("kind", KINDS), ("heads", HEADS), ("weights", WEIGHTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
        probe = jnp.ones(2)
        mo.control_reward(probe, probe, self.target, self.sided)
        mo.gram_matrix(probe, self.normalize)
        mo.tchebycheff(probe, probe, probe, self.smoothing)

    def names(self, objectives: list[str] | tuple[str, ...]) -> tuple[str, ...]:
        """Of the H heads, given those of the S objectives."""
        if self.kind in ("sum", "tchebycheff"):
            return ("reward",)
        if self.kind in ("gdpo", "pama"):
            return tuple(objectives)
        return {
            "per_reward": tuple(objectives),
            "reward_sum+control": ("reward", "control"),
            "per_reward+control": (*objectives, "control"),
            "control": ("control",),
            "per_preference": ("reward",),
        }[self.heads]

    def rewards(self, scores: jax.Array, p: jax.Array) -> jax.Array:
        """Rewards of the heads [n, H], from scores [n, S] (calibrated to [0, 1] for control rewards)."""
        if self.kind == "sum" or (self.kind == "min_norm" and self.heads == "per_preference"):
            return mo.weighted_sum(scores, p)[..., None]
        if self.kind == "tchebycheff":
            return mo.tchebycheff(scores, p, jnp.full(scores.shape[-1], self.ideal), self.smoothing)[..., None]
        if self.kind in ("gdpo", "pama") or self.heads == "per_reward":
            return jnp.asarray(scores, jnp.float32)
        if self.heads == "control":
            return self.control_weight * mo.control_reward(scores, p, self.target, self.sided)[..., None]
        heads = mo.moc_heads(scores, p, self.heads, self.target, self.sided)
        return heads.at[..., -1].multiply(self.control_weight)

    def advantages(
        self, advantages: jax.Array, p: jax.Array, mask: jax.Array, group: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The advantage to train on, [n, T], and what there is to log.

        The min-norm weights are those of the whole batch before its first update, where every ratio is 1 and no token
        is clipped, so that the surrogate gradient of head k in the log-probs is its advantage. A head without any
        advantage has nothing to say and takes no part. Nothing is standardised here; the heads of "gdpo" come so.

        Args:
          advantages: [n, T, H].
          p: [n, S].
          mask: [n, T].
          group: int32 [n], of "per_preference": which preference vector an answer was asked for.

        Returns:
          [n, T], 0 outside the mask, and {"weights" [H], "gradient_cosine" scalar: mean over pairs of heads}; the
          weights of "sum", "gdpo" and "tchebycheff" are the means of p, or 1; "pama" has none (NaN).
        """
        mask = mask.astype(jnp.float32)
        if self.kind == "min_norm" and self.heads == "per_preference":
            if group is None:
                raise ValueError("per_preference: needs the index of every answer's preference; train on a fixed set")
            scale = _disjoint_weights((jnp.square(advantages[..., 0]) * mask).sum(1), group)
            scale = jnp.ones_like(scale) if self.weights == "equal" else scale
            info = {"gradient_cosine": jnp.zeros(()), "weights": jnp.ones(1)}
            return advantages[..., 0] * scale[:, None] * mask, info
        H = advantages.shape[-1]
        gram = mo.gram_matrix(mo.surrogate_gradients(advantages, jnp.ones(mask.shape), mask))
        info = {"gradient_cosine": _mean_cosine(gram)}
        if self.kind == "gdpo":
            return mo.weighted_sum(advantages, p[:, None]) * mask, info | {"weights": p.mean(0)}
        if self.kind == "pama":
            return mo.pama(advantages, self.noon) * mask, info | {"weights": jnp.full(H, jnp.nan)}
        if H == 1:
            return advantages[..., 0] * mask, info | {"weights": jnp.ones(1)}
        present = jnp.diagonal(gram) > 0
        if self.weights == "equal":
            c = present / jnp.maximum(present.sum(), 1)
        else:
            c = _present_weights(mo.cosines(gram) if self.normalize == "gradient" else gram, present)
        return mo.weighted_sum(advantages, c) * mask, info | {"weights": c}


def _present_weights(gram: jax.Array, present: jax.Array) -> jax.Array:
    """Min-norm weights [H] among the heads that are `present` (bool [H]), 0 for the others."""
    # An absent head stands at the largest norm there is, and far beyond: the least norm leaves it out.
    far = 1e6 * jnp.maximum(jnp.diagonal(gram).max(), 1e-30)
    c = jnp.where(present, mo.min_norm_weights(jnp.where(present, gram, gram + far * jnp.eye(len(gram)))), 0.0)
    return c / jnp.maximum(c.sum(), 1e-30)


def _disjoint_weights(squares: jax.Array, group: jax.Array) -> jax.Array:
    """Min-norm weight of every answer's preference [n], times the number of preferences in the batch.

    Objectives of disjoint answers have a diagonal Gram matrix, whose min-norm weights are in proportion to
    1 / ||g_m||^2; `squares` [n] are the parts of the answers. A preference without any advantage takes no part.
    """
    same = (group[:, None] == group).astype(jnp.float32)
    norms, sizes = same @ squares, same.sum(1)
    inverse = jnp.where(norms > 0, 1.0 / jnp.where(norms > 0, norms, 1.0), 0.0)
    total, count = (inverse / sizes).sum(), ((norms > 0) / sizes).sum()
    return inverse * count / jnp.maximum(total, 1e-30)


def _mean_cosine(gram: jax.Array) -> jax.Array:
    """Mean cosine between different heads; 0 for one head, or without gradients."""
    cosine, H = mo.cosines(gram), len(gram)
    return (cosine.sum() - jnp.trace(cosine)) / max(H * (H - 1), 1)
