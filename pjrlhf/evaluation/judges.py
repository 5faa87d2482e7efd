"""Judges: which of two answers serves a criterion better, and how much the order of asking matters.

A verdict is +1 (first wins), -1 (second wins) or 0 (tie): swapping the answers changes the sign, and a tie stays a tie.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from pjrlhf.errors import UserError


class Judge(Protocol):
    """Anything that compares answers: a reward model, a rule, a person, a language model behind an API."""

    def __call__(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], criterion: str
    ) -> np.ndarray:
        """Verdicts int8 [N] in {+1, 0, -1} for N pairs of answers under one criterion."""


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
    """A judge that asks `judge` in both orders and counts how often the answer depended on the order."""

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
        """Share of comparisons decided alike in both orders: 1 without position bias, nan before the first question."""
        return self.consistent / self.asked if self.asked else math.nan


# Scores of plain text, for runs on real models where no ground truth is at hand.

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
# A quotation still open at the end counts: sampled answers are often cut by the length limit.
_QUOTED = re.compile(r'"([^"]*)(?:"|$)|“([^”]*)(?:”|$)')


def words(text: str) -> list[str]:
    """Lower-case words; digits count, punctuation does not, and an apostrophe inside a word belongs to it."""
    return _WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))


def lexicon_share(text: str, lexicon: frozenset[str]) -> float:
    """Share of the words of `text` that are in `lexicon` (lower case), 0 for an empty text."""
    found = words(text)
    return sum(word in lexicon for word in found) / max(len(found), 1)


def dialogue_share(text: str) -> float:
    """Share of the words of `text` that stand inside double quotes, straight or curly, 0 for an empty text."""
    spoken = sum(len(words(straight or curly)) for straight, curly in _QUOTED.findall(text))
    return spoken / max(len(words(text)), 1)


# "short" and "long" count words, "shorter" and "longer" characters.
SCORERS: dict[str, Callable[[str, str], float]] = {
    "short": lambda prompt, text: -float(len(words(text))),
    "long": lambda prompt, text: float(len(words(text))),
    "shorter": lambda prompt, text: -float(len(text)),
    "longer": lambda prompt, text: float(len(text)),
    "dialogue": lambda prompt, text: dialogue_share(text),
    "plain": lambda prompt, text: -dialogue_share(text),
}


@functools.cache
def scorer(name: str) -> Callable[[str, str], float]:
    """A scoring function `(prompt, text) -> float` by name: a key of `SCORERS`, "sentiment" (-1 to 1, by the lexicon of
    VADER), or "words:happy,glad" for a word list.

    Raises:
      UserError: unknown name or empty word list, or VADER is not installed.
    """
    if name in SCORERS:
        return SCORERS[name]
    if name == "sentiment":
        return _sentiment()
    kind, _, listed = name.partition(":")
    lexicon = frozenset(words(listed))
    if kind != "words" or not lexicon:
        raise UserError(
            f"scorer {name!r}: unknown; use one of {', '.join(SCORERS)}, sentiment or words:<comma-separated words>"
        )
    return lambda prompt, text: lexicon_share(text, lexicon)


def _sentiment() -> Callable[[str, str], float]:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError("scorer 'sentiment': needs vaderSentiment; pip install 'pjrlhf[sentiment]'") from error
    analyzer = SentimentIntensityAnalyzer()
    return lambda prompt, text: float(analyzer.polarity_scores(text)["compound"])


def score_by_name(prompt: str, text: str, criterion: str) -> float:
    """A scoring function for `ScoreJudge` whose criteria are names of `scorer`."""
    return scorer(criterion)(prompt, text)
