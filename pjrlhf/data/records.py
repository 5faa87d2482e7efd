"""Records as plain Python values, and a report of those that cannot be used."""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from pjrlhf.errors import UserError
from pjrlhf.types import Json

_LOGGED = 5  # bad records that are logged one by one


class RecordError(ValueError):
    """One record cannot be used.

    Args:
      reason: a short phrase; records are counted by it.
      detail: what is wrong in this record.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


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

    def add(self, where: str, error: RecordError) -> None:
        self.items.append((where, error.reason, str(error)))
        if len(self.items) <= _LOGGED:
            logging.warning("left out %s: %s", where, error)

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
            raise UserError(f"{self.source_name}: no records; check the path and the split")
        if not self.items:
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        bad = f"{len(self.items)} of {self.total} records are bad ({reasons})"
        if len(self.items) == self.total or len(self.items) > max_bad_fraction * self.total:
            where, _, message = self.items[0]
            raise UserError(
                f"{self.source_name}: {bad}, the first at {where}: {message}; correct the data, "
                f"or allow more than {max_bad_fraction:.2%} with --config.data.max_bad_fraction"
            )
        logging.warning("%s: %s; they are left out", self.source_name, bad)


def plain(value: Json) -> Any:
    """The value as plain Python: bytes become text (UTF-8), NumPy scalars become numbers, arrays become lists.

    Raises:
      RecordError: bytes that are not UTF-8.
    """
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecordError("not UTF-8", str(error)) from error
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
