"""Local folders in Hugging Face layout: JSON, safetensors, and atomic writing of whole folders."""

import contextlib
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pjrlhf import strict_json
from pjrlhf.errors import UserError
from pjrlhf.paths import disk_errors, shown_as
from pjrlhf.types import Json

if TYPE_CHECKING:
    from safetensors import safe_open

Folder = str | pathlib.Path
# safetensors name -> numpy name of a dtype: of weights, and of everything else.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
OTHER_DTYPES = {"BOOL": "bool", "F64": "float64", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
OTHER_DTYPES |= {"U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"}
INDEX = "model.safetensors.index.json"


@contextlib.contextmanager
def reading(file: pathlib.Path) -> Iterator[None]:
    """Turns a missing or broken `file` into a UserError that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as e:
        raise UserError(f"{file}: no such file; name a folder in Hugging Face layout with safetensors weights") from e
    except NotADirectoryError as e:
        raise UserError(f"{file.parent}: is a file; name the folder that holds the model") from e
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror or e}); check the path and its permissions") from e
    except (ValueError, RecursionError, SafetensorError) as e:
        raise UserError(f"{file}: cannot be read ({e}); download or export it again") from e


def read_json(file: pathlib.Path) -> dict[str, Json]:
    """The JSON object in a file.

    Raises:
      UserError: the file is missing or holds no JSON object.
    """
    with reading(file):
        content = strict_json.loads(file.read_text(), bounded=True)
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no JSON object; download or export it again")
    return content


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a model, sorted: one, or the shards that its index names.

    Raises:
      UserError: the index names no files, or files outside the folder.
    """
    index = folder / INDEX
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    shards = read_json(index).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{index}: weight_map names no weight files; download or export the model again")
    for name in names:
        path = pathlib.PurePath(name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{index}: {name} lies outside the model folder; move it there and correct weight_map")
    return [folder / name for name in sorted(set(names))]


class _File:
    """An open safetensors file whose tensor names omit `prefix`, which may be empty."""

    def __init__(self, handle: "safe_open", file: pathlib.Path, prefix: str):
        self._handle, self._file, self._prefix = handle, file, prefix

    def get_slice(self, name: str) -> Any:
        return self._handle.get_slice(name.removeprefix(self._prefix))

    def dtype(self, name: str) -> np.dtype:
        return jnp.dtype((DTYPES | OTHER_DTYPES)[self.get_slice(name).get_dtype()])

    def get_tensor(self, name: str) -> np.ndarray:
        return self._handle.get_tensor(name.removeprefix(self._prefix))

    def flat(self, name: str) -> np.ndarray:
        """A tensor as a flat memory map [n] in the order of the file; reading is lazy."""
        header, content = self._mapped
        entry = header[name.removeprefix(self._prefix)]
        start, end = entry["data_offsets"]
        return content[start:end].view(self.dtype(name))

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

    Raises:
      UserError: a file is missing or damaged, or two files hold a tensor of the same name.
    """
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        handles = {}
        for file in files:
            with reading(file):
                handles[file] = stack.enter_context(safe_open(file, framework="np"))
        if any(name.startswith(prefix) for handle in handles.values() for name in handle.keys()):  # noqa: SIM118
            prefix = ""
        found: dict[str, _File] = {}
        for file, handle in handles.items():
            names = [prefix + name for name in handle.keys()]  # noqa: SIM118
            if twice := sorted(found.keys() & names):
                raise UserError(f"{file}: {twice[0]} is in another file of the model as well; keep one of them")
            found |= dict.fromkeys(names, _File(handle, file, prefix))
        yield found


def all_finite(x: np.ndarray) -> bool:
    """Whether no number of `x` is NaN or infinite; arrays of integers are finite."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return True
    if not x.flags.c_contiguous:
        return bool(np.isfinite(x).all())
    flat = x.reshape(-1)
    return all(np.isfinite(flat[i : i + 2**18]).all() for i in range(0, len(flat), 2**18))


def equal_values(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether two flat arrays hold the same numbers, whatever their dtypes; compares piece by piece."""
    if len(x) != len(y):
        return False
    pieces = ((x[i : i + 2**18], y[i : i + 2**18]) for i in range(0, len(x), 2**18))
    return all(np.array_equal(a.astype(np.float32), b.astype(np.float32)) for a, b in pieces)


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
    """Writes a safetensors file that torch can read, with one piece of one tensor in memory at a time.

    The library's own writer orders the metadata at random, so that equal content has different bytes.

    Raises:
      UserError: a tensor holds NaN or infinity.
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
                if not all_finite(piece):
                    half = tensor.dtype == np.float16
                    raise UserError(
                        f"{file}: {name} would hold NaN or infinity as {tensor.dtype.name}, so nothing is written; "
                        + ("choose bfloat16 or float32" if half else "look for what it is made from")
                    )
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
      UserError: `folder` exists and is neither empty nor an earlier export, or the disk is full or unwritable.
    """
    folder = pathlib.Path(folder).absolute()
    work, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    absent = [parent for parent in folder.parents if not os.path.lexists(parent)]
    with disk_errors(folder):
        try:
            taken = folder.exists() and not (folder / marker).is_file()
            if taken and not (folder.is_dir() and not any(folder.iterdir())):
                raise UserError(f"{folder}: exists and is no earlier export; choose another folder")
            for leftover in (work, old):
                shutil.rmtree(leftover, ignore_errors=True)
            work.mkdir(parents=True)
            with shown_as(work, folder):
                yield work
            if folder.exists():
                folder.rename(old)
            work.rename(folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            if old.exists() and not folder.exists():
                old.rename(folder)
            for parent in absent:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise
    shutil.rmtree(old, ignore_errors=True)
