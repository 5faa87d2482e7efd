"""Pytrees of arrays in one safetensors file, with JSON metadata."""

import json
import os
import pathlib

import flax.traverse_util
import jax.numpy as jnp

from pjrlhf.errors import UserError
from pjrlhf.models.folders import reading, write_tensors
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
    with atomic_write(path) as file:
        write_tensors(file, flat.items(), {"note": json.dumps(note)})


def load_tree(path: str | os.PathLike) -> tuple[Params, dict[str, Json]]:
    """(tree of jax arrays, note) as written by `save_tree`.

    Raises:
      UserError: the file is missing or damaged.
    """
    from safetensors import safe_open

    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; run the stage that writes it first")
    with reading(path), safe_open(path, framework="np") as file:
        flat = {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
        note = json.loads((file.metadata() or {}).get("note", "{}"))
    return flax.traverse_util.unflatten_dict(flat, sep="/"), note
