"""AlignX (arXiv 2503.15463): 1.3 million preference pairs, each with a persona instead of a user id."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, field, objects, text
from pjrlhf.data.records import RecordError
from pjrlhf.settings import setting, shown

DIRECTIONS = 90
# Part of a profile -> (its column, the fields of each of its items in words).
_ITEMS = {
    "comments": ("User-Generated Content", {"prompt": "Post", "comment": "Comment"}),
    "pairs": ("Pair-wise Comparative Feedback", {"prompt": "Post", "chosen": "Chosen", "rejected": "Rejected"}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignXSettings(ReaderSettings):
    """What a config may say about AlignX."""

    profile: tuple[str, ...] = setting(
        ("demographics", "comments", "pairs"),
        "parts of the persona that user_text tells",
        choices=("demographics", *_ITEMS),
    )
    profile_items: int = setting(4, "most comments, and most pairs, that user_text tells", low=1)


def convert(row: Row, settings: AlignXSettings, raw: Raw) -> Iterator[Record]:
    """The record of a raw row.

    Raises:
      RecordError: a column is missing, null or of another type, or the directions are not 90 of 0, 0.5 and 1.
    """
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    directions = field(row, "Preference Direction")
    if (
        not isinstance(directions, list)
        or len(directions) != DIRECTIONS
        or any(one not in (0, 0.5, 1) for one in directions)
    ):
        raise RecordError("bad Preference Direction", f"{shown(directions)} is not {DIRECTIONS} times 0, 0.5 or 1")
    told = persona(row, settings)
    if chosen == rejected:
        raw.drop("identical answers")
    elif not told:
        raw.drop("rows without a persona")
    else:
        record = {"prompt": text(row, "prompt"), "chosen": chosen, "rejected": rejected, "user_id": row.where}
        yield {**record, "user_text": told, "directions": [float(one) for one in directions]}


def persona(row: Mapping[str, Any], settings: AlignXSettings) -> str:
    """What a row tells about its person, "" for nothing.

    Raises:
      RecordError: a part of it is of another type.
    """
    parts = []
    if "demographics" in settings.profile and str(row.get("Demographic Information") or "").strip():
        parts.append(text(row, "Demographic Information"))
    for part, (column, names) in _ITEMS.items():
        if part in settings.profile and row.get(column):
            for item in objects(row, column)[: settings.profile_items]:
                parts.append("\n".join(f"{words}: {text(item, name)}" for name, words in names.items()))
    return "\n\n".join(parts)


def read(settings: AlignXSettings, raw: Raw) -> Iterator[Row | RecordError]:
    """The records of the set."""
    yield from converted(raw(), lambda row: convert(row, settings, raw))


READER = DataReader(
    kind="alignx",
    settings=AlignXSettings,
    read=read,
    title="AlignX (arXiv 2503.15463): 1,309,785 pairs, 93 % of them from Reddit, each with a persona",
    home="https://github.com/JinaLeejnl/AlignX",
    licence="not stated in the repository; the sets that it is made of have their own",
    mapping={
        "prompt": "prompt",
        "chosen": "chosen",
        "rejected": "rejected",
        "user_id": "the place of the row, because there are no users",
        "user_text": "Demographic Information, User-Generated Content, Pair-wise Comparative Feedback",
    },
    traps=(
        "there are no user ids, and a person per row is seen once: personalize by user_text, not by user_id",
        "Preference Direction (90 numbers: 1 more, 0 less, 0.5 neutral) becomes the column directions: these are no "
        "weights of objectives",
        "rows without any part of a persona, and identical answers, are left out and counted",
    ),
)
