"""Rule-based scores of plain text, for models and prompts without a ground truth.

A scorer is a function `(prompt, text) -> float`; the prompt is a list of messages where its record has messages. A
config names a registered one, "words:happy,glad" for a word list, or your own as "package.module:function". A minus
sign before any of them, as in "-sentiment", turns its scores around.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Protocol, cast

from pjrlhf.data.messages import Prompt
from pjrlhf.errors import UserError, described
from pjrlhf.paths import install
from pjrlhf.registry import Registry, callable_as
from pjrlhf.rewards.calls import number
from pjrlhf.settings import shown

Scorer = Callable[[Prompt, str], float]

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
# A quotation may be open at the end: sampled answers are often cut by the length limit.
_QUOTED = re.compile(r'"([^"]*)(?:"|$)|“([^”]*)(?:”|$)')


def words(text: str) -> list[str]:
    """Lower-case words; digits count, punctuation does not, and an apostrophe inside a word belongs to it."""
    return _WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))


def lexicon_fraction(text: str, lexicon: frozenset[str]) -> float:
    """Fraction of the words of `text` that are in `lexicon` (lower case), 0 for an empty text."""
    found = words(text)
    return sum(word in lexicon for word in found) / max(len(found), 1)


def dialogue_fraction(text: str) -> float:
    """Fraction of the words of `text` inside double quotes, straight or curly, 0 for an empty text."""
    spoken = sum(len(words(straight or curly)) for straight, curly in _QUOTED.findall(text))
    return spoken / max(len(words(text)), 1)


SCORERS: Registry[Scorer] = Registry("scorer", callable_as("a function (prompt, text) -> float"))


@SCORERS.register("short")
def short(prompt: Prompt, text: str) -> float:
    """Minus the number of words."""
    return -float(len(words(text)))


@SCORERS.register("long")
def long(prompt: Prompt, text: str) -> float:
    """The number of words."""
    return float(len(words(text)))


@SCORERS.register("shorter")
def shorter(prompt: Prompt, text: str) -> float:
    """Minus the number of characters."""
    return -float(len(text))


@SCORERS.register("longer")
def longer(prompt: Prompt, text: str) -> float:
    """The number of characters."""
    return float(len(text))


@SCORERS.register("dialogue")
def dialogue(prompt: Prompt, text: str) -> float:
    """The fraction of words in quotes."""
    return dialogue_fraction(text)


@SCORERS.register("plain")
def plain(prompt: Prompt, text: str) -> float:
    """Minus the fraction of words in quotes."""
    return -dialogue_fraction(text)


@SCORERS.register("sentiment")
def sentiment(prompt: Prompt, text: str) -> float:
    """Sentiment from -1 to 1, by the lexicon of VADER. Raises UserError where vaderSentiment is not installed."""
    return float(_vader().polarity_scores(text)["compound"])


@SCORERS.register("grade")
def grade(prompt: str, text: str) -> float:
    """The school grade that it takes to read the text, by the automated readability index: long words and long
    sentences raise it. Raises UserError where textstat is not installed.
    """
    return float(_textstat().automated_readability_index(text))


class _Readability(Protocol):
    def automated_readability_index(self, text: str) -> float: ...


@functools.cache
def _textstat() -> _Readability:
    try:
        import textstat
    except ImportError as error:
        raise UserError(f"scorer 'grade': needs textstat; {install('readability')}") from error
    return cast(_Readability, textstat)


class _Analyzer(Protocol):
    def polarity_scores(self, text: str) -> dict[str, float]: ...


@functools.cache
def _vader() -> _Analyzer:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError(f"scorer 'sentiment': needs vaderSentiment; {install('sentiment')}") from error
    return SentimentIntensityAnalyzer()


NEEDS: Mapping[str, Callable[[], object]] = {"sentiment": _vader, "grade": _textstat}


@functools.cache
def scorer(spec: str) -> Scorer:
    """The scorer that `spec` names, see the module.

    Raises:
      UserError: unknown name, an empty word list, or a package that the scorer needs is not installed.
    """
    if spec.startswith("-"):
        opposite = scorer(spec[1:])
        return lambda prompt, text: -opposite(prompt, text)
    kind, _, listed = spec.partition(":")
    if kind == "words":
        lexicon = frozenset(words(listed))
        if not lexicon:
            raise UserError(f"scorer {spec!r}: has no words; write words:happy,glad")
        return lambda prompt, text: lexicon_fraction(text, lexicon)
    if spec in NEEDS:
        NEEDS[spec]()  # a missing package must be found before the run
    return SCORERS.get(spec)


def checked(name: str, score: Scorer) -> Scorer:
    """The scorer with errors in one line for what other people's code may do.

    Args:
      name: of the setting that names it.

    Raises:
      UserError: by the scorer that is returned, where `score` raises, or returns anything but a number.
    """

    def scored(prompt: Prompt, text: str) -> float:
        try:
            value = score(prompt, text)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            reason = described(error)
            raise UserError(f"{name}: raised {reason} for the answer {text[:60]!r}; correct the scorer") from error
        found = number(value)
        if not math.isfinite(found):
            raise UserError(f"{name}: returned {shown(value)} for the answer {text[:60]!r}; return a finite number")
        return found

    return scored
