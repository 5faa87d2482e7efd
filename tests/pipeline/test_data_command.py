"""`pjrlhf data show`: a kind with settings, or a section of a config; with and without a tokenizer and colour."""

import io
import json

import pytest
import rich.console

from pjrlhf import cli
from pjrlhf.data import synthetic
from pjrlhf.data.schema import parse
from pjrlhf.data.tokenization import load_tokenizer
from pjrlhf.pipeline.data_command import print_example

SAID = ["what is rain ?", "what is snow ?", "what is wind ?", "what is sand ?"]


@pytest.fixture
def path(tmp_path):
    rows = [
        {"prompt": prompt, "chosen": "it is water .", "rejected": "it can burn .", "user_id": user}
        for prompt in SAID
        for user in ("ann", "bob")
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "broken"}]))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    return file


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    synthetic.write_tokenizer(folder, synthetic.ENVIRONMENTS["synthetic"])
    return folder


def told(capsys, *arguments):
    cli.main(["data", "show", *map(str, arguments)])
    return capsys.readouterr().out


def row_of(text, name):
    return next(" ".join(line.replace("│", " ").split()) for line in text.splitlines() if f"│ {name}" in line)


def test_a_kind_with_settings(path, capsys):
    text = told(capsys, "jsonl", f"path={path}", "--examples", 1)
    assert row_of(text, "records ") == "records 8" and row_of(text, "prompts") == "prompts 4"
    assert row_of(text, "cannot be used") == "cannot be used 1 missing chosen and rejected"
    assert row_of(text, "records of a person") == "records of a person 4 4 4 4 4 4"
    assert "lengths in words" in text and row_of(text, "chosen") == "chosen 4 4 4 4 4 4"
    assert text.count("  chosen: it is water .") == 1 and "\x1b" not in text


def test_a_file_names_its_kind(path, capsys):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    other = path.with_suffix(".json")
    other.write_text(json.dumps(rows[:-1]))
    whole = told(capsys, "jsonl", f"path={path}", "--examples", 0)
    assert told(capsys, path, "--examples", 0) == whole
    assert row_of(told(capsys, other, "--examples", 0), "records ") == "records 8"
    odd = other.rename(other.with_suffix(".rows"))
    for arguments, message in (
        ([odd], f"{odd}: the name tells no format; end a file in one of .jsonl"),
        ([path.parent], f"{path.parent}: the name tells no format"),
        ([path, "path=other.jsonl"], f"path=other.jsonl: {path} is the file already; name one of them"),
    ):
        with pytest.raises(SystemExit):
            told(capsys, *arguments)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], "none.jsonl: no such file or folder; name one that exists"),
        (["jsonl", "path=none.jsonl"], "none.jsonl: no such file or folder; name one that exists"),
        (["votes", "path=.", "votes=none.csv"], "none.csv: no such file or folder; set votes to one that exists"),
        (["configs/pdpo.py:records", "preference.data", "path=none.jsonl"], "none.jsonl: no such file or folder; name"),
    ],
)
def test_the_way_out_of_a_mistake_is_one_of_this_command(arguments, message, capsys):
    with pytest.raises(SystemExit):
        told(capsys, *arguments)
    found = capsys.readouterr().err
    assert message in found and "--config" not in found


def test_what_another_source_shares(path, capsys):
    text = told(capsys, "jsonl", f"path={path}", "--against", f"path={path.with_name('test.jsonl')}", "--examples", 0)
    assert f"also in path={path.with_name('test.jsonl')} (2 records)" in text
    assert "prompts 1 of 1 (100.0 %)" in " ".join(text.replace("│", " ").split())


def test_records_as_the_model_reads_them(path, tokenizer, capsys):
    text = told(capsys, "jsonl", f"path={path}", "--tokenizer", tokenizer)
    assert "lengths in tokens" in text and row_of(text, "prompt ") == "prompt 7 7 7 7 7 7"
    assert text.count("  prompt, 7 tokens, mask 0: <s>|<user>|what|is|") == 3
    assert text.count("  chosen, 5 tokens, mask 1: it|is|water|.|</s>\n") == 3


def test_tokens_that_the_tokenizer_does_not_know(path, tokenizer, capsys):
    """They are counted by part, with a warning from one in a hundred on."""
    warning = "warning: the tokenizer does not know "
    known = told(capsys, "jsonl", f"path={path}", "--tokenizer", tokenizer, "--examples", 0)
    assert "unknown tokens" not in known and warning not in known
    path.write_text(path.read_text().replace("it is water .", "it is zyzzyva ."))
    text = told(capsys, "jsonl", f"path={path}", "--tokenizer", tokenizer, "--examples", 0)
    assert "unknown tokens" in text and row_of(text, "chosen ") == "chosen 5 5 5 5 5 5 8 (20.0 %)"
    assert row_of(text, "prompt ") == "prompt 7 7 7 7 7 7"
    assert f"{warning}5.9 % of all tokens: a model reads each of them as <unk>; choose a model whose" in text
    words = told(capsys, "jsonl", f"path={path}", "--examples", 0)
    assert "unknown tokens" not in words and warning not in words


def test_an_end_that_also_stands_for_the_unknown_is_no_unknown_token(path, tokenizer, capsys):
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": settings["eos_token"]}))
    text = told(capsys, "jsonl", f"path={path}", "--tokenizer", tokenizer, "--examples", 0)
    assert "unknown tokens" not in text


def test_pairs_that_were_compared_both_ways(path, capsys):
    rows = [json.loads(line) for line in path.read_text().splitlines()[:-1]]
    turned = {**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, turned]))
    text = told(capsys, "jsonl", f"path={path}", "--examples", 0)
    assert row_of(text, "contradicted").startswith("contradicted 1 pairs that one person compared both ways")
    assert row_of(text, "disputed").startswith("disputed 1 pairs compared both ways by several people")


def test_colours_only_on_a_terminal(tokenizer):
    example = parse({"prompt": SAID[0], "chosen": "it is water .", "rejected": "it can burn ."}, "preference")
    texts = {}
    for colour in (True, False):
        file = io.StringIO()
        system = "truecolor" if colour else None
        console = rich.console.Console(file=file, force_terminal=colour, color_system=system, width=200)
        print_example(console, example, load_tokenizer(tokenizer), 4)
        texts[colour] = file.getvalue()
    assert "\x1b[" in texts[True] and "\x1b" not in texts[False]
    assert "more ..." in texts[False] and "mask 1" in texts[False]


def test_a_section_of_a_config(path, capsys):
    text = told(capsys, "configs/pdpo.py:records", "preference.data", f"path={path}", "--examples", 1)
    assert "of the run: in train and in heldout" in text and "lengths in tokens" in text
    assert "prompts 0 of" in " ".join(text.replace("│", " ").split())


def test_columns_of_other_names(path, capsys):
    path.write_text(path.read_text().replace("chosen", "better"))
    text = told(capsys, "jsonl", f"path={path}", "columns.chosen=better", "--examples", 0)
    assert row_of(text, "records ") == "records 8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jsonl", "path"], "path: is not KEY=VALUE"),
        (
            ["jsonl", "columns=1", "columns.chosen=a"],
            "columns.chosen=a: columns has the value 1; give either it or columns.NAME",
        ),
        (
            ["jsonl", "columns.chosen=a", "columns=1"],
            "columns=1: columns has the value {'chosen': 'a'} already; give one",
        ),
        (["jsonl", "path=gone.jsonl"], "gone.jsonl: no such file"),
        (["prisn", "path=x"], "did you mean prism?"),
        (["prism", "path=."], "holds no files"),
        (["configs/pdpo.py", "preference.data"], "preference.data: is no source of records in configs/pdpo.py"),
        (["configs/pdpo.py:records"], "choose one of preference.data"),
        (["pdpo:records"], "is no source of records in pdpo:records; choose one of preference.data"),
        (["pdpo:records", "preference.data", "path=x", "colums.chosen=a"], "data.colums: no such setting; did you"),
        (["jsonl", "path=configs/instructions.jsonl", "--tokenizer", "nowhere/x/y"], "nowhere/x/y"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["data", "show", *arguments])
    assert error.value.code == 2
    err = capsys.readouterr().err.strip()
    assert message in err and err.count("\n") == 0
