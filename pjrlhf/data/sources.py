"""Sources of records: random-access sequences of plain dicts that can name every row."""

import gzip
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from etils import epath

from pjrlhf import paths
from pjrlhf.data.joined import read_choices, read_votes
from pjrlhf.data.records import RecordError, plain
from pjrlhf.errors import UserError
from pjrlhf.registry import Registry

_FORMATS = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet", "arrow": "arrow"}


class Source(Sequence):
    """A random-access sequence of records with a name. Items are plain dicts; a bad row raises `RecordError`.

    Args:
      name: for messages.
      records: mappings by index.
      rows: the rows of `records` that belong to the source, in order; all of them where None.
    """

    def __init__(self, name: str, records: Any, rows: range | None = None):
        self.name = name
        self._records = records
        self._rows = range(len(records)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride] - no slices
        return plain(self._records[self._rows[i]])

    def where(self, i: int) -> str:
        """The place of a row, such as "train row 3": the row number in the whole split, from 0."""
        return f"{self.name} row {self._rows[i]}"


class JsonLines(Source):
    """The JSON objects of a .jsonl or .jsonl.gz file, local or in a bucket; blank lines are skipped.

    Raises:
      UserError: no such file, or a damaged one.
    """

    def __init__(self, path: str):
        file = epath.Path(path)
        try:
            with paths.bucket_errors(path):
                if not file.is_file():
                    raise UserError(f"{path}: no such file; check --config.data.path")
                with file.open("rb") as raw, gzip.open(raw, "rb") if file.suffix == ".gz" else raw as lines:
                    self._lines = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        except (gzip.BadGzipFile, EOFError) as error:
            raise UserError(f"{path}: a damaged gzip file ({error}); copy or download it again") from error
        super().__init__(file.name, self._lines)

    def __getitem__(self, i: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride] (no slices)
        try:
            record = json.loads(self._lines[i][1].decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise RecordError("not UTF-8", str(error)) from error
        except json.JSONDecodeError as error:
            raise RecordError("bad JSON", str(error)) from error
        if not isinstance(record, dict):
            raise RecordError("bad JSON", f"a {type(record).__name__}, not an object")
        return record

    def where(self, i: int) -> str:
        return f"{self.name} line {self._lines[i][0]}"


def open_source(spec: Mapping[str, Any]) -> Source:
    """Opens the source that `spec`, a mapping or a ConfigDict, describes. Its `kind` is one of `READERS`, or your own.

    "jsonl":    `path` of a .jsonl or .jsonl.gz file.
    "datasets": `path` of a folder written by `save_to_disk`, of a data file or a folder of data files, or a name on the
                Hugging Face hub; `name` of the configuration; `split`, "train" by default, also a slice:
                "train[:1000]", "train[90%:]".
    "tfds":     `name`, `split` (as above) and `data_dir` of a data set in a file format with random access.
    "votes":    votes on pairs of answers, see `joined.read_votes`.
    "choices":  multiple-choice questions, see `joined.read_choices`.
    "records":  `records`, a random-access sequence of mappings, and a `name` for messages.
    "package.module:reader" or "path/to/file.py:reader": a `Reader`.

    Raises:
      UserError: the kind is unknown, or the file, data set or split does not exist or cannot be read.
    """
    kind: Any = spec.get("kind") if hasattr(spec, "get") else spec
    found = READERS.get(kind)(spec)
    if isinstance(found, Source):
        return found
    if not isinstance(found, Sequence):
        raise UserError(f"data kind {kind!r}: returns a {type(found).__name__}; let it return a sequence of records")
    return Source(str(spec.get("name") or kind), found)


# Opens what a specification describes; returns a `Source`, or any random-access sequence of mappings.
Reader = Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any]]]


def _reader(thing: object) -> Reader:
    if not callable(thing):
        raise ValueError("is not a function of a specification")
    return cast(Reader, thing)


READERS: Registry[Reader] = Registry("data kind", _reader)


def _required(spec: Mapping[str, Any], key: str) -> Any:
    if spec.get(key) is None:
        raise UserError(f"data kind {spec['kind']!r}: needs {key!r}; set --config.data.{key}")
    return spec[key]


@READERS.register("jsonl")
def _jsonl(spec: Mapping[str, Any]) -> Source:
    return JsonLines(_required(spec, "path"))


@READERS.register("records")
def _records(spec: Mapping[str, Any]) -> Source:
    return Source(spec.get("name") or "records", _required(spec, "records"))


@READERS.register("votes")
def _votes(spec: Mapping[str, Any]) -> Source:
    return Source(pathlib.Path(str(spec.get("votes"))).name, read_votes(spec))


@READERS.register("choices")
def _choices(spec: Mapping[str, Any]) -> Source:
    return Source(pathlib.Path(str(spec.get("path"))).name, read_choices(spec))


@READERS.register("datasets")
def _datasets(spec: Mapping[str, Any]) -> Source:
    import datasets
    from datasets.exceptions import DatasetsError

    data: Any
    path, name = str(_required(spec, "path")), spec.get("name")
    split, cut = _split(spec.get("split") or "train")
    local = paths.local(path).expanduser()
    suffixes = [part for part in local.name.split(".")[1:] if part in _FORMATS]
    try:
        if (local / "state.json").is_file():
            data = datasets.load_from_disk(str(local))
        elif (local / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(local))
            if split not in splits:
                raise UserError(f"{path}: no split {split!r}; set --config.data.split to one of {list(splits)}")
            data = splits[split]
        elif local.is_file() and suffixes:
            data = datasets.load_dataset(_FORMATS[suffixes[-1]], data_files={split: str(local)}, split=split)
        elif not local.exists() and (suffixes or path.startswith(("/", "~", ".")) or path.count("/") > 1):
            raise UserError(f"{path}: no such file or folder; check --config.data.path")
        else:
            data = datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: `datasets` cannot open split {split!r} ({_one_line(error)}); check --config.data.path, "
            "--config.data.name and --config.data.split, and the network for a name on the hub"
        ) from error
    return Source(f"{local.name} [{split}]", data, cut(len(data)))


@READERS.register("tfds")
def _tfds(spec: Mapping[str, Any]) -> Source:
    import tensorflow_datasets as tfds

    name, data_dir = _required(spec, "name"), spec.get("data_dir")
    split, cut = _split(spec.get("split") or "train")
    prepare = (
        f"prepare it once with tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare() "
        "and set --config.data.data_dir"
    )
    try:
        builder: Any = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"{name}: tfds finds no such data set in {data_dir or 'its default folder'}; {prepare}"
        ) from error
    if split not in builder.info.splits:  # empty where the data set is not prepared
        found = list(builder.info.splits)
        way = f"set --config.data.split to one of {found}" if found else prepare
        raise UserError(f"{name}: no split {split!r} in {builder.data_dir}; {way}")
    try:
        data = builder.as_data_source(split=split)
    except (NotImplementedError, ImportError) as error:
        raise UserError(
            f"{name}: the files in {builder.data_dir} need TensorFlow for random access; {prepare}"
        ) from error
    # Slices are taken here because parquet builders silently ignore them.
    return Source(f"{name} [{split}]", data, cut(len(data)))


def _split(text: str) -> tuple[str, Callable[[int], range]]:
    """(name, number of rows -> the range of the slice) of "train", "train[10:20]" or "train[:5%]"."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", text)
    if not match:
        raise UserError(f"split {text!r}: not understood; write --config.data.split=train, train[:1000] or train[90%:]")
    name, start, stop = match.groups()

    def cut(rows: int) -> range:
        def edge(part: str | None) -> int | None:
            if part is None:
                return None
            return round(rows * int(part[:-1]) / 100) if part.endswith("%") else int(part)

        return range(rows)[edge(start) : edge(stop)]

    return name, cut


def _one_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
