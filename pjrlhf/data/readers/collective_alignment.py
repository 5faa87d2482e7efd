"""Collective Alignment 1 of OpenAI (2025): people rank four answers, for themselves and for the world."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, field, objects, text
from pjrlhf.data.records import RecordError, name_of
from pjrlhf.settings import setting, shown

RANKINGS = ("personal", "world")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectiveAlignmentSettings(ReaderSettings):
    """What a config may say about Collective Alignment 1."""

    rankings: tuple[str, ...] = setting(
        RANKINGS, "rankings to read, each with its name as objective: for themselves, for the world", choices=RANKINGS
    )
    pair: str = setting(
        "all",
        "of four ranked answers: all pairs of unequal rank, or the first over the last",
        choices=("all", "extremes"),
    )
    demographics: bool = setting(
        False, "give what annotators.jsonl tells about people as user_text; needs a folder or a name on the hub"
    )


def assessments(row: Row) -> Iterator[Row]:
    """The assessments of a row of comparisons.jsonl, each with the `prompt` and the `responses` that it ranks."""
    for one in objects(row, "metadata", "assessments"):
        yield Row({"prompt": field(row, "prompt"), "responses": field(row, "responses"), "assessment": one}, row.where)


def convert(
    row: Row, settings: CollectiveAlignmentSettings, raw: Raw, told: Mapping[str, str], seen: set[tuple[str, str, str]]
) -> Iterator[Record]:
    """The preference records of one assessment.

    Args:
      told: annotator -> what is known about them.
      seen: (prompt, annotator, ranking) of the assessments so far.

    Raises:
      RecordError: a field is missing, null or of another type, or a ranking names an unknown answer or one twice.
    """
    user = name_of(field(row, "assessment", "annotator_id"), "annotator_id")
    prompt, blocks = objects(row, "prompt", "messages"), field(row, "assessment", "ranking_blocks")
    answers = dict(map(answer, objects(row, "responses")))
    shared = {"prompt": prompt, "user_id": user} | ({"user_text": told[user]} if user in told else {})
    for name in settings.rankings:
        if not isinstance(blocks, Mapping) or not blocks.get(name):
            raw.drop(f"no {name} ranking")
            continue
        key = (repr(prompt), user, name)
        if key in seen:
            raw.drop("further assessments by the same person")
            continue
        seen.add(key)
        tiers = ranking(text(objects(blocks, name)[0], "ranking"), answers)
        for higher, lower in pairs(tiers, settings.pair):
            if answers[higher] == answers[lower]:
                raw.drop("identical answers")
                continue
            yield {**shared, "chosen": answers[higher], "rejected": answers[lower], "objective": name}
        raw.drop("ties", sum(len(tier) * (len(tier) - 1) // 2 for tier in tiers))


def answer(response: Mapping[str, Any]) -> tuple[str, str]:
    """(letter, text) of a response: its last message.

    Raises:
      RecordError: it is none.
    """
    messages = objects(response, "messages")
    return text(response, "response_index"), text(messages[-1] if messages else {}, "content")


def ranking(value: str, known: Iterable[str]) -> list[list[str]]:
    """The tiers of a ranking such as "B>A=C>D", the best one first.

    Raises:
      RecordError: it names an answer that is not `known`, or one twice.
    """
    tiers = [[letter.strip() for letter in tier.split("=")] for tier in value.split(">")]
    letters = list(itertools.chain(*tiers))
    if len(set(letters)) < len(letters) or not set(letters) <= set(known):
        raise RecordError("bad ranking", f"{shown(value)} does not name each answer once ({', '.join(known)})")
    return tiers


def pairs(tiers: list[list[str]], which: str) -> Iterator[tuple[str, str]]:
    """(higher, lower) of answers in different tiers; of the first and the last one for "extremes"."""
    if which == "extremes":
        yield from [(tiers[0][0], tiers[-1][0])] if len(tiers) > 1 else []
        return
    for higher, lower in itertools.combinations(tiers, 2):
        yield from itertools.product(higher, lower)


def about(row: Row) -> Iterator[Record]:
    """`user`, and what a row of annotators.jsonl tells about them: "age: 25-34; country of residence: Chile".

    Raises:
      RecordError: a column is missing, null or of another type.
    """
    facts = field(row, "demographics")
    if not isinstance(facts, Mapping):
        raise RecordError("bad demographics", f"a {type(facts).__name__}, not facts by name")
    plain = {
        name: value for name, value in facts.items() if isinstance(value, str | int | float) and str(value).strip()
    }
    told = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in plain.items())
    if told:
        yield {"user": name_of(field(row, "annotator_id"), "annotator_id"), "told": told}


def read(settings: CollectiveAlignmentSettings, raw: Raw) -> Iterator[Row | RecordError]:
    """The records of the set."""
    told: dict[str, str] = {}
    if settings.demographics:
        if raw.is_file:
            raise raw.error("path", "is one file, without annotators.jsonl; name the folder of both files")
        for row in converted(raw("annotators", split="train", hub={"name": "annotators"}), about):
            if isinstance(row, RecordError):
                yield row
            else:
                told[row["user"]] = row["told"]
    seen: set[tuple[str, str, str]] = set()
    rows = converted(raw("comparisons", split="train", hub={"name": "comparisons"}), assessments)
    yield from converted(rows, lambda row: convert(row, settings, raw, told, seen))


READER = DataReader(
    kind="collective_alignment",
    settings=CollectiveAlignmentSettings,
    read=read,
    title="Collective Alignment 1 (OpenAI, 2025): 18,384 rankings of four answers to 1,078 prompts by 1,012 people",
    home="https://huggingface.co/datasets/openai/collective-alignment-1",
    licence="CC BY 4.0",
    mapping={
        "prompt": "prompt.messages",
        "chosen": "the last message of the response of the higher tier",
        "rejected": "that of the response of the lower tier",
        "user_id": "metadata.assessments[].annotator_id",
        "objective": "personal or world: which ranking",
        "user_text": "with demographics: those of annotators.jsonl",
    },
    traps=(
        "answers of equal rank (B>A=C) make no pair: ties are counted",
        "many assessments have a ranking for the world alone: a missing one is counted, and none stands for the other",
        "some people assess a prompt twice: the first assessment counts",
        "the fields of annotators.jsonl are not verified: all short facts of demographics are told",
    ),
)
