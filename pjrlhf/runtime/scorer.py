"""Scores many rows in chunks of equal size."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pjrlhf.parallel.processes import to_host
from pjrlhf.runtime.devices import Devices
from pjrlhf.training.progress import progress


class Scorer:
    """Scores rows in chunks.

    The last chunk repeats its first row, so that all chunks of a shape share one program. A chunk is dispatched before
    the scores of the previous one are fetched.

    Args:
      size: rows of a chunk, rounded up to a multiple that splits evenly over the devices.
    """

    def __init__(self, devices: Devices, size: int):
        self.devices, self.size = devices, devices.even(size)

    def __call__(
        self,
        name: str,
        rows: Sequence[Any],
        collate: Callable[[list[Any]], Any],
        score: Callable[[Any], jax.Array],
        lengths: Sequence[int] | None = None,
    ) -> np.ndarray:
        """The scores [N, ...] of N rows, in their order.

        Args:
          name: of the progress bar.
          rows: N rows, at least one.
          collate: `size` rows -> batch.
          score: batch on the devices -> scores [size, ...].
          lengths: length of every row. Rows of similar length share a chunk, which saves padding. Without lengths,
            chunks are consecutive rows.
        """
        N = len(rows)
        order = np.arange(N) if lengths is None else np.argsort(lengths, kind="stable")
        chunks = [order[i : i + self.size] for i in range(0, N, self.size)]
        scores: list[np.ndarray] = []
        with progress(name, len(chunks)) as bar:
            pending: jax.Array | None = None
            for index in chunks:
                padded = [rows[i] for i in (*index, *[index[0]] * (self.size - len(index)))]
                batch = self.devices.place(collate(padded))
                pending, previous = score(batch), pending
                if previous is not None:
                    scores.append(to_host(previous))
                    bar.update(len(scores), {})
            scores.append(to_host(pending))
            bar.update(len(scores), {})
        joined = np.concatenate(scores)[:N]
        found = np.empty_like(joined)
        found[order] = joined
        return found
