"""Local folders in Hugging Face layout: JSON, safetensors, and atomic writing of whole folders."""

import contextlib
import functools
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.types import Json

if TYPE_CHECKING:
    from safetensors import safe_open

Folder = str | pathlib.Path
# safetensors name -> numpy name of a dtype.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
OTHER_DTYPES = {"BOOL": "bool", "F64": "float64", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
OTHER_DTYPES |= {"U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"}


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


def read_json(file: pathlib.Path) -> dict[str, Json]:
    """The JSON object in a file.

    Raises:
      UserError: the file is missing or holds no JSON object.
    """
    with reading(file):
        content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no JSON object; download or export it again")
    return content


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a model, sorted: one, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]


class _File:
    """An open safetensors file whose tensor names omit `prefix`, which may be empty."""

    def __init__(self, handle: "safe_open", file: pathlib.Path, prefix: str):
        self._handle, self._file, self._prefix = handle, file, prefix

    def get_slice(self, name: str) -> Any:
        return self._handle.get_slice(name.removeprefix(self._prefix))

    def get_tensor(self, name: str) -> np.ndarray:
        return self._handle.get_tensor(name.removeprefix(self._prefix))

    def flat(self, name: str) -> np.ndarray:
        """A tensor as a flat memory map [n] in the order of the file; reading is lazy."""
        header, content = self._mapped
        entry = header[name.removeprefix(self._prefix)]
        start, end = entry["data_offsets"]
        return content[start:end].view(jnp.dtype(DTYPES[entry["dtype"]]))

    @functools.cached_property
    def _mapped(self) -> tuple[dict[str, Json], np.ndarray]:
        """(header of the file, memory map uint8 of the bytes of all tensors)."""
        with self._file.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        return header, np.memmap(self._file, np.uint8, "r", offset=8 + length)


@contextlib.contextmanager
def open_tensors(files: Iterable[pathlib.Path], prefix: str = "") -> Iterator[dict[str, _File]]:
    """Tensor name -> the open safetensors file that holds it; no tensor is read yet.

    Where no name starts with `prefix`, it is added to all: folders saved without the head omit the name of the module
    below it.
    """
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        handles = {}
        for file in files:
            with reading(file):
                handles[file] = stack.enter_context(safe_open(file, framework="np"))
        if any(name.startswith(prefix) for handle in handles.values() for name in handle.keys()):  # noqa: SIM118
            prefix = ""
        found = {}
        for file, handle in handles.items():
            found |= dict.fromkeys((prefix + name for name in handle.keys()), _File(handle, file, prefix))  # noqa: SIM118
        yield found


class Stream(NamedTuple):
    """A tensor that is produced piece by piece while it is written.

    Attributes:
      shape, dtype: of the whole tensor.
      pieces: gives consecutive pieces of its flat content, in `dtype`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]


def stream_tensors(
    file: pathlib.Path, tensors: Mapping[str, Stream], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file holding one piece of one tensor in memory at a time.

    The library's own writer orders the metadata at random, so that equal content has different bytes.

    Raises:
      ValueError: the pieces of a tensor do not add up to its shape.
    """
    names = {dtype: name for name, dtype in (OTHER_DTYPES | DTYPES).items()}
    header: dict[str, Json] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        entry = {"dtype": names[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            for piece in tensor.pieces():
                target.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
            end = 8 + len(text) + header[name]["data_offsets"][1]
            if target.tell() != end:
                raise ValueError(f"{file}: {name} ends at byte {target.tell()}, where its shape says {end}")


def write_tensors(
    file: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file that torch can read; the same tensors give the same bytes."""

    arrays = {name: np.asarray(x) for name, x in tensors}
    # Larger items first, as the library has them, so that every tensor starts at a multiple of its item size.
    ordered = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    streams = {name: Stream(arrays[name].shape, arrays[name].dtype, lambda x=arrays[name]: [x]) for name in ordered}
    stream_tensors(file, streams, metadata)


@contextlib.contextmanager
def new_folder(folder: Folder, marker: str) -> Iterator[pathlib.Path]:
    """A temporary sibling folder, renamed to `folder` when the block succeeds and deleted when it fails.

    Replaces an existing folder if that is empty or holds the file `marker`.

    Raises:
      UserError: `folder` exists and is neither empty nor an earlier export.
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
