"""Preferences: ids, dimensions and the sentences that state them.

Code and records carry ids ("P1A"); this module writes the text for them.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from pjrlhf.settings import Settings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference:
    """One preference: its dimension, the sentence that states it, and a label to put beside a weight (by default the
    id).
    """

    dimension: str
    sentence: str
    label: str = ""


Preferences = Mapping[str, Preference]

# Personalized Soups (arXiv 2310.11564), table 1.
PAPER: Preferences = {
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


def dimensions(registry: Preferences, ids: Iterable[str]) -> dict[str, list[str]]:
    """Dimension -> the ids among `ids` that belong to it, in the order given."""
    found: dict[str, list[str]] = {}
    for name in ids:
        found.setdefault(registry[name].dimension, []).append(name)
    return found


def combinations(registry: Preferences, ids: Iterable[str]) -> list[tuple[str, ...]]:
    """Every choice of one preference per dimension: 2 x 2 x 2 = 8 kinds of people for the paper's six."""
    return list(itertools.product(*dimensions(registry, ids).values()))


def sentences(registry: Preferences, ids: Iterable[str]) -> str:
    """The sentences of `ids`, joined by spaces; empty where no preference has one."""
    return " ".join(filter(None, (registry[name].sentence for name in ids)))


FORMS = ("sentences", "numbers", "tally")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferencePrompt(Settings):
    """How a prompt states preference weights.

    Attributes:
      form: "sentences", those of preferences with at least half of an equal weight, without saying how much;
        "numbers", every label and its weight; "tally", every label in proportion to its weight, `levels` in all, for
        models that do not read numbers.
      decimals: of a number.
      levels: labels of a tally.
    """

    form: str = setting("sentences", "sentences, numbers, or a tally of labels", choices=FORMS)
    decimals: int = setting(1, "of a number", low=0, high=9)
    levels: int = setting(10, "labels of a tally", low=1, high=1000)

    def __call__(self, registry: Preferences, ids: Sequence[str], weights: Sequence[float]) -> str:
        """The text for `weights`, one per id; they need not sum to 1, so that it can also state targets."""
        if self.form == "sentences":
            least = 0.5 / len(ids)
            return sentences(registry, [name for name, w in zip(ids, weights, strict=True) if w >= least - 1e-9])
        labels = [registry[name].label or name for name in ids]
        if self.form == "numbers":
            return " ".join(f"{label} {w:.{self.decimals}f}" for label, w in zip(labels, weights, strict=True))
        counts = parts(weights, self.levels)
        return " ".join(label for label, count in zip(labels, counts, strict=True) for _ in range(count))


def parts(weights: Sequence[float], levels: int) -> list[int]:
    """Weights as whole numbers of `levels`-ths; those of weights that sum to 1 sum to `levels` (largest remainders)."""
    exact = [max(float(w), 0.0) * levels for w in weights]
    counts = [math.floor(x + 1e-6) for x in exact]
    missing = round(sum(exact)) - sum(counts)
    # Among equal remainders the first gets the part, so that the text is a function of the weights.
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: max(missing, 0)]:
        counts[i] += 1
    return counts
