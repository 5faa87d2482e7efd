"""The objective of P-DPO and P-RM (P-RLHF, arXiv 2402.05133): scores, rewards, losses and margins of pairs as their
users see them.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pjrlhf.algorithms.pdpo_settings import Entry, PreferenceConfig
from pjrlhf.feedback.pairs import SIDES, PairBatch, Pairs
from pjrlhf.models.adapters import Backbone
from pjrlhf.models.users import UserModel
from pjrlhf.objectives import preference as losses
from pjrlhf.rollout import scoring
from pjrlhf.runtime.scorer import Scorer
from pjrlhf.training.metrics import Metrics
from pjrlhf.types import Array, Params, PRNGKey


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


def preference_loss(
    backbone: Backbone,
    users: UserModel,
    config: PreferenceConfig,
    trainable: Params,
    batch: PairBatch,
    dropout_key: PRNGKey | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The personalized loss of a batch (P-RLHF, arXiv 2402.05133): alpha times the mean over pairs as their users see
    them, and 1 - alpha times the mean over the copies of the generic user. Without such copies (`batch.generic` is
    None) every pair counts once, as in plain DPO.

    `trainable` and `dropout_key` are those of `answer_scores`.
    """
    scores = answer_scores(backbone, users, trainable, batch, dropout_key)
    pairwise = pair_losses(config, scores, batch)
    if config.sft_weight:
        pairwise = pairwise + config.sft_weight * losses.sft_term(scores[0], batch.counts[:, 0])
    ones = jnp.ones_like(pairwise)
    if batch.generic is None:
        pair = (pairwise.sum(), ones.sum())
    else:
        pair = losses.mixture(pairwise, batch.generic, config.alpha)
    chosen, rejected = pair_rewards(config, scores, batch)
    counted = ones if batch.generic is None else 1.0 - batch.generic
    hits, decided = losses.accuracy(chosen, rejected), counted
    if batch.preference is not None:  # a tie has no better answer
        decided = jnp.where(batch.preference > 0.5, counted, 0.0)
    metrics = {
        "loss": pair,
        "rewards/accuracies": (jnp.where(decided > 0, hits * decided, 0.0).sum(), decided.sum()),
        "rewards/margins": (((chosen - rejected) * counted).sum(), counted.sum()),
        "rewards/chosen": ((chosen * counted).sum(), counted.sum()),
        "rewards/rejected": ((rejected * counted).sum(), counted.sum()),
        "wasted_tokens": scoring.wasted_tokens(batch.rows),
    }
    if batch.shift is not None:
        metrics["rewards/shift"] = tuple(reward_shift(config, scores, batch))
    if config.head == "policy":
        for side, logps in zip(SIDES, scores, strict=True):
            metrics[f"logps/{side}"] = ((logps * counted).sum(), counted.sum())
    return pair[0] / pair[1], metrics


class PairMargins:
    """Reward margins of comparisons by an entry: the reward of chosen minus that of rejected, as people see them."""

    def __init__(self, entry: Entry, users: UserModel, pairs: Pairs, backbone: Backbone, scorer: Scorer):
        self.objective, self.users, self.pairs, self.backbone = entry.objective, users, pairs, backbone
        self.name, self.scorer = entry.name, scorer
        self._margins = jax.jit(self._of_batch)

    def _of_batch(self, backbone: Backbone, trainable: Params, batch: PairBatch) -> Float[Array, " B"]:
        chosen, rejected = pair_rewards(self.objective, answer_scores(backbone, self.users, trainable, batch), batch)
        return chosen - rejected

    def __call__(
        self, trainable: Params, part: str, users: np.ndarray, rows: Sequence[int] | None = None
    ) -> np.ndarray:
        """Float32 [M], of `rows` of a part (all by default), as seen by `users` int32 [N], rows of the user table for
        all N pairs of the part. Of a policy these are the implicit margins, beta Delta log(pi / reference).
        """
        table = self.pairs.tables[part]
        rows = range(len(table)) if rows is None else rows
        return self.scorer(
            f"margins of pairs by {self.name} ({part})",
            rows,
            lambda chunk: self.pairs.collate(part, users, [table[i] for i in chunk], self.users.num_tokens),
            functools.partial(self._margins, self.backbone, trainable),
        )
