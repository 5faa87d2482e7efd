"""What a reader of a published data set is: where the raw files are, what they become, and which traps they hold.

A reader turns the raw rows of a set, in the format in which its authors serve them, into records (`data.schema`). It
ships no rows: licences of data sets differ, and several forbid copies.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from absl import logging

from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import COLUMNS
from pjrlhf.errors import UserError, described
from pjrlhf.settings import Settings, parse, setting, shown

Record: TypeAlias = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReaderSettings(Settings):
    """What every reader takes. A reader adds fields of its own in a subclass."""

    path: str = setting("", "a file or a folder of raw files, or a name on the hub: owner/name or owner/name@revision")
    split: str = setting("train", "the part of the set, also a slice of its records: train[:1000], train[90%:]")
    name: str = setting("", "configuration of the set; if empty, the one that the table of readers names")
    answers: str = setting(
        "pairs",
        "pairs of answers, or the chosen answers alone, each once, as completions",
        choices=("pairs", "chosen"),
    )


@dataclasses.dataclass(frozen=True)
class DataReader:
    """A reader of one data set, or of one family.

    Attributes:
      kind: its name in a config.
      settings: what a config may say.
      read: (settings, raw rows) -> records in order; a `RecordError` in place of a record that cannot be used. What is
        left out on purpose is counted by `Raw.drop`.
      title: the set in words, with its paper.
      home: where the raw files are.
      licence: of the set, in words.
      mapping: column of our records -> what of the raw rows becomes it.
      traps: what is odd in the set, and what the reader does about it.
    """

    kind: str
    settings: type[ReaderSettings]
    read: Callable[[Any, Raw], Iterable[Mapping[str, Any] | RecordError]]
    title: str
    home: str
    licence: str
    mapping: Mapping[str, str]
    traps: tuple[str, ...]

    def __post_init__(self):
        if unknown := set(self.mapping) - set(COLUMNS):
            raise ValueError(f"{self.kind}: {sorted(unknown)} are no columns of records")


@dataclasses.dataclass(frozen=True)
class Found:
    """What a reader made of a set.

    Attributes:
      records: in order; a `RecordError` in place of one that cannot be used.
      places: of the raw row of each record, such as "train.jsonl line 7"; "" where a record has no one row.
      dropped: reason -> raw rows or pairs that were left out on purpose.
    """

    records: list[Record | RecordError]
    places: list[str]
    dropped: dict[str, int]


def converted(
    rows: Iterable[Row | RecordError], convert: Callable[[Row], Iterable[Record]]
) -> Iterator[Row | RecordError]:
    """The records that `convert` makes of each row, in order, named by the place of the row.

    A `RecordError` that `convert` raises, and a row that cannot be read, stand in place of their records. So does a row
    that is nested otherwise than the set, on which `convert` raises something else.
    """
    for row in rows:
        if isinstance(row, RecordError):
            yield row
            continue
        try:
            for record in convert(row):
                yield Row(record, row.where)
        except UserError:
            raise
        except RecordError as error:
            yield error.at(row.where)
        except Exception as error:
            yield RecordError("of another format", described(error)).at(row.where)


def settings_of(reader: DataReader, spec: Mapping[str, Any], key: str) -> ReaderSettings:
    """The settings of a specification, checked.

    Args:
      key: dotted key of `spec` in the config.

    Raises:
      UserError: an unknown setting, a bad value, or no path.
    """
    values = {name: value for name, value in spec.items() if name not in ("kind", "columns")}
    found = parse(reader.settings, values, key)
    if not found.path:
        raise UserError(f"data kind {reader.kind!r}: needs 'path'; set --config.{key}.path ({reader.home})")
    return found


def read(reader: DataReader, settings: ReaderSettings, key: str = "data") -> Found:
    """All records of a set. `settings.split` is a name, without a slice.

    Raises:
      UserError: the files are missing or cannot be read, or nothing in them is of this set.
    """
    raw = Raw(settings.path, settings.split, settings.name, key, reader.kind)
    records, places = [], []
    try:
        for item in reader.read(settings, raw):
            records.append(item if isinstance(item, RecordError) else dict(item))
            places.append(getattr(item, "where", ""))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{key}.path: the rows of {settings.path} are not those of data kind {reader.kind!r} ({described(error)}); "
            f"take the files of {reader.home}"
        ) from error
    found = Found(records, places, dict(raw.dropped))
    if found.dropped:
        counts = ", ".join(f"{count} {reason}" for reason, count in found.dropped.items())
        logging.info("%s: %d records of %s; left out: %s", reader.kind, len(records), shown(settings.path), counts)
    return _chosen(found) if settings.answers == "chosen" else found


def _chosen(found: Found) -> Found:
    """Completion records of the chosen answers: one for every prompt, answer and person."""
    kept, dropped, seen = Found([], [], found.dropped), collections.Counter[str](), set()
    for record, place in zip(found.records, found.places, strict=True):
        if not isinstance(record, RecordError) and "chosen" in record:
            record = dict(record) | {"completion": record["chosen"]}
            for name in ("chosen", "rejected", "margin", "preference"):
                record.pop(name, None)
            key = repr([record.get(name) for name in ("prompt", "completion", "user_id", "objective")])
            if key in seen:
                dropped["chosen before"] += 1
                continue
            seen.add(key)
        kept.records.append(record)
        kept.places.append(place)
    return dataclasses.replace(kept, dropped={**found.dropped, **dropped})


# ---- fields of raw rows


def field(row: Mapping[str, Any], *names: str) -> Any:
    """A value inside a row, by the names that lead to it, which must not be null.

    Raises:
      RecordError: "missing <last name>", "<last name> is null", or something on the way is no object.
    """
    value: Any = row
    for name in names:
        if not isinstance(value, Mapping):
            raise RecordError(f"missing {names[-1]}", f"{shown(value)} has no {name!r}")
        if name not in value:
            raise RecordError(f"missing {names[-1]}", f"found {shown(sorted(map(str, value)))}")
        value = value[name]
    if value is None:
        raise RecordError(f"{names[-1]} is null")
    return value


def text(row: Mapping[str, Any], *names: str) -> str:
    """A `field` that is text and not blank.

    Raises:
      RecordError: see `field`; also "<last name> is not text" and "empty <last name>".
    """
    value = field(row, *names)
    if not isinstance(value, str):
        raise RecordError(f"{names[-1]} is not text", f"a {type(value).__name__}")
    if not value.strip():
        raise RecordError(f"empty {names[-1]}")
    return value


def number(row: Mapping[str, Any], *names: str) -> float:
    """A `field` that is a finite number, also as text, as CSV files have it.

    Raises:
      RecordError: see `field`; also "bad <last name>".
    """
    value = field(row, *names)
    with contextlib.suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    if isinstance(value, bool) or not isinstance(value, int | float) or value - value != 0:
        raise RecordError(f"bad {names[-1]}", f"{shown(value)} is not a finite number")
    return float(value)


def objects(row: Mapping[str, Any], *names: str) -> list[Mapping[str, Any]]:
    """A `field` that is a list of objects.

    Raises:
      RecordError: see `field`; also "bad <last name>".
    """
    value = field(row, *names)
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise RecordError(f"bad {names[-1]}", f"{shown(value)} is no list of objects")
    return value
