"""Preferences: ids, dimensions and the sentences that state them, rendered from one registry.

Code and records carry ids ("P1A"); text is made from them and parsed back here, so that a missing comma cannot
change a method.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from pjrlhf.settings import Settings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference:
    """One preference: the dimension it belongs to, the sentence that states it, and a word for it beside a weight
    (its id where there is none).
    """

    dimension: str
    sentence: str
    label: str = ""


Registry = Mapping[str, Preference]

# Personalized Soups (arXiv 2310.11564), table 1.
PAPER: Registry = {
    "P1A": Preference(
        dimension="expertise",
        sentence="Generate a response that can be easily understood by an elementary school student.",
        label="simple",
    ),
    "P1B": Preference(
        dimension="expertise",
        sentence="Generate a response that only a PhD Student in that specific field could understand.",
        label="expert",
    ),
    "P2A": Preference(
        dimension="informativeness",
        sentence="Generate a response that is concise and to the point, without being verbose.",
        label="concise",
    ),
    "P2B": Preference(
        dimension="informativeness",
        sentence="Generate a response that is very informative, without missing any background information.",
        label="informative",
    ),
    "P3A": Preference(
        dimension="style",
        sentence="Generate a response that is friendly, witty, funny, and humorous, like a close friend.",
        label="friendly",
    ),
    "P3B": Preference(dimension="style", sentence="Generate a response in an unfriendly manner.", label="unfriendly"),
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


FORMS = ("sentences", "numbers", "tally")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferencePrompt(Settings):
    """How a prompt states preference weights.

    Attributes:
      form: "sentences", those of preferences with half an equal share or more, which cannot say how much; "numbers",
        every label and its weight; "tally", every label as often as it has of `levels` equal parts, for models that
        do not read numbers.
      decimals: of a number.
      levels: parts of a tally.
    """

    form: str = setting("sentences", "sentences, numbers, or a tally of labels", choices=FORMS)
    decimals: int = setting(1, "of a number", low=0, high=9)
    levels: int = setting(10, "parts of a tally", low=1, high=1000)

    def __call__(self, registry: Registry, ids: Sequence[str], weights: Sequence[float]) -> str:
        """The words for `weights`, one per id. They need not sum to 1, so goals can be stated in the same way."""
        if self.form == "sentences":
            least = 0.5 / len(ids)
            return sentences(registry, [name for name, w in zip(ids, weights, strict=True) if w >= least - 1e-9])
        labels = [registry[name].label or name for name in ids]
        if self.form == "numbers":
            return " ".join(f"{label} {w:.{self.decimals}f}" for label, w in zip(labels, weights, strict=True))
        counts = parts(weights, self.levels)
        return " ".join(label for label, count in zip(labels, counts, strict=True) for _ in range(count))


def parts(weights: Sequence[float], levels: int) -> list[int]:
    """Weights in `levels`-ths, whole numbers; of weights that sum to 1 they sum to `levels` (largest remainders)."""
    exact = [max(float(w), 0.0) * levels for w in weights]
    counts = [math.floor(x + 1e-6) for x in exact]
    missing = round(sum(exact)) - sum(counts)
    # Of equal remainders the first in order gets the part, so that a statement is a function of its weights.
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: max(missing, 0)]:
        counts[i] += 1
    return counts


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
