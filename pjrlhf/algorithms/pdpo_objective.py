"""The training objective of P-DPO and P-RM (P-RLHF, arXiv 2402.05133), and the margins of pairs as their users see
them.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pjrlhf.algorithms.pdpo_settings import Entry
from pjrlhf.data.comparisons import SIDES, PairBatch
from pjrlhf.feedback.pairs import Pairs
from pjrlhf.models.adapters import Backbone
from pjrlhf.models.users import UserModel
from pjrlhf.objectives import preference as losses
from pjrlhf.rollout import scoring
from pjrlhf.rollout.preference import PreferenceConfig, answer_scores, pair_losses, pair_rewards, reward_shift
from pjrlhf.runtime.scorer import Scorer
from pjrlhf.training.metrics import Metrics
from pjrlhf.types import Array, Params, PRNGKey


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
