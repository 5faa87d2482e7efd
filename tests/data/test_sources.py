"""Every kind of source gives the same plain records and can say where each stood."""

import gzip
import json
import sys
import types
from unittest import mock

import ml_collections
import pytest
from etils import epath

from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import validate
from pjrlhf.data.sources import Source, check_source, open_source
from pjrlhf.errors import UserError

RECORDS = [{"prompt": f"question {i} é\u2028?", "n": i} for i in range(10)]


def write_lines(path, lines):
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_json_lines(tmp_path, name):
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    lines.insert(3, "")  # a blank line moves the line numbers, not the records
    source = open_source({"kind": "jsonl", "path": write_lines(tmp_path / name, lines)})
    assert list(source) == RECORDS
    assert [source.where(i) for i in (0, 3, -1)] == [f"{name} line {n}" for n in (1, 5, 11)]


def test_bad_lines_are_bad_records(tmp_path):
    lines = ["\ufeff" + json.dumps(RECORDS[0]), '{"prompt": "cut', "[1]", json.dumps(RECORDS[1])]
    source = open_source({"kind": "jsonl", "path": write_lines(tmp_path / "train.jsonl", lines)})
    with pytest.raises(RecordError, match="bad JSON"):
        source[1]
    examples, report = validate(source, "prompt", max_bad_fraction=0.5)
    assert [example.prompt for example in examples] == [RECORDS[0]["prompt"], RECORDS[1]["prompt"]]
    assert [where for where, _, _ in report.items] == ["train.jsonl line 2", "train.jsonl line 3"]
    assert report.counts == {"bad JSON": 2}


def test_line_that_is_not_utf8_is_a_bad_record(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(RecordError) as error:
        open_source({"kind": "jsonl", "path": str(tmp_path / "a.jsonl")})[0]
    assert error.value.reason == "not UTF-8"


@pytest.mark.parametrize("damage", [lambda x: x[:-12], lambda x: x[:30] + b"\xff" * 8 + x[38:], lambda x: x[:5]])
def test_damaged_gzip_is_a_user_error(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damage(gzip.compress(json.dumps(RECORDS).encode())))
    with pytest.raises(UserError, match=r"a.jsonl.gz: a damaged gzip file .*; copy or download it again"):
        open_source({"kind": "jsonl", "path": str(path)})


def test_gzip_is_recognised_by_its_content(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"prompt": "a"}'))
    (tmp_path / "b.jsonl.gz").write_bytes(b'{"prompt": "b"}')
    found = [open_source({"kind": "jsonl", "path": str(tmp_path / name)})[0] for name in ("a.jsonl", "b.jsonl.gz")]
    assert found == [{"prompt": "a"}, {"prompt": "b"}]


BAD_LINES = {
    b'{"prompt": "\\ud800"}': "not UTF-8",
    b'{"prompt": "a", "n": %s}' % (b"9" * 5000): "number too large",
    b'{"prompt": %s' % (b"[" * 100_000): "nested too deeply",
    b'{"prompt": "a", "n": %s1%s}' % (b"[" * 200, b"]" * 200): "nested too deeply",
    b'{"prompt": "\xff"}': "not UTF-8",
    b"\x00\x01": "bad JSON",
    b"NaN": "bad JSON",
    b"[1]": "bad JSON",
    b'{"prompt": "a", "prompt": "b"}': "repeated key",
    b'{"prompt": "a", "n": [{"b": 1, "b": 1}]}': "repeated key",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=list(BAD_LINES.values()))
def test_a_line_that_cannot_be_used_is_named_by_file_and_line(tmp_path, line):
    good = b'{"prompt": "a"}\n'
    for content, number in ((good + b"\n" + line + b"\n", 3), (line + b"\n" + good, 1)):
        (tmp_path / "a.jsonl").write_bytes(content)
        source = open_source({"kind": "jsonl", "path": str(tmp_path / "a.jsonl")})
        _, bad = validate(source, "prompt", max_bad_fraction=0.5)
        assert [(where, reason) for where, reason, _ in bad.items] == [(f"a.jsonl line {number}", BAD_LINES[line])]


@pytest.mark.parametrize(
    "text", ['[{"prompt": "a"}]', '[\n{"prompt": "a"}\n]', '[{"prompt": "a"},\n{}]', '{\n"prompt": "a"\n}']
)
def test_one_json_text_over_the_whole_file_is_read_as_datasets_do(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(
        UserError, match=r"a.jsonl: one JSON text over the whole file, .*--config.sft.data.kind=datasets"
    ):
        open_source({"kind": "jsonl", "path": str(tmp_path / "a.jsonl")}, "sft.data")


def test_a_line_that_is_a_list_of_something_else_is_a_bad_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('["a", "b"]\n')
    with pytest.raises(
        UserError, match=r"1 of 1 records are bad \(1 bad JSON\), the first at a.jsonl line 1: .*a list"
    ):
        validate(open_source({"kind": "jsonl", "path": str(tmp_path / "a.jsonl")}), "prompt")


def test_a_file_that_the_system_does_not_let_read(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("{}")
    monkeypatch.setattr(type(epath.Path("/")), "open", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"a.jsonl: cannot be read \(Permission denied\); check its permissions"):
        open_source({"kind": "jsonl", "path": str(tmp_path / "a.jsonl")})


def test_home_is_expanded_in_every_kind_of_source(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"id": 1, "prompt": "a", "left": "x", "right": "y"}')
    (tmp_path / "v.csv").write_text("id,worker,winner\n1,ann,left\n")
    (tmp_path / "q.json").write_text('[{"question": "a", "options": ["x", "y"], "preference": "u"}]')
    for spec in (
        {"kind": "jsonl", "path": "~/a.jsonl"},
        {"kind": "datasets", "path": "~/a.jsonl"},
        {"kind": "votes", "path": "~/a.jsonl", "votes": "~/v.csv"},
        {"kind": "choices", "path": "~/q.json"},
    ):
        check_source(spec, "data")
        assert [record["prompt"] for record in open_source(spec)] == ["a"]


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
def test_a_saved_format_changes_no_record(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    if form == "torch":
        pytest.importorskip("torch")
    datasets.disable_progress_bars()
    records = [{**record, "turns": [{"role": "user", "content": "é"}]} for record in RECORDS]
    datasets.Dataset.from_list(records).with_format(form).save_to_disk(str(tmp_path / "data"))
    state = json.loads((tmp_path / "data" / "state.json").read_text())
    (tmp_path / "data" / "state.json").write_text(json.dumps({**state, "_format_type": form}))
    source = open_source({"kind": "datasets", "path": str(tmp_path / "data")})
    assert list(source) == records
    examples, _ = validate(source, "prompt", columns={"prompt": "turns"})
    assert examples[0].prompt == records[0]["turns"]


def test_records_in_memory_of_any_sequence():
    class Squares:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return {"prompt": f"{i * i}"}

    source = open_source({"kind": "records", "name": "squares", "records": Squares()})
    assert [source[i]["prompt"] for i in range(3)] == ["0", "1", "4"]
    assert (source.name, source.where(2)) == ("squares", "squares row 2")


@pytest.mark.parametrize("form", ["folder", "folder of splits", "file"])
@pytest.mark.parametrize(
    ("split", "rows"),
    [("train", range(10)), ("train[2:5]", range(2, 5)), ("train[:30%]", range(3)), ("train[-1:]", [9])],
)
def test_datasets_forms_and_slices(tmp_path, monkeypatch, form, split, rows):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(RECORDS)
    if form == "file":
        path = write_lines(tmp_path / "data.jsonl", map(json.dumps, RECORDS))
    else:
        path = str(tmp_path / "data")
        (data if form == "folder" else datasets.DatasetDict({"train": data})).save_to_disk(path)
    source = open_source(ml_collections.ConfigDict({"kind": "datasets", "path": path, "split": split}))
    assert list(source) == [RECORDS[i] for i in rows]
    assert source.where(0).endswith(f"[train] row {rows[0]}")


@pytest.mark.parametrize("path", ["ann/pairs", "ann/pairs@v1.0", "ann/pairs@refs/pr/2", "pairs@main"])
def test_data_sets_on_the_hub_by_revision(monkeypatch, path):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source({"kind": "datasets", "path": path, "name": "all", "split": "test[:2]"})
    repo, _, revision = path.partition("@")
    assert asked == [((repo, "all"), {"split": "test", "revision": revision or None})]
    assert list(source) == RECORDS[:2] and source.name.endswith("[test]")


@pytest.fixture(scope="module", params=["array_record", "parquet"])
def tfds_folder(request, tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")
    tfds.disable_progress_bar()

    class PjrlhfToy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            turn = {"role": tfds.features.Text(), "content": tfds.features.Text()}
            columns = {"prompt": tfds.features.Sequence(turn), "n": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(columns))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(10):
                yield i, {"prompt": [{"role": "user", "content": f"é {i}"}], "n": str(i)}

    folder = str(tmp_path_factory.mktemp("tfds"))
    PjrlhfToy(data_dir=folder, file_format=request.param).download_and_prepare()
    return folder


def test_tfds_without_tensorflow(tfds_folder):
    spec = {"kind": "tfds", "name": "pjrlhf_toy", "data_dir": tfds_folder}
    whole = open_source(spec | {"split": "train"})
    part = open_source(spec | {"split": "train[7:9]"})
    assert sorted(record["n"] for record in whole) == [str(i) for i in range(10)]
    assert list(part) == [whole[7], whole[8]]  # parquet builders ignore slices by themselves
    assert part.where(0) == "pjrlhf_toy [train] row 7"
    examples, _ = validate(part, "prompt")
    assert examples[0].prompt == [{"role": "user", "content": f"é {whole[7]['n']}"}]
    with pytest.raises(UserError, match=r"no split 'test'.*\['train'\]"):
        open_source(spec | {"split": "test"})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"kind": "csv"},
            "data kind 'csv': unknown; .*choose one of jsonl, records, .*, ratings, datasets, tfds",
        ),
        ("csv", "data kind 'csv': unknown"),
        ({}, "data kind None: unknown"),
        ({"kind": "jsonl"}, "--config.data.path"),
        ({"kind": "jsonl", "path": "/nowhere/a.jsonl"}, "/nowhere/a.jsonl: no such file"),
        ({"kind": "jsonl", "path": "http://host/a.jsonl"}, "http:// cannot be read; download it and name the local"),
        ({"kind": "datasets", "path": "https://host/a.jsonl"}, "https:// cannot be read; download it"),
        ({"kind": "choices", "path": "file:///data/a.json"}, "a path stands without file://; write /data/a.json"),
        ({"kind": "jsonl", "path": "/tmp"}, "/tmp: is a folder, .*; read it with --config.data.kind=datasets"),
        ({"kind": "votes", "path": "/tmp", "votes": "/tmp"}, "/tmp: is a folder; set --config.data.path to a file in"),
        (
            {"kind": "datasets", "path": __file__},
            "the name does not tell the format; let it end in one of .jsonl, .json",
        ),
        ({"kind": "datasets", "path": "/nowhere/data"}, "/nowhere/data: no such file or folder"),
        ({"kind": "datasets", "path": "data.parquet"}, "data.parquet: no such file or folder"),
        ({"kind": "datasets", "path": "/nowhere", "split": "train[a:b]"}, "split 'train.a:b.': not understood"),
        ({"kind": "records"}, "--config.data.records"),
    ],
)
def test_user_errors_name_the_thing_and_the_way_out(spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec)


def test_a_reader_of_other_code(monkeypatch):
    module = types.ModuleType("toy_readers")
    module.plain = lambda spec: [{"prompt": f"{spec['word']} {i}"} for i in range(3)]
    module.named = lambda spec: Source("mine", [{"prompt": "x"}])
    module.none, module.number = lambda spec: None, 3
    monkeypatch.setitem(sys.modules, "toy_readers", module)
    examples, _ = validate(open_source({"kind": "toy_readers:plain", "word": "hello"}), "prompt")
    assert [example.prompt for example in examples] == ["hello 0", "hello 1", "hello 2"]
    assert examples[1].where == "toy_readers:plain row 1"
    assert open_source({"kind": "toy_readers:named"}).where(0) == "mine row 0"
    with pytest.raises(UserError, match="data kind 'toy_readers:none': returns a NoneType; let it return a sequence"):
        open_source({"kind": "toy_readers:none"})
    with pytest.raises(UserError, match="data kind 'toy_readers:number': is not a function of a specification"):
        open_source({"kind": "toy_readers:number"})


def test_an_absent_split_of_a_folder_names_the_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)}).save_to_disk(str(tmp_path))
    with pytest.raises(UserError, match=r"no split 'test'.*\['train'\]"):
        open_source({"kind": "datasets", "path": str(tmp_path), "split": "test"})


@pytest.mark.parametrize("name", ["pjrlhf_absent", "imdb_reviews"])
def test_tfds_that_is_not_prepared_says_how(tmp_path, name):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(UserError, match="array_record"):
        open_source({"kind": "tfds", "name": name, "data_dir": str(tmp_path)})


def test_source_gives_plain_values():
    source = Source("bytes", [{"prompt": b"caf\xc3\xa9"}, {"prompt": b"\xff"}])
    assert source[0] == {"prompt": "café"}
    _, report = validate(source, "prompt", max_bad_fraction=0.5)
    assert report.counts == {"not UTF-8": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"prompt": "a"}]', "one JSON text over the whole file, not one JSON object per line"),
        (b'\xef\xbb\xbf [\n{"prompt": "a"}\n]', "one JSON text over the whole file, not one JSON object per line"),
        (b'{\n"prompt": "a"\n}', "one JSON text over the whole file, not one JSON object per line"),
        (b"PAR1\x15\x04", "a parquet file, not one JSON object per line"),
    ],
)
def test_another_format_is_named_with_the_kind_that_reads_it(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=f"a.json: {message}; read it with --config.sft.data.kind=datasets"):
        open_source({"kind": "jsonl", "path": str(tmp_path / "a.json")}, "sft.data")
    if content.startswith(b"[{"):  # the remedy works
        pytest.importorskip("datasets").disable_progress_bars()
        assert open_source({"kind": "datasets", "path": str(tmp_path / "a.json")})[0]["prompt"] == "a"


def test_a_csv_file_is_named_with_the_kind_that_reads_it(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen\na,b\n")
    with pytest.raises(UserError, match=r"a.csv: a CSV file, .*; read it with --config.sft.data.kind=datasets"):
        open_source({"kind": "jsonl", "path": str(tmp_path / "a.csv")}, "sft.data")
    pytest.importorskip("datasets").disable_progress_bars()
    assert open_source({"kind": "datasets", "path": str(tmp_path / "a.csv")})[0] == {"prompt": "a", "chosen": "b"}


def test_what_is_wrong_with_many_records_is_logged_once(caplog):
    with caplog.at_level("WARNING"), pytest.raises(UserError, match="4 of 4 records are bad"):
        validate(Source("mine", [{"text": "a"}, {"text": "a"}, {"text": "a"}, {"prompt": None}]), "prompt")
    assert [record.getMessage()[:20] for record in caplog.records] == ["left out mine row 0:", "left out mine row 3:"]


def test_a_reader_that_fails_names_the_row():
    source = Source("mine", {}, range(3))
    with pytest.raises(UserError, match=r"mine row 2: cannot be read .*; correct the data"):
        source[2]


def test_what_can_be_told_before_a_source_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    check_source({"kind": "jsonl", "path": str(tmp_path / "a.jsonl")}, "sft.data")
    for spec, message in (
        ({"kind": "jsnl"}, "sft.data.kind: data kind 'jsnl': unknown; did you mean jsonl"),
        ({"kind": "jsonl", "path": ""}, "needs 'path'; set --config.sft.data.path"),
        ({"kind": "jsonl", "path": "no"}, "no: no such file or folder; set --config.sft.data.path to one that exists"),
        (
            {"kind": "jsonl", "path": "no", "column": {}},
            "sft.data.column: no such setting; did you mean sft.data.columns",
        ),
        (
            {"kind": "datasets", "path": "x", "split": "a[b:]"},
            "split 'a.b:.': not understood; write --config.sft.data.spl",
        ),
        ({"kind": "votes", "path": str(tmp_path), "votes": "no.csv"}, "set --config.sft.data.votes to one that exists"),
    ):
        with pytest.raises(UserError, match=message):
            check_source(spec, "sft.data")
