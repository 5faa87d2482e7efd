"""Preferences: ids, dimensions and the sentences that state them, rendered from one registry.

Code and records carry ids ("P1A"); text is made from them and parsed back here, so that a missing comma cannot
change a method.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence


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


def sentences(registry: Registry, ids: Sequence[str]) -> str:
    """The sentences of `ids`, joined by spaces; empty for no preference."""
    return " ".join(registry[name].sentence for name in ids)


def _normal(text: str) -> str:
    return re.sub(r"[\s,.]+", " ", text).strip().lower()


def split_sentences(registry: Registry, text: str) -> tuple[str, tuple[str, ...]]:
    """Finds preference sentences at the end of `text`, whatever their commas and spaces.

    Returns:
      the text before the first of them, and the ids in order of appearance. Published data omits commas that the
      released prompts contain, so an exact match would silently miss half of the preferences.
    """
    found = []
    for name, preference in registry.items():
        words = [re.escape(word) for word in _normal(preference.sentence).split()]
        match = re.search(r"[\s,.]+".join(words) + r"[\s.]*", text, flags=re.IGNORECASE)
        if match:
            found.append((match.start(), name))
    found.sort()
    start = found[0][0] if found else len(text)
    return text[:start].rstrip(), tuple(name for _, name in found)
