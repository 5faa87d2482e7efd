"""Several objectives at once, on arrays: rules that combine them, MOC, MODPO and the decoding of MOD.

Shapes: see `pjrlhf.types`. Objectives are the last axis of rewards and of preference weights, which have shape [S] or
one row per example. Weights are used as given, without normalisation. All functions compute and return float32.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int, Num, Shaped

from pjrlhf.objectives.preference import Pair, expected
from pjrlhf.types import Array

DIVERGENCES = {"reverse_kl": 0.0, "forward_kl": 1.0}

# ---- combination rules: [..., S] -> [...], larger is better


def weighted_sum(x: Num[Array, "... S"], weights: Num[Array, "..."]) -> Float[Array, "..."]:
    """sum_i w_i x_i of rewards or advantages; weights [S] or [..., S].

    One-hot weights give that objective to the last bit; one of weight 0 adds nothing, even where it is infinite or NaN.
    Raises ValueError for weights that are not one per objective.
    """
    x, weights = _fitting(x, weights)
    return (jnp.where(weights == 0, 0.0, x) * weights).sum(-1)


def standardize(x: Num[Array, "*batch"], mask: Shaped[Array, "..."], axis: int | None) -> Float[Array, "*batch"]:
    """(x - mean) / sqrt(population variance + 1e-8) over `axis` (None: over everything) where `mask`, 0 elsewhere,
    whatever x is there: the advantage of GRPO over the answers to one prompt (arXiv 2402.03300, section 4.1.2).

    Equal values, or a single one, give 0. `mask` broadcasts against `x`.
    """
    x, mask = jnp.asarray(x, jnp.float32), jnp.asarray(mask) > 0
    count = jnp.maximum(mask.sum(axis, keepdims=True), 1)
    x = jnp.where(mask, x, 0.0)
    # Twice, because the first mean is rounded, and the remainder of equal values would be divided by nearly 0.
    for _ in range(2):
        x = jnp.where(mask, x - x.sum(axis, keepdims=True) / count, 0.0)
    return x * jax.lax.rsqrt((x * x).sum(axis, keepdims=True) / count + 1e-8)


def tchebycheff(
    rewards: Num[Array, "... S"], weights: Num[Array, "..."], ideal: Num[Array, "..."], smoothing: float = 0.0
) -> Float[Array, "..."]:
    """-max_i w_i (z_i - r_i): minus the largest weighted distance to the ideal point.

    Its maximisers reach the concave parts of a front, which no weighted sum reaches. With `smoothing` m > 0: -m log
    sum_i exp(w_i (z_i - r_i) / m), differentiable and at most m log S lower (arXiv 2402.19078).

    Args:
      rewards: on one scale (see `calibrate`).
      weights: [S] or [..., S], not negative.
      ideal: z, [S] or [..., S], at least the best reward of every objective; a reward beyond it counts as a negative
        distance, so that more is never worse.
      smoothing: not negative.

    Raises ValueError for negative smoothing and for weights that do not fit.
    """
    if smoothing < 0:
        raise ValueError(f"smoothing={smoothing} is negative; make it 0 for the exact maximum, or positive")
    rewards, weights = _fitting(rewards, weights)
    distance = weights * (jnp.asarray(ideal, jnp.float32) - rewards)
    if smoothing == 0:
        return -distance.max(-1)
    return -smoothing * jax.nn.logsumexp(distance / smoothing, axis=-1)


def pama(advantages: Num[Array, "*batch S"], noon: bool = True) -> Float[Array, "*batch"]:
    """The point nearest 0 between the least and the largest of the S advantages: the min-norm mixture of every token by
    itself (PAMA, arXiv 2508.07768).

    Where objectives disagree in sign it is 0; where they agree, the one of smallest size. `noon`, as published, first
    raises negative advantages to 0, and the mixture is max(min_i A_i, 0). Without weights, it aims at no particular
    trade-off.
    """
    advantages = jnp.asarray(advantages, jnp.float32)
    if noon:
        advantages = jnp.maximum(advantages, 0)
    return jnp.clip(0.0, advantages.min(-1), advantages.max(-1))


# ---- MOC: min-norm weights in the space of the policy


def surrogate_gradients(
    advantages: Num[Array, "B T H"], ratio: Num[Array, "B T"], mask: Shaped[Array, "B T"], clip: float = 0.2
) -> Float[Array, "B T H"]:
    """g_k = mask 1[PPO's unclipped branch] rho A_k: gradient of head k, summed over the tokens, in the log-probs of the
    sampled tokens. A constant to the gradient.

    With J the Jacobian of the log-probs in the parameters, the gradient in the parameters is J^T g_k, and
    ||sum_k c_k J^T g_k|| <= ||J|| ||sum_k c_k g_k||. A small right side therefore bounds the left side, for one
    backward pass instead of H (the upper bound of MGDA-UB, arXiv 1810.04650, for log-probs). PPO clips the mixture by
    the sign of the mixed advantage, so the two agree exactly only while no token is clipped, as in the first minibatch.

    Args:
      ratio: rho = pi / pi_old.
      mask: positions outside count as 0, whatever their values (NaN included).
      clip: range of PPO.
    """
    advantages, ratio = jnp.asarray(advantages, jnp.float32), jnp.asarray(ratio, jnp.float32)[..., None]
    unclipped = jnp.where(advantages > 0, ratio <= 1 + clip, ratio >= 1 - clip)
    counted = (jnp.asarray(mask) > 0)[..., None] & unclipped
    return jax.lax.stop_gradient(jnp.where(counted, ratio * advantages, 0.0))


def gram_matrix(g: Num[Array, "... H"], normalize: str = "none") -> Float[Array, "H H"]:
    """M_kl = <g_k, g_l>, summed over all other axes; for sharded g, the matrix of the whole batch.

    `normalize="gradient"` divides every g_k by its norm (GAPO, arXiv 2507.01915): without it the objective with the
    smallest gradient gets most of the weight. An objective without any gradient is a row of zeros either way, and then
    takes all the weight. Raises ValueError for an unknown `normalize`.
    """
    if normalize not in ("none", "gradient"):
        raise ValueError(f"Gram normalisation {normalize!r} is unknown; choose one of none, gradient")
    g = jnp.asarray(g, jnp.float32)
    axes = tuple(range(g.ndim - 1))
    gram = jnp.tensordot(g, g, axes=(axes, axes), precision=jax.lax.Precision.HIGHEST)
    return gram if normalize == "none" else cosines(gram)


def cosines(gram: Float[Array, "H H"]) -> Float[Array, "H H"]:
    """The Gram matrix of the same gradients, each divided by its norm; rows of zeros stay."""
    squares = jnp.diagonal(gram)
    scale = jnp.where(squares == 0, 0.0, jax.lax.rsqrt(squares))
    return gram * scale[:, None] * scale


def min_norm_weights(gram: Num[Array, "..."], iterations: int = 50) -> Float[Array, " H"]:
    """argmin_c c^T M c over the simplex (MGDA; Désidéri 2012): the convex mixture of gradients with the least norm,
    whose ascent direction hurts no objective.

    H = 2 has a closed form. Beyond, fully corrective Frank-Wolfe: a step towards the best vertex, then one towards the
    optimum of the reached face, until twice the duality gap, a bound on c^T M c - min, is below 2e-6 sum_k c_k M_kk: a
    few iterations even for singular M. If the minimiser is not unique, the result is one of them; for M = 0 it is 1/H.
    A constant to the gradient. M that is not finite gives NaN.

    Args:
      gram: [H, H], symmetric and positive semi-definite, of any scale.
      iterations: at most.

    Raises ValueError where it is not square.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram has shape {gram.shape}; give one [H, H] matrix, and vmap over more")
    gram = jax.lax.stop_gradient(jnp.asarray(gram, jnp.float32))
    n, largest, tiny = gram.shape[0], jnp.diagonal(gram).max(), jnp.finfo(jnp.float32).tiny
    m = gram / jnp.where(largest > 0, largest, 1.0)  # so that no scale of gradients underflows below
    squares, identity = jnp.diagonal(m), jnp.eye(n)

    def advance(c: Array, d: Array) -> Array:
        """c moved along d, which sums to 0, to the least norm or to the edge of the simplex."""
        room, slope = jnp.where(d < 0, -c / d, jnp.inf), (m * d).sum(-1)
        size = jnp.minimum(-(c * slope).sum() / jnp.maximum((d * slope).sum(), tiny), room.min())
        moved = jnp.where(room <= size, 0.0, jnp.maximum(c + size * d, 0))
        return jnp.where((size > 0) & jnp.isfinite(moved).all(), moved, c)

    def step(state):
        i, c = state
        c = advance(c, identity[(m * c).sum(-1).argmin()] - c)
        face = c > 0
        # M x = 1 on the face: a multiple of x is the optimum there. The ridge is for singular M.
        x = jnp.linalg.solve(jnp.where(face[:, None] & face, m + 1e-6 * identity * squares, identity), face * 1.0)
        d = x / x.sum() - c
        c = advance(c, jnp.where(face, d - (d * face).sum() / face.sum(), 0.0))
        return i + 1, c / c.sum()

    def unfinished(state):
        i, c = state
        slope = (m * c).sum(-1)
        return (i < iterations) & ((c * slope).sum() - slope.min() > 1e-6 * (c * squares).sum())

    if n == 2:
        width = squares.sum() - 2 * m[0, 1]  # ||g_1 - g_2||^2
        first = jnp.where(width > 0, jnp.clip((m[1, 1] - m[0, 1]) / jnp.maximum(width, tiny), 0, 1), 0.5)
        c = jnp.stack([first, 1 - first])
    else:
        _, c = jax.lax.while_loop(unfinished, step, (0, jnp.full(n, 1 / n, jnp.float32)))
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(gram).all(), c, jnp.nan))


# ---- MOC: control, rewards near the preference


def calibrate(
    rewards: Num[Array, "... S"], low: Num[Array, "... S"], high: Num[Array, "... S"]
) -> Float[Array, "... S"]:
    """clip((R - low) / (high - low), 0, 1): rewards on the scale of preference weights.

    `low` and `high` are best quantiles of the initial policy's rewards, fixed for the whole training. Raises ValueError
    where high is not above low, as for a constant reward (seen only outside jit).
    """
    if _concrete(low, high) and not (np.asarray(high) > np.asarray(low)).all():
        raise ValueError(f"high {high} is not above low {low} everywhere; leave out rewards that are constant")
    low, high = jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)
    return jnp.clip((jnp.asarray(rewards, jnp.float32) - low) / (high - low), 0, 1)


def fill_missing(
    rewards: Float[Array, "n S"], objectives: Int[Array, "n S"], count: int, samples: int = 1
) -> Float[Array, "n S"]:
    """Rewards with the missing ones, NaN, replaced by the mean of what is known of the same objective: among the
    `samples` consecutive answers to the same prompt, otherwise among all answers, otherwise 0.

    A missing reward then neither favours its answer nor moves the mean that answers are compared with.

    Args:
      objectives: numbers of the objectives, below `count`.
    """
    n, S = rewards.shape
    known = ~jnp.isnan(rewards)
    each = jax.nn.one_hot(objectives, count) * known[..., None]
    each = each.reshape(n // samples, samples * S, count)
    sums = jnp.einsum("gac,ga->gc", each, jnp.where(known, rewards, 0).reshape(n // samples, samples * S))
    counts = each.sum(1)
    overall = sums.sum(0) / jnp.maximum(counts.sum(0), 1)
    means = jnp.where(counts > 0, sums / jnp.maximum(counts, 1), overall)
    means = jnp.repeat(means, samples, axis=0, total_repeat_length=n)
    return jnp.where(known, rewards, jnp.take_along_axis(means, objectives, axis=1))


def target_map(p: Num[Array, "*batch S"], kind: str = "identity") -> Float[Array, "*batch S"]:
    """Calibrated rewards t(p) that preference weights p ask for: p itself, p / ||p||_2 ("l2", as
    Rewards-in-Context, arXiv 2402.10207) or p / max p ("max").

    The targets of "identity" sum to 1: two equal weights ask for 1/2 each even where 1 is within reach. "max" always
    asks for 1 in the objective with the largest weight. Raises ValueError for an unknown kind.
    """
    p = jnp.asarray(p, jnp.float32)
    if kind == "identity":
        return p
    if kind == "l2":
        return p / jnp.sqrt((p * p).sum(-1, keepdims=True))
    if kind == "max":
        return p / p.max(-1, keepdims=True)
    raise ValueError(f"target map {kind!r} is unknown; choose one of identity, l2, max")


def control_reward(
    calibrated: Num[Array, "... S"], p: Num[Array, "..."], target: str = "identity", sided: str = "two"
) -> Float[Array, "..."]:
    """-(1/S) sum_i (R_i - t_i(p))^2 of calibrated rewards and weights p [S] or [..., S].

    "two" is the squared distance that MOC's reviews describe; it also pushes a reward down to its target. "hinge" is
    -(1/S) sum_i max(0, t_i(p) - R_i)^2, which allows more. Raises ValueError for unknown `target` or `sided`, and for
    weights that do not fit.
    """
    calibrated, p = _fitting(calibrated, p)
    short = target_map(p, target) - calibrated
    if sided == "hinge":
        short = jnp.maximum(short, 0)
    elif sided != "two":
        raise ValueError(f"control reward sided={sided!r} is unknown; choose one of two, hinge")
    return -(short * short).mean(-1)


def moc_heads(
    calibrated: Num[Array, "... S"],
    p: Num[Array, "..."],
    heads: str = "reward_sum+control",
    target: str = "identity",
    sided: str = "two",
) -> Float[Array, "... H"]:
    """Rewards of MOC's H heads from calibrated rewards and preference weights p [S] or [..., S].

    MOC (arXiv 2604.04497) trains one policy for all p, stated in its prompt, on min-norm mixtures of objectives. Its
    full text was not available: this is a reconstruction from the abstract and the public reviews of an earlier
    version. Each head has its own values and advantages A_k; an update mixes them as
    `weighted_sum(A, min_norm_weights(gram_matrix(surrogate_gradients(A, ratio, mask))))` and goes on as PPO.

    Settings choose among the interpretations:
      heads: "reward_sum+control", H = 2: sum_i p_i R_i and the control reward; the default, because the reviews mention
        two weights, and because min-norm weights of the rewards alone ignore p and favour the smallest gradient.
        "per_reward+control", H = S + 1: every R_i and the control reward; p enters through control only.
      target: "identity" by default, because controllability is reported as the squared error of R against p itself.
      sided: "two" by default, for the same reason. If rewards end lower than necessary, try "hinge" with "max".

    `scalarization.MinNorm` has the other ones: a head per preference vector, the size of the control reward, the
    normalisation of the Gram matrix.

    Raises ValueError for unknown settings, and for weights that do not fit.
    """
    calibrated, p = _fitting(calibrated, p)
    control = control_reward(calibrated, p, target, sided)[..., None]
    if heads == "reward_sum+control":
        return jnp.concatenate([weighted_sum(calibrated, p)[..., None], control], axis=-1)
    if heads == "per_reward+control":
        return jnp.concatenate([jnp.broadcast_to(calibrated, (*control.shape[:-1], calibrated.shape[-1])), control], -1)
    raise ValueError(f"heads {heads!r} are unknown; choose one of reward_sum+control, per_reward+control")


# ---- off-line, and at decoding time


def modpo_loss(
    logps: Pair,
    reference: Pair,
    beta: float,
    *,
    weights: Num[Array, "... S"],
    rewards: Pair,
    kind: str = "sigmoid",
    preference: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """Losses of pairs labelled for objective 0, with the other objectives as margins (MODPO, arXiv 2310.03708).

    h = (beta (log-ratio of chosen - of rejected) - sum_{i>0} w_i (r_i(chosen) - r_i(rejected))) / w_0, and the loss is
    -log s(h), or max(0, 1 - h) for "hinge". With w_0 = 1 and the rest 0 it is `preference.sigmoid`, or `hinge`.

    Args:
      logps, reference: log-probs [*B] of the chosen and the rejected answers, summed over tokens, under the policy and
        under the reference.
      beta: strength of the tie to the reference, positive.
      weights: that of the labelled objective first and positive.
      rewards: rewards [*B, S - 1] of the chosen and the rejected answers by the other objectives, in the units of
        Bradley-Terry (a gap of 1 is odds of e), as are those of `preference.implicit_rewards`.
      kind: "sigmoid" or "hinge".
      preference: soft labels, see `preference.expected`; None for labels that are certain.

    Raises ValueError for an unknown kind, rewards that are not one fewer than weights, and a w_0 that is not positive
    (seen only outside jit).
    """
    if kind not in ("sigmoid", "hinge"):
        raise ValueError(f"MODPO loss {kind!r} is unknown; choose one of sigmoid, hinge")
    if _concrete(weights) and not (np.asarray(weights)[..., 0] > 0).all():
        raise ValueError(f"weights {weights} of MODPO start with one that is not positive; label pairs for another one")
    gaps = jnp.asarray(rewards[0], jnp.float32) - jnp.asarray(rewards[1], jnp.float32)
    weights = jnp.asarray(weights, jnp.float32)
    margin = weighted_sum(gaps, weights[..., 1:])
    h = (beta * ((logps[0] - reference[0]) - (logps[1] - reference[1])) - margin) / weights[..., 0]

    def loss(h: Float[Array, "..."]) -> Float[Array, "..."]:
        return -jax.nn.log_sigmoid(h) if kind == "sigmoid" else jax.nn.relu(1 - h)

    return loss(h) if preference is None else expected(loss(h), loss(-h), preference)


def divergence_alpha(divergence: str | float) -> float:
    """The alpha of a divergence of `combine_logps`. Raises ValueError for one that is unknown or not finite."""
    if isinstance(divergence, int | float) and abs(divergence) <= sys.float_info.max:
        return float(divergence)
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence {divergence!r} is unknown; choose {', '.join(DIVERGENCES)} or a number (alpha)")
    return DIVERGENCES[divergence]


def combine_logps(
    logps: Num[Array, "... K V"], weights: Num[Array, "..."], divergence: str | float = "reverse_kl"
) -> Float[Array, "... V"]:
    """Normalised log-probs of K policies mixed for decoding (MOD, arXiv 2406.18853).

    The rule follows the divergence that tied the policies to their common reference:
      alpha, a number: (sum_k w_k pi_k^-alpha)^(-1/alpha); -1 is the plain mixture.
      forward_kl: alpha 1, the weighted harmonic mean 1 / sum_k (w_k / pi_k).
      reverse_kl: the limit alpha 0, the weighted geometric mean prod_k pi_k^{w_k}; RLHF and DPO. Weights may be
        negative.
    One-hot weights give that policy, which no policy of weight 0 can disturb. Normalising per token, not per answer,
    is an approximation; for all but reverse_kl, adding to `logps` each policy's log-prob of the tokens so far reduces
    its error.

    Args:
      logps: log-probs of the next token.
      weights: [K], or one row per example.

    Raises ValueError for an unknown divergence, weights that do not fit, and negative ones outside reverse_kl (seen
    only outside jit).
    """
    alpha = divergence_alpha(divergence)
    if alpha != 0 and _concrete(weights) and (np.asarray(weights) < 0).any():
        raise ValueError(f"weights {weights} are negative for some policy; only reverse_kl takes such weights")
    by_policy, weights = _fitting(jnp.swapaxes(logps, -1, -2), weights, spread=1)
    # `where`, because a policy of weight 0 may rule a token out with -inf.
    if alpha == 0:
        mixed = jnp.where(weights == 0, 0.0, weights * by_policy).sum(-1)
    else:
        terms = jnp.where(weights == 0, -jnp.inf, jnp.log(weights) - alpha * by_policy)
        mixed = -jax.nn.logsumexp(terms, axis=-1) / alpha
    return jax.nn.log_softmax(mixed, axis=-1)


def _concrete(*arrays: Array) -> bool:
    """Whether the values are known, as they are outside jit."""
    return not any(isinstance(x, Tracer) for x in arrays)


def _fitting(
    x: Num[Array, "..."], weights: Num[Array, "..."], spread: int = 0
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Both in float32, the weights with `spread` new axes before their last."""
    x, weights = jnp.asarray(x, jnp.float32), jnp.asarray(weights, jnp.float32)
    if x.ndim == 0 or weights.ndim == 0 or x.shape[-1] != weights.shape[-1]:
        raise ValueError(f"weights of shape {weights.shape} do not fit {x.shape}; give one per objective, last axis")
    return x, jnp.expand_dims(weights, tuple(range(-1 - spread, -1)))
