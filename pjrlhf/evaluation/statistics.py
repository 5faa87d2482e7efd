"""Intervals and rank statistics for small evaluations."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from pjrlhf.errors import UserError


def bootstrap_interval(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    statistic: str = "mean",
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap interval (BCa, Efron 1987) of a mean or a win ratio, resampling whole clusters.

    Args:
      values: float [N]; for "ratio", outcomes whose sign is win, tie or loss.
      clusters: [N] labels of what was sampled independently (the prompt); None makes every value its own cluster.
      statistic: "mean", or "ratio" = wins / (wins + losses). A cluster without a decided value says nothing about the
        ratio and is left out, so every resample has something to divide by.
      resamples, seed, level: bootstrap resamples, their seed, and the nominal coverage.

    Returns:
      (low, high). Both equal the statistic where all clusters agree (one cluster, or equal values): zero width then
      means "no spread seen", not certainty. (nan, nan) where there is nothing to count.

    Raises:
      UserError: unknown statistic, values that are not finite, or labels that do not fit the values.
    """
    values = np.asarray(values, np.float64).ravel()
    labels = np.arange(len(values)) if clusters is None else np.asarray(clusters).ravel()
    if not np.isfinite(values).all():
        raise UserError(
            f"values: {int((~np.isfinite(values)).sum())} of {len(values)} are not finite; remove them first"
        )
    if len(labels) != len(values):
        raise UserError(f"clusters: {len(labels)} labels for {len(values)} values; give one label per value")
    # Both statistics are a ratio of two sums, so a cluster is fully described by its two sums.
    if statistic == "mean":
        parts = values, np.ones_like(values)
    elif statistic == "ratio":
        parts = (values > 0).astype(np.float64), (values != 0).astype(np.float64)
    else:
        raise UserError(f"statistic {statistic!r}: unknown; use mean or ratio")
    names, index = np.unique(labels, return_inverse=True)
    above, below = (np.bincount(index, weights=part, minlength=len(names)) for part in parts)
    above, below = above[below > 0], below[below > 0]
    if not len(below):
        return math.nan, math.nan
    each, whole = above / below, float(above.sum() / below.sum())
    if np.ptp(each) <= 1e-12 * np.abs(each).max():
        return whole, whole
    interval = stats.bootstrap(
        (above, below),
        lambda x, y, axis=-1: x.sum(axis) / y.sum(axis),
        n_resamples=resamples,
        confidence_level=level,
        paired=True,
        vectorized=True,
        method="BCa",
        batch=256,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def mean_interval(values: ArrayLike, level: float = 0.95) -> dict[str, float]:
    """{"mean", "low", "high"} of a few independent values, by Student's t; one value has an interval of zero width."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean, "low": mean, "high": mean}
    error = float(stats.t.ppf(0.5 + level / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return {"mean": mean, "low": mean - error, "high": mean + error}


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation in [-1, 1]; 0 where a side is constant."""
    return _rank_correlation(stats.spearmanr, x, y)


def kendall(x: ArrayLike, y: ArrayLike) -> float:
    """Kendall's tau-b in [-1, 1]; 0 where a side is constant."""
    return _rank_correlation(stats.kendalltau, x, y)


def _rank_correlation(test: Callable[..., Any], x: ArrayLike, y: ArrayLike) -> float:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(test(x, y).statistic)


def chord_gap(weights: ArrayLike, scores: ArrayLike) -> dict[str, float]:
    """How far the scores of a sweep lie above (+) or below (-) the straight line between its two ends.

    Args:
      weights: [N] in any order; the smallest and the largest are the ends.
      scores: [N] score at each weight.

    Returns:
      {"mean", "min", "max"} of score(w) - line(w) over the points between the ends; zeros where there are none.

    Raises:
      UserError: fewer than two distinct weights.
    """
    weights, scores = np.asarray(weights, np.float64), np.asarray(scores, np.float64)
    if len(weights) < 2 or np.ptp(weights) == 0:
        raise UserError("weights: a sweep needs two different ends; add another weight")
    ends = [int(weights.argmin()), int(weights.argmax())]
    inside = (weights > weights[ends[0]]) & (weights < weights[ends[1]])
    if not inside.any():
        return {"mean": 0.0, "min": 0.0, "max": 0.0}
    gap = scores[inside] - np.interp(weights[inside], weights[ends], scores[ends])
    return {"mean": float(gap.mean()), "min": float(gap.min()), "max": float(gap.max())}
