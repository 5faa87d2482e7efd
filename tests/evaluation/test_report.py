"""The report: complete, partial and hostile summaries."""

import collections
import json
import math
import random
import re

import numpy as np
import pytest
from support.pages import Page, printed
from support.summaries import METHODS, RATE, SUMMARY, USER_MODELS

from pjrlhf.data.messages import Conversation, dialogue
from pjrlhf.data.records import as_json
from pjrlhf.errors import UserError
from pjrlhf.evaluation import plots, report
from pjrlhf.evaluation.formats import MISSING, duration
from pjrlhf.evaluation.winrate import win_rate

SAMPLES = [
    {"combo": ("P1A", "P2A"), "prompt": "Why <i>so</i>?", "answers": {"Soups": "<script>alert('x')</script> & more"}},
    {"prompt": "No combination", "answers": {"Base": "an answer"}},
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    lines = [
        {"stage": "policy", "step": s, "samples": 8 * s, "objective/scores/P1A": 0.1 * s, "objective/kl/P1A": None}
        for s in range(4)
    ]
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"stage": "poli')
    report.write_report(run / "report", SUMMARY, SAMPLES, run / "metrics.jsonl")
    return run / "report"


def test_the_folder_holds_the_files_and_no_leftovers(written):
    names = {"win_rate.png", "ingredients.png", "sweep.png", "training.png", "summary.json", "index.html"}
    assert {path.name for path in written.iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written.glob("*.png"))


def test_summary_is_json_with_null_for_what_is_no_number(written):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    summary = json.loads((written / "summary.json").read_text(), parse_constant=refuse)
    assert summary["reward_models"]["P1A"]["mean"] is None
    assert summary["sweep"]["expertise"]["weights"] == [0.0, 0.5, 1.0]
    assert summary["win_rate"]["Soups"]["Base"]["rate"] == 0.75
    assert list(summary["win_rate"]) == list(METHODS)


def test_the_page_stands_alone(written):
    page = Page((written / "index.html").read_text())
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert len(links) == 4 and all(link.startswith("data:image/png;base64,") for link in links)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"url\(|@import|https?:", (written / "index.html").read_text())


def test_text_is_shown_and_never_run(written):
    source = (written / "index.html").read_text()
    page = Page(source)
    assert "<script" not in source and "<i>so</i>" not in source and "<b>spoons" not in source
    text = "".join(page.text)
    assert "<script>alert('x')</script> & more" in text
    assert "Soups & <b>spoons</b>" in text and "P1A+P2A" in text and "Use <i>easy</i> words." in text


def test_conversations_are_shown_as_dialogues(tmp_path):
    nasty = '</p><script>alert(1)</script> & "quotes"'
    call = {"type": "function", "function": {"name": "look<up>", "arguments": {"where": nasty}}}
    talk = [
        {"role": "system", "content": f"Be kind. {nasty}"},
        {"role": "user", "content": "What is rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "They ask."},
        {"role": "tool", "content": "wet"},
        {"role": 'x" onclick="alert(1)', "content": "odd"},
        {"role": "user", "content": "And snow?"},
    ]
    single = [{"role": "user", "content": "What is ice?"}]
    samples = [
        {"combo": "P1A", "prompt": prompt, "answers": {"base": "Cold."}} for prompt in (talk, single, "Why?", None)
    ]
    text = report.write_report(tmp_path, {}, samples).read_text(encoding="utf-8")
    page = Page(text)
    shown = "".join(page.text)
    assert [tag for tag, _ in page.tags].count("ol") == 1 and "script" not in {tag for tag, _ in page.tags}
    assert not any("onclick" in known for _, known in page.tags)
    roles = [known.get("class", "") for tag, known in page.tags if tag == "li"]
    assert roles == ["system", "", "assistant", "tool", "", ""]
    for said in (
        "Be kind. </p>",
        "What is rain?",
        "They ask.",
        "[calls look<up>(",
        "wet",
        "odd",
        "What is ice?",
        "Why?",
    ):
        assert said in shown
    assert shown.count("And snow?") == 2, "in the heading, and in its turn"


def test_the_tools_of_a_conversation_are_listed(tmp_path):
    tools = [
        {"type": "function", "function": {"name": "look<up>", "description": "Finds <b>facts</b>."}},
        {"name": "sum", "parameters": {}},
    ]
    prompt = Conversation([{"role": "user", "content": "How high is it?"}], {"tools": tools, "style": "brief"})
    samples = [{"combo": "P1A", "prompt": one, "answers": {"base": "High."}} for one in (prompt, list(prompt))]
    page = Page(report.write_report(tmp_path, {}, samples).read_text(encoding="utf-8"))
    shown = " ".join("".join(page.text).split())
    assert shown.count("Tools of this conversation: look<up>: Finds <b>facts</b>. sum") == 1
    assert dialogue(prompt) == "User: How high is it?\n\n[tools: look<up> (Finds <b>facts</b>.); sum]"
    assert dialogue(list(prompt)) == "How high is it?"


def test_the_page_tells_the_numbers(written):
    text = "".join(Page((written / "index.html").read_text()).text)
    for expected in ("75.0", "98.0 %", "1 min 16 s", "model.layers", "A note.", "-0.250", "No combination"):
        assert expected in text, expected
    assert "nan" not in text.lower() and "None" not in text


@pytest.mark.parametrize("kept", [(), *[(key,) for key in SUMMARY]])
def test_sections_may_be_missing(tmp_path, kept):
    summary = {key: SUMMARY[key] for key in kept}
    report.write_report(tmp_path, summary)
    sections = {
        "win_rate": "win-rate",
        "win_rate_average": "win-rate",
        "combos": "combos",
        "sweep": "sweep",
        "ingredients": "ingredients",
        "reward_models": "reward-models",
        "preferences": "preferences",
        "stage_seconds": "run",
        "config": "run",
        "notes": "run",
    }
    page = Page((tmp_path / "index.html").read_text())
    assert page.ids() == {sections[key] for key in kept if key in sections}
    printed(summary)


def test_numbers_may_be_missing(tmp_path):
    undecided = win_rate(np.zeros(4))
    summary = {
        "ingredients": {"short": {"win_rate_vs_base": undecided}, "long": {"score": math.nan}, "odd": {}},
        "reward_models": {"short": {}},
        "win_rate": {"Soup": {"Base": {"rate": 0.5}}, "Base": {"Soup": {}}},
        "win_rate_average": {"Soup": {}},
        "sweep": {"length": {"weights": [0, 1], "scores": {"short": [math.nan, 1.0]}}, "empty": {}},
        "combos": {"short": {"Soup": {"Base": undecided}}},
        "stage_seconds": {"sft": None},
    }
    path = report.write_report(tmp_path, summary, [{"prompt": "p"}], tmp_path / "absent.jsonl")
    assert "nan" not in "".join(Page(path.read_text()).text).lower()
    assert "nan" not in printed(summary).lower()


def test_writing_again_replaces_the_report(tmp_path):
    report.write_report(tmp_path, {"title": "first"})
    path = report.write_report(str(tmp_path), {"title": "second"})
    assert path == tmp_path / "index.html"
    assert "second" in path.read_text() and "first" not in (tmp_path / "summary.json").read_text()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, MISSING), (0.04, "0.0 s"), (59.9, "59.9 s"), (76.5, "1 min 16 s"), (8247, "2 h 17 min")],
)
def test_durations_have_two_units_at_most(seconds, text):
    assert duration(seconds) == text


def test_pooled_combinations_count_comparisons(tmp_path):
    few, many = win_rate(np.array([1])), win_rate(np.repeat([1, -1], [1, 8]))
    report.write_report(tmp_path, {"combos": {"P1A": {"Soups": {"A": few, "B": many}}}})
    assert "20.0" in "".join(Page((tmp_path / "index.html").read_text()).text)


def test_tables_fit_a_terminal_and_keep_brackets():
    text = printed(SUMMARY | {"win_rate_average": {"[bold]Soups[/bold]": RATE}}, width=80)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "[bold]Soups[/bold]" in text
    for expected in ("75.0", "90.0", "1.25", "-1.00", "1 min 16 s"):
        assert expected in text, expected


def test_training_curves_are_read_by_stage_and_policy(tmp_path):
    rows = [
        {"stage": "policy", "step": 1, "samples": 8, "objective/scores/P1A": 0.0, "rewards/accuracies": 1.0},
        {"stage": "policy", "step": 2, "samples": 16, "objective/scores/P1A": None},
        {"stage": "policy", "step": 3, "samples": 24, "objective/scores/P1A": 1.0, "objective/scores/P1B": 2.0},
        {"stage": "morl", "step": 3, "objective/kl": 0.5},
        {"stage": "sft", "step": 1, "loss": 2.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage"')
    curves = plots.training_curves(path)
    assert set(curves) == {("policy", "scores", "samples"), ("morl", "kl", "step")}
    scores = curves["policy", "scores", "samples"]
    np.testing.assert_array_equal(scores["P1A"], [[8, 16, 24], [0, math.nan, 1]])
    assert scores["P1B"].tolist() == [[24], [2]]
    assert curves["morl", "kl", "step"]["all"].tolist() == [[3], [0.5]]


def test_methods_come_before_opponents_without_a_row():
    assert plots.opponents({"A": {"C": 1, "B": 1}, "B": {"A": 1}}) == ["A", "B", "C"]


def test_an_altered_summary_is_printed_or_refused_in_one_line(tmp_path, capsys):
    """As `pjrlhf report` prints it, with one value replaced."""
    whole = json.dumps(as_json(SUMMARY | USER_MODELS))
    values = [None, True, 3.5, 10**30, "", "x", [], [1], {}, {"a": 1}, {"a": {"b": 1}}]
    ended = collections.Counter()
    for seed in range(150):
        rng, summary = random.Random(seed), json.loads(whole)
        holder = summary
        while (key := rng.choice(sorted(holder))) is not None:
            below = holder[key]
            if not isinstance(below, dict) or not below or rng.random() < 0.3:
                break
            holder = below
        holder[key] = rng.choice(values)
        try:
            report.print_summary(tmp_path / "summary.json", summary, "run it again")
            ended["printed"] += 1
            assert capsys.readouterr().out
        except UserError as error:
            told = str(error)
            assert "\n" not in told and told.endswith("; run it again") and "summary.json: is no summary" in told
            assert not capsys.readouterr().out, "all of it or nothing"
            ended["refused"] += 1
    for nonsense in ([], 3, None, "x"):
        with pytest.raises(UserError, match="is no summary of a run"):
            report.print_summary(tmp_path / "summary.json", nonsense, "run it again")
    assert min(ended["printed"], ended["refused"]) > 10, ended
