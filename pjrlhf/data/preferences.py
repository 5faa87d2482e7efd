"""Preferences: ids, dimensions and the sentences that state them, rendered from one registry.

Code and records carry ids ("P1A"); text is made from them and parsed back here, so that a missing comma cannot
change a method.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference:
    """One preference: the dimension it belongs to and the sentence that states it."""

    dimension: str
    sentence: str


Registry = Mapping[str, Preference]

# Personalized Soups (arXiv 2310.11564), table 1.
PAPER: Registry = {
    "P1A": Preference(
        dimension="expertise",
        sentence="Generate a response that can be easily understood by an elementary school student.",
    ),
    "P1B": Preference(
        dimension="expertise",
        sentence="Generate a response that only a PhD Student in that specific field could understand.",
    ),
    "P2A": Preference(
        dimension="informativeness",
        sentence="Generate a response that is concise and to the point, without being verbose.",
    ),
    "P2B": Preference(
        dimension="informativeness",
        sentence="Generate a response that is very informative, without missing any background information.",
    ),
    "P3A": Preference(
        dimension="style",
        sentence="Generate a response that is friendly, witty, funny, and humorous, like a close friend.",
    ),
    "P3B": Preference(dimension="style", sentence="Generate a response in an unfriendly manner."),
}


def dimensions(registry: Registry, ids: Iterable[str]) -> dict[str, list[str]]:
    """Dimension -> the ids among `ids` that belong to it, in the order given."""
    found: dict[str, list[str]] = {}
    for name in ids:
        found.setdefault(registry[name].dimension, []).append(name)
    return found


def combinations(registry: Registry, ids: Iterable[str]) -> list[tuple[str, ...]]:
    """Every choice of one preference per dimension: 2 x 2 x 2 = 8 kinds of people for the paper's six."""
    return list(itertools.product(*dimensions(registry, ids).values()))


def sentences(registry: Registry, ids: Iterable[str]) -> str:
    """The sentences of `ids`, joined by spaces; empty where no preference has one."""
    return " ".join(filter(None, (registry[name].sentence for name in ids)))


def _pattern(sentence: str) -> re.Pattern[str]:
    """The sentence at the very end of a text, whatever its case, commas, full stops and spaces."""
    words = re.split(r"[\s,.]+", sentence.strip(" \t\n,."))
    return re.compile(r"(?<!\w)" + r"[\s,.]+".join(map(re.escape, words)) + r"[\s,.]*$", re.IGNORECASE)


def split_sentences(registry: Registry, text: str) -> tuple[str, tuple[str, ...]]:
    """Takes the preference sentences off the end of `text`.

    Returns:
      the text before them, and their ids in order of appearance. Published data omits commas that the released
      prompts contain, so an exact match would silently miss half of the preferences.
    """
    patterns = {name: _pattern(preference.sentence) for name, preference in registry.items() if preference.sentence}
    found: list[str] = []
    while hit := next(((name, m) for name, p in patterns.items() if (m := p.search(text))), None):
        found.append(hit[0])
        text = text[: hit[1].start()]
    return text.rstrip(), tuple(reversed(found))
