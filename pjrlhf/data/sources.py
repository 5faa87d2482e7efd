"""Sources of records: random-access sequences of plain dicts that can name every row."""

import codecs
import gzip
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from pjrlhf import paths
from pjrlhf.data import readers
from pjrlhf.data.joined import ANSWERS, CHOICES, RATINGS, VOTES, answer_pairs, rated_pairs, read_choices, read_votes
from pjrlhf.data.readers.raw import check_path
from pjrlhf.data.readers.reader import read, settings_of
from pjrlhf.data.records import RecordError, from_json, plain
from pjrlhf.errors import UserError
from pjrlhf.registry import Registry, callable_as
from pjrlhf.settings import UnknownKey

FORMATS = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet", "arrow": "arrow"}


class Spec(dict):
    """The specification of a source.

    Attributes:
      key: its dotted key in the config, for messages.
    """

    def __init__(self, values: Mapping[str, Any], key: str):
        super().__init__(values)
        self.key = key


class Source(Sequence):
    """A random-access sequence of records with a name. Items are plain dicts; a bad row raises `RecordError`.

    Args:
      name: for messages.
      records: mappings by index; a `RecordError` in place of a record that cannot be used.
      rows: the rows of `records` that belong to the source, in order; all of them where None.
      places: of each of `records`, for messages; "" or None for its number.
      dropped: what a reader left out on purpose, reason -> how often.
    """

    def __init__(
        self,
        name: str,
        records: Any,
        rows: Sequence[int] | None = None,
        places: Sequence[str] | None = None,
        dropped: Mapping[str, int] | None = None,
    ):
        self.name = name
        self.dropped = dict(dropped or {})
        self._records = records
        self._rows = range(len(records)) if rows is None else rows
        self._places = places

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride] - no slices
        row = self._rows[i]
        try:
            record = self._records[row]
        except RecordError:
            raise
        except Exception as error:  # readers are code of others
            raise UserError(f"{self.where(i)}: cannot be read ({_one_line(error)}); correct the data") from error
        if isinstance(record, RecordError):
            raise record
        return plain(record)

    def where(self, i: int) -> str:
        """The place of a row, such as "train row 3": the row number in the whole split, from 0."""
        row = self._rows[i]
        place = self._places[row] if self._places else ""
        return place or f"{self.name} row {row}"


class JsonLines(Source):
    """The JSON objects of a file, local or in a bucket, which may be compressed by gzip; blank lines are skipped.

    Args:
      path: of the file.
      key: dotted key of its specification in the config, for messages.

    Raises:
      UserError: no such file, a damaged one, or one of another format.
    """

    def __init__(self, path: str, key: str = "data"):
        try:
            with paths.bucket_errors(path), paths.read_errors(path):
                file = epath.Path(paths.expand(path))
                if file.is_dir():
                    raise UserError(f"{path}: is a folder, not a file of JSON lines; {_as_datasets(key)}")
                if not file.is_file():
                    raise UserError(f"{path}: no such file; set --config.{key}.path to a file that exists")
                with file.open("rb") as raw:
                    packed = raw.read(2) == b"\x1f\x8b"
                with file.open("rb") as raw, gzip.open(raw, "rb") if packed else raw as lines:
                    self._lines = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path}: a damaged gzip file ({error}); copy or download it again") from error
        start = self._lines[0][1].removeprefix(codecs.BOM_UTF8).strip() if self._lines else b""
        if start.startswith(b"PAR1"):
            what = "a parquet file"
        elif file.suffix == ".csv" and not start.startswith(b"{"):
            what = "a CSV file"
        else:
            what = "one JSON text over the whole file" if _is_one_text(start, len(self._lines)) else ""
        if what:
            raise UserError(f"{path}: {what}, not one JSON object per line; {_as_datasets(key)}")
        super().__init__(file.name, self._lines)

    def __getitem__(self, i: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride] (no slices)
        record = from_json(self._lines[i][1])
        if not isinstance(record, dict):
            raise RecordError("bad JSON", f"a {type(record).__name__}, not an object")
        return record

    def where(self, i: int) -> str:
        return f"{self.name} line {self._lines[i][0]}"


def _is_one_text(line: bytes, count: int) -> bool:
    """Whether a file of `count` lines, of which this is the first, is one JSON text: a list of records, or a text that
    goes on on the next line. A list that ends on its line is a bad record among others.
    """
    if not line.startswith((b"[", b"{")):
        return False
    try:
        value = from_json(line)
    except RecordError as error:
        return line == b"{" or (line.startswith(b"[") and error.reason == "bad JSON")
    return count == 1 and isinstance(value, list) and all(isinstance(one, dict) for one in value)


class Joined(Source):
    """Records that are put together from several; each is named by the number of one of them, from 1."""

    def where(self, i: int) -> str:
        return f"{self.name} record {self._rows[i]}"


def open_source(spec: Mapping[str, Any], key: str = "data") -> Source:
    """Opens the source that `spec`, a mapping or a ConfigDict, describes. Its `kind` is one of `READERS`, or your own.

    "jsonl":    `path` of a file of JSON lines, also compressed by gzip.
    "datasets": `path` of a folder written by `save_to_disk`, of a data file or a folder of data files, or a name on the
                Hugging Face hub with an optional "@revision" (branch, tag or commit); `name` of the configuration;
                `split`, "train" by default, also a slice: "train[:1000]", "train[90%:]".
    "tfds":     `name`, `split` (as above) and `data_dir` of a data set in a file format with random access.
    "votes":    votes on pairs of answers, see `joined.read_votes`.
    "choices":  multiple-choice questions, see `joined.read_choices`.
    "answers":  pairs of answers to the same prompt, see `joined.answer_pairs`.
    "ratings":  pairs of statements that people rate, see `joined.rated_pairs`.
    "records":  `records`, a random-access sequence of mappings, and a `name` for messages.
    One of `readers.MODULES`: a published data set, see docs/data.md.
    "package.module:reader" or "path/to/file.py:reader": a `Reader`.

    Args:
      key: dotted key of `spec` in the config, for messages.

    Raises:
      UserError: the kind is unknown, or the file, data set or split does not exist or cannot be read.
    """
    kind: Any = spec.get("kind") if hasattr(spec, "get") else spec
    reader = _reader_of(kind, key)
    found = reader(Spec(spec, key))
    if isinstance(found, Source):
        return found
    if not isinstance(found, Sequence):
        raise UserError(f"data kind {kind!r}: returns a {type(found).__name__}; let it return a sequence of records")
    return Source(str(spec.get("name") or kind), found)


def check_source(spec: Mapping[str, Any], key: str) -> None:
    """Checks what can be told about a source without reading it.

    Args:
      key: dotted key of `spec` in the config.

    Raises:
      UserError: an unknown kind, a missing setting or one that no kind has, a split that cannot be read, or a local
        file that does not exist.
    """
    kind = spec.get("kind")
    _reader_of(kind, key)
    spec = Spec(spec, key)
    # What belongs to another kind may stay: a flag changes the kind, and takes nothing away.
    unknown = [name for name in spec if name not in _SETTINGS] if kind in _BUILT_IN else []
    if unknown:
        raise UnknownKey(f"{key}.{unknown[0]}", _SETTINGS)
    if kind in readers.MODULES:
        _split(spec)
        check_path(settings_of(readers.reader_of(str(kind)), spec, key).path, key)
    for name in _NEEDED.get(str(kind), ()):
        value = str(_required(spec, name))
        is_file = name in ("path", "votes", "statements") and kind != "datasets" and not paths.is_remote(value)
        if is_file and not os.path.exists(paths.expand(value)):
            raise UserError(f"{value}: no such file or folder; set --config.{key}.{name} to one that exists")
    if kind in ("datasets", "tfds"):
        _split(spec)


# Opens what a specification describes; returns a `Source`, or any random-access sequence of mappings.
Reader = Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any]]]


READERS: Registry[Reader] = Registry("data kind", callable_as("a function of a specification"))
_NEEDED = {
    "jsonl": ("path",),
    "datasets": ("path",),
    "tfds": ("name",),
    "votes": ("path", "votes"),
    "choices": ("path",),
    "answers": ("path",),
    "ratings": ("path", "statements", "prompt"),
}
_BUILT_IN = {"records", *_NEEDED}
# Of all kinds of `_BUILT_IN`.
_SETTINGS = {
    *("kind", "path", "columns", "records", "name", "split", "data_dir", "votes", "min_votes", "ties", "pairs", "page"),
    *("statements", *VOTES, *CHOICES, *ANSWERS, *RATINGS),
}


def _reader_of(kind: Any, key: str) -> Reader:
    try:
        return READERS.get(kind)
    except UserError as error:
        raise UserError(f"{key}.kind: {error}") from error


def _required(spec: Mapping[str, Any], key: str) -> Any:
    if not spec.get(key):
        raise UserError(f"data kind {spec['kind']!r}: needs {key!r}; set --config.{_key(spec)}.{key}")
    return spec[key]


def _key(spec: Mapping[str, Any]) -> str:
    return getattr(spec, "key", "data")


def _as_datasets(key: str) -> str:
    return f"read it with --config.{key}.kind=datasets"


@READERS.register("jsonl")
def _jsonl(spec: Mapping[str, Any]) -> Source:
    return JsonLines(str(_required(spec, "path")), _key(spec))


@READERS.register("records")
def _records(spec: Mapping[str, Any]) -> Source:
    return Source(spec.get("name") or "records", _required(spec, "records"))


@READERS.register("votes")
def _votes(spec: Mapping[str, Any]) -> Source:
    found = read_votes(spec, _key(spec))
    return Joined(pathlib.Path(str(spec.get("votes"))).name, found, list(found))


@READERS.register("choices")
def _choices(spec: Mapping[str, Any]) -> Source:
    return Source(pathlib.Path(str(spec.get("path"))).name, read_choices(spec, _key(spec)))


@READERS.register("answers")
def _answers(spec: Mapping[str, Any]) -> Source:
    found = _jsonl(spec)
    return Source(found.name, answer_pairs(found, spec, _key(spec)))


@READERS.register("ratings")
def _ratings(spec: Mapping[str, Any]) -> Source:
    return Source(pathlib.Path(str(spec.get("path"))).name, rated_pairs(spec, _key(spec)))


@READERS.register("datasets")
def _datasets(spec: Mapping[str, Any]) -> Source:
    import datasets

    data: Any
    path, name, key = str(_required(spec, "path")), spec.get("name"), _key(spec)
    split, cut = _split(spec)
    local = paths.local(path)
    suffixes = [part for part in local.name.split(".")[1:] if part in FORMATS]
    try:
        if (local / "state.json").is_file():
            data = datasets.load_from_disk(str(local))
        elif (local / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(local))
            if split not in splits:
                raise UserError(f"{path}: no split {split!r}; set --config.{key}.split to one of {list(splits)}")
            data = splits[split]
        elif local.is_file():
            if not suffixes:
                known = ", ".join(f".{suffix}" for suffix in FORMATS)
                raise UserError(f"{path}: the name does not tell the format; let it end in one of {known}")
            data = datasets.load_dataset(FORMATS[suffixes[-1]], data_files={split: str(local)}, split=split)
        elif not local.exists() and (
            suffixes or path.startswith(("/", "~", ".")) or path.partition("@")[0].count("/") > 1
        ):
            raise UserError(f"{path}: no such file or folder; set --config.{key}.path to one that exists")
        elif local.exists():
            data = datasets.load_dataset(str(local), name, split=split)
        else:
            repo, _, revision = path.partition("@")
            data = datasets.load_dataset(repo, name, split=split, revision=revision or None)
    except UserError:
        raise
    except Exception as error:  # the library and its readers raise many kinds
        raise UserError(
            f"{path}: `datasets` cannot open split {split!r} ({_one_line(error)}); check --config.{key}.path, "
            f"--config.{key}.name and --config.{key}.split, and the network for a name on the hub"
        ) from error
    # A saved format, such as that of torch, would give its own types.
    return Source(f"{local.name} [{split}]", data.with_format(None), cut(len(data)))


@READERS.register("tfds")
def _tfds(spec: Mapping[str, Any]) -> Source:
    import tensorflow_datasets as tfds

    name, data_dir = _required(spec, "name"), spec.get("data_dir")
    (split, cut), key = _split(spec), _key(spec)
    if data_dir is not None:
        data_dir = paths.expand(str(data_dir))
    prepare = (
        f"prepare it once with tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare() "
        f"and set --config.{key}.data_dir"
    )
    try:
        builder: Any = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"{name}: tfds finds no such data set in {data_dir or 'its default folder'}; {prepare}"
        ) from error
    if split not in builder.info.splits:  # empty where the data set is not prepared
        found = list(builder.info.splits)
        way = f"set --config.{key}.split to one of {found}" if found else prepare
        raise UserError(f"{name}: no split {split!r} in {builder.data_dir}; {way}")
    try:
        data = builder.as_data_source(split=split)
    except (NotImplementedError, ImportError) as error:
        raise UserError(
            f"{name}: the files in {builder.data_dir} need TensorFlow for random access; {prepare}"
        ) from error
    # Slices are taken here because parquet builders silently ignore them.
    return Source(f"{name} [{split}]", data, cut(len(data)))


def _published(spec: Mapping[str, Any]) -> Source:
    reader, key = readers.reader_of(str(spec["kind"])), _key(spec)
    settings = settings_of(reader, spec, key)
    split, cut = _split(Spec({"split": settings.split}, key))  # each reader has its default
    check_path(settings.path, key)
    found = read(reader, settings.replace(split=split), key)
    name = f"{reader.kind} [{split}]"
    return Source(name, found.records, cut(len(found.records)), found.places, found.dropped)


for _kind in readers.MODULES:
    READERS.register(_kind)(_published)


def _split(spec: Mapping[str, Any]) -> tuple[str, Callable[[int], range]]:
    """(name, number of rows -> the range of the slice) of a `split` such as "train", "train[10:20]" or "train[:5%]"."""
    text = str(spec.get("split") or "train")
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", text)
    if not match:
        known = "train, train[:1000] or train[90%:]"
        raise UserError(f"split {text!r}: not understood; write --config.{_key(spec)}.split={known}")
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
