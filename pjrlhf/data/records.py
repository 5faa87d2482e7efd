"""Records as plain Python values, and a report of those that cannot be used."""

import base64
import collections
import dataclasses
import datetime
import decimal
import json
import math
import numbers
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
from absl import logging

from pjrlhf import strict_json
from pjrlhf.errors import UserError
from pjrlhf.settings import shown
from pjrlhf.types import Json

_LOGGED = 5  # bad records that are logged one by one, each with another message
_DEPTH = 100  # levels of nesting; Python's own limit depends on who calls
_BITS = 1000  # of a whole number; every such number is a finite float


class RecordError(ValueError):
    """One record cannot be used.

    Args:
      reason: a short phrase; records are counted by it.
      detail: what is wrong in this record.

    Attributes:
      where: place of the raw row, where a reader knows it; else "".
    """

    where = ""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> Any:
        """Another process gets a plain RecordError, whatever the arguments of a subclass are."""
        return RecordError, (self.reason, self.detail), {"where": self.where}

    def at(self, where: str) -> "RecordError":
        """The error itself, with the place of its raw row."""
        self.where = where
        return self


class BadRecords:
    """The records of one source that were left out, each as (where, reason, message).

    Args:
      source_name: the name of the source, for messages.
      total: number of records in the source, bad ones included.
    """

    def __init__(self, source_name: str, total: int):
        self.source_name = source_name
        self.total = total
        self.items: list[tuple[str, str, str]] = []
        self._logged: set[str] = set()

    def add(self, where: str, error: RecordError) -> None:
        message = str(error)
        self.items.append((where, error.reason, message))
        if len(self._logged) < _LOGGED and message not in self._logged:
            self._logged.add(message)
            logging.warning("left out %s: %s", where, message)

    @property
    def counts(self) -> dict[str, int]:
        """Bad records per reason, most frequent first."""
        return dict(collections.Counter(reason for _, reason, _ in self.items).most_common())

    def check(self, max_bad_fraction: float) -> None:
        """Logs how many records are bad.

        Raises:
          UserError: the source is empty, all records are bad, or more than `max_bad_fraction` of them.
        """
        if not self.total:
            raise UserError(f"{self.source_name}: holds no records; name a file or a split that has some")
        if not self.items:
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        bad = f"{len(self.items)} of {self.total} records are bad ({reasons})"
        if len(self.items) == self.total or len(self.items) > max_bad_fraction * self.total:
            where, _, message = self.items[0]
            share = math.ceil(100 * len(self.items) / self.total) / 100
            leave_out = f", or leave them out with --config.data.max_bad_fraction={share:g}"
            raise UserError(
                f"{self.source_name}: {bad}, the first at {where}: {message}; correct the data"
                f"{leave_out if len(self.items) < self.total else ''}"
            )
        logging.warning("%s: %s; they are left out", self.source_name, bad)


def from_json(text: bytes | str, strict: bool = False) -> Any:
    """The value of a JSON text.

    Args:
      strict: NaN and infinities, which JSON does not define, are an error.

    Raises:
      RecordError: not UTF-8, not JSON, a key that stands twice in one object, nested too deeply, or a number with
        thousands of digits.
    """
    try:
        return strict_json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text, constants=not strict)
    except strict_json.RepeatedKey as error:
        raise RecordError("repeated key", str(error)) from error
    except strict_json.Constant as error:
        raise RecordError("bad JSON", str(error)) from error
    except UnicodeDecodeError as error:
        raise RecordError("not UTF-8", str(error)) from error
    except json.JSONDecodeError as error:
        raise RecordError("bad JSON", str(error)) from error
    except RecursionError as error:
        raise RecordError("nested too deeply", f"more than {_DEPTH} levels") from error
    except ValueError as error:  # Python reads no whole number of thousands of digits
        raise RecordError("number too large", str(error).partition(";")[0]) from error


def plain(value: Json, depth: int = 0) -> Any:
    """The value as plain Python: bytes become text (UTF-8), NumPy scalars become numbers, arrays become lists.

    Raises:
      RecordError: text or bytes that are not UTF-8, such as half of a surrogate pair; more than 100 levels of nesting;
        or a whole number beyond the range of floats.
    """
    if depth > _DEPTH:
        raise RecordError("nested too deeply", f"more than {_DEPTH} levels")
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecordError("not UTF-8", str(error)) from error
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError("not UTF-8", f"half of a surrogate pair at character {error.start}") from error
        return value
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise RecordError("number too large", f"a whole number of {value.bit_length()} bits")
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), depth + 1)
    if isinstance(value, Mapping):
        return {_key(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    return value


def _key(key: object) -> object:
    return plain(key) if isinstance(key, str | bytes) else key


def name_of(value: Json, column: str) -> str:
    """The name of a person or a pair: text as it is, and a whole number as its digits, also where a columnar file has
    made it a float: 7, 7.0 and "7" are one name.

    Args:
      column: for messages.

    Raises:
      RecordError: blank text, or neither text nor a whole number.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RecordError(f"{column} is no name", f"{shown(value)} is neither text nor a whole number")
    if not value.strip():
        raise RecordError(f"empty {column}")
    return value


def as_json(value: object) -> Any:
    """A value in JSON types, without loss where that is possible.

    Numbers that JSON does not have (NaN, infinity) are null, bytes are base64, dates and times are those of ISO 8601,
    dataclasses and mappings are objects, and arrays of any library are lists; all else is its text.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if tolist := getattr(value, "tolist", None):  # NumPy and JAX, arrays and scalars
        plain = tolist()
        # NumPy gives a time to the nanosecond as a whole number.
        return str(value) if isinstance(value, np.datetime64) and isinstance(plain, int) else as_json(plain)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real | decimal.Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, datetime.date | datetime.time):
        return None if value != value else value.isoformat()  # NaT of pandas is no time
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, Set):
        return sorted((as_json(item) for item in value), key=str)
    return str(value)
