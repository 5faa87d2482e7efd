"""Pads rows of token ids, and iterates over batches in an order that a resumed run continues exactly."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from absl import logging
from flax import struct
from jaxtyping import Bool, Int

from pjrlhf.data.token_table import TokenRow
from pjrlhf.errors import UserError
from pjrlhf.types import Array, Json

Row = TypeVar("Row")
Batch = TypeVar("Batch")  # a pytree of arrays
Row_co = TypeVar("Row_co", covariant=True)
Batch_co = TypeVar("Batch_co", covariant=True)
Ids = Sequence[int] | np.ndarray  # token ids of one text
Length = int | Sequence[int]  # one length, or buckets; the smallest bucket that holds a batch is used


class Table(Protocol[Row_co]):
    """Rows by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Row_co: ...


class Batches(Protocol[Batch_co]):
    """An iterator over batches whose position is a small JSON dict."""

    def __next__(self) -> Batch_co: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Json) -> None: ...


class Completions(struct.PyTreeNode):
    """Prompts with one completion each, padded to T = P + N positions; NumPy arrays on the host.

    Prompts are padded on the left and completions on the right, so that they meet at column P.

    Attributes:
      valid: False on padding.
      prompt_length: P, static.
      scored: which tokens of the completions are scored; None for all that are valid.
    """

    tokens: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    prompt_length: int = struct.field(pytree_node=False)
    scored: Bool[Array, "B N"] | None = None


def pad_left(rows: Sequence[Ids], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows on the left: (tokens int32 [B, length], valid bool [B, length]).

    Raises:
      ValueError: a row is longer than `length`.
    """
    tokens, valid = pad_right([row[::-1] for row in rows], length, pad_id)
    return tokens[:, ::-1], valid[:, ::-1]


def pad_right(rows: Sequence[Ids], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows on the right: (tokens int32 [B, length], valid bool [B, length]).

    Raises:
      ValueError: a row is longer than `length`.
    """
    counts = np.array([len(row) for row in rows])
    if counts.max(initial=0) > length:
        raise ValueError(f"a row of {counts.max()} tokens does not fit into {length}")
    valid = np.arange(length)[None, :] < counts[:, None]
    tokens = np.full(valid.shape, pad_id, np.int32)
    tokens[valid] = np.concatenate(rows) if len(rows) else []
    return tokens, valid


def buckets(lengths: Sequence[int] | np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The smallest of `sizes` that holds each length, int64 [...]. Few shapes mean few compiled programs.

    Raises:
      ValueError: a length exceeds the largest size.
    """
    ordered = np.sort(np.asarray(sizes, np.int64))
    found = np.searchsorted(ordered, lengths)
    if np.max(found, initial=0) == len(ordered):
        raise ValueError(f"length {np.max(lengths)} is beyond the largest bucket, {ordered[-1]}")
    return ordered[found]


def soft_labels(rows: Sequence[TokenRow]) -> np.ndarray:
    """The probabilities that the chosen answers of rows are the better ones, float32 [B]."""
    return np.array([1.0 if row["preference"] is None else row["preference"] for row in rows], np.float32)


def collate_completion(
    rows: Sequence[TokenRow], *, prompt_length: Length, completion_length: Length, pad_id: int
) -> Completions:
    """Pads the "prompt" and "completion" ids of rows, and their "completion_mask" if any, to these lengths, or to the
    smallest buckets that hold them.

    Raises:
      ValueError: a prompt or completion is longer than its length, or than the largest bucket.
    """
    prompts, P = _fitted([row["prompt"] for row in rows], prompt_length)
    prompt = pad_left(prompts, P, pad_id)
    completion = pad_right(*_fitted([row["completion"] for row in rows], completion_length), pad_id)
    tokens, valid = (np.concatenate(pair, axis=1) for pair in zip(prompt, completion, strict=True))
    arrays: dict[str, Any] = {"tokens": tokens, "valid": valid}
    masks = [row.get("completion_mask") for row in rows]
    if any(mask is not None for mask in masks):
        arrays["scored"] = valid[:, P:].copy()
        for b, mask in enumerate(masks):
            if mask is not None:
                arrays["scored"][b, : len(mask)] = mask
    return Completions(**arrays, prompt_length=P)


def _fitted(ids: Sequence[Ids], length: Length) -> tuple[Sequence[Ids], int]:
    """(`ids`, the length to pad them to)."""
    return ids, length if isinstance(length, int) else int(buckets([max(map(len, ids))], length)[0])


def batches(
    table: Table[Row],
    batch_size: int,
    *,
    seed: int,
    collate: Callable[[list[Row]], Batch],
    shuffle: bool = True,
    epochs: int | None = None,
    key: str = "batch_size",
    rows: str = "rows",
) -> Batches[Batch]:
    """A grain iterator over batches, whose `get_state()` is a small JSON dict; after `set_state(state)` it continues
    exactly.

    Every epoch has its own order, fixed by `seed`. All processes make the same batches, and every device takes its rows
    (`parallel.mesh.shard_batch`). Which rows a process needs depends on the mesh, and processes that split layers need
    the same ones.

    Args:
      table: a random-access sequence of rows.
      batch_size: rows of a batch.
      collate: rows -> batch.
      epochs: passes over the table; endless where None. Batches may span two epochs; a partial last batch is dropped.
      key: dotted key of the setting that fixes the size of a batch, for messages.
      rows: what the rows are, for messages.

    Raises:
      UserError: the table is smaller than a batch.
    """
    import grain

    if batch_size > len(table):
        raise UserError(
            f"{key}: a batch takes {batch_size} {rows}, and there are only {len(table)} to train on; lower it with "
            f"--config.{key}, or add data"
        )

    dataset = grain.MapDataset.source(cast(Any, table))
    if shuffle:
        dataset = dataset.shuffle(seed=seed)
    dataset = dataset.repeat(epochs).batch(batch_size, drop_remainder=True, batch_fn=lambda rows: collate(list(rows)))
    # Rows are in memory, so threads would only compete for the interpreter lock.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def by_hash(names: Iterable[str], seed: int) -> list[str]:
    """`names`, each once, in a random order that is the same on every machine, whatever their order was."""
    return sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())


def split_by(
    keys: Sequence[Hashable],
    fraction: float,
    seed: int,
    alike: str = "split by another one",
    held: Sequence[bool] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows by key, such as a user or a prompt: all rows of one key are on the same side.

    Keys are ordered by a hash of key and seed, and the first `fraction` of them, at least one and never all, is held
    out. The split is the same on every machine and does not depend on the order of the rows.

    Args:
      keys: one per row.
      fraction: of the keys, between 0 and 1, exclusive.
      alike: the way out where all keys are equal.
      held: which rows are held out, in place of a fraction. Other rows with the key of one of these are on neither
        side, and a warning says how many.

    Returns:
      (numbers of the training rows, numbers of the held-out rows), int64 each.

    Raises:
      UserError: `fraction` is not between 0 and 1, a key is None, or all keys are equal.
    """
    if not 0 < fraction < 1:
        raise UserError(f"held-out fraction {fraction}: not between 0 and 1; choose for example 0.1")
    keys = list(keys)
    if None in keys:
        raise UserError(
            f"row {keys.index(None)}: has no key to split by; give every row a key, or split by another one"
        )
    names = [str(key) for key in keys]
    if held is not None:
        tested = {name for name, out in zip(names, held, strict=True) if out}
        train = np.array([name not in tested for name in names], bool)
        if left := len(names) - int(train.sum()) - sum(held):
            logging.warning("%d training records are left out: they share what is split by with held-out ones", left)
        return np.flatnonzero(train), np.flatnonzero(held)
    groups = by_hash(names, seed)
    if len(groups) < 2:
        raise UserError(
            f"held-out fraction {fraction}: the {len(names)} rows have one key, so nothing can be held out; {alike}"
        )
    first = set(groups[: min(max(round(fraction * len(groups)), 1), len(groups) - 1)])
    is_held = np.array([name in first for name in names])
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)
