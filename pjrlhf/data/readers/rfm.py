"""Reward models as users, of "Capturing individual human preferences with reward features" (arXiv 2503.17338).

Each row is a prompt of UltraFeedback with two answers, which eight public reward models score: every model is a user.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from pjrlhf.data.readers.literals import literal
from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, number, text
from pjrlhf.data.records import RecordError
from pjrlhf.errors import UserError
from pjrlhf.settings import setting, shown

_SEPARATORS = " _-./"
_NO_RATER = ("", "score", "scores", "reward", "rewards", "rating")  # of UltraFeedback itself: no reward model


@dataclasses.dataclass(frozen=True, kw_only=True)
class RfmSettings(ReaderSettings):
    """What a config may say about the set."""

    answer_columns: tuple[str, ...] = setting(
        ("chosen", "rejected"), "the columns of the two answers; columns of scores hold one of these names"
    )

    def check(self) -> None:
        super().check()
        if len(self.answer_columns) != 2:
            raise UserError(f"answer_columns: {shown(self.answer_columns)} are not two names; give two columns")


def raters(row: Mapping[str, object], answers: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Name of every rater -> the columns with its scores of the two answers.

    Two columns belong to one rater where their names differ in the name of the answer alone.
    """
    first, second = answers
    found = {}
    for column in row:
        other = column.replace(first, second)
        if first in column and column != first and other in row:
            rater = column.replace(first, "").strip(_SEPARATORS)
            if rater not in _NO_RATER:
                found[rater] = (column, other)
    return found


def convert(row: Row, settings: RfmSettings, raw: Raw) -> Iterator[Record]:
    """One preference record for every rater that scores the answers differently.

    Raises:
      RecordError: a column is missing, null or of another type; or no column holds scores of a rater.
    """
    first, second = settings.answer_columns
    prompt, pair = text(row, "prompt"), (answer(row, first), answer(row, second))
    scores = raters(row, settings.answer_columns)
    if not scores:
        raise RecordError("no scores of raters", f"found columns {shown(sorted(row))}; see setting answer_columns")
    if pair[0] == pair[1]:
        raw.drop("identical answers", len(scores))
        return
    for rater, columns in scores.items():
        if any(row[column] in ("", None) for column in columns):
            raw.drop("no score")
            continue
        margin = number(row, columns[0]) - number(row, columns[1])
        if margin == 0:
            raw.drop("ties")
            continue
        chosen, rejected = pair if margin > 0 else pair[::-1]
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, "user_id": rater, "margin": abs(margin)}


def answer(row: Row, column: str) -> str:
    """An answer: text, or the last message of a conversation that the CSV file holds as JSON or as a Python literal.

    Raises:
      RecordError: it is blank or neither of these.
    """
    value = text(row, column)
    if not value.lstrip().startswith("[{"):
        return value
    messages = literal(value, column)
    if not isinstance(messages, list) or not messages:
        raise RecordError(f"bad {column}", f"{shown(value)} is no conversation")
    return text(messages[-1], "content")


def read(settings: RfmSettings, raw: Raw) -> Iterator[Row | RecordError]:
    """The records of the set."""
    yield from converted(raw(), lambda row: convert(row, settings, raw))


READER = DataReader(
    kind="rfm",
    settings=RfmSettings,
    read=read,
    title="Reward models as users (arXiv 2503.17338): 60,819 + 985 prompts of UltraFeedback, eight reward models",
    home="https://huggingface.co/datasets/google/rfm-rm-as-user-dataset",
    licence="CC BY 4.0",
    mapping={
        "prompt": "prompt",
        "chosen": "the answer with the larger score of the rater",
        "rejected": "the other answer",
        "user_id": "the rater, as its columns of scores name it",
        "margin": "difference of the rater's two scores",
    },
    traps=(
        "the names of the columns are not verified: answer_columns names the answers, and columns of scores are found "
        "by them (<rater>_<answer>, <answer>_<rater>, ...)",
        "scores of the models have different scales: margins compare within a user only",
        "every prompt comes once per user: split by prompt",
        "ties, identical answers and empty scores are left out and counted",
    ),
)
