"""Tables of sampled answers: files, terminal, loggers."""

import os
import sys
import types

import pyarrow.parquet
import pytest

from pjrlhf.training import completions
from pjrlhf.training.completions import drop_after, file_of, markdown, print_rows, write_rows
from pjrlhf.training.metrics import MetricWriter
from pjrlhf.training.workdir import Workdir

LONG = "the quick brown fox jumps over the lazy dog while a stupendously-hyphenated word stands near " * 3


def row(i, prompt="what is rain ?", answer="it holds air ."):
    found = {"policy": f"P{i}", "prompt": prompt, "completion": answer, "weights": f"P{i} 1"}
    return {**found, f"rewards/P{i % 2}": 0.25 * i, f"rewards/P{1 - i % 2}": None, "advantage": -0.5}


def test_a_file_has_all_rows_with_their_step(tmp_path):
    rows = [row(i) for i in range(5)]
    path = file_of(tmp_path, "methods/morl", 20)
    write_rows(path, 20, rows)
    assert path == tmp_path / "completions" / "methods" / "morl-20.parquet"
    found = pyarrow.parquet.read_table(path)
    assert found.to_pylist() == [{"step": 20, **one} for one in rows]
    assert str(found.schema.field("rewards/P1").type) == "double"
    first = path.read_bytes()
    write_rows(path, 20, rows)
    assert path.read_bytes() == first


def test_a_stage_that_continues_drops_later_tables_of_its_own(tmp_path):
    for stage in ("policy", "policy-2", "methods/policy"):
        for step in (2, 4, 10):
            write_rows(file_of(tmp_path, stage, step), step, [row(0)])
    drop_after(tmp_path, "policy", 4)
    left = sorted(str(path.relative_to(tmp_path / "completions")) for path in tmp_path.rglob("*.parquet"))
    assert len(left) == 8 and "policy-10.parquet" not in left


@pytest.mark.parametrize("columns", [0, 40, 80])
def test_no_word_is_cut_and_nothing_acts_on_the_terminal(monkeypatch, capsys, columns):
    """Off a terminal (0) every text is one line; on one, lines end between words."""
    if columns:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(completions.shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    print_rows("policy", 4, [row(0, LONG, f"{LONG}\x1b[31mred\x07\u202e")], 3)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out and "\\x1b[31mred" in out
    if columns:
        assert max(map(len, out.splitlines())) <= columns
        assert " ".join(out.split()).count("stupendously-hyphenated word stands near") == 6
    else:
        assert f"  prompt: {LONG.rstrip()}" in out and f"  completion: {LONG}" in out
    assert "policy, step 4: 1 of 1 rows" in out and "rewards/P0 0" in out and "advantage -0.5" in out


def test_printed_rows_are_spread_over_the_table(capsys):
    print_rows("policy", 2, [row(i) for i in range(10)], 2)
    out = capsys.readouterr().out
    assert "2 of 10 rows" in out and "policy P0" in out and "policy P5" in out
    print_rows("policy", 2, [row(0)], 0)
    assert capsys.readouterr().out == ""


def test_markdown_keeps_cells_apart():
    text = markdown([row(0, "a | b\nc", "x\x1b")])
    header, line, cells = text.splitlines()
    assert header.count("|") == line.count("|") == len(row(0)) + 1
    assert "a \\| b<br>c" in cells and "\x1b" not in cells


def test_loggers_get_the_table(tmp_path, monkeypatch):
    seen = []
    run = types.SimpleNamespace(
        log=lambda values, step=None: seen.append((values, step)),
        finish=lambda: None,
        define_metric=lambda *_, **__: None,
    )
    writer = types.SimpleNamespace(add_text=lambda *x: seen.append(x), add_scalar=lambda *_: None, close=lambda: None)
    table = lambda **content: content  # noqa: E731 - a stand-in for a class
    fakes = {
        "wandb": {"init": lambda **_: run, "Table": table},
        "trackio": {"init": lambda **_: run, "Table": table},
        "tensorboardX": {"SummaryWriter": lambda *_, **__: writer},
    }
    for name, content in fakes.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**content))

    class Plain:
        """A logger of other code, without tables."""

        def __init__(self, workdir, stage, after):
            pass

        def write(self, step, values):
            seen.append("plain")

        def close(self):
            pass

    monkeypatch.setitem(sys.modules, "plain_logger", types.SimpleNamespace(Plain=Plain))
    loggers = ("tensorboard", "wandb", "trackio", "plain_logger:Plain")
    writer = MetricWriter(Workdir(tmp_path / "run"), "policy", loggers=loggers)
    rows = [row(i) for i in range(3)]
    writer.table(4, rows)
    writer.close()
    text, wandb, trackio = seen
    assert text == ("completions", markdown(rows), 4)
    assert wandb[0]["policy/step"] == 4 and wandb[0]["policy/completions"]["data"][2][:2] == [4, "P2"]
    frame = trackio[0]["completions"]["dataframe"]
    assert trackio[1] == 4 and list(frame["policy"]) == ["P0", "P1", "P2"] and set(frame["step"]) == {4}
    assert file_of(tmp_path / "run", "policy", 4).is_file()
