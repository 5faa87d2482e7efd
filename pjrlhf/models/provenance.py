"""What saved parameters belong to, and the check of it where they are loaded.

A provenance is a flat dict of JSON values that stands in the note of a file, see `models.storage`.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import xxhash

from pjrlhf.errors import UserError
from pjrlhf.models.adapters import is_low_rank
from pjrlhf.types import Json, Params, Tree


def adapted(bank: Params) -> list[str]:
    """The linear layers with adapters, such as "attention/query"; ["all"] for full parameters."""
    if not is_low_rank(bank):
        return ["all"]
    return sorted(f"{block}/{name}" for block, layers in bank["layers"].items() for name in layers)


def text_provenance(tokenizer: Any, chat: bool) -> dict[str, Json]:
    """How text becomes tokens with a `data.tokenization.Tokenizer`. The chat template counts where requests
    are turns, `chat`.
    """
    template = tokenizer.backend.chat_template if chat else None
    return {
        "vocabulary": _digest(tokenizer.backend.get_vocab()),
        "eos_tokens": tokenizer.eos_tokens,
        "chat_template": _digest(template) if template else "",
    }


def _digest(value: Json) -> str:
    """16 hex digits that identify a JSON value."""
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True).encode())


def difference(found: Mapping[str, Json], wanted: Mapping[str, Json]) -> list[str]:
    """One phrase for every key of `wanted` whose value in `found` is another one."""
    return [
        f"{name}: {found.get(name, '(not recorded)')!r}, here {value!r}"
        for name, value in wanted.items()
        if name not in found or found[name] != value
    ]


def check_provenance(path: str | os.PathLike, note: Mapping[str, Json], wanted: Mapping[str, Json]) -> None:
    """Raises UserError unless a note records every value of `wanted`; the message lists what differs."""
    if differs := difference(note, wanted):
        raise UserError(
            f"{path}: was trained with {'; '.join(differs)}; use the base and settings it was trained with, or train "
            "it again"
        )


def check_shapes(path: str | os.PathLike, tree: Tree, like: Tree) -> None:
    """Raises UserError unless the leaves of `tree` have the names and shapes of those of `like`."""

    def shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf.shape for keys, leaf in leaves}

    found, wanted = shapes(tree), shapes(like)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{path}: {name} has shape {found.get(name, '(absent)')}, this run needs {wanted.get(name, '(none)')}; "
                "use the base and settings it was trained with, or train it again"
            )
