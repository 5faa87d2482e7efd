"""Names and rows of people, checked, and rows as a store keeps them."""

import flax.traverse_util
import jax
import numpy as np
from safetensors.numpy import load, save

from pjrlhf.data.records import RecordError, plain
from pjrlhf.errors import UserError
from pjrlhf.serving.people.fit import Row

NAME_LENGTH = 512  # characters of a person's name


def checked_name(name: object) -> str:
    """A person's name.

    Raises:
      UserError: no text, an empty or a too long one, or half of a surrogate pair.
    """
    if not isinstance(name, str) or not name:
        raise UserError("id: is no text of at least one character; name the person")
    if len(name) > NAME_LENGTH:
        raise UserError(f"id: has {len(name)} characters, more than {NAME_LENGTH}; shorten it")
    try:
        return plain(name)
    except RecordError as error:
        raise UserError(f"id: {error}; correct it") from error


def is_name(name: str) -> bool:
    """Whether a person can have this name."""
    try:
        return bool(checked_name(name))
    except UserError:
        return False


def packed(row: Row) -> bytes:
    """The bytes that a store keeps of a row."""
    return save({name: np.ascontiguousarray(x) for name, x in flax.traverse_util.flatten_dict(row, sep="/").items()})


def unpacked(data: bytes, like: Row) -> Row:
    """The row of some bytes.

    Raises:
      ValueError: it has other arrays than `like`, or numbers that are not finite.
    """
    try:
        row = flax.traverse_util.unflatten_dict(load(data), sep="/")
    except Exception as error:  # the reader has no type of its own for what damaged bytes may be
        raise ValueError(" ".join(str(error).split())[:100]) from error
    return checked_row(row, like)


def checked_row(row: Row, like: Row) -> Row:
    """A row of host arrays.

    Raises:
      ValueError: it has other arrays than `like`, or numbers that are not finite.
    """
    if jax.tree.map(lambda x: (x.shape, x.dtype), row) != jax.tree.map(lambda x: (x.shape, x.dtype), like):
        raise ValueError("it has other arrays")
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(row)):
        raise ValueError("not all of its numbers are finite")
    return row
