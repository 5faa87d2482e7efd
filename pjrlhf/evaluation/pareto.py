"""Fronts of several objectives, all maximised, and whether a policy follows the preference weights it is given.

Shapes: N objectives, n points (one per preference, evaluated means), P prompts. All arrays are float64.

A front metric of your own is a function of an `EvaluatedFront`; a config adds it to the report as
`evaluate_front.metrics = ("package.module:function",)`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import moocore
import numpy as np
from numpy.typing import ArrayLike

from pjrlhf.errors import UserError
from pjrlhf.evaluation.statistics import kendall, spearman
from pjrlhf.registry import Registry


def non_dominated(points: ArrayLike) -> np.ndarray:
    """Which points no other point dominates, bool [n]: none is as good in every objective and better in one. Copies of
    a non-dominated point all count.

    Args:
      points: [n, N].
    """
    points = _points(points)
    if not len(points):
        return np.zeros(0, bool)
    return np.asarray(moocore.is_nondominated(points, maximise=True, keep_weakly=True))


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume that the points dominate above `reference`, exact for any N; exponential in N in the worst case.

    Args:
      points: [n, N]; those not above the reference in every objective add nothing.
      reference: [N], the same for all methods that are compared.

    Raises:
      UserError: shapes that do not fit, or values that are not finite.
    """
    points, reference = _points(points), np.asarray(reference, np.float64)
    if reference.shape != points.shape[1:] or not np.isfinite(reference).all():
        raise UserError(
            f"reference {reference.tolist()}: give one finite number for each of {points.shape[1]} objectives"
        )
    return float(moocore.hypervolume(points, ref=reference, maximise=True)) if len(points) else 0.0


def controllability(preferences: ArrayLike, rewards: ArrayLike) -> dict[str, np.ndarray]:
    """Rank correlations of each objective's weight with its reward over the grid.

    Spearman's is the controllability of arXiv 2605.10585: a front can be wide while the weights are ignored.

    Args:
      preferences: [n, N], points of the simplex.
      rewards: [n, N], mean reward at each.

    Returns:
      {"spearman": [N], "kendall": [N]}, 0 where the reward does not move.
    """
    preferences, rewards = _grid(preferences, rewards)
    pairs = list(zip(preferences.T, rewards.T, strict=True))
    return {test.__name__: np.array([test(p, r) for p, r in pairs]) for test in (spearman, kendall)}


def prompt_tau(preferences: ArrayLike, rewards: ArrayLike) -> float:
    """Kendall's tau-b between the order of the weights and the order of the rewards, over the objectives of one answer,
    averaged over prompts and preferences (MOC, arXiv 2604.04497).

    Args:
      preferences: [n, N], points of the simplex; those with equal weights have no order and are left out.
      rewards: [n, P, N], reward of each answer, calibrated: the objectives must be on one scale.

    Raises:
      UserError: as `EvaluatedFront`; no prompts, or no preference with an order.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 3 or not rewards.shape[1]:
        raise UserError(f"rewards: shape {rewards.shape}; give [preferences, prompts, objectives]")
    flat = rewards.reshape(-1, rewards.shape[-1])
    preferences, flat = _grid(np.repeat(preferences, rewards.shape[1], axis=0), flat)
    taus = [kendall(p, r) for p, r in zip(preferences, flat, strict=True) if np.ptp(p) > 0]
    if not taus:
        raise UserError("preferences: all weigh the objectives equally; add one with an order")
    return float(np.mean(taus))


def mse_to_target(rewards: ArrayLike, targets: ArrayLike) -> float:
    """Mean of (reward - target)^2 over points and objectives, both [n, N] and on one scale."""
    rewards, targets = _points(rewards, "rewards"), _points(targets, "targets")
    if rewards.shape != targets.shape or not len(rewards):
        raise UserError(f"targets: shape {targets.shape} for rewards of shape {rewards.shape}; give one per reward")
    return float(np.mean((rewards - targets) ** 2))


def mean_inner_product(preferences: ArrayLike, rewards: ArrayLike) -> float:
    """MIP: mean over the grid of p . R(p), the utility of each preference by its own weights; both [n, N]."""
    preferences, rewards = _grid(preferences, rewards)
    return float(np.mean(np.sum(preferences * rewards, 1)))


def expected_utility(weights: ArrayLike, rewards: ArrayLike) -> float:
    """EUM: mean over weights [m, N] of max over points [n, N] of w . r, when everyone may choose among all points.

    At least the MIP on the same grid; where it is larger, some preference does better with another one's answer.
    """
    weights, rewards = _points(weights, "weights"), _points(rewards, "rewards")
    if weights.shape[1] != rewards.shape[1] or not (len(weights) and len(rewards)):
        raise UserError(f"weights, rewards: shapes {weights.shape} and {rewards.shape}; give [m, N] and [n, N]")
    return float((weights @ rewards.T).max(1).mean())


def sparsity(points: ArrayLike) -> float:
    """Squared gaps between neighbours, summed over objectives, per gap (as MORL-Baselines); 0 for fewer than two.

    Args:
      points: [n, N], of which the distinct non-dominated ones count. Lower is denser.
    """
    points = _points(points)
    front = np.unique(points[non_dominated(points)], axis=0)
    return float((np.diff(np.sort(front, axis=0), axis=0) ** 2).sum() / max(len(front) - 1, 1))


def violations(preferences: ArrayLike, rewards: ArrayLike, tolerance: float = 0.0) -> tuple[int, int]:
    """(edges along which a reward falls although its weight rises, edges).

    An edge of the grid raises one weight while the others keep their proportions: from each point to the next one
    towards that objective's corner. With two objectives these are the neighbours, in either direction.

    Args:
      preferences: [n, N], points of the simplex.
      rewards: [n, N], mean reward at each.
      tolerance: how far a reward may fall unnoticed, for example its standard error.
    """
    preferences, rewards = _grid(preferences, rewards)
    fallen = edges = 0
    for k in range(preferences.shape[1]):
        own, others = preferences[:, k], np.delete(preferences, k, axis=1)
        rest = others.sum(1, keepdims=True)
        corner = rest[:, 0] <= 1e-6
        proportions = others / np.where(corner[:, None], 1.0, rest)
        for i in range(len(own)):
            aligned = corner | (np.abs(proportions - proportions[i]) < 1e-4).all(1)
            ahead = aligned & (own > own[i])
            following = np.flatnonzero(ahead & (own == own[ahead].min(initial=np.inf)))
            edges += len(following)
            fallen += int((rewards[following, k] < rewards[i, k] - tolerance).sum())
    return fallen, edges


@dataclasses.dataclass(frozen=True)
class EvaluatedFront:
    """What a method earned over a grid of preferences.

    Attributes:
      preferences: [n, N], points of the simplex.
      rewards: [n, N], mean reward at each.
      reference: [N], of the hypervolume; the same for all methods.
      targets: [n, N], the rewards that were asked for, if any.
      answers: [n, P, N], the reward of every answer, if known; `rewards` are its means over P.

    Raises:
      UserError: shapes that do not fit, values that are not finite, or preferences off the simplex.
    """

    preferences: np.ndarray
    rewards: np.ndarray
    reference: np.ndarray
    targets: np.ndarray | None = None
    answers: np.ndarray | None = None

    def __post_init__(self):
        preferences, rewards = _grid(self.preferences, self.rewards)
        object.__setattr__(self, "preferences", preferences)
        object.__setattr__(self, "rewards", rewards)


@dataclasses.dataclass(frozen=True)
class FrontMetric:
    """A number that a report gives for every front.

    Attributes:
      function: from an `EvaluatedFront` to the number, or None where it does not apply.
      heading: of its column in the tables; "" leaves it to summary.json.
      digits, scale: how the column shows it, rounded after multiplication.
      averaged: whether runs with several seeds report a mean and an interval; False for what is alike in all of them.
    """

    function: Callable[[EvaluatedFront], float | None]
    heading: str = ""
    digits: int = 3
    scale: float = 1
    averaged: bool = True

    def __call__(self, front: EvaluatedFront) -> float | None:
        return self.function(front)


def metric(
    heading: str = "", digits: int = 3, scale: float = 1, averaged: bool = True
) -> Callable[[Callable[[EvaluatedFront], float | None]], FrontMetric]:
    """A decorator that makes a `FrontMetric` of a function."""
    return lambda function: FrontMetric(function, heading, digits, scale, averaged)


def _metric(thing: object) -> FrontMetric:
    if isinstance(thing, FrontMetric):
        return thing
    if callable(thing):
        heading = getattr(thing, "__name__", type(thing).__name__).replace("_", " ")
        return FrontMetric(cast(Callable[[EvaluatedFront], float | None], thing), heading)
    raise ValueError("is not a function of an EvaluatedFront")


# In the order of the columns of the tables.
METRICS: Registry[FrontMetric] = Registry("front metric", _metric)

METRICS.register("hypervolume")(FrontMetric(lambda front: hypervolume(front.rewards, front.reference), "hypervolume"))


@METRICS.register("spearman")
@metric("Spearman", digits=2)
def _spearman(front: EvaluatedFront) -> float:
    """Mean over objectives of Spearman's correlation of `controllability`."""
    return float(controllability(front.preferences, front.rewards)["spearman"].mean())


@METRICS.register("tau")
@metric("tau", digits=2)
def _tau(front: EvaluatedFront) -> float:
    """Mean over objectives of Kendall's tau of `controllability`."""
    return float(controllability(front.preferences, front.rewards)["kendall"].mean())


@METRICS.register("mse")
@metric("MSE")
def _mse(front: EvaluatedFront) -> float | None:
    return None if front.targets is None else mse_to_target(front.rewards, front.targets)


@METRICS.register("mip")
@metric("mean p.R")
def _mip(front: EvaluatedFront) -> float:
    return mean_inner_product(front.preferences, front.rewards)


@METRICS.register("eum")
@metric("expected utility")
def _eum(front: EvaluatedFront) -> float:
    """With the preferences of the grid as weights."""
    return expected_utility(front.preferences, front.rewards)


@METRICS.register("dominated")
@metric("dominated, %", digits=1, scale=100)
def _dominated(front: EvaluatedFront) -> float:
    """Fraction of the points that another point dominates."""
    return float(1 - non_dominated(front.rewards).mean())


METRICS.register("sparsity")(FrontMetric(lambda front: sparsity(front.rewards)))


@METRICS.register("prompt_tau")
@metric()
def _prompt_tau(front: EvaluatedFront) -> float | None:
    return None if front.answers is None else prompt_tau(front.preferences, front.answers)


@METRICS.register("violations")
@metric()
def _violations(front: EvaluatedFront) -> int:
    return violations(front.preferences, front.rewards)[0]


@METRICS.register("edges")
@metric(averaged=False)
def _edges(front: EvaluatedFront) -> int:
    return violations(front.preferences, front.rewards)[1]


def chosen_metrics(extra: Sequence[str] = ()) -> dict[str, FrontMetric]:
    """All registered metrics, and `extra` ones as `METRICS.get` finds them, by name.

    Raises UserError for an extra metric that cannot be found.
    """
    return dict(METRICS.items()) | {spec.rpartition(":")[2]: METRICS.get(spec) for spec in extra}


def described(metrics: dict[str, FrontMetric]) -> dict[str, dict[str, Any]]:
    """What a summary says about its metrics, so that a report needs no code of theirs."""
    fields = ("heading", "digits", "scale", "averaged")
    return {name: {field: getattr(one, field) for field in fields} for name, one in metrics.items()}


def front_metrics(front: EvaluatedFront, metrics: dict[str, FrontMetric] | None = None) -> dict[str, float | None]:
    """The metrics of one method's front by name; by default all that are registered."""
    return {name: function(front) for name, function in (metrics or chosen_metrics()).items()}


def _points(values: ArrayLike, name: str = "points") -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.shape[1]:
        raise UserError(f"{name}: shape {values.shape}; give one row per point and one column per objective")
    if bad := int((~np.isfinite(values)).any(1).sum()):
        raise UserError(f"{name}: {bad} of {len(values)} rows are not finite; look for answers that were not scored")
    return values


def _grid(preferences: ArrayLike, rewards: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    preferences, rewards = _points(preferences, "preferences"), _points(rewards, "rewards")
    if preferences.shape != rewards.shape or not len(rewards):
        raise UserError(f"preferences, rewards: shapes {preferences.shape} and {rewards.shape}; give two alike [n, N]")
    off = (preferences < -1e-4).any(1) | (np.abs(preferences.sum(1) - 1) > 1e-4)
    if off.any():
        raise UserError(
            f"preferences: {int(off.sum())} of {len(off)} are off the simplex, first {preferences[off][0].tolist()}; "
            "weights must not be negative and must sum to 1"
        )
    # Weights that differ by rounding only (1 - .7 and .3) tie.
    return np.round(preferences, 6), rewards
