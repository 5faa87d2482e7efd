"""Judges: which of two answers is better by a criterion, and how much the order of asking matters.

A verdict is +1 (first wins), -1 (second wins) or 0 (tie): swapping the answers changes the sign, and a tie stays a tie.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, cast

import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.registry import Registry


class Judge(Protocol):
    """Anything that compares answers: a reward model, a rule, a person, a language model behind an API.

    A judge whose verdict cannot depend on the order of the answers may say so with `order_invariant = True`.
    """

    def __call__(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], criterion: str
    ) -> np.ndarray:
        """Verdicts int8 [N] in {+1, 0, -1} for N pairs of answers under one criterion."""
        ...


def ask(
    judge: Judge, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], criterion: str
) -> np.ndarray:
    """The verdicts of `judge`, int8 [N], checked.

    Raises:
      UserError: the lists differ in length, or the judge returned something other than N values in {+1, 0, -1}.
    """
    if not len(prompts) == len(first) == len(second):
        raise UserError(
            f"criterion {criterion!r}: {len(prompts)} prompts, {len(first)} first and {len(second)} second answers; "
            "give one answer of each side per prompt"
        )
    verdicts = np.asarray(judge(prompts, first, second, criterion))
    if verdicts.shape != (len(prompts),) or not np.isin(verdicts, (-1, 0, 1)).all():
        raise UserError(
            f"criterion {criterion!r}: the judge returned {np.unique(verdicts)[:5]} in shape {verdicts.shape}; "
            f"it must return {len(prompts)} verdicts in -1, 0, +1"
        )
    return verdicts.astype(np.int8)


@dataclasses.dataclass
class ScoreJudge:
    """The answer with the higher score wins; a difference of at most `tolerance` is a tie.

    `score(prompt, text, criterion)` is called once per distinct triple, however many opponents an answer meets.
    Raises UserError for a score that is not finite.
    """

    order_invariant: ClassVar[bool] = True

    score: Callable[[str, str, str], float]
    tolerance: float = 0.0
    cache: dict[tuple[str, str, str], float] = dataclasses.field(default_factory=dict, repr=False)

    def __call__(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], criterion: str
    ) -> np.ndarray:
        gap = self.scores(prompts, first, criterion) - self.scores(prompts, second, criterion)
        return (np.sign(gap) * (np.abs(gap) > self.tolerance)).astype(np.int8)

    def scores(self, prompts: Sequence[str], texts: Sequence[str], criterion: str) -> np.ndarray:
        """Cached scores, float64 [N]."""
        found = []
        for prompt, text in zip(prompts, texts, strict=True):
            key = (prompt, text, criterion)
            if key not in self.cache:
                value = float(self.score(prompt, text, criterion))
                if not math.isfinite(value):
                    raise UserError(f"criterion {criterion!r}: score {value} for {text[:60]!r}; scores must be finite")
                self.cache[key] = value
            found.append(self.cache[key])
        return np.array(found, np.float64)


def _maker(thing: object) -> "Callable[[ScoreJudge], Judge]":
    if not callable(thing):
        raise ValueError("is not a function from a ScoreJudge to a Judge")
    return cast(Callable[[ScoreJudge], Judge], thing)


# Each makes a judge for a run from the judge by the scores of the run, which it may ignore.
JUDGES: Registry[Callable[[ScoreJudge], Judge]] = Registry("judge", _maker)


@JUDGES.register("score")
def by_score(scores: ScoreJudge) -> Judge:
    """The higher score wins."""
    return scores


def both_orders(
    judge: Judge, prompts: Sequence[str], a: Sequence[str], b: Sequence[str], criterion: str
) -> tuple[np.ndarray, np.ndarray]:
    """Asks for (a, b) and for (b, a).

    Returns:
      verdict: int8 [N] from the side of `a`; a tie where the two orders disagree.
      consistent: bool [N], whether the orders agree.
    """
    forward = ask(judge, prompts, a, b, criterion)
    backward = -ask(judge, prompts, b, a, criterion)
    consistent = forward == backward
    return np.where(consistent, forward, 0).astype(np.int8), consistent


@dataclasses.dataclass
class BothOrders:
    """A judge that asks `judge` in both orders and counts how often the two verdicts agree."""

    judge: Judge
    asked: int = 0
    consistent: int = 0

    def __call__(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], criterion: str
    ) -> np.ndarray:
        verdict, consistent = both_orders(self.judge, prompts, first, second, criterion)
        self.asked += len(consistent)
        self.consistent += int(consistent.sum())
        return verdict

    @property
    def consistency(self) -> float:
        """Fraction of comparisons with the same verdict in both orders, 1 without position bias. NaN before the first
        question, and for a judge that is `order_invariant`, whose fraction says nothing.
        """
        if getattr(self.judge, "order_invariant", False) or not self.asked:
            return math.nan
        return self.consistent / self.asked
