"""docs/readers.md: its samples are read as it says, and its tables say what happens where a value is missing."""

import copy
import functools
import gzip
import json
import pathlib
import re

import pytest
from support.raw_data import write

from pjrlhf.data import readers
from pjrlhf.data.readers.reader import ReaderSettings
from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import parse
from pjrlhf.data.sources import READERS, check_source, open_source
from pjrlhf.errors import UserError
from pjrlhf.settings import fields_of

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "readers.md"
OF_NO_SET = {"datasets", "jsonl", "records", "tfds"}  # they read records as they are
KINDS = sorted(kind for kind in READERS if kind not in OF_NO_SET and re.fullmatch(r"\w+", kind))


@functools.cache
def sections():
    """kind -> its section."""
    _, *parts = re.split(r"^## `(\w+)`\n", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def specs(kind):
    return [json.loads(text) for text in re.findall(r'`(\{"kind": [^`]+\})`', sections()[kind])]


def samples(kind):
    """File -> the values of its lines."""
    found = re.findall(r"^`([\w./-]+)`:\n\n```json\n(.*?)^```$", sections()[kind], re.DOTALL | re.MULTILINE)
    return {file: [json.loads(line) for line in block.splitlines()] for file, block in found}


def table(kind):
    """(columns of the set, fields of the record, what happens) of every row."""
    for line in re.findall(r"^\| (?!column |-).*\|$", sections()[kind], re.MULTILINE):
        columns, fields, happens = (cell.strip() for cell in line.strip("|").split(" | "))
        yield re.findall(r"`([^`]+)`", columns.split(" (")[0]), re.findall(r"`(\w+)`", fields), happens


def save(files):
    for name, rows in files.items():
        path = pathlib.Path(name)
        if path.suffix in (".csv", ".parquet"):
            write(path, rows)
            continue
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def read(spec):
    """(good records, number of bad rows) of a source."""
    check_source(spec, "data")
    source = open_source(spec)
    good, bad = [], 0
    for i in range(len(source)):
        try:
            record = source[i]
            given = {"chosen": "preference", "completion": "completion", "prompt": "prompt"}
            parse(record, next(kind for column, kind in given.items() if column in record))
            good.append(record)
        except RecordError:
            bad += 1
    return good, bad


def holders(value, path):
    """(object, name) of every value that a path such as a.b[].c names."""
    head, _, rest = path.partition(".")
    name = re.sub(r"<[^>]*>", ".+", re.escape(head.removesuffix("[]")))
    for key in [key for key in value if re.fullmatch(name, key)] if isinstance(value, dict) else []:
        if not rest:
            yield value, key
            continue
        for inner in value[key] if head.endswith("[]") else [value[key]]:
            yield from holders(inner, rest)


def test_every_kind_has_a_section():
    assert set(readers.MODULES) < set(KINDS) and set(sections()) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_read(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(samples(kind))
    given = set()
    assert specs(kind)
    for spec in specs(kind):
        good, bad = read(spec)
        assert spec["kind"] == kind and good and not bad, spec
        given.update(*good)
    named = {name for _, fields, _ in table(kind) for name in fields}
    assert given <= named, f"the tables do not name {given - named}"


@pytest.mark.parametrize("kind", readers.MODULES)
def test_tables_have_the_columns_and_settings_of_the_reader(kind):
    reader = readers.reader_of(kind)
    named = {name for _, fields, _ in table(kind) for name in fields}
    assert set(reader.mapping) <= named, f"the tables do not name {set(reader.mapping) - named}"
    own = set(fields_of(reader.settings)) - set(fields_of(ReaderSettings))
    missing = [name for name in own if f"`{name}`" not in sections()[kind]]
    assert not missing, f"docs/readers.md does not name the settings {missing} of {kind}"


@pytest.mark.parametrize("gone", [True, False], ids=["missing", "null"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_happens_without_a_value(kind, gone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(samples(kind))
    whole = [len(read(spec)[0]) for spec in specs(kind)]
    for columns, _, happens in table(kind):
        for column in columns:
            files = copy.deepcopy(samples(kind))
            rows = [
                row
                for lines in files.values()
                for line in lines
                for row in (line if isinstance(line, list) else [line])
            ]
            found = [place for row in rows for place in holders(row, column)]
            assert found or not happens, f"no sample has {column}"
            for place, name in found:
                if gone:
                    del place[name]
                else:
                    place[name] = None
            save(files)
            counts, errors = [], 0
            for spec in specs(kind):
                try:
                    good, bad = read(spec)
                    counts.append((len(good), bad))
                    texts = [one.get(key) or "" for one in good for key in ("prompt", "user_text")]
                    assert "None" not in str(texts), f"{column}: a text has None for a value"
                except UserError:
                    errors += 1
                    counts.append((0, 0))
            holds = {
                "bad row": any(bad for _, bad in counts),
                "left out": not any(bad for _, bad in counts)
                and not errors
                and sum(whole) > sum(good for good, _ in counts),
                "optional": not errors and all(good and not bad for good, bad in counts),
                "an error": errors or any(bad for _, bad in counts),
                "": True,
            }
            said = next(word for word in holds if happens.startswith(word))
            assert holds[said], f"{column}: {happens}, but {counts} good and bad rows, {errors} errors"
