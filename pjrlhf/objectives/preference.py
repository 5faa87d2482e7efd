"""Losses on preference pairs, on arrays. B pairs; s is the logistic function."""

import inspect
from collections.abc import Callable

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


def implicit_rewards(
    chosen: jax.Array, rejected: jax.Array, ref_chosen: jax.Array, ref_rejected: jax.Array, beta: float
) -> tuple[jax.Array, jax.Array]:
    """(chosen, rejected) rewards [B] of summed log-probs [B]: beta log(pi / ref), constants to the gradient (DPO, arXiv
    2305.18290, eq. 5 without the term that both answers share).
    """
    rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return jax.lax.stop_gradient(rewards)


# A pairwise loss takes the log-ratios w = log pi/ref of the chosen and l of the rejected answer, float32 [B], summed
# over tokens, and gives losses [B]. Its keyword-only arguments are the options that it knows.


def sigmoid(
    w: jax.Array, l: jax.Array, beta: float, *, label_smoothing: float = 0.0, margin: jax.Array | float = 0.0
) -> jax.Array:
    """-log s(h), h = beta (w - l) - margin (DPO, arXiv 2305.18290, eq. 7; the margin is the offset of ODPO, arXiv
    2402.10571).

    With `label_smoothing` e: -(1 - e) log s(h) - e log s(-h) (conservative DPO, Mitchell 2023, "A note on DPO with
    noisy preferences").
    """
    h = beta * (w - l) - margin
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(h) - label_smoothing * jax.nn.log_sigmoid(-h)


def robust(
    w: jax.Array, l: jax.Array, beta: float, *, label_smoothing: float = 0.0, margin: jax.Array | float = 0.0
) -> jax.Array:
    """(-(1 - e) log s(h) + e log s(-h)) / (1 - 2 e): the DPO loss of clean labels in expectation where a share e =
    `label_smoothing` < 1/2 of them is flipped (arXiv 2403.00409). May be negative.
    """
    h = beta * (w - l) - margin
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(h) + label_smoothing * jax.nn.log_sigmoid(-h)
    return losses / (1 - 2 * label_smoothing)


def ipo(w: jax.Array, l: jax.Array, beta: float) -> jax.Array:
    """(w - l - 1 / (2 beta))^2 (IPO, arXiv 2310.12036, eq. 17, beta is its tau); log-probs summed over tokens."""
    return (w - l - 1 / (2 * beta)) ** 2


def ipo_norm(
    w: jax.Array, l: jax.Array, beta: float, *, chosen_length: jax.Array, rejected_length: jax.Array
) -> jax.Array:
    """`ipo` on log-probs averaged over the tokens of each answer: what IPO's authors ran, and TRL's "ipo"."""
    return ipo(_per_token(w, chosen_length), _per_token(l, rejected_length), beta)


def hinge(w: jax.Array, l: jax.Array, beta: float, *, margin: jax.Array | float = 0.0) -> jax.Array:
    """max(0, 1 - beta (w - l) + margin): SLiC (arXiv 2305.10425, eq. 1) on log-ratios, as normalised by RSO (arXiv
    2309.06657, "hinge-norm").
    """
    return jax.nn.relu(1 - beta * (w - l) + margin)


def sigmoid_norm(
    w: jax.Array,
    l: jax.Array,
    beta: float,
    *,
    chosen_length: jax.Array,
    rejected_length: jax.Array,
    label_smoothing: float = 0.0,
    margin: jax.Array | float = 0.0,
) -> jax.Array:
    """`sigmoid` on log-ratios averaged over the tokens of each answer (length-normalised DPO, Tulu 3, arXiv
    2411.15124); `beta` is about as many times larger as answers have tokens.
    """
    w, l = _per_token(w, chosen_length), _per_token(l, rejected_length)
    return sigmoid(w, l, beta, label_smoothing=label_smoothing, margin=margin)


def apo_zero(w: jax.Array, l: jax.Array, beta: float) -> jax.Array:
    """1 - s(beta w) + s(beta l): chosen up and rejected down, for chosen answers better than the model's own (APO,
    arXiv 2408.06266, eq. 7).
    """
    return jax.nn.sigmoid(-beta * w) + jax.nn.sigmoid(beta * l)


def apo_down(w: jax.Array, l: jax.Array, beta: float) -> jax.Array:
    """s(beta w) + 1 - s(beta (w - l)): both down, rejected further, for chosen answers worse than the model's own (APO,
    arXiv 2408.06266, eq. 8).
    """
    return jax.nn.sigmoid(beta * w) + jax.nn.sigmoid(-beta * (w - l))


def bco_pair(w: jax.Array, l: jax.Array, beta: float, *, delta: jax.Array | float = 0.0) -> jax.Array:
    """-log s(beta w - delta) - log s(-(beta l - delta)) (BCO, arXiv 2404.04656).

    `delta` is the reward shift: a running mean of the implicit rewards of both answers, kept by the caller and no part
    of the gradient.
    """
    delta = jax.lax.stop_gradient(delta)
    return -jax.nn.log_sigmoid(beta * w - delta) - jax.nn.log_sigmoid(delta - beta * l)


PAIRWISE: dict[str, Callable[..., jax.Array]] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "ipo": ipo,
    "ipo_norm": ipo_norm,
    "hinge": hinge,
    "sigmoid_norm": sigmoid_norm,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "bco_pair": bco_pair,
}


def options(kind: str) -> frozenset[str]:
    """The options of `pairwise_loss` that the loss `kind` uses. ValueError where there is no such loss."""
    if kind not in PAIRWISE:
        raise ValueError(f"pairwise loss {kind!r} is unknown; choose one of {', '.join(PAIRWISE)}")
    parameters = inspect.signature(PAIRWISE[kind]).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def pairwise_loss(
    kind: str,
    chosen: jax.Array,
    rejected: jax.Array,
    ref_chosen: jax.Array,
    ref_rejected: jax.Array,
    beta: float,
    *,
    label_smoothing: float = 0.0,
    chosen_length: jax.Array | None = None,
    rejected_length: jax.Array | None = None,
    margin: jax.Array | float | None = None,
    delta: jax.Array | float | None = None,
) -> jax.Array:
    """Losses [B] of preference pairs.

    Args:
      kind: a key of `PAIRWISE`.
      chosen, rejected, ref_chosen, ref_rejected: log-probs [B], float32, summed over the tokens of the answer.
      beta: strength of the tie to the reference, positive.
      label_smoothing: share of labels taken for wrong, in [0, 1/2).
      chosen_length, rejected_length: scored tokens [B]; needed by the losses per token, ignored by the others.
      margin: [B] or scalar, how much larger the implicit reward of chosen must be.
      delta: reward shift of "bco_pair".

    Raises:
      ValueError: unknown kind, an option that this kind does not use, or lengths missing.
    """
    known = options(kind)
    given = {
        "label_smoothing": label_smoothing or None,
        "chosen_length": chosen_length,
        "rejected_length": rejected_length,
        "margin": margin,
        "delta": delta,
    }
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("label_smoothing", "margin", "delta"):
        if name in given and name not in known:
            raise ValueError(f"pairwise loss {kind!r} has no {name}; leave it out or choose another loss")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} is not in [0, 0.5); make it the share of wrong labels")
    missing = [name for name in ("chosen_length", "rejected_length") if name in known and name not in given]
    if missing:
        raise ValueError(f"pairwise loss {kind!r} works per token; give {' and '.join(missing)}")
    given = {name: value for name, value in given.items() if name in known}
    return PAIRWISE[kind](chosen - ref_chosen, rejected - ref_rejected, beta, **given)


def sft_term(chosen: jax.Array, chosen_length: jax.Array) -> jax.Array:
    """Negative log-likelihood per token of the chosen answers, [B] nats, to be added with a weight of one's own
    (iterative RPO, arXiv 2404.19733, eq. 1).
    """
    return -_per_token(chosen, chosen_length)


def _per_token(logps: jax.Array, length: jax.Array) -> jax.Array:
    return logps / jnp.maximum(length, 1)


def mixture(
    losses: jax.Array, generic: jax.Array, alpha: float, weight: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """alpha mean over user rows + (1 - alpha) mean over generic rows (P-RLHF, arXiv 2402.05133), as (sum, count).

    Every pair goes in twice, once with its user and once as the generic user, so both means are over equally many
    rows and the mixture is sum / count with row weights 2 alpha and 2 (1 - alpha). Sums and counts of micro-batches
    add up to those of the whole batch, however its rows are dealt out; the means themselves would not.

    Args:
      losses: [B], half of them (by `weight`) generic.
      generic: bool [B], which copy a row is; the user copy of an unknown user counts as a user row.
      alpha: share of the user rows, in [0, 1].
      weight: [B], 0 leaves a row out, equal for both copies of a pair; None counts every row once.
    """
    weight = jnp.ones_like(losses) if weight is None else weight
    share = jnp.where(generic, 2 * (1 - alpha), 2 * alpha)
    # where, not a product alone: the loss of a row left out may be infinite
    return jnp.where(weight > 0, losses * weight * share, 0.0).sum(), weight.sum()


def user_dropout(key: jax.Array, users: jax.Array, alpha: float) -> jax.Array:
    """User indices [B] with each replaced by 0, the generic user, with probability 1 - alpha.

    One row per pair then has the gradient of `mixture` in expectation, at half its cost and with more variance.
    """
    return jnp.where(jax.random.bernoulli(key, alpha, users.shape), users, 0)
