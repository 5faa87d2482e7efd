"""Pairwise win rates under several criteria (the protocol of Personalized Soups, arXiv 2310.11564).

A user is a combination of criteria. A judge compares two answers under each criterion alone, the verdicts are combined
per prompt, and the rate counts prompts won against prompts lost.
"""

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike

from pjrlhf.errors import UserError
from pjrlhf.evaluation.statistics import bootstrap_interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """Counts of n = wins + losses + ties comparisons and their rates in [0, 1].

    `rate` = wins / (wins + losses) leaves ties out, `rate_half` = (wins + ties / 2) / n counts a tie as half a win, and
    a soft verdict v as (1 + v) / 2 of one; `low` and `high` are the bootstrap interval of `rate` over prompts. A rate
    of no comparisons is NaN. Comparisons without a verdict are `unjudged` and in no other count.
    """

    wins: int
    losses: int
    ties: int
    n: int
    rate: float
    rate_half: float
    low: float
    high: float
    unjudged: int = 0


def aggregate(outcomes: ArrayLike, how: str = "sum_sign") -> np.ndarray:
    """One outcome per prompt from verdicts [N, C], for `win_rate`.

    Args:
      outcomes: [N, C] in [-1, 1] or NaN.
      how: "sum_sign" -> [N], the side that wins more criteria wins the prompt, which has no outcome where a criterion
        has none; "mean" -> [N, C], every criterion stays a comparison of its own, so that the rate is a mean over
        criteria as well as over prompts.
    """
    outcomes = np.asarray(outcomes, np.float64)
    if how == "sum_sign":
        return np.sign(outcomes.sum(1))
    if how == "mean":
        return outcomes
    raise UserError(f"aggregate {how!r}: unknown rule; use sum_sign or mean")


def win_rate(
    outcomes: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Rate:
    """Win rate of outcomes [P] or [P, ...] whose first axis is the prompt.

    Outcomes of one prompt (its combinations, criteria or opponents on the other axes) are not independent, so the
    interval resamples prompts. Where rows repeat prompts, `clusters` [P] names the prompt of each row.
    """
    outcomes = np.asarray(outcomes, np.float64)
    if (np.abs(outcomes) > 1).any():
        raise UserError(f"outcomes: values {np.unique(outcomes)[:5]}; only -1 to +1 can be counted")
    rows = outcomes.reshape(len(outcomes), -1) if outcomes.size else outcomes.reshape(0, 1)
    groups = np.arange(len(rows)) if clusters is None else np.asarray(clusters)
    groups, judged = np.repeat(groups, rows.shape[1]), ~np.isnan(rows.ravel())
    verdicts, groups = rows.ravel()[judged], groups[judged]
    n, wins, losses = len(verdicts), int((verdicts > 0).sum()), int((verdicts < 0).sum())
    low, high = bootstrap_interval(verdicts, groups, "ratio", resamples=resamples, seed=seed, level=level)
    return Rate(
        wins=wins,
        losses=losses,
        ties=n - wins - losses,
        n=n,
        rate=wins / (wins + losses) if wins + losses else math.nan,
        rate_half=float((1 + verdicts).mean() / 2) if n else math.nan,
        low=low,
        high=high,
        unjudged=rows.size - n,
    )
