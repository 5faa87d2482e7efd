"""The objective of P-DPO and P-RM for batches of comparisons: scores, rewards and losses of pairs as their users see
them (P-RLHF, arXiv 2402.05133).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Float

from pjrlhf.data.comparisons import PairBatch
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import Backbone
from pjrlhf.models.users import UserModel
from pjrlhf.objectives import preference as losses
from pjrlhf.rollout import scoring
from pjrlhf.settings import Settings, setting
from pjrlhf.types import Array, Params, PRNGKey

HEADS = ("policy", "reward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig(Settings):
    """The objective.

    `head` "policy" scores an answer by beta log(pi / reference), as DPO does; "reward" by a scalar head on its last
    token, without a reference and with beta 1 (P-RM, arXiv 2402.05133, section 4.1). `loss` and `label_smoothing` as
    in `objectives.preference.pairwise_loss`; `alpha` is the share of the user-specific term; `mixture` "exact" puts
    every pair in twice (its user, the generic user), "dropout" once with the user dropped with probability 1 - alpha:
    the same gradient in expectation at half the cost.
    """

    head: str = setting("policy", "policy (P-DPO), or reward (P-RM)", choices=HEADS)
    loss: str = setting(
        "sigmoid", "see objectives/preference.py", choices=lambda: tuple(losses.PAIRWISE), extensible=True
    )
    beta: float = setting(0.1, "inverse temperature of the implicit reward", above=0.0, high=1e6)
    alpha: float = setting(
        0.5, "fraction of the user-specific term; the rest trains the generic user", low=0.0, high=1.0
    )
    mixture: str = setting(
        "exact", "exact: every pair twice; dropout: once, at half the cost", choices=("exact", "dropout")
    )
    label_smoothing: float = setting(0.0, "fraction of labels taken for wrong", low=0.0, below=0.5)
    sft_weight: float = setting(0.0, "weight of the log-likelihood of the chosen answers", low=0.0, high=1e6)

    def check(self) -> None:
        try:
            loss = losses.PAIRWISE.get(self.loss)
        except UserError as error:
            raise UserError(f"loss: {error}") from error
        if self.label_smoothing and "label_smoothing" not in loss.options:
            raise UserError(f"label_smoothing: loss {self.loss!r} has none; set it to 0 or choose another loss")
        if self.head == "reward" and (self.sft_weight or not loss.for_rewards):
            known = [name for name, other in losses.PAIRWISE.items() if other.for_rewards]
            raise UserError(
                f"head: 'reward' with loss {self.loss!r} and sft_weight {self.sft_weight} needs a policy; choose from "
                f"{', '.join(known)}, and sft_weight 0"
            )

    @property
    def scale(self) -> float:
        """What a score difference is multiplied by: beta for log-ratios, 1 for rewards."""
        return self.beta if self.head == "policy" else 1.0


def answer_scores(
    backbone: Backbone, users: UserModel, trainable: Params, batch: PairBatch, dropout_key: PRNGKey | None = None
) -> Float[Array, "2 B"]:
    """Scores of the chosen and rejected answers as each pair's user sees them: summed log-probs, nats, or, where
    `trainable` has "heads", rewards.

    Args:
      trainable: {"bank": the adapters, "users": parameters of the user model, whose table has a row for each of
        `batch.places`}, and "heads" of a reward model.
      dropout_key: see `Policies`.
    """
    user_tokens, mix = users.apply(trainable["users"], batch.places)
    one = jnp.ones((1, 1))
    policies = backbone.policies(trainable["bank"], one if mix is None else mix, user_tokens, dropout_key)
    if "heads" in trainable:
        scores = scoring.packed_rewards(policies, trainable["heads"], one, batch.rows)
    else:
        scores = scoring.packed_logps(policies, batch.rows)
    return scores.reshape(-1, 2).T


def _references(config: PreferenceConfig, batch: PairBatch) -> Float[Array, "2 B"]:
    """What the scores of `answer_scores` are measured against; rewards against nothing."""
    return batch.reference.T if config.head == "policy" else jnp.zeros_like(batch.reference.T)


def pair_rewards(
    config: PreferenceConfig, scores: Float[Array, "2 B"], batch: PairBatch
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(chosen, rejected) rewards from what `answer_scores` gives, constants to the gradient: those of the head, or beta
    log(pi / reference), per token where the loss is.
    """
    chosen, rejected = losses.implicit_rewards(scores, _references(config, batch), config.scale)
    if "lengths" in losses.PAIRWISE.get(config.loss).options:
        return chosen / batch.counts[:, 0], rejected / batch.counts[:, 1]
    return chosen, rejected


def reward_shift(config: PreferenceConfig, scores: Float[Array, "2 B"], batch: PairBatch) -> Float[Array, "2"]:
    """Sum and number of the rewards of both answers so far: `batch.shift` and those of the batch. Their
    mean is the reward shift of BCO (arXiv 2404.04656).
    """
    rewards = jnp.stack(losses.implicit_rewards(scores, _references(config, batch), config.scale))
    before = jnp.zeros(2) if batch.shift is None else batch.shift
    return before + jnp.stack([rewards.sum(), jnp.asarray(float(rewards.size))])


def pair_losses(config: PreferenceConfig, scores: Float[Array, "2 B"], batch: PairBatch) -> Float[Array, " B"]:
    """The loss of every pair from what `answer_scores` gives."""
    takes, options = losses.PAIRWISE.get(config.loss).options, {}
    if "lengths" in takes:
        options["lengths"] = batch.counts.T
    if "label_smoothing" in takes:
        options["label_smoothing"] = config.label_smoothing
    if "margin" in takes:
        options["margin"] = batch.margin
    if "delta" in takes:
        total, count = reward_shift(config, scores, batch)
        options["delta"] = total / count
    references = _references(config, batch)
    return losses.pairwise_loss(config.loss, scores, references, config.scale, preference=batch.preference, **options)
