"""LaMP (arXiv 2304.11406): seven tasks with the profile of each user, what they wrote or rated before."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, field, objects, text
from pjrlhf.data.records import RecordError, name_of
from pjrlhf.settings import setting

_HIDDEN = ("id", "date")  # of a profile item: no content


@dataclasses.dataclass(frozen=True, kw_only=True)
class LampSettings(ReaderSettings):
    """What a config may say about LaMP."""

    gives: str = setting(
        "completions",
        "inputs with the user's own output, or inputs alone, as test parts have them",
        choices=("completions", "prompts"),
    )
    profile_items: int = setting(10, "items of the profile in user_text, the last ones; 0 for no user_text", low=0)


def profile(items: Sequence[Mapping[str, Any]], count: int) -> str:
    """The last items of a profile as text: "field: value" in a line each, items parted by an empty line."""
    if all(isinstance(item.get("date"), str) for item in items):
        items = sorted(items, key=lambda item: item["date"])
    told = ["\n".join(f"{name}: {value}" for name, value in item.items() if name not in _HIDDEN) for item in items]
    return "\n\n".join(told[-count:] if count else [])


def convert(row: Row, settings: LampSettings, raw: Raw, golds: Mapping[str, str]) -> Iterator[Record]:
    """The record of a question.

    Args:
      golds: id of a question -> its output.

    Raises:
      RecordError: a column is missing, null or of another type, or the question has no output.
    """
    question = name_of(field(row, "id"), "id")
    user = name_of(row["user_id"], "user_id") if row.get("user_id") is not None else question
    record: Record = {"prompt": text(row, "input"), "user_id": user}
    told = profile(objects(row, "profile"), settings.profile_items)
    if not told and settings.profile_items:
        raw.drop("users without a profile")
        return
    if settings.gives == "completions":
        if question not in golds:
            raise RecordError("no output", f"no gold has the id {question}")
        record["completion"] = golds[question]
    yield record | ({"user_text": told} if told else {})


def outputs(row: Row) -> Iterator[Record]:
    """(id, output) of the golds in a file of outputs."""
    for gold in objects(row, "golds"):
        yield {"id": name_of(field(gold, "id"), "id"), "output": text(gold, "output")}


def read(settings: LampSettings, raw: Raw) -> Iterator[Row | RecordError]:
    """The records of one task."""
    golds: dict[str, str] = {}
    if settings.gives == "completions":
        if raw.is_file:
            raise raw.error("path", "is one file, without outputs; name the folder of the task, or set gives=prompts")
        for gold in converted(raw("*outputs"), outputs):
            if isinstance(gold, RecordError):
                yield gold
            else:
                golds[gold["id"]] = gold["output"]
    yield from converted(raw("*questions"), lambda row: convert(row, settings, raw, golds))


READER = DataReader(
    kind="lamp",
    settings=LampSettings,
    read=read,
    title="LaMP (arXiv 2304.11406): seven tasks, among them headlines, titles and paraphrases in a user's style",
    home="https://lamp-benchmark.github.io/download",
    licence="CC BY-NC-SA 4.0",
    mapping={
        "prompt": "input of <part>_questions.json",
        "completion": "output of the gold of the same id in <part>_outputs.json",
        "user_id": "user_id where there is one, else id",
        "user_text": "the last profile_items items of profile, all their fields but id and date",
    },
    traps=(
        "one folder per task: questions and outputs are two files, joined by id",
        "test parts have no outputs: gives=prompts",
        "profiles hold hundreds of items: profile_items keeps the last 10, by date where all items have one",
        "the licence and the fields of profile items are not verified: all fields are told",
    ),
)
