"""Rule-based scores of plain text, for models and prompts without a ground truth."""

import functools
import re
from collections.abc import Callable

from pjrlhf.errors import UserError

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
