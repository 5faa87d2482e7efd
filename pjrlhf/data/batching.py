"""Rows to padded arrays, in an order that a checkpoint can continue exactly."""

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import struct

from pjrlhf.errors import UserError

Row = Mapping[str, Any]
Batch = TypeVar("Batch")  # a pytree of arrays
Length = int | Sequence[int]  # one length, or buckets of which the smallest that holds a batch is taken


@struct.dataclass
class Completions:
    """B prompts with a completion each, padded to [B, P + C].

    The prompt is padded on its left and the completion on its right, so that they meet at column P.

    Attributes:
      tokens: int32 [B, P + C].
      valid: bool [B, P + C], False on padding.
      prompt_length: P, static.
    """

    tokens: np.ndarray | jax.Array
    valid: np.ndarray | jax.Array
    prompt_length: int = struct.field(pytree_node=False)


def pad_left(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [B, length], valid bool [B, length]) rows at the right edge; ValueError if one is longer."""
    tokens, valid = pad_right([row[::-1] for row in rows], length, pad_id)
    return tokens[:, ::-1], valid[:, ::-1]


def pad_right(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [B, length], valid bool [B, length]) rows at the left edge; ValueError if one is longer."""
    counts = np.array([len(row) for row in rows])
    if counts.max(initial=0) > length:
        raise ValueError(f"a row of {counts.max()} tokens does not fit into {length}")
    valid = np.arange(length)[None, :] < counts[:, None]
    tokens = np.full(valid.shape, pad_id, np.int32)
    tokens[valid] = np.concatenate(rows) if len(rows) else []
    return tokens, valid


def buckets(lengths: Sequence[int] | np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The smallest of `sizes` that holds each length, int64 [...]: few shapes, so few compiled programs.

    Raises:
      ValueError: a length is beyond the largest size.
    """
    sizes = np.sort(np.asarray(sizes, np.int64))
    found = np.searchsorted(sizes, lengths)
    if np.max(found, initial=0) == len(sizes):
        raise ValueError(f"length {np.max(lengths)} is beyond the largest bucket, {sizes[-1]}")
    return sizes[found]


def collate_completion(
    rows: Sequence[Row], *, prompt_length: Length, completion_length: Length, pad_id: int
) -> Completions:
    """Pads rows {"prompt", "completion"} of token ids to these lengths, or to the smallest buckets that hold them."""
    prompts, P = _fitted([row["prompt"] for row in rows], prompt_length)
    prompt = pad_left(prompts, P, pad_id)
    completion = pad_right(*_fitted([row["completion"] for row in rows], completion_length), pad_id)
    tokens, valid = (np.concatenate(pair, axis=1) for pair in zip(prompt, completion, strict=True))
    return Completions(tokens, valid, P)


def _fitted(ids: Sequence[np.ndarray], length: Length) -> tuple[Sequence[np.ndarray], int]:
    """`ids` and the length to pad them to."""
    return ids, length if isinstance(length, int) else int(buckets([max(map(len, ids))], length)[0])


def batches(
    table: Sequence[Row],
    batch_size: int,
    *,
    seed: int,
    collate: Callable[[Sequence[Row]], Batch],
    shuffle: bool = True,
    epochs: int | None = None,
) -> Iterator[Batch]:
    """A grain iterator over batches; `get_state()` is a small dict fit for JSON, `set_state(state)` continues exactly.

    Every epoch has its own order, fixed by `seed`. Several processes make the same batches, and their devices take
    their rows (`parallel.mesh.shard_batch`): which rows a process needs depends on the mesh, and where layers are split
    over processes, several need the same ones.

    Args:
      table: a random-access sequence of rows.
      batch_size: rows of a batch.
      collate: rows -> batch.
      epochs: passes over the table; endless by default. Batches run on over the end of an epoch, and a partial last
        batch is left out.

    Raises:
      UserError: the table is smaller than a batch.
    """
    import grain

    if batch_size > len(table):
        raise UserError(
            f"batch_size {batch_size}: the data set has only {len(table)} rows; lower the batch size or add data"
        )

    dataset = grain.MapDataset.source(table)
    if shuffle:
        dataset = dataset.shuffle(seed=seed)
    dataset = dataset.repeat(epochs).batch(batch_size, drop_remainder=True, batch_fn=lambda rows: collate(list(rows)))
    # The rows are in memory: threads would only contend for the interpreter.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def split_by(keys: Sequence[Hashable], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, held out) row numbers, int64, such that rows of one key (a user, a prompt) are never on both sides.

    The keys are ordered by a hash of key and seed, and the first `share` of them (at least one, never all) are held
    out: the same on every machine, and independent of the order of the rows.

    Raises:
      UserError: `share` is not between 0 and 1, a key is None, or there are fewer than two keys.
    """
    if not 0 < share < 1:
        raise UserError(f"held-out share {share}: not between 0 and 1; choose for example 0.1")
    keys = list(keys)
    if None in keys:
        raise UserError(f"row {keys.index(None)}: it has no key to split by; give every row one or split by another")
    names = [str(key) for key in keys]
    groups = sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())
    if len(groups) < 2:
        raise UserError(f"split by key: all {len(names)} rows have the same key; split by another one")
    held = set(groups[: min(max(round(share * len(groups)), 1), len(groups) - 1)])
    is_held = np.array([name in held for name in names])
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)
