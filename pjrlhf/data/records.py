"""Records in Python's own types, and the account of those that cannot be used."""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from pjrlhf.errors import UserError

_LOGGED = 5  # bad records shown in the log; the report keeps all of them


class RecordError(ValueError):
    """One record cannot be used: `reason` is a short phrase that is counted, `detail` what was seen in this record."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


class BadRecords:
    """The records of one source that were left out: (where, reason, message) each, out of `total` seen."""

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
        """Raises `UserError` where no record is left or more than `max_bad_fraction` are bad; else logs the counts."""
        if not self.total:
            raise UserError(f"{self.source_name}: there are no records; check the path and the split")
        if not self.items:
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        bad = f"{len(self.items)} of {self.total} records are left out: {reasons}"
        if len(self.items) == self.total or len(self.items) > max_bad_fraction * self.total:
            where, _, message = self.items[0]
            raise UserError(
                f"{self.source_name}: {bad}; the first is {where}: {message}; mend the data, "
                f"or allow more than {max_bad_fraction:.2%} with --config.data.max_bad_fraction"
            )
        logging.warning("%s: %s", self.source_name, bad)


def plain(value: Any) -> Any:
    """The value in Python's own types: bytes become text (UTF-8), NumPy scalars and arrays numbers and lists."""
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
