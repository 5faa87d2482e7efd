"""UltraFeedback (arXiv 2310.01377): four answers per instruction, each rated on four aspects.

With `aspect_as_user` every aspect is a person who prefers by it alone: UF-P-2 and UF-P-4 of VPL (arXiv 2408.10075).
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pjrlhf.data.readers.raw import Raw, Row, rows
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, field, number, text
from pjrlhf.data.records import RecordError
from pjrlhf.settings import setting, shown

# Aspect -> the name of its person in UF-P-2 and UF-P-4.
ASPECTS = {"helpfulness": "8", "honesty": "4", "instruction_following": "2", "truthfulness": "1"}
_UNRATED = ("N/A", "", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UltraFeedbackSettings(ReaderSettings):
    """Ratings of answers, as pairs or as rewards."""

    gives: str = setting(
        "pairs", "pairs of answers, or single answers with a reward per aspect", choices=("pairs", "ratings")
    )
    aspect_as_user: bool = setting(
        False,
        "pairs of a person per aspect, who prefers by it alone, as UF-P-2 and UF-P-4; else by the mean of the aspects",
    )
    aspects: tuple[str, ...] = setting(
        tuple(ASPECTS),
        "the aspects that count; UF-P-2 has helpfulness and honesty",
        choices=tuple(ASPECTS),
    )
    controversial: bool = setting(False, "only pairs about which the people of `aspects` disagree")
    ties: str = setting(
        "drop", "pairs of equal ratings: dropped; or decided by a coin, as VPL does", choices=("drop", "coin")
    )
    seed: int = setting(42, "of the coin", low=0)
    binarized: str = setting(
        "", "ultrafeedback-binarized-preferences-cleaned, file, folder or name: only its pairs; if empty, all pairs"
    )


def ratings(completion: Mapping[str, Any]) -> dict[str, float]:
    """Aspect -> its rating, 1 to 5, of those that are rated.

    Raises:
      RecordError: annotations are missing, or a rating is no number.
    """
    annotations = field(completion, "annotations")
    if not isinstance(annotations, Mapping):
        raise RecordError("annotations is no object")
    found = {}
    for aspect in ASPECTS:
        value = annotations.get(aspect)
        # Some files hold a list of one annotation.
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(value, Mapping) and value.get("Rating") not in _UNRATED:
            found[aspect] = number(value, "Rating")
    return found


def answers_of(row: Row) -> list[tuple[str, dict[str, float]]]:
    """(text, ratings) of the answers of a row that are not empty.

    Raises:
      RecordError: completions are missing.
    """
    completions = field(row, "completions")
    if not isinstance(completions, list):
        raise RecordError("completions is no list")
    return [
        (str(one["response"]), ratings(one)) for one in completions if isinstance(one, Mapping) and one.get("response")
    ]


def _read(settings: UltraFeedbackSettings, raw: Raw) -> Iterator[Row | RecordError]:
    only = _pairs_of(settings.binarized, raw) if settings.binarized else None

    def convert(row: Row) -> list[Record]:
        prompt, answers = text(row, "instruction"), answers_of(row)
        if settings.gives == "ratings":
            return _rated(prompt, answers, settings, raw)
        found: list[Record] = []
        for (first, of_first), (second, of_second) in itertools.combinations(answers, 2):
            if only is not None and frozenset((prompt, first, second)) not in only:
                continue
            if first == second:
                raw.drop("equal answers")
                continue
            found += list(_compared(prompt, (first, second), (of_first, of_second), settings, raw))
        return found

    yield from converted(raw(), convert)


def _rated(
    prompt: str, answers: Sequence[tuple[str, dict[str, float]]], settings: UltraFeedbackSettings, raw: Raw
) -> list[Record]:
    found = []
    for answer, scores in answers:
        rewards = {aspect: scores[aspect] for aspect in settings.aspects if aspect in scores}
        if not rewards or not answer.strip():
            raw.drop("answers without ratings")
            continue
        found.append({"prompt": prompt, "completion": answer, "rewards": rewards})
    return found


def _compared(
    prompt: str,
    answers: tuple[str, str],
    scores: tuple[dict[str, float], dict[str, float]],
    settings: UltraFeedbackSettings,
    raw: Raw,
) -> Iterator[Record]:
    """The records of two answers: one by the mean of the aspects, or one per person."""
    rated = [[of[aspect] for of in scores] for aspect in settings.aspects if all(aspect in of for of in scores)]
    if len(rated) < len(settings.aspects):
        raw.drop("pairs without all ratings")
        return
    differences = {aspect: a - b for aspect, (a, b) in zip(settings.aspects, rated, strict=True)}
    if not settings.aspect_as_user:
        differences = {"": sum(differences.values()) / len(differences)}
    # A controversial pair is one that the coins of ties count for, as in VPL.
    coins = {name: _coin(prompt, answers, name, settings.seed) for name, value in differences.items() if value == 0}
    sides = {
        name: coins.get(name, value > 0) for name, value in differences.items() if value != 0 or settings.ties == "coin"
    }
    if settings.controversial and len(set(sides.values())) < 2:
        raw.drop("pairs on which all agree")
        return
    raw.drop("equal ratings", len(differences) - len(sides))
    for name, first in sides.items():
        chosen, rejected = answers if first else answers[::-1]
        record = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": abs(differences[name]) / 4}
        yield {**record, "user_id": ASPECTS[name], "objective": name} if name else record


def _coin(prompt: str, answers: Sequence[str], name: str, seed: int) -> bool:
    """A fair draw that depends on nothing but the pair, the person and the seed."""
    text = "\0".join([str(seed), name, prompt, *answers])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] % 2 == 0


def _pairs_of(path: str, raw: Raw) -> set[frozenset[str]]:
    """{prompt, chosen, rejected} of the pairs of the binarized set."""
    found = set()
    for row in rows(path, split=raw.split, key=raw.key):
        if isinstance(row, RecordError):
            continue
        sides = [row.get(name) for name in ("chosen", "rejected")]
        last = [one[-1].get("content") for one in sides if isinstance(one, list) and one]
        if len(last) == 2:
            found.add(frozenset((str(row.get("prompt")), *map(str, last))))
    if not found:
        raise raw.error("binarized", f"{shown(path)} has no rows with prompt, chosen and rejected; name that set")
    return found


READER = DataReader(
    kind="ultrafeedback",
    settings=UltraFeedbackSettings,
    read=_read,
    title="UltraFeedback (arXiv 2310.01377), and UF-P-2 and UF-P-4 of VPL (arXiv 2408.10075)",
    home="https://huggingface.co/datasets/openbmb/UltraFeedback",
    licence="MIT",
    mapping={
        "prompt": "instruction",
        "chosen": "completions[i].response with the higher rating",
        "rejected": "the other one",
        "user_id": "aspect_as_user: 8 helpfulness, 4 honesty, 2 instruction following, 1 truthfulness",
        "objective": "aspect_as_user: the aspect",
        "margin": "difference of the ratings (of their means without people) / 4",
        "rewards": "gives=ratings: annotations.<aspect>.Rating, 1 to 5",
    },
    traps=(
        "overall_score is wrong where a 1 was read as a 10: it is never used, the mean of the aspects is",
        'ratings are text, and "N/A" where an aspect does not apply: such pairs are dropped and counted',
        "many ratings are equal: dropped; ties=coin decides them by chance as VPL does, and then no model can be right "
        "about them",
        "the published files of UF-P-2 and UF-P-4 cannot be remade by the released code: these are their rules, not "
        "their rows; binarized gives the pairs that they start from",
        "all pairs of an instruction share it: split by prompt",
    ),
)
