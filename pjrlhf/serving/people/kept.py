"""What the frozen base gives for answers: computed in blocks of few shapes, and kept in memory by content."""

import collections
import threading
from collections.abc import Callable, Sequence

import jax
import numpy as np

from pjrlhf.data.batching import Completions, collate_completion
from pjrlhf.data.token_table import TokenRow
from pjrlhf.models.adapters import Backbone
from pjrlhf.rollout.features import answer_key
from pjrlhf.types import Array

ROWS = 8  # answers that are read at once
SHORTEST = 32  # tokens of a prompt or an answer; longer ones are padded to powers of two
LIMIT = 4096  # answers whose numbers are kept


class Kept:
    """Numbers of answers. Several threads may ask; one computes at a time.

    Args:
      pad_id: of the tokenizer.
      score: (base, batch of B answers) -> their numbers [B, ...].
    """

    def __init__(self, backbone: Backbone, pad_id: int, score: Callable[[Backbone, Completions], Array]):
        self._backbone, self._pad_id, self._score = backbone, pad_id, jax.jit(score)
        self._known: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, rows: Sequence[TokenRow]) -> list[np.ndarray]:
        """The numbers of each of N answers {"prompt", "completion"}, perhaps with "completion_mask"."""
        keys = [answer_key(row) + np.asarray(_mask(row), bool).tobytes() for row in rows]
        with self._lock:
            missing = list({key: row for key, row in zip(keys, rows, strict=True) if key not in self._known}.items())
            found = {key: self._known[key] for key in keys if key in self._known}
            missing.sort(key=lambda one: len(one[1]["prompt"]) + len(one[1]["completion"]))
            for start in range(0, len(missing), ROWS):
                block = missing[start : start + ROWS]
                padded = [row for _, row in block] + [block[0][1]] * (ROWS - len(block))
                lengths = {f"{name}_length": _padded(padded, name) for name in ("prompt", "completion")}
                batch = collate_completion(padded, **lengths, pad_id=self._pad_id)
                for (key, _), numbers in zip(block, np.asarray(self._score(self._backbone, batch)), strict=False):
                    found[key] = self._known[key] = numbers
            while len(self._known) > LIMIT:
                self._known.popitem(last=False)
        return [found[key] for key in keys]


def _mask(row: TokenRow) -> Sequence[bool]:
    """Which tokens of the answer are scored, where not all are."""
    mask = row.get("completion_mask")
    return () if mask is None else mask


def _padded(rows: Sequence[TokenRow], name: str) -> int:
    longest = max(len(row[name]) for row in rows)
    return max(SHORTEST, 1 << (longest - 1).bit_length()) if longest else 0
