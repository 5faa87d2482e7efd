"""BeaverTails (arXiv 2307.04657): answers that several people label as safe or harmful."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping

from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, field, text
from pjrlhf.data.records import RecordError
from pjrlhf.settings import setting, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeaverTailsSettings(ReaderSettings):
    """What a config may say about BeaverTails."""

    split: str = setting(
        "330k_train", "the part of the set: 330k_train, 330k_test, 30k_train or 30k_test; also a slice"
    )
    gives: str = setting(
        "answers",
        "single answers with the fraction of people who call them safe, or one pair per prompt: the answer with the "
        "largest fraction over that with the smallest",
        choices=("answers", "pairs"),
    )


def label(row: Row) -> Row:
    """A raw row: `prompt`, `response`, `is_safe`, and `category`, 14 truth values by name.

    Raises:
      RecordError: a column is missing, null or of another type.
    """
    safe, category = field(row, "is_safe"), field(row, "category")
    if not isinstance(safe, bool):
        raise RecordError("bad is_safe", f"{shown(safe)} is no truth value")
    if not isinstance(category, Mapping):
        raise RecordError("bad category", f"a {type(category).__name__}, not truth values by name")
    harms = sorted(name for name, is_in in category.items() if is_in)
    record = {"prompt": text(row, "prompt"), "answer": text(row, "response")}
    return Row({**record, "safe": safe, "harms": harms}, row.where)


def together(labels: list[Row]) -> Row:
    """The completion record of one answer that several people labelled."""
    first = labels[0]
    harmless = sum(one["safe"] for one in labels) / len(labels)
    record = {"prompt": first["prompt"], "completion": first["answer"], "rewards": {"harmless": harmless}}
    return Row({**record, "harms": sorted({harm for one in labels for harm in one["harms"]})}, first.where)


def pair(answers: list[Row], raw: Raw) -> Iterator[Row]:
    """The preference record of the answers to one prompt."""
    ordered = sorted(answers, key=lambda one: -one["rewards"]["harmless"])
    best, worst = ordered[0], ordered[-1]
    margin = best["rewards"]["harmless"] - worst["rewards"]["harmless"]
    if margin == 0:
        raw.drop("prompts with one answer" if len(answers) == 1 else "ties")
        return
    record: Record = {"prompt": best["prompt"], "chosen": best["completion"], "rejected": worst["completion"]}
    yield Row({**record, "objective": "harmless", "margin": margin}, best.where)


def read(settings: BeaverTailsSettings, raw: Raw) -> Iterator[Row | RecordError]:
    """The records of the set: bad rows, then answers in the order in which they first come."""
    size, _, part = settings.split.rpartition("_")  # a folder of raw files has folders 30k and 330k
    rows = raw(f"{size}/*" if size else "*", split=part, hub={"split": settings.split})
    labels: dict[tuple[str, str], list[Row]] = collections.defaultdict(list)
    for row in converted(rows, lambda row: [label(row)]):
        if isinstance(row, RecordError):
            yield row
        else:
            labels[row["prompt"], row["answer"]].append(row)
    raw.drop("further labels of an answer", sum(len(same) - 1 for same in labels.values()))
    prompts: dict[str, list[Row]] = collections.defaultdict(list)
    for (prompt, _), same in labels.items():
        prompts[prompt].append(together(same))
    for answers in prompts.values():
        yield from answers if settings.gives == "answers" else pair(answers, raw)


READER = DataReader(
    kind="beavertails",
    settings=BeaverTailsSettings,
    read=read,
    title="BeaverTails (arXiv 2307.04657): 333,963 labels of answers, safe or harmful in 14 categories",
    home="https://huggingface.co/datasets/PKU-Alignment/BeaverTails",
    licence="CC BY-NC 4.0",
    mapping={
        "prompt": "prompt",
        "completion": "response",
        "rewards": "harmless: the fraction of the labels of this answer with is_safe",
        "chosen": "with gives=pairs: the response with the largest fraction",
        "rejected": "with gives=pairs: that with the smallest",
        "objective": "with gives=pairs: harmless",
        "margin": "with gives=pairs: difference of the fractions",
    },
    traps=(
        "the same answer comes several times, labelled by people who may disagree: it becomes one record, and its "
        "other labels are counted",
        "there are no pairs in the set: gives=pairs makes one per prompt, and leaves out ties and single answers",
        "categories with a label become the column harms",
    ),
)
