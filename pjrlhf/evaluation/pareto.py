"""Fronts of several objectives, all maximised, and whether a policy follows the preference weights it is given.

Legend: N objectives, n points (one per preference, evaluated means), P prompts.
"""

from typing import Any

import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.evaluation.statistics import kendall, spearman


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Which points no other beats, bool [n]: nobody is as good everywhere and better somewhere. Copies stay together.

    Args:
      points: float [n, N].
    """
    points = _points(points)
    return np.array([not ((points >= p).all(1) & (points > p).any(1)).any() for p in points], bool)


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Volume that the points dominate above `reference`, exact for any N; exponential in N in the worst case.

    For N > 2 each point adds what it dominates beyond the points that are better in the last objective (the exclusive
    volume of WFG; While, Bradstreet and Barone 2012), which is a product with the same question in N - 1.

    Args:
      points: float [n, N]; those not above the reference in every objective add nothing, nor do dominated ones.
      reference: float [N], one for all methods that are compared.

    Raises:
      UserError: shapes that do not fit, or values that are not finite.
    """
    points, reference = _points(points), np.asarray(reference, np.float64)
    if reference.shape != points.shape[1:] or not np.isfinite(reference).all():
        raise UserError(
            f"reference {reference.tolist()}: give one finite number for each of {points.shape[1]} objectives"
        )
    above = points - reference
    return float(_volume(above[(above > 0).all(1)]))


def _volume(points: np.ndarray) -> float:
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return points.max()
    if points.shape[1] == 2:
        x, y = points[np.argsort(-points[:, 0])].T
        return x @ np.diff(np.maximum.accumulate(y), prepend=0.0)
    points = np.unique(points[non_dominated(points)], axis=0)
    points = points[np.argsort(points[:, -1])]
    height, base = points[:, -1], points[:, :-1]
    exclusive = [base[i].prod() - _volume(np.minimum(base[i + 1 :], base[i])) for i in range(len(points))]
    return height @ exclusive


def controllability(preferences: np.ndarray, rewards: np.ndarray) -> dict[str, np.ndarray]:
    """Does a reward follow its own weight over the grid? Rank correlations of weight and reward, per objective.

    Spearman's is the controllability of arXiv 2605.10585: a front can be wide while the weights are ignored.

    Args:
      preferences: float [n, N], points of the simplex.
      rewards: float [n, N], mean reward at each.

    Returns:
      {"spearman": float64 [N], "kendall": float64 [N]}, 0 where the reward does not move.
    """
    preferences, rewards = _grid(preferences, rewards)
    pairs = list(zip(preferences.T, rewards.T, strict=True))
    return {test.__name__: np.array([test(p, r) for p, r in pairs]) for test in (spearman, kendall)}


def prompt_tau(preferences: np.ndarray, rewards: np.ndarray) -> float:
    """Kendall's tau-b between the order of the weights and the order of the rewards, over the objectives of one answer,
    averaged over prompts and preferences (MOC, arXiv 2604.04497).

    Args:
      preferences: float [n, N], points of the simplex; those with equal weights have no order and are left out.
      rewards: float [n, P, N], reward of each answer, calibrated: the objectives must be on one scale.

    Raises:
      UserError: as `front_metrics`; no prompts, or no preference with an order.
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


def mse_to_target(rewards: np.ndarray, targets: np.ndarray) -> float:
    """Mean of (reward - target)^2 over points and objectives, both float [n, N] and on one scale."""
    rewards, targets = _points(rewards, "rewards"), _points(targets, "targets")
    if rewards.shape != targets.shape or not len(rewards):
        raise UserError(f"targets: shape {targets.shape} for rewards of shape {rewards.shape}; give one per reward")
    return float(np.mean((rewards - targets) ** 2))


def mean_inner_product(preferences: np.ndarray, rewards: np.ndarray) -> float:
    """MIP: mean over the grid of p . R(p), what each preference gets by its own weights; both float [n, N]."""
    preferences, rewards = _grid(preferences, rewards)
    return float(np.mean(np.sum(preferences * rewards, 1)))


def expected_utility(weights: np.ndarray, rewards: np.ndarray) -> float:
    """EUM: mean over weights [m, N] of max over points [n, N] of w . r, when everyone may choose from all the points.

    At least the MIP on the same grid; where it is larger, somebody would rather have another preference's answer.
    """
    weights, rewards = _points(weights, "weights"), _points(rewards, "rewards")
    if weights.shape[1] != rewards.shape[1] or not (len(weights) and len(rewards)):
        raise UserError(f"weights, rewards: shapes {weights.shape} and {rewards.shape}; give [m, N] and [n, N]")
    return float((weights @ rewards.T).max(1).mean())


def sparsity(points: np.ndarray) -> float:
    """Squared gaps between neighbours, summed over objectives, per gap (as MORL-Baselines); 0 for fewer than two.

    Args:
      points: float [n, N], of which the distinct non-dominated ones count. Lower is denser.
    """
    points = _points(points)
    front = np.unique(points[non_dominated(points)], axis=0)
    return float((np.diff(np.sort(front, axis=0), axis=0) ** 2).sum() / max(len(front) - 1, 1))


def violations(preferences: np.ndarray, rewards: np.ndarray, tolerance: float = 0.0) -> tuple[int, int]:
    """(edges along which a reward falls although its weight rises, edges).

    An edge of the grid turns one objective up while the others keep their proportions: from each point to the next one
    on its way to that objective's corner. Between two objectives these are the neighbours, seen from either side.

    Args:
      preferences: float [n, N], points of the simplex.
      rewards: float [n, N], mean reward at each.
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


def additive_epsilon(points: np.ndarray, front: np.ndarray) -> float:
    """The least number that, added to every reward of `points`, lets them reach each point of `front` in everything.

    With the union of all methods' points as `front` it is not negative, and 0 for who owns the whole union front.

    Args:
      points: float [n, N]; front: float [m, N], where dominated points make no difference.
    """
    points, front = _points(points), _points(front, "front")
    if points.shape[1] != front.shape[1] or not (len(points) and len(front)):
        raise UserError(f"points, front: shapes {points.shape} and {front.shape}; give [n, N] and [m, N]")
    return float(max((target - points).max(1).min() for target in front))


def front_metrics(
    preferences: np.ndarray, rewards: np.ndarray, reference: np.ndarray, targets: np.ndarray | None = None
) -> dict[str, Any]:
    """The front and the controllability of one method, for a report.

    Args:
      preferences: float [n, N], points of the simplex.
      rewards: float [n, N], mean reward at each.
      reference: float [N], of the hypervolume; the same for all methods.
      targets: float [n, N], the rewards that were asked for.

    Returns:
      Floats "hypervolume", "spearman" and "tau" (Kendall), means over objectives of `controllability`, "mse" to the
      targets (None without), "mip", "eum" (its weights are the preferences), "sparsity", "dominated" = share of points
      that another beats, and ints "violations" of "edges".

    Raises:
      UserError: shapes that do not fit, values that are not finite, or preferences off the simplex.
    """
    preferences, rewards = _grid(preferences, rewards)
    control = controllability(preferences, rewards)
    fallen, edges = violations(preferences, rewards)
    return {
        "hypervolume": hypervolume(rewards, reference),
        "spearman": float(control["spearman"].mean()),
        "tau": float(control["kendall"].mean()),
        "mse": None if targets is None else mse_to_target(rewards, targets),
        "mip": mean_inner_product(preferences, rewards),
        "eum": expected_utility(preferences, rewards),
        "sparsity": sparsity(rewards),
        "violations": fallen,
        "edges": edges,
        "dominated": float(1 - non_dominated(rewards).mean()),
    }


def _points(values, name: str = "points") -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.shape[1]:
        raise UserError(f"{name}: shape {values.shape}; give one row per point and one column per objective")
    if bad := int((~np.isfinite(values)).any(1).sum()):
        raise UserError(f"{name}: {bad} of {len(values)} rows are not finite; look for answers that were not scored")
    return values


def _grid(preferences, rewards) -> tuple[np.ndarray, np.ndarray]:
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
