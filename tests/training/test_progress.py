"""Output on stderr."""

import sys
import time

import jax
import pytest
from support import tiny_users

from pjrlhf.models.folders import weight_files
from pjrlhf.models.huggingface import fingerprint, load_params, read_config, save_params
from pjrlhf.training import progress as module
from pjrlhf.training.progress import megabytes, progress, watched


@pytest.fixture
def clock(monkeypatch):
    """[seconds], a clock that a test moves."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_where_stderr_is_no_terminal(capsys, clock):
    with progress("sft", 400, ("loss", "kl"), start=100, every=10, patience=0.0) as bar:
        for step in range(101, 401):
            bar.update(step, {"loss": 1.2345678, "other": 3.0})
            clock[0] += 0.5
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sft  101/400  loss 1.235  0:00 so far"
    assert lines[1] == "sft  121/400  loss 1.235  2:20 left"
    assert lines[-1] == "sft  400/400  loss 1.235  0:00 left"
    assert len(lines) == 16


def test_whole_numbers_have_all_their_digits(capsys, clock):
    with progress("judge", 2, ("requests", "cost", "loss"), every=10, patience=0.0) as bar:
        bar.update(2, {"requests": 24240.0, "cost": 12.34567, "loss": 98765.4})
    assert capsys.readouterr().err == "judge  2/2  requests 24,240  cost 12.35  loss 9.877e+04  0:00 so far\n"


def test_a_short_pass_is_silent_and_a_long_one_is_not(capsys, clock):
    for seconds in (1.0, 1.5):
        with progress("rewards", 4) as bar:
            for step in range(1, 5):
                clock[0] += seconds
                bar.update(step, {})
        shown = capsys.readouterr().err.splitlines()
        assert shown == ([] if seconds == 1.0 else ["rewards  4/4  0:00 left"])


def test_a_pass_whose_first_step_takes_long_says_what_it_is(capsys):
    """Compilation, or one large batch: nothing calls `update` meanwhile."""
    for note, middle in (("", "  "), ("compiling", "  compiling  ")):
        with progress("reference log-probs", 2, every=0.1, patience=0.1, note=note) as bar:
            time.sleep(0.5)
            bar.update(2, {})
        lines = capsys.readouterr().err.splitlines()
        assert lines and lines[0] == f"reference log-probs  0/2{middle}0:00 so far"
        assert "compiling" not in lines[-1]


def test_of_passes_within_passes_the_innermost_is_shown(capsys, clock):
    with progress("stage reward", 1) as outer:
        clock[0] += 10
        with progress("reading", 2) as inner:
            clock[0] += 10
            outer.show()
            inner.update(1, {})
        clock[0] += 10
        outer.show()
    assert capsys.readouterr().err.splitlines() == ["reading  1/2  0:10 so far", "stage reward  0:30 so far"]


def test_a_failed_pass_leaves_nothing_behind(capsys, clock):
    with pytest.raises(KeyError), progress("a", 1):
        raise KeyError
    assert module._passes == []


def test_reading_a_sequence_moves_a_bar(capsys, clock):
    class Rows(list):
        name = "rows"

    with watched("reading rows", Rows(range(4))) as rows:
        assert rows.name == "rows" and len(rows) == 4
        found = []
        for row in rows:
            clock[0] += 20
            found.append(row)
    assert found == [0, 1, 2, 3]
    assert capsys.readouterr().err.splitlines()[-1] == "reading rows  4/4  0:00 left"


def test_passes_over_bytes_count_them(capsys, clock):
    with megabytes("downloading ann/small") as report:
        for done in range(0, 40, 10):
            report(done * 10**6, 40 * 10**6)
            clock[0] += 10
        report(40 * 10**6, 40 * 10**6)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "downloading ann/small (MB)  10/40  0:30 left" and lines[-1].endswith("40/40  0:00 left")
    with megabytes("hashing a small file") as report:
        report(10, 10)
    assert not capsys.readouterr().err


def test_reading_writing_and_hashing_weights_say_how_far_they_are(tmp_path):
    folder = tiny_users.save_base(tmp_path)
    params, config = load_params(folder), read_config(folder)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    passes = {
        "read": lambda report: load_params(folder, report=report),
        "write": lambda report: save_params(tmp_path / "copy", config, params, report=report),
        "hash": lambda report: fingerprint(tmp_path / "copy", report),
    }
    for name, run in passes.items():
        seen = []
        run(lambda done, total: seen.append((done, total)))  # noqa: B023 - called at once
        done, totals = zip(*seen, strict=True)
        assert list(done) == sorted(done) and len({*totals}) == 1 and done[-1] <= totals[0], name
        assert totals[0] == size or name == "hash", name
    assert not seen or totals[0] == sum(file.stat().st_size for file in weight_files(tmp_path / "copy"))
    seen.clear()
    fingerprint(tmp_path / "copy", lambda *x: seen.append(x))
    assert not seen, "unchanged files are read once"


def test_names_are_data(capsys, clock):
    with progress("a\x1b[31m[bold]b", 1) as bar:
        clock[0] += 10
        bar.update(1, {})
    assert capsys.readouterr().err.startswith(r"a\x1b[31m[bold]b  0:10")


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress("sft", 4, ("loss",), patience=0.0) as bar:
        for step in range(1, 5):
            bar.update(step, {"loss": 0.5})
    shown = capsys.readouterr().err
    assert "sft" in shown and "4/4" in shown and "loss 0.5" in shown
