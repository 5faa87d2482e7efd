"""Pairwise win rates under several criteria (the protocol of Personalized Soups, arXiv 2310.11564).

A user is a combination of criteria. A judge compares two answers under each criterion alone, the verdicts are combined
per prompt, and the rate counts prompts won against prompts lost.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from pjrlhf.errors import UserError
from pjrlhf.evaluation.statistics import bootstrap_interval
from pjrlhf.judges.judge import Judge, ask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """Counts of n = wins + losses + ties comparisons and their rates in [0, 1].

    `rate` = wins / (wins + losses) leaves ties out, `rate_half` = (wins + ties / 2) / n counts a tie as half a win;
    `low` and `high` are the bootstrap interval of `rate` over prompts. A rate of no comparisons is NaN.
    """

    wins: int
    losses: int
    ties: int
    n: int
    rate: float
    rate_half: float
    low: float
    high: float


def combo_outcomes(
    judge: Judge, prompts: Sequence[str], a: Sequence[str], b: Sequence[str], criteria: Sequence[str]
) -> np.ndarray:
    """Verdicts of answers `a` against `b` under each of C criteria, int8 [N, C].

    Wrap the judge in `judges.BothOrders` if its verdict may depend on the order of the answers.
    """
    if not criteria:
        raise UserError("criteria: the combination is empty; name at least one criterion")
    return np.stack([ask(judge, prompts, a, b, criterion) for criterion in criteria], axis=1)


def aggregate(outcomes: ArrayLike, how: str = "sum_sign") -> np.ndarray:
    """One outcome per prompt from verdicts [N, C], for `win_rate`.

    Args:
      outcomes: int [N, C] in {+1, 0, -1}.
      how: "sum_sign" -> [N], the side that wins more criteria wins the prompt; "mean" -> [N, C], every criterion stays
        a comparison of its own, so that the rate is a mean over criteria as well as over prompts.
    """
    outcomes = np.asarray(outcomes, np.int8)
    if how == "sum_sign":
        return np.sign(outcomes.sum(1, dtype=np.int64)).astype(np.int8)
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
    outcomes = np.asarray(outcomes)
    if not np.isin(outcomes, (-1, 0, 1)).all():
        raise UserError(f"outcomes: values {np.unique(outcomes)[:5]}; only -1, 0 and +1 can be counted")
    rows = outcomes.reshape(len(outcomes), -1) if outcomes.size else outcomes.reshape(0, 1)
    groups = np.arange(len(rows)) if clusters is None else np.asarray(clusters)
    n, wins, losses = rows.size, int((rows > 0).sum()), int((rows < 0).sum())
    ties = n - wins - losses
    low, high = bootstrap_interval(
        rows.ravel(), np.repeat(groups, rows.shape[1]), "ratio", resamples=resamples, seed=seed, level=level
    )
    return Rate(
        wins=wins,
        losses=losses,
        ties=ties,
        n=n,
        rate=wins / (wins + losses) if wins + losses else math.nan,
        rate_half=(wins + ties / 2) / n if n else math.nan,
        low=low,
        high=high,
    )
