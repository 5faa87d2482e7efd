"""Batches of comparisons that people made."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

from pjrlhf.data.batching import soft_labels
from pjrlhf.data.packing import PackedRows
from pjrlhf.data.token_table import TokenRow
from pjrlhf.types import Array

SIDES = ("chosen", "rejected")


class PairBatch(struct.PyTreeNode):
    """B comparisons of people; NumPy arrays on the host.

    Attributes:
      rows: pair b is owner b; its answers are 2 b, chosen, and 2 b + 1, rejected.
      index: rows of the token table.
      users: rows of the user table: who made each comparison; 0 is the generic user.
      reference: summed log-probabilities of chosen and rejected under the reference, nats.
      counts: scored tokens of chosen and rejected.
      margin: by how much the reward of chosen must exceed that of rejected.
      local: places of the users in a gathered table, see `models.users.gather_rows`; None where the user model has its
        whole table.
      generic: which copies are the generic user's, see `both_copies`; None where every pair is in once.
      preference: the probability that chosen is better; None where that is certain for all pairs of a run.
      shift: sum and number of the rewards before this batch, for losses with a reward shift, or None.
    """

    # The order of a program's arguments, on which the rounding of its results depends.
    counts: Float[Array, "B 2"]
    index: Int[Array, " B"]
    margin: Float[Array, " B"]
    reference: Float[Array, "B 2"]
    rows: PackedRows
    users: Int[Array, " B"]
    generic: Bool[Array, " B"] | None = None
    local: Int[Array, " B"] | None = None
    preference: Float[Array, " B"] | None = None
    shift: Float[Array, "2"] | None = None

    def __len__(self) -> int:
        return len(self.users)

    @property
    def places(self) -> Int[Array, " B"]:
        """Each user's place in the table that the user model has."""
        return self.users if self.local is None else self.local

    def both_copies(self) -> "PairBatch":
        """Every pair twice: as its user said it, and as the generic user."""
        B = len(self)
        rest: PairBatch = self.replace(rows=None)
        both = jax.tree.map(lambda x: jnp.concatenate([x, x]), rest)
        generic = jnp.arange(2 * B) >= B
        return both.replace(rows=self.rows.repeat(2), users=jnp.where(generic, 0, both.users), generic=generic)


def pair_batch(
    rows: Sequence[TokenRow], packed: PackedRows, users: np.ndarray, reference: np.ndarray, soft: bool = False
) -> PairBatch:
    """A batch of B comparisons.

    Args:
      rows: B rows of a token table of preference records.
      packed: their prompts with both answers, chosen first.
      users: int32 [B], rows of the user table.
      reference: float32 [B, 2], log-probabilities of both answers under the reference.
      soft: whether rows say how certain a comparison is.
    """
    arrays: dict[str, Any] = {
        "index": np.array([row["index"] for row in rows], np.int32),
        "users": users,
        "reference": reference,
        "counts": np.array([[_count(row, side) for side in SIDES] for row in rows], np.float32),
        "margin": np.array([row["margin"] or 0.0 for row in rows], np.float32),
        "preference": soft_labels(rows) if soft else None,
    }
    return PairBatch(rows=packed, **arrays)


def _count(row: TokenRow, side: str) -> int:
    """Number of scored tokens of an answer."""
    mask = row[f"{side}_mask"]
    return len(row[side]) if mask is None else int(mask.sum())
