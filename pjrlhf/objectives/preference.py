"""Losses on preference pairs, on arrays. B pairs; s is the logistic function; arrays are float32.

A pairwise loss is a function of the log-ratios w = log pi/ref of the chosen and l of the rejected answers, [B], summed
over tokens, and of beta; it returns losses [B]. `takes` declares what else it needs. A config names one of `PAIRWISE`,
or a function of your own as "package.module:function".
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Num

from pjrlhf.registry import Registry
from pjrlhf.types import Array, PRNGKey

# What a pairwise loss can ask for, as keyword arguments:
#   lengths: number of scored tokens of the chosen and rejected answers, [2, B].
#   label_smoothing: fraction of labels assumed wrong.
#   margin: how much larger the implicit reward of the chosen answer must be, [B] or scalar.
#   delta: running mean of the implicit rewards of both answers, scalar.
OPTIONS = ("lengths", "label_smoothing", "margin", "delta")
# Of the chosen and of the rejected answers: [2, B], or two arrays [B] (or of any equal shape).
Pair = Array | Sequence[Array]
Option = Pair | float


def bradley_terry_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    margin: Array | float = 0.0,
    weight: Float[Array, " B"] | None = None,
    preference: Float[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """-log s(r(chosen) - r(rejected) - margin), averaged with `weight` (Ouyang et al. 2022, eq. 1; Llama 2, eq. 2).

    Args:
      chosen, rejected: rewards.
      margin: [B] or scalar, how much better chosen must be.
      weight: 0 leaves a pair out; None counts every pair once.
      preference: see `expected`.
    """
    gap = chosen - rejected - margin
    if weight is not None:
        # `where`, because the rewards of a pair left out may be infinite.
        gap = jnp.where(weight > 0, gap, 0.0)
    losses = -jax.nn.log_sigmoid(gap)
    if preference is not None:
        losses = expected(losses, -jax.nn.log_sigmoid(-gap), preference)
    return losses.mean() if weight is None else (losses * weight).sum() / jnp.maximum(weight.sum(), 1)


def expected(
    losses: Float[Array, "*B"], exchanged: Float[Array, "*B"], preference: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    """p losses + (1 - p) exchanged: the expected loss of pairs with soft labels (RLAIF, arXiv 2309.00267;
    of `sigmoid` it is conservative DPO with a label smoothing 1 - p for every pair).

    Args:
      losses, exchanged: of the pairs, and of the pairs with both answers exchanged.
      preference: p, the probability that chosen is better, in [1/2, 1].
    """
    # `where`, because the loss of the exchanged pair may be infinite.
    return preference * losses + jnp.where(preference < 1, (1 - preference) * exchanged, 0.0)


def accuracy(chosen: Float[Array, "*B"], rejected: Float[Array, "*B"] | float) -> Float[Array, "*B"]:
    """1 where the reward of chosen is strictly larger, 0 where it is not, NaN where either reward is NaN."""
    margin = chosen - rejected
    return jnp.where(jnp.isnan(margin), jnp.nan, (margin > 0).astype(jnp.float32))


def implicit_rewards(logps: Pair, reference: Pair, beta: float) -> tuple[Array, Array]:
    """(chosen, rejected) rewards of summed log-probs: beta log(pi / ref), constants to the gradient (DPO, arXiv
    2305.18290, eq. 5 without the term that both answers share).
    """
    rewards = beta * (logps[0] - reference[0]), beta * (logps[1] - reference[1])
    return jax.lax.stop_gradient(rewards)


@dataclasses.dataclass(frozen=True)
class PairwiseLoss:
    """A loss on pairs and what it needs.

    Attributes:
      function: (w, l, beta, **options) -> losses [B].
      options: the names among `OPTIONS` that it takes.
      for_rewards: whether it also trains reward models, where w and l are rewards and beta is 1.
    """

    function: Callable[..., Float[Array, " B"]]
    options: frozenset[str] = frozenset()
    for_rewards: bool = False

    def __call__(
        self, w: Float[Array, " B"], l: Float[Array, " B"], beta: float, **options: Option
    ) -> Float[Array, " B"]:
        return self.function(w, l, beta, **options)


def takes(*options: str, for_rewards: bool = False) -> Callable[[Callable[..., Array]], PairwiseLoss]:
    """A decorator that declares the options of a pairwise loss. Raises ValueError for one that is not in `OPTIONS`."""
    if unknown := set(options) - set(OPTIONS):
        raise ValueError(f"a pairwise loss cannot take {', '.join(sorted(unknown))}; it may take {', '.join(OPTIONS)}")
    return lambda function: PairwiseLoss(function, frozenset(options), for_rewards)


def _loss(thing: object) -> PairwiseLoss:
    if isinstance(thing, PairwiseLoss):
        return thing
    if callable(thing):
        return PairwiseLoss(cast(Callable[..., Array], thing))
    raise ValueError("is not a function of log-ratios w, l and beta")


PAIRWISE: Registry[PairwiseLoss] = Registry("pairwise loss", _loss)


@PAIRWISE.register("sigmoid")
@takes("label_smoothing", "margin", for_rewards=True)
def sigmoid(
    w: Float[Array, " B"],
    l: Float[Array, " B"],
    beta: float,
    *,
    label_smoothing: float = 0.0,
    margin: Array | float = 0.0,
) -> Float[Array, " B"]:
    """-log s(h), h = beta (w - l) - margin (DPO, arXiv 2305.18290, eq. 7; the margin is the offset of ODPO, arXiv
    2402.10571).

    With `label_smoothing` e: -(1 - e) log s(h) - e log s(-h) (conservative DPO, Mitchell 2023, "A note on DPO with
    noisy preferences").
    """
    h = beta * (w - l) - margin
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(h) - label_smoothing * jax.nn.log_sigmoid(-h)


@PAIRWISE.register("robust")
@takes("label_smoothing", "margin", for_rewards=True)
def robust(
    w: Float[Array, " B"],
    l: Float[Array, " B"],
    beta: float,
    *,
    label_smoothing: float = 0.0,
    margin: Array | float = 0.0,
) -> Float[Array, " B"]:
    """(-(1 - e) log s(h) + e log s(-h)) / (1 - 2 e): the DPO loss of clean labels in expectation where a fraction
    e = `label_smoothing` < 1/2 of them is flipped (arXiv 2403.00409). May be negative.
    """
    h = beta * (w - l) - margin
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(h) + label_smoothing * jax.nn.log_sigmoid(-h)
    return losses / (1 - 2 * label_smoothing)


@PAIRWISE.register("ipo")
@takes()
def ipo(w: Float[Array, " B"], l: Float[Array, " B"], beta: float) -> Float[Array, " B"]:
    """(w - l - 1 / (2 beta))^2 (IPO, arXiv 2310.12036, eq. 17, beta is its tau); log-probs summed over tokens."""
    return (w - l - 1 / (2 * beta)) ** 2


@PAIRWISE.register("ipo_norm")
@takes("lengths")
def ipo_norm(w: Float[Array, " B"], l: Float[Array, " B"], beta: float, *, lengths: Pair) -> Float[Array, " B"]:
    """`ipo` on log-probs averaged over the tokens of each answer: what IPO's authors ran, and TRL's "ipo"."""
    return ipo(_per_token(w, lengths[0]), _per_token(l, lengths[1]), beta)


@PAIRWISE.register("hinge")
@takes("margin", for_rewards=True)
def hinge(
    w: Float[Array, " B"], l: Float[Array, " B"], beta: float, *, margin: Array | float = 0.0
) -> Float[Array, " B"]:
    """max(0, 1 - beta (w - l) + margin): SLiC (arXiv 2305.10425, eq. 1) on log-ratios, as normalised by RSO (arXiv
    2309.06657, "hinge-norm").
    """
    return jax.nn.relu(1 - beta * (w - l) + margin)


@PAIRWISE.register("sigmoid_norm")
@takes("lengths", "label_smoothing", "margin")
def sigmoid_norm(
    w: Float[Array, " B"],
    l: Float[Array, " B"],
    beta: float,
    *,
    lengths: Pair,
    label_smoothing: float = 0.0,
    margin: Array | float = 0.0,
) -> Float[Array, " B"]:
    """`sigmoid` on log-ratios averaged over the tokens of each answer (length-normalised DPO, Tulu 3, arXiv
    2411.15124); `beta` is about as many times larger as answers have tokens.
    """
    w, l = _per_token(w, lengths[0]), _per_token(l, lengths[1])
    return sigmoid(w, l, beta, label_smoothing=label_smoothing, margin=margin)


@PAIRWISE.register("apo_zero")
@takes()
def apo_zero(w: Float[Array, " B"], l: Float[Array, " B"], beta: float) -> Float[Array, " B"]:
    """1 - s(beta w) + s(beta l): chosen up and rejected down, for chosen answers better than the model's own (APO,
    arXiv 2408.06266, eq. 7).
    """
    return jax.nn.sigmoid(-beta * w) + jax.nn.sigmoid(beta * l)


@PAIRWISE.register("apo_down")
@takes()
def apo_down(w: Float[Array, " B"], l: Float[Array, " B"], beta: float) -> Float[Array, " B"]:
    """s(beta w) + 1 - s(beta (w - l)): both down, rejected further, for chosen answers worse than the model's own (APO,
    arXiv 2408.06266, eq. 8).
    """
    return jax.nn.sigmoid(beta * w) + jax.nn.sigmoid(-beta * (w - l))


@PAIRWISE.register("bco_pair")
@takes("delta")
def bco_pair(
    w: Float[Array, " B"], l: Float[Array, " B"], beta: float, *, delta: Array | float = 0.0
) -> Float[Array, " B"]:
    """-log s(beta w - delta) - log s(-(beta l - delta)) (BCO, arXiv 2404.04656).

    `delta` is the reward shift: a running mean of the implicit rewards of both answers, kept by the caller and no part
    of the gradient.
    """
    delta = jax.lax.stop_gradient(delta)
    return -jax.nn.log_sigmoid(beta * w - delta) - jax.nn.log_sigmoid(delta - beta * l)


def pairwise_loss(
    kind: str,
    logps: Pair,
    reference: Pair,
    beta: float,
    *,
    preference: Float[Array, " B"] | None = None,
    **options: Option,
) -> Float[Array, " B"]:
    """Losses of preference pairs.

    Args:
      kind: a name in `PAIRWISE`, or "package.module:function".
      logps: log-probs of the chosen and the rejected answers under the policy, summed over tokens.
      reference: the same under the reference.
      beta: strength of the tie to the reference, positive.
      preference: soft labels, see `expected`; None for labels that are certain.
      options: see `OPTIONS`; `label_smoothing` in [0, 1/2). A loss that does not work per token ignores `lengths`.

    Raises:
      ValueError: unknown kind, an option that this kind does not take, or lengths missing.
    """
    loss, smoothing = PAIRWISE.get(kind), cast(float, options.get("label_smoothing", 0.0))
    for name, value in options.items():
        neutral = name == "lengths" or (name == "label_smoothing" and not value)
        if name not in loss.options and not neutral:
            raise ValueError(f"pairwise loss {kind!r} has no {name}; leave it out or choose another loss")
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"label_smoothing={smoothing} is not in [0, 0.5); make it the fraction of wrong labels")
    if "lengths" in loss.options and "lengths" not in options:
        raise ValueError(f"pairwise loss {kind!r} works per token; give lengths")
    given = {name: value for name, value in options.items() if name in loss.options}
    w, l = logps[0] - reference[0], logps[1] - reference[1]
    losses = loss(w, l, beta, **given)
    if preference is None:
        return losses
    other = dict(given)
    if "lengths" in given:
        other["lengths"] = cast(Pair, given["lengths"])[::-1]
    if "margin" in given:
        other["margin"] = -cast(Array, given["margin"])
    return expected(losses, loss(l, w, beta, **other), preference)


def sft_term(chosen: Float[Array, " B"], chosen_length: Num[Array, " B"]) -> Float[Array, " B"]:
    """Negative log-likelihood per token of the chosen answers, nats, to be added to a loss (iterative RPO, arXiv
    2404.19733, eq. 1).
    """
    return -_per_token(chosen, chosen_length)


def _per_token(logps: Float[Array, " B"], length: Num[Array, " B"]) -> Float[Array, " B"]:
    return logps / jnp.maximum(length, 1)


def mixture(
    losses: Float[Array, " B"], generic: Bool[Array, " B"], alpha: float, weight: Float[Array, " B"] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """alpha mean over user rows + (1 - alpha) mean over generic rows (P-RLHF, arXiv 2402.05133), as (sum, count).

    Every pair goes in twice, once with its user and once as the generic user, so both means are over equally many
    rows and the mixture is sum / count with row weights 2 alpha and 2 (1 - alpha). Sums and counts of micro-batches
    add up to those of the whole batch, in any order of the rows; the means themselves would not.

    Args:
      losses: half of them (by `weight`) generic.
      generic: which copy a row is; the user copy of an unknown user counts as a user row.
      alpha: weight of the user-specific mean, in [0, 1].
      weight: 0 leaves a row out, equal for both copies of a pair; None counts every row once.
    """
    weight = jnp.ones_like(losses) if weight is None else weight
    share = weight * jnp.where(generic, 2 * (1 - alpha), 2 * alpha)
    # `where`, because the loss of a row left out may be infinite.
    return (jnp.where(share > 0, losses, 0.0) * share).sum(), weight.sum()


def user_dropout(key: PRNGKey, users: Int[Array, " B"], alpha: float) -> Int[Array, " B"]:
    """User indices with each replaced by 0, the generic user, with probability 1 - alpha.

    One row per pair then has the gradient of `mixture` in expectation, at half its cost and with more variance.
    """
    return jnp.where(jax.random.bernoulli(key, alpha, users.shape), users, 0)
