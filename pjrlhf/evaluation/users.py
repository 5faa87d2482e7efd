"""Statistics of user models (P-RLHF, arXiv 2402.05133): accuracy over people, new people, and a map of them."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from pjrlhf.errors import UserError
from pjrlhf.evaluation.statistics import bootstrap_interval


def user_accuracy(
    margins: ArrayLike,
    users: ArrayLike,
    *,
    groups: Mapping[str, str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Fraction of pairs whose chosen answer scores higher, per person and over people.

    Args:
      margins: float [N], score of the chosen answer less that of the rejected one; exactly 0 is no hit.
      users: str [N], whose pair it is.
      groups: the persona of every person in `users`, and perhaps of others; all count when the largest is determined.
      resamples, seed: of the bootstrap over people.

    Returns:
      Shares in [0, 1]: "mean" over people (each weighs the same) with its 95 % interval "low" and "high", "micro" over
      pairs, "worst" person, "worst_decile" (mean of the worst tenth of the people, rounded down, at least one),
      "majority" and "minority" (mean over people of the largest persona and of all others; absent without groups, for
      an empty one, or where two personas are equally large), "pairs" = N, and "users": {user: {"accuracy", "pairs",
      "group" or None}} in order of name.

    Raises:
      UserError: nothing to count, margins that are nan, users that do not fit, or a person without a group.
    """
    margins, users = _pairs(margins, users)
    names, index = np.unique(users, return_inverse=True)
    pairs = np.bincount(index)
    each = np.bincount(index, weights=margins > 0) / pairs
    low, high = bootstrap_interval(each, resamples=resamples, seed=seed)
    found = {
        "mean": float(each.mean()),
        "low": low,
        "high": high,
        "micro": float((margins > 0).mean()),
        "worst": float(each.min()),
        "worst_decile": float(np.sort(each)[: max(1, len(each) // 10)].mean()),
    }
    personas = [None] * len(names)
    if groups is not None:
        if missing := [name for name in names if name not in groups]:
            raise UserError(f"groups: no group for {len(missing)} people, first {str(missing[0])!r}; name one for each")
        personas = [groups[name] for name in names]
        (largest, size), *others = collections.Counter(groups.values()).most_common()
        if not others or others[0][1] < size:
            inside = np.array([persona == largest for persona in personas])
            for name, members in (("majority", inside), ("minority", ~inside)):
                if members.any():
                    found[name] = float(each[members].mean())
    people = {
        str(name): {"accuracy": float(accuracy), "pairs": int(count), "group": persona}
        for name, accuracy, count, persona in zip(names, each, pairs, personas, strict=True)
    }
    return found | {"pairs": len(margins), "users": people}


def accuracy_by(
    margins: ArrayLike, users: ArrayLike, kinds: Mapping[str, str], *, resamples: int = 2000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Accuracy over people, for each kind of person.

    Args:
      margins, users: as for `user_accuracy`.
      kinds: user -> their kind; people without one do not count.

    Returns:
      {kind: {"mean", "low", "high", "users"}} in the order of `kinds`, with the 95 % bootstrap interval over people.

    Raises:
      UserError: as `user_accuracy`.
    """
    margins, users = _pairs(margins, users)
    names, index = np.unique(users, return_inverse=True)
    each = np.bincount(index, weights=margins > 0) / np.bincount(index)
    values: dict[str, list[float]] = {kind: [] for kind in kinds.values()}
    for name, accuracy in zip(names.tolist(), each.tolist(), strict=True):
        if name in kinds:
            values[kinds[name]].append(accuracy)
    found = {}
    for kind, fractions in values.items():
        if fractions:
            low, high = bootstrap_interval(fractions, resamples=resamples, seed=seed)
            found[kind] = {"mean": float(np.mean(fractions)), "low": low, "high": high, "users": len(fractions)}
    return found


def by_powers_of_two(counts: Mapping[str, int]) -> dict[str, str]:
    """User -> the range "4-7" between powers of two that their count is in, in the order of the ranges."""
    ranges = {}
    for user, count in sorted(counts.items(), key=lambda item: item[1]):
        low = 1 << (count.bit_length() - 1) if count else 0
        ranges[user] = str(low) if low < 2 else f"{low}-{2 * low - 1}"
    return ranges


def length_matched(
    margins: ArrayLike,
    users: ArrayLike,
    lengths_chosen: ArrayLike,
    lengths_rejected: ArrayLike,
    fraction: float = 0.25,
    *,
    groups: Mapping[str, str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """`user_accuracy` on the `fraction` of pairs whose answers differ least in length, where length explains least.

    Args:
      margins, users: as for `user_accuracy`.
      lengths_chosen, lengths_rejected: [N] in any one unit, not negative.
      fraction: of the pairs to keep, rounded up. Pairs that differ as much as the last one kept are kept too, so the
        result does not depend on the order of the pairs.
      groups, resamples, seed: as for `user_accuracy`.

    Returns:
      As `user_accuracy`, and "max_difference": the largest |chosen - rejected| / longer among the pairs kept. People
      without such a pair are absent.
    """
    margins, users = _pairs(margins, users)
    chosen, rejected = (np.asarray(x, np.float64).ravel() for x in (lengths_chosen, lengths_rejected))
    if not len(chosen) == len(rejected) == len(margins):
        raise UserError(f"lengths: {len(chosen)} and {len(rejected)} for {len(margins)} pairs; give two per pair")
    if not (np.isfinite(chosen).all() and np.isfinite(rejected).all() and min(chosen.min(), rejected.min()) >= 0):
        raise UserError("lengths: some are negative or not finite; count the tokens or words of each answer")
    if not 0 < fraction <= 1:
        raise UserError(f"fraction {fraction}: not in (0, 1]; it is the part of the pairs to keep")
    difference = np.abs(chosen - rejected) / np.maximum(np.maximum(chosen, rejected), 1e-12)
    last = np.sort(difference)[math.ceil(fraction * len(difference)) - 1]
    kept = difference <= last
    found = user_accuracy(margins[kept], users[kept], groups=groups, resamples=resamples, seed=seed)
    return found | {"max_difference": float(last)}


def paired_gain(
    one: Mapping[str, Any], other: Mapping[str, Any], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """How much more accurate `one` is than `other`, person by person on the same pairs.

    Args:
      one, other: "users" of `user_accuracy`; people that only one of them has do not count.

    Returns:
      {"mean", "low", "high", "users"}: mean over people of the difference in [-1, 1], its 95 % bootstrap interval over
      people, and how many people there are.

    Raises:
      UserError: no person is in both.
    """
    shared = sorted(one.keys() & other.keys())
    if not shared:
        raise UserError("gain: no person is in both models; evaluate both on the same pairs")
    gains = np.array([one[user]["accuracy"] - other[user]["accuracy"] for user in shared])
    low, high = bootstrap_interval(gains, resamples=resamples, seed=seed)
    return {"mean": float(gains.mean()), "low": low, "high": high, "users": len(shared)}


def rate_of_people(verdicts: ArrayLike, users: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """How often people prefer their answers to others, each person's comparisons counted first.

    Args:
      verdicts: float [N] in [-1, 1], +1 where the person prefers their own answer, 0 for a tie; NaN for no verdict.
      users: str [N], who judges.

    Returns:
      {"mean", "low", "high", "ties", "n", "users"}: the mean over people (each weighs the same) of the fraction they
      win, ties as half, with its 95 % bootstrap interval over people; the fraction of ties among the n verdicts; and
      {user: fraction} in order of appearance. NaN where nobody has a verdict.

    Raises:
      UserError: users that do not fit.
    """
    verdicts, users = np.asarray(verdicts, np.float64).ravel(), np.asarray(users, str).ravel()
    if len(users) != len(verdicts):
        raise UserError(f"users: {len(users)} for {len(verdicts)} verdicts; name one per verdict")
    judged = ~np.isnan(verdicts)
    names = list(dict.fromkeys(users[judged].tolist()))
    won = {name: float((1 + verdicts[judged & (users == name)]).mean() / 2) for name in names}
    low, high = bootstrap_interval(list(won.values()), resamples=resamples, seed=seed) if won else (math.nan, math.nan)
    mean = float(np.mean(list(won.values()))) if won else math.nan
    ties = float((verdicts[judged] == 0).mean()) if won else math.nan
    return {"mean": mean, "low": low, "high": high, "ties": ties, "n": int(judged.sum()), "users": won}


def choice_accuracy(
    margins: ArrayLike, questions: ArrayLike, *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Fraction of questions whose right option scores above every other one.

    Args:
      margins: float [N], score of the right option less that of one other; exactly 0 is no hit.
      questions: str [N], which question each belongs to.

    Returns:
      {"mean", "low", "high"} with the 95 % bootstrap interval over questions, "chance" (mean fraction by guessing) and
      "questions", their number.

    Raises:
      UserError: as `user_accuracy`.
    """
    margins, questions = _pairs(margins, questions)
    _, index = np.unique(questions, return_inverse=True)
    others = np.bincount(index)
    right = np.bincount(index, weights=margins > 0) == others
    low, high = bootstrap_interval(right, resamples=resamples, seed=seed)
    chance = float((1 / (1 + others)).mean())
    return {"mean": float(right.mean()), "low": low, "high": high, "chance": chance, "questions": len(others)}


def calibration_error(margins: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error (arXiv 1706.04599) of the probabilities s(margin) that the chosen answer is preferred,
    in [0, 1/2]: the mean over pairs of |accuracy - mean confidence| of their bin.

    Args:
      margins: float [N], score of the chosen answer less that of the rejected one. The answer that scores higher is the
        prediction, and its probability the confidence; exactly 0 is no hit.
      bins: of equal width between 1/2 and 1.

    Raises:
      UserError: nothing to count, or margins that are nan.
    """
    margins, _ = _pairs(margins, np.zeros(np.size(margins), str))
    confidence = special.expit(np.abs(margins))
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = np.bincount(index, weights=(margins > 0) - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(margins))


def cold_start_curve(
    accuracies: Mapping[int, Sequence[float]], *, resamples: int = 2000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Accuracy for new people after k of their comparisons.

    Args:
      accuracies: {k: accuracy of each new person}.

    Returns:
      {str(k): {"mean", "low", "high", "users"}} by rising k, with the 95 % bootstrap interval over people.

    Raises:
      UserError: a k without people, or an accuracy that is not finite.
    """
    curve = {}
    for k in sorted(accuracies):
        values = np.asarray(accuracies[k], np.float64)
        if not values.size:
            raise UserError(f"cold start with {k} comparisons: no person was measured; leave this number out")
        low, high = bootstrap_interval(values, resamples=resamples, seed=seed)
        curve[str(k)] = {"mean": float(values.mean()), "low": low, "high": high, "users": values.size}
    return curve


def principal_axes(vectors: ArrayLike) -> np.ndarray:
    """Coordinates on the two directions in which the rows differ most, float64 [U, 2] (principal components).

    The sign of an axis is free; here its largest loading (the first of several within rounding) is positive.

    Args:
      vectors: [U, ...], flattened to [U, D']; an axis that does not exist (one user, D' = 1) is zeros.
    """
    vectors = np.asarray(vectors, np.float64)
    if not np.isfinite(vectors).all():
        raise UserError("vectors: some values are not finite; the user table holds nan or inf")
    vectors = vectors.reshape(len(vectors), -1)
    centred = vectors - vectors.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    size = np.abs(axes)
    leading = np.argmax(size >= (1 - 1e-6) * size.max(1, keepdims=True), axis=1)
    axes = axes * np.sign(axes[np.arange(len(axes)), leading])[:, None]
    points = np.zeros((len(vectors), 2))
    points[:, : len(axes)] = centred @ axes.T
    return points


def _pairs(margins: ArrayLike, users: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    margins, users = np.asarray(margins, np.float64).ravel(), np.asarray(users, str).ravel()
    if not len(margins):
        raise UserError("margins: there are no pairs; accuracy needs at least one")
    if len(users) != len(margins):
        raise UserError(f"users: {len(users)} for {len(margins)} margins; name one per pair")
    if bad := int(np.isnan(margins).sum()):
        raise UserError(f"margins: {bad} of {len(margins)} are nan; look for the answers that could not be scored")
    return margins, users
