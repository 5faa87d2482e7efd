"""What holds for every reader, and how raw rows are opened."""

import dataclasses
import gzip
import json
import lzma
import pathlib
import re

import pytest
from support.raw_data import write

from pjrlhf.data import readers
from pjrlhf.data.readers.raw import FORMATS, Raw, Row
from pjrlhf.data.readers.reader import ReaderSettings
from pjrlhf.data.records import RecordError
from pjrlhf.data.sources import check_source, open_source
from pjrlhf.errors import UserError
from pjrlhf.settings import fields_of, rule_of

ROOT = pathlib.Path(__file__).parents[3]
KINDS = list(readers.MODULES)


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_is_documented_and_checked(kind, tmp_path):
    reader = readers.reader_of(kind)
    assert reader.kind == kind and issubclass(reader.settings, ReaderSettings)
    assert reader.title and reader.home.startswith("https://") and reader.licence and reader.mapping and reader.traps
    assert all(rule_of(field).help for _, field in fields_of(reader.settings).values())
    path = write(tmp_path / "a.jsonl", [{}])
    with pytest.raises(UserError, match=r"^x.data.no_such: no such setting"):
        check_source({"kind": kind, "path": path, "no_such": 1}, "x.data")
    with pytest.raises(UserError, match=r"needs 'path'; set --config.x.data.path"):
        check_source({"kind": kind}, "x.data")
    with pytest.raises(UserError, match=r"gone.jsonl: no such file or folder; set --config.x.data.path"):
        check_source({"kind": kind, "path": str(tmp_path / "gone.jsonl")}, "x.data")
    with pytest.raises(UserError, match=r"split 'a\[': not understood"):
        check_source({"kind": kind, "path": path, "split": "a["}, "x.data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no|needs"):
        open_source({"kind": kind, "path": str(tmp_path / "empty")}, "x.data")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_another_set_give_no_records_and_no_traceback(kind, tmp_path):
    path = write(tmp_path / "train.jsonl", [{"odd": 1}, {}])
    try:
        source = open_source({"kind": kind, "path": path}, "x.data")
    except UserError as error:
        assert "x.data" in str(error)
        return
    for i in range(len(source)):
        with pytest.raises(RecordError):
            source[i]


ROWS = [{"a": "x\u2028y", "n": [{"b": None}]}, {"a": "", "n": []}]


@pytest.mark.parametrize("packed", ["", ".gz", ".xz"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_all_formats_give_the_same_rows(tmp_path, suffix, packed):
    path = tmp_path / f"train{suffix}"
    rows = [{"a": row["a"]} for row in ROWS] if suffix == ".csv" else ROWS
    if suffix == ".csv":
        path.write_text('a\n"x\u2028y"\n""\n', "utf-8")
    else:
        write(path, rows)
    if packed:
        compress = gzip.compress if packed == ".gz" else lzma.compress
        (tmp_path / f"train{suffix}{packed}").write_bytes(compress(path.read_bytes()))
        path.unlink()
    found = list(Raw(str(tmp_path))())
    assert found == rows and all(row.where.startswith("train") for row in found)


@pytest.mark.parametrize("text", [json.dumps(ROWS), json.dumps(ROWS, indent=1), "\n" + json.dumps(ROWS)])
def test_a_json_text_over_the_whole_file(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    found = list(Raw(str(tmp_path / "a.json"))())
    assert found == ROWS and found[1].where == "a.json record 2"


def test_bad_rows_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": \n[1]\n')
    good, cut, odd = Raw(str(tmp_path / "a.jsonl"))()
    assert good == {"a": 1} and isinstance(cut, RecordError) and isinstance(odd, RecordError)
    assert (cut.where, cut.reason, odd.where, odd.reason) == (
        "a.jsonl line 3",
        "bad JSON",
        "a.jsonl line 4",
        "not a row",
    )
    (tmp_path / "a.csv").write_text("a,b\n1,2\n1\n1,2,3\n")
    assert [getattr(row, "reason", "") for row in Raw(str(tmp_path / "a.csv"))()] == [
        "",
        *["wrong number of columns"] * 2,
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[1, 2", "cannot be read"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", "damaged compressed file"),
        ("a.jsonl.xz", lzma.compress(b'{"a": 1}')[:-9], "damaged compressed file"),
        ("a.parquet", b"PAR1 no more", "damaged parquet file"),
        ("a.csv", b"a\n\xff\n", "cannot be read"),
        ("a.txt", b"a", "does not tell the format"),
    ],
)
def test_damaged_files_are_told(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(Raw(str(tmp_path / name))())


def test_files_of_a_folder_are_chosen_by_part_and_pattern(tmp_path):
    for name in ("train/a.jsonl", "b-validation-00000-of-00001.parquet", "sub/dev.csv", "restrain.jsonl"):
        path = tmp_path / name
        write(path, [{"n": name}]) if path.suffix != ".csv" else (
            path.parent.mkdir(exist_ok=True),
            path.write_text(f"n\n{name}\n"),
        )

    def names(split, files="*"):
        return [dict(row)["n"] for row in Raw(str(tmp_path), split)(files) if isinstance(row, Row)]

    assert names("train") == ["train/a.jsonl"]
    assert names("validation") == ["b-validation-00000-of-00001.parquet", "sub/dev.csv"]
    assert names("validation", "sub/*") == ["sub/dev.csv"]
    assert len(list(Raw(str(tmp_path))(split=None))) == 4
    with pytest.raises(UserError, match="no file of split 'test'"):
        names("test")
    with pytest.raises(UserError, match="holds no files 'survey'"):
        names("train", "survey")
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain/x.jsonl", ROWS)
    assert len(list(Raw(str(tmp_path / "plain"), "test")())) == 2


def test_a_name_on_the_hub_is_read_by_datasets(monkeypatch, tmp_path):
    import datasets

    asked = []

    def load(repo, **arguments):
        asked.append((repo, arguments))
        return datasets.Dataset.from_list([{"a": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = list(Raw("owner/set@v1", "test", "small")(hub={"data_dir": "x"}))
    assert found == [{"a": 1}] and found[0].where == "owner/set [test] row 0"
    assert asked == [("owner/set", {"split": "test", "revision": "v1", "name": "small", "data_dir": "x"})]
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"a": 2}])}).save_to_disk(str(tmp_path / "saved"))
    assert list(Raw(str(tmp_path / "saved"))()) == [{"a": 2}]
    with pytest.raises(UserError, match="no split 'test'"):
        list(Raw(str(tmp_path / "saved"), "test")())


def test_chosen_answers_are_completions_once_each(tmp_path):
    row = {
        "post_id": "p",
        "domain": "legaladvice_train",
        "history": "May I?",
        "human_ref_A": "You may.",
        "labels": 1,
        "human_ref_B": "No.",
        "score_ratio": 3.0,
    }
    path = write(tmp_path / "train.jsonl", [row, row | {"human_ref_B": "Never."}])
    source = open_source({"kind": "shp", "path": path, "answers": "chosen"})
    assert len(source) == 1 and source.dropped == {"chosen before": 1}
    assert source[0] == {
        "prompt": "May I?",
        "completion": "You may.",
        "user_id": "legaladvice",
        "score_ratio": 3.0,
    }
    sliced = open_source({"kind": "shp", "path": path, "split": "train[1:]"})
    assert [one["rejected"] for one in sliced] == ["Never."] and sliced.where(0) == "train.jsonl line 2"


def test_readers_are_in_the_table_of_the_docs():
    table = {
        cells[1].strip(" `"): line
        for line in (ROOT / "docs/data.md").read_text("utf-8").splitlines()
        if re.match(r"\| `", line)
        for cells in [line.split("|")]
    }
    for kind in KINDS:
        assert kind in table, f"docs/data.md has no row of {kind}"
        assert readers.reader_of(kind).home in table[kind], kind
        own = {f.name for f in dataclasses.fields(readers.reader_of(kind).settings)} - {
            f.name for f in dataclasses.fields(ReaderSettings)
        }
        missing = [name for name in own if f"`{name}`" not in table[kind]]
        assert not missing, f"docs/data.md does not name the settings {missing} of {kind}"
