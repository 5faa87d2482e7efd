"""What may reach a terminal: no control characters, no secrets, one line."""

import io
import logging
import os
import pathlib
import subprocess
import sys

import pytest
import rich.console

from pjrlhf import cli, terminal
from pjrlhf.evaluation.formats import print_table, terminal_console

ROOT = pathlib.Path(__file__).parents[1]
HOSTILE = "a\x1b[31mb\x07\x9bc\u202ed\ud800\x00\re"


def test_control_characters_are_shown_and_all_other_text_stays():
    shown = terminal.visible(HOSTILE)
    assert shown == r"a\x1b[31mb\x07\x9bc\u202ed\ud800\x00\re"
    for text in ("plain", "é 你好 🏳️\u200d🌈", "$x_1$ <b> & [bold]"):
        assert terminal.visible(text) == text
    assert terminal.visible("a\nb\tc", keep="\n\t") == "a\nb\tc" and terminal.visible("a\nb") == r"a\nb"


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("users list RUN --rum", "--run"),
        ("users show ana --rum=RUN", "--run"),
        ("users list RUN", "--run RUN"),
        ("users show ana RUN", "--run RUN"),
        ("users list --run RUN --entri x", "--entry"),
        ("merge A B --weihgts 1 2 --output x", "--weights"),
        ("report --rum RUN", ""),
        ("users show ana", ""),
    ],
)
def test_a_mistyped_flag_gets_the_one_that_was_meant(arguments, meant, capsys):
    """Also one that is required, of which the parser says only that it is missing."""
    with pytest.raises(SystemExit):
        cli.main(arguments.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"did you mean {meant}?" if meant else "--help says what there is"), line


SECRETS = {
    "s3://key:secret@bucket/x": "s3://***@bucket/x",
    "https://token@host/a.jsonl": "https://***@host/a.jsonl",
    "https://host/a?X-Amz-Signature=secret&b=secret#t=secret": "https://host/a?X-Amz-Signature=***&b=***#t=***",
    "see gs://secret@b/c, and a@b.c?d=e": "see gs://***@b/c, and a@b.c?d=e",
    "/home/me/a?b=c": "/home/me/a?b=c",
}


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_of_addresses_are_masked(text):
    assert terminal.masked(text) == SECRETS[text]
    assert terminal.masked({"a": [{"path": text}], "n": 1}) == {"a": [{"path": SECRETS[text]}], "n": 1}
    assert SECRETS[text] in terminal.line(f"{text}: broken\nfor ever") and "\n" not in terminal.line("a\nb")


def test_log_records_are_safe():
    handler = logging.StreamHandler(io.StringIO())
    handler.addFilter(terminal.SafeRecords())
    record = logging.LogRecord("x", logging.INFO, "f", 1, "left out %s: %s", (HOSTILE, "s3://k:secret@b"), None)
    handler.handle(record)
    text = handler.stream.getvalue()
    assert "\x1b" not in text and "secret" not in text and r"\x1b[31m" in text


def table(width=80, names=("method",), cells=(HOSTILE,)):
    console = rich.console.Console(file=io.StringIO(), width=width, force_terminal=False)
    print_table(console, HOSTILE, names, [cells])
    return console.file.getvalue()


def test_tables_hold_no_control_characters_and_cut_no_word():
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(table())
    words = [f"a-word-of-some-length-{i}" for i in range(9)]
    for width in (60, 200):
        text = table(width, words, words)
        assert all(word in text for word in words)
        assert max(map(len, text.splitlines())) <= max(width, 80)


def test_tables_away_from_a_terminal_are_as_wide_as_their_text(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setenv("COLUMNS", "40")
    words = [f"a-word-of-some-length-{i}" for i in range(9)]
    print_table(terminal_console(), "Title", words, [words])
    assert sum(all(word in line for word in words) for line in sys.stdout.getvalue().splitlines()) == 2


def test_columns_without_a_value_are_left_out():
    text = table(80, ("name", "full", "empty"), ("a", "1", "–"))  # noqa: RUF001
    assert "full" in text and "empty" not in text


def test_libraries_are_quiet():
    """The notice of transformers that PyTorch was not found is none that a user can act on."""
    code = "import pjrlhf.data.tokenization as t\ntry:\n    t.load_tokenizer('/')\nexcept ValueError:\n    pass"
    env = {key: value for key, value in os.environ.items() if not key.startswith("TRANSFORMERS")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**env, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
