"""Pytrees of arrays in one safetensors file, with JSON metadata and a checksum."""

import json
import os
import pathlib
from collections.abc import Mapping

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import xxhash

from pjrlhf.errors import UserError
from pjrlhf.models.folders import all_finite, reading, write_tensors
from pjrlhf.parallel.processes import on_process_zero, to_host
from pjrlhf.paths import atomic_write
from pjrlhf.types import Json, Params


def save_tree(path: str | os.PathLike, tree: Params, note: dict[str, Json] | None = None) -> None:
    """Writes a nested dict of arrays, and `note` as JSON, atomically. Every process must call it.

    Raises:
      UserError: an array holds NaN or infinity.
    """
    _write(pathlib.Path(path), flax.traverse_util.flatten_dict(to_host(tree), sep="/"), note or {})


@on_process_zero
def _write(path: pathlib.Path, flat: Params, note: dict[str, Json]) -> None:
    text = json.dumps(note)
    with atomic_write(path) as file:
        write_tensors(file, flat.items(), {"note": text, "checksum": _checksum(flat, text)})


def _checksum(flat: Mapping[str, np.ndarray], note: str) -> str:
    """XXH3 of the names, dtypes, shapes and contents of arrays and of their note, in hex."""
    digest = xxhash.xxh3_128(note.encode())
    for name, array in sorted(flat.items()):
        array = np.asarray(array, order="C")
        digest.update(f"\0{name}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def load_tree(path: str | os.PathLike) -> tuple[Params, dict[str, Json]]:
    """(tree of jax arrays, note) as written by `save_tree`.

    Raises:
      UserError: the file is missing or damaged, or holds numbers that are not finite.
    """
    from safetensors import safe_open

    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the .safetensors file in it")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; run the stage that writes it first")
    with reading(path), safe_open(path, framework="np") as file:
        flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = file.metadata() or {}
        text = metadata.get("note", "{}")
        note = json.loads(text)
    if metadata.get("checksum", "") not in ("", _checksum(flat, text)):  # files of others have none
        raise UserError(f"{path}: its contents are not what was saved; restore it, or run the stage that writes it")
    for name, array in flat.items():
        if not all_finite(array):
            raise UserError(
                f"{path}: {name} holds numbers that are not finite; run the stage that writes it with a lower "
                "learning rate"
            )
    tree = {name: jnp.asarray(array) for name, array in flat.items()}
    return flax.traverse_util.unflatten_dict(tree, sep="/"), note
