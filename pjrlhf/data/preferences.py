"""Preferences: their ids, their dimensions, and the text that states them in a prompt.

Records refer to a preference by its id, such as "P1A".
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from pjrlhf.settings import Settings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference:
    """One preference.

    Attributes:
      dimension: preferences of one dimension exclude each other.
      sentence: states the preference in a prompt; may be empty.
      label: its name where a prompt states weights; "" for the id.
    """

    dimension: str
    sentence: str
    label: str = ""


Preferences = Mapping[str, Preference]  # by id

# Table 1 of Personalized Soups (arXiv 2310.11564).
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

# With the two styles of its scaling experiment.
PAPER16: Preferences = {
    **PAPER,
    "P3C": Preference(dimension="style", sentence="Generate a response in a sassy manner.", label="sassy"),
    "P3D": Preference(dimension="style", sentence="Generate a response in a sarcastic manner.", label="sarcastic"),
}


def dimensions(preferences: Preferences, ids: Iterable[str]) -> dict[str, list[str]]:
    """Dimension -> those of `ids` that belong to it, in order."""
    found: dict[str, list[str]] = {}
    for name in ids:
        found.setdefault(preferences[name].dimension, []).append(name)
    return found


def combinations(preferences: Preferences, ids: Iterable[str]) -> list[tuple[str, ...]]:
    """All choices of one preference per dimension: 2 x 2 x 2 = 8 personas from the six preferences of the paper."""
    return list(itertools.product(*dimensions(preferences, ids).values()))


def sentences(preferences: Preferences, ids: Iterable[str]) -> str:
    """The sentences of `ids`, joined by spaces; "" where none of them has a sentence."""
    return " ".join(filter(None, (preferences[name].sentence for name in ids)))


FORMS = ("sentences", "numbers", "tally")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferencePrompt(Settings):
    """How a prompt states preference weights.

    Attributes:
      form: "sentences" gives the sentences of all preferences whose weight is at least half of an equal weight, and no
        weights; "numbers" gives every label with its weight; "tally" repeats every label in proportion to its weight,
        `levels` labels in all, for models that do not read numbers.
      decimals: of the weights, for "numbers".
      levels: number of labels, for "tally".
    """

    form: str = setting("sentences", "sentences, numbers, or a tally of labels", choices=FORMS)
    decimals: int = setting(1, "decimals of the weights, for numbers", low=0, high=9)
    levels: int = setting(10, "number of labels, for a tally", low=1, high=1000)

    def __call__(self, preferences: Preferences, ids: Sequence[str], weights: Sequence[float]) -> str:
        """The text for `weights`, one per id. They need not sum to 1, so target rewards can be stated as well."""
        if self.form == "sentences":
            least = 0.5 / len(ids)
            return sentences(preferences, [name for name, w in zip(ids, weights, strict=True) if w >= least - 1e-9])
        labels = [preferences[name].label or name for name in ids]
        if self.form == "numbers":
            return " ".join(f"{label} {w:.{self.decimals}f}" for label, w in zip(labels, weights, strict=True))
        counts = parts(weights, self.levels)
        return " ".join(label for label, count in zip(labels, counts, strict=True) for _ in range(count))


def parts(weights: Sequence[float], levels: int) -> list[int]:
    """Weights in units of 1 / `levels`, rounded so that weights of sum 1 give `levels` units (largest remainders)."""
    exact = [max(float(w), 0.0) * levels for w in weights]
    counts = [math.floor(x + 1e-6) for x in exact]
    missing = round(sum(exact)) - sum(counts)
    # Among equal remainders the first gets the unit, so that the same weights give the same text.
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: max(missing, 0)]:
        counts[i] += 1
    return counts
