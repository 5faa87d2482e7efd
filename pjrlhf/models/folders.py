"""Folders in Hugging Face layout on a local disk: JSON, safetensors, and writing that leaves no half folder behind."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pjrlhf.errors import UserError

Folder = str | pathlib.Path


@contextlib.contextmanager
def reading(file: pathlib.Path) -> Iterator[None]:
    """Turns a missing or broken `file` into a UserError that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as e:
        raise UserError(f"{file}: no such file; name a folder in Hugging Face layout with safetensors weights") from e
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as e:
        raise UserError(f"{file}: cannot be read ({e}); download or export it again") from e


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file; UserError where there is none."""
    with reading(file):
        content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no JSON object; download or export it again")
    return content


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a model, sorted: one, or those its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]


class _Longer:
    """A safetensors file whose names lack a prefix."""

    def __init__(self, handle: Any, prefix: str):
        self._handle, self._prefix = handle, prefix

    def get_slice(self, name: str) -> Any:
        return self._handle.get_slice(name.removeprefix(self._prefix))

    def get_tensor(self, name: str) -> np.ndarray:
        return self._handle.get_tensor(name.removeprefix(self._prefix))


@contextlib.contextmanager
def open_tensors(files: Iterable[pathlib.Path], prefix: str = "") -> Iterator[dict[str, Any]]:
    """Tensor name -> the open safetensors file that holds it; nothing is read yet.

    Where no name starts with `prefix`, all are given it: models are also saved without the head, and then without the
    name of what it is put on.
    """
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        found = {}
        for file in files:
            with reading(file):
                handle = stack.enter_context(safe_open(file, framework="np"))
            found |= dict.fromkeys(handle.keys(), handle)
        if not any(name.startswith(prefix) for name in found):
            found = {prefix + name: _Longer(handle, prefix) for name, handle in found.items()}
        yield found


def write_tensors(
    file: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file that torch reads. safetensors writes memory as it lies, so views are made contiguous first."""
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(x) for name, x in tensors}
    save_file(arrays, file, metadata={"format": "pt", **(metadata or {})})


@contextlib.contextmanager
def new_folder(folder: Folder, marker: str) -> Iterator[pathlib.Path]:
    """A temporary sibling that takes the name `folder` when the block ends, and vanishes where it fails.

    A folder already there is replaced if it holds the file `marker`; UserError if it holds anything else.
    """
    folder = pathlib.Path(folder).absolute()
    if folder.exists() and not (folder / marker).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is no earlier export; choose another folder")
    work, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    for leftover in (work, old):
        shutil.rmtree(leftover, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
