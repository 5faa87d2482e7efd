"""Output on stderr."""

import sys

from pjrlhf.training import progress as module
from pjrlhf.training.progress import progress


def test_plain_lines_where_stderr_is_no_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress("sft", 400, ("loss", "kl"), start=100, every=10) as bar:
        for step in range(101, 401):
            bar.update(step, {"loss": 1.2345678, "other": 3.0})
            now[0] += 0.5
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sft  101/400  loss 1.235"
    assert lines[1] == "sft  121/400  loss 1.235  2:20 left"
    assert lines[-1] == "sft  400/400  loss 1.235  0:00 left"
    assert len(lines) == 16


def test_a_short_pass_is_silent_and_a_long_one_is_not(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    for seconds in (1.0, 1.5):
        with progress("rewards", 4, (), patience=5.0) as bar:
            for step in range(1, 5):
                now[0] += seconds
                bar.update(step, {})
        shown = capsys.readouterr().err.splitlines()
        assert shown == ([] if seconds == 1.0 else ["rewards  4/4  0:00 left"])


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress("sft", 4) as bar:
        for step in range(1, 5):
            bar.update(step, {"loss": 0.5})
    shown = capsys.readouterr().err
    assert "sft" in shown and "4/4" in shown and "loss 0.5" in shown
