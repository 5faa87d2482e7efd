"""The best of N answers by the rewards of a run: selection guided by rewards, which trains nothing."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from pjrlhf.algorithms import reward
from pjrlhf.algorithms.modpo import answer_rewards
from pjrlhf.data.messages import Prompt
from pjrlhf.runtime.run import Run


def best_of(scores: Float[np.ndarray, "M N"]) -> Int[np.ndarray, " M"]:
    """Of each row of N scores the place of the highest one, of equal ones the first."""
    return scores.argmax(1)


class Rewarded:
    """Sampled answers with their rewards.

    Args:
      requests, texts: of M answers.
      name: what messages call the answers.

    Attributes:
      rewards: float32 [M, R] by all R rewards of the run, in standard deviations of answers of the base, as in
        training. One without a value counts as the mean of these.
      usable: bool [M], not of answers without text, which are worse than all others.

    Raises:
      UserError: there are no rewards, see `reward.load`, or a source fails.
    """

    rewards: Float[np.ndarray, "M R"]
    usable: Bool[np.ndarray, " M"]

    def __init__(self, run: Run, requests: Sequence[Prompt], texts: Sequence[str], name: str):
        rewarder = reward.load(run)
        run.audience.announce(name, len(texts))
        raw, self.usable = answer_rewards(run, rewarder, requests, texts, name)
        self.rewards = np.nan_to_num((raw - np.asarray(rewarder["mean"])) / np.asarray(rewarder["std"]), nan=0.0)

    def best(self, N: int, weights: Float[np.ndarray, "..."]) -> Int[np.ndarray, " M/N"]:
        """Of every N consecutive answers the number of the best, by rewards weighed with `weights` [R] or [M, R]."""
        total = np.where(self.usable, (self.rewards * weights).sum(1), -np.inf).reshape(-1, N)
        return np.arange(len(total)) * N + best_of(total)
