"""Raw rows of a data set, from a file, a folder of files, or the Hugging Face hub. No code of a data set ever runs."""

import codecs
import collections
import csv
import fnmatch
import gzip
import io
import itertools
import lzma
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, BinaryIO, cast

from pjrlhf import paths
from pjrlhf.data.records import RecordError, from_json, plain
from pjrlhf.errors import UserError, reason_of
from pjrlhf.models.hub import hub_name
from pjrlhf.settings import shown

FORMATS = (".jsonl", ".json", ".csv", ".parquet")  # each also compressed: .jsonl.gz, .jsonl.xz
# Other words for the same part of a set, as file names have them.
_ALIKE = (
    ("train", "training"),
    ("test", "testing", "eval", "evaluation"),
    ("validation", "valid", "val", "dev"),
)
_SPLITS = tuple(word for words in _ALIKE for word in words)
_ROWS = 1000  # of a parquet file that are in memory at once


class Row(dict[str, Any]):
    """A raw row, or a record made of one.

    Attributes:
      where: its place, such as "train.jsonl line 7".
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        super().__init__(values)
        self.where = where


class Raw:
    """Opens the raw rows of a set, and counts what its reader leaves out on purpose.

    Args:
      path: a file, a folder, or "owner/name" on the hub with an optional "@revision".
      split: name of the part that is read where a call names none.
      name: of the configuration on the hub; "" for the only one.
      key: dotted key of the specification in the config, for messages.
      kind: of the reader, for readers of a family.

    Attributes:
      dropped: reason -> how often.
    """

    def __init__(self, path: str, split: str = "train", name: str = "", key: str = "data", kind: str = ""):
        self.path, self.split, self.name, self.key, self.kind = path, split, name, key, kind
        self.dropped: collections.Counter[str] = collections.Counter()

    def drop(self, reason: str, count: int = 1) -> None:
        """Counts what is left out on purpose, such as ties."""
        if count:
            self.dropped[reason] += count

    @property
    def is_folder(self) -> bool:
        """Whether the path is a folder of files, and not one file or a name on the hub."""
        return paths.local(self.path).is_dir()

    def error(self, name: str, reason: str) -> UserError:
        """An error about a setting, whose message begins with its key."""
        return UserError(f"{self.key}.{name}: {reason}")

    def holds(self, files: str) -> bool:
        """Whether a folder has files that match a pattern, see `rows`."""
        return bool(_matching(paths.local(self.path), files))

    @property
    def is_file(self) -> bool:
        """Whether the path is one file, so that it cannot hold a set of several."""
        return paths.local(self.path).is_file()

    def __call__(
        self,
        files: str = "*",
        *,
        split: str | None = "",
        hub: Mapping[str, Any] | None = None,
    ) -> Iterator[Row | RecordError]:
        """Raw rows, in order; a `RecordError` in place of a row that cannot be read. See `rows`.

        Args:
          files: pattern of the files in a folder.
          split: the part of the set; "" for that of the settings, None for all parts.
          hub: arguments of `datasets.load_dataset` that differ from those of the settings.
        """
        wanted = self.split if split == "" else split
        arguments = {"name": self.name or None, **(hub or {})}
        return rows(self.path, files=files, split=wanted, hub=arguments, key=self.key)


def rows(
    path: str,
    *,
    files: str = "*",
    split: str | None = "train",
    hub: Mapping[str, Any] | None = None,
    key: str = "data",
) -> Iterator[Row | RecordError]:
    """Raw rows of .jsonl, .json, .csv and .parquet files, also compressed by gzip or xz, in order of file names.

    Args:
      path: a file, whose rows are all read; a folder of files, also in subfolders; or a name on the hub.
      files: of a folder, those whose path without suffix ends in this pattern: "comparisons/batch*".
      split: of a folder, the files that name this part ("train-00000-of-00001.parquet", "valid/a.jsonl"); all where no
        file names a part. None reads all files.
      hub: further arguments of `datasets.load_dataset` for a name on the hub.
      key: dotted key of the specification in the config, for messages.

    Raises:
      UserError: no such file, folder or data set, or a damaged one.
    """
    place = paths.local(path)
    if not place.exists():
        yield from _of_hub(path, split, hub or {}, key)
        return
    if place.is_dir() and any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
        yield from _saved(place, split, key)
        return
    for file in [place] if place.is_file() else _files(place, files, split, key):
        name = file.name if place.is_file() else file.relative_to(place).as_posix()
        for where, row in _numbered(file, name):
            if isinstance(row, RecordError):
                yield row.at(where)
            elif isinstance(row, Mapping):
                yield Row(row, where)
            else:
                yield RecordError("not a row", f"a {type(row).__name__}, not an object").at(where)


def check_path(path: str, key: str) -> None:
    """Raises UserError for a path that is neither there nor a name on the hub."""
    if not paths.is_remote(path) and not pathlib.Path(paths.expand(path)).exists() and not _is_hub_name(path):
        raise UserError(f"{path}: no such file or folder; set --config.{key}.path to one that exists")


def _is_hub_name(path: str) -> bool:
    return hub_name(path) is not None and not _unpacked(path).endswith(FORMATS)


def _unpacked(name: str) -> str:
    """The name of a file without the suffix of its compression."""
    return name.removesuffix(".gz").removesuffix(".xz")


def _files(folder: pathlib.Path, pattern: str, split: str | None, key: str) -> list[pathlib.Path]:
    """The files of a folder that match a pattern, of one part of the set.

    Raises:
      UserError: there are none.
    """
    found = _matching(folder, pattern)
    if not found:
        what = "data files" if pattern == "*" else f"files {pattern!r}"
        raise UserError(
            f"{folder}: holds no {what} ({', '.join(FORMATS)}, also .gz and .xz); set --config.{key}.path to the "
            "folder of the raw files"
        )
    if split is None:
        return found
    words = next((alike for alike in _ALIKE if split in alike), (split,))
    # The folder itself is named by the user, so only what is inside tells parts.
    inside = {file: file.relative_to(folder).as_posix() for file in found}
    chosen = [file for file, name in inside.items() if _has_word(name, words)]
    if not chosen and any(_has_word(name, _SPLITS) for name in inside.values()):
        raise UserError(
            f"{folder}: no file of split {split!r} (found {shown(sorted(inside.values())[:10])}); set "
            f"--config.{key}.split to another one"
        )
    return chosen or found


def _matching(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    """The data files of a folder whose path without suffix ends in a pattern."""
    named = ((file, _stem(folder, file)) for file in paths.visible_files(folder))
    return [file for file, name in named if name is not None and fnmatch.fnmatchcase(f"/{name}", f"*/{pattern}")]


def _stem(folder: pathlib.Path, file: pathlib.Path) -> str | None:
    """The path of a data file with its folder and without its suffix; None for a file of another format."""
    name = _unpacked((folder.absolute().name / file.relative_to(folder)).as_posix())
    return next((name.removesuffix(suffix) for suffix in FORMATS if name.endswith(suffix)), None)


def _has_word(name: str, words: Iterable[str]) -> bool:
    return any(re.search(rf"(^|[^A-Za-z0-9]){re.escape(word)}([^A-Za-z0-9]|$)", name) for word in words)


def _numbered(file: pathlib.Path, name: str) -> Iterator[tuple[str, Any]]:
    """(place, value) of every row of a file; a `RecordError` for a line that is not JSON."""
    try:
        with paths.read_errors(file), file.open("rb") as raw:
            start = raw.read(6)
        with paths.read_errors(file), _opened(file, start) as content:
            yield from _rows_of(cast(BinaryIO, content), _unpacked(file.name), name)
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: a damaged compressed file ({error}); copy or download it again") from error


def _opened(file: pathlib.Path, start: bytes) -> IO[bytes]:
    """The unpacked content of a file that starts with these bytes, whatever its name says."""
    if start.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.open(file))
    return lzma.open(file) if start == b"\xfd7zXZ\x00" else file.open("rb")


def _rows_of(content: BinaryIO, file: str, name: str) -> Iterator[tuple[str, Any]]:
    if file.endswith(".parquet"):
        return _parquet(content, name)
    if file.endswith(".csv"):
        return _csv(content, name)
    if file.endswith((".jsonl", ".json")):
        return _json(content, name)
    raise UserError(
        f"{name}: the name does not tell the format; let it end in one of {', '.join(FORMATS)}, also .gz and .xz"
    )


def _json(content: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    """The objects of JSON lines, or of one list or object over the whole file, whichever the file is."""
    numbered = ((i, line) for i, line in enumerate(content, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        return
    lines = itertools.chain([first], numbered)
    if _begins_one_text(first[1]):
        text = b"".join(line for _, line in lines)
        try:
            value = from_json(text)
        except RecordError as error:
            raise UserError(f"{name}: cannot be read ({error}); copy or download it again") from error
        for i, row in enumerate(value if isinstance(value, list) else [value], 1):
            yield f"{name} record {i}", row
        return
    for i, line in lines:
        try:
            yield f"{name} line {i}", plain(from_json(line))
        except RecordError as error:
            yield f"{name} line {i}", error


def _begins_one_text(line: bytes) -> bool:
    """Whether the first line of a file begins one JSON text over the whole file: a list, or an object that goes on."""
    line = line.removeprefix(codecs.BOM_UTF8).strip()
    return line.startswith(b"[") or line == b"{"


def _csv(content: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default is shorter than a conversation
    found = csv.DictReader(io.TextIOWrapper(content, "utf-8-sig", newline=""))
    try:
        for i, row in enumerate(found, 1):
            if None in row or None in row.values():
                yield f"{name} record {i}", RecordError("wrong number of columns", f"the header has {len(row)}")
            else:
                yield f"{name} record {i}", row
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{name}: cannot be read ({error}); copy or download it again") from error


def _parquet(content: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(content).iter_batches(batch_size=_ROWS)
        for i, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            yield f"{name} row {i}", plain(row)
    except pyarrow.ArrowException as error:
        reason = reason_of(error, 200)
        raise UserError(f"{name}: a damaged parquet file ({reason}); copy or download it again") from error


def _of_hub(path: str, split: str | None, arguments: Mapping[str, Any], key: str) -> Iterator[Row]:
    import datasets

    check_path(path, key)
    repo, _, revision = path.partition("@")
    arguments = {"split": split, "revision": revision or None, **arguments}
    split = arguments["split"]
    try:
        data: Any = datasets.load_dataset(repo, **arguments)
    except Exception as error:  # the library and its readers raise many kinds
        raise UserError(
            f"{path}: `datasets` cannot open split {split!r} ({reason_of(error, 200)}); check --config.{key}.path, "
            f"--config.{key}.name and --config.{key}.split, and the network"
        ) from error
    yield from _of_dataset(data, repo, split)


def _saved(folder: pathlib.Path, split: str | None, key: str) -> Iterator[Row]:
    import datasets

    data: Any = datasets.load_from_disk(str(folder))
    if isinstance(data, Mapping) and split is not None:
        if split not in data:
            raise UserError(f"{folder}: no split {split!r}; set --config.{key}.split to one of {list(data)}")
        data = data[split]
    yield from _of_dataset(data, folder.name, split)


def _of_dataset(data: Any, name: str, split: str | None) -> Iterator[Row]:
    parts = data if isinstance(data, Mapping) else {split: data}
    for part, table in parts.items():
        for i, row in enumerate(table.with_format(None)):
            yield Row(plain(row), f"{name} [{part}] row {i}")
