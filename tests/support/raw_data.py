"""Raw files of data sets, written by hand, and what their readers make of them."""

import csv
import dataclasses
import gzip
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from pjrlhf.data import readers
from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import COLUMNS, parse
from pjrlhf.data.sources import check_source, open_source


def write(path: pathlib.Path, rows: Any) -> str:
    """Writes rows as .parquet, .csv, or JSON lines, also .gz; as one JSON list where the folder is called one_text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    if name.endswith(".csv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, rows[0].keys())
            table.writeheader()
            table.writerows(rows)
        return str(path)
    one_text = name.endswith(".json") and path.parent.name == "one_text"
    text = json.dumps(rows) if one_text else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def odd(row: Any) -> Iterator[Any]:
    """Copies of a row in each of which one value, at any depth, is of another type, null or gone. Of lists, one of the
    first two values.
    """
    for key in row if isinstance(row, dict) else range(len(row[:2])):
        kept = {name: value for name, value in row.items() if name != key} if isinstance(row, dict) else row[:key]
        yield kept
        values = [None, "", "x", "[", 7, -0.5, True, [], [[]], {}, {"a": []}]
        if isinstance(row[key], dict | list):
            values += odd(row[key])
        for value in values:
            yield {**row, key: value} if isinstance(row, dict) else [*row[:key], value, *row[key + 1 :]]


@dataclasses.dataclass
class Read:
    """What a source gave: good records, (place, reason) of bad ones, and what its reader left out."""

    good: list[dict[str, Any]]
    bad: list[tuple[str, str]]
    dropped: dict[str, int]


def read(kind: str, path: Any, **settings: Any) -> Read:
    """The records of a set by the source of that kind. Every record is one of our schema, with columns that the reader
    says it gives.
    """
    spec = {"kind": kind, "path": str(path), **settings}
    check_source(spec, "data")
    source = open_source(spec)
    found = Read([], [], source.dropped)
    for i in range(len(source)):
        try:
            record = source[i]
            kinds = {"preference": "chosen", "completion": "completion", "prompt": "prompt"}
            example = parse(record, next(k for k, column in kinds.items() if column in record), where=source.where(i))
        except RecordError as error:
            found.bad.append((source.where(i), error.reason))
            continue
        assert example.where
        given = set(record) & set(COLUMNS) - {"completion"}
        assert given <= set(readers.reader_of(kind).mapping), f"{kind} gives {given}, and documents other columns"
        found.good.append(record)
    return found
