"""The sections of user models in the report: complete, partial and hostile."""

import json
import math
import re

import pytest
from support.pages import Page, printed
from support.summaries import MODELS, USER_MODELS

from pjrlhf.evaluation import plots_users, report

USER_SAMPLES = [{"model": MODELS[1], "prompt": "Why?", "answers": {"bob": "<script>x</script>", "unheard": "so"}}]
USER_SECTIONS = {"accuracy", "choices", "length-matched", "grid", "cold-start", "embedding", "generation"}
USER_FIGURES = {"accuracy", "people", "grid", "cold_start", "embedding", "generation"}


@pytest.fixture(scope="module")
def of_users(tmp_path_factory):
    folder = tmp_path_factory.mktemp("users")
    report.write_report(folder, USER_MODELS, USER_SAMPLES)
    return folder


def test_user_models_have_their_sections_and_figures(of_users):
    page = Page((of_users / "index.html").read_text())
    assert page.ids() == USER_SECTIONS | {"samples"}
    assert {path.stem for path in of_users.glob("*.png")} == USER_FIGURES
    text = " ".join("".join(page.text).split())
    fractions = ("43.2", "67.9 %", "98.8", "54.3", "9.8", "0.50", "83.3", "7.8", "61.6")
    for expected in (*fractions, "20.0 to 20.0", "10.0 to 30.0"):
        assert expected in text, expected
    assert "nan" not in text.lower() and "None" not in text
    table = json.loads((of_users / "summary.json").read_text())
    assert table["generation"]["pooled"]["ann"]["score"] == {"P3A": 0.25, "P3B": None}


def test_names_of_people_models_and_tastes_are_text(of_users):
    source = (of_users / "index.html").read_text()
    page = Page(source)
    assert not {"script", "link", "iframe", "i", "u"} & {tag for tag, attributes in page.tags if not attributes}
    assert "one <b>each</b>" in "".join(page.text) and "one <b>each" not in source
    assert "bob long & <i>wordy</i>" in " ".join("".join(page.text).split())
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert len(links) == len(USER_FIGURES) and all(link.startswith("data:image/png;base64,") for link in links)
    assert not re.search(r"url\(|@import|https?:", source)


@pytest.mark.parametrize("key", USER_MODELS)
def test_a_section_of_user_models_may_stand_alone(tmp_path, key):
    figures = {"accuracy": {"accuracy", "people"}, "length_matched": {"accuracy"}}
    figures |= {"ceiling": set(), "gain": set(), "choices": set()}
    summary = {key: USER_MODELS[key]}
    page = Page(report.write_report(tmp_path, summary).read_text())
    assert page.ids() == {key.replace("_", "-")} & USER_SECTIONS
    assert {path.stem for path in tmp_path.glob("*.png")} == figures.get(key, {key})
    printed(summary)


def test_numbers_of_user_models_may_be_missing(tmp_path):
    summary = {
        "accuracy": {"a": {}, "b": {"mean": math.nan, "users": {"ann": {}, "bob": {"accuracy": None}}}},
        "ceiling": {},
        "gain": {"a": {}, "b": {"mean": math.nan}},
        "choices": {"a": {}, "b": {"mean": math.nan}},
        "grid": {"a": {}, "b": {"seen_user_seen_prompt": math.nan}},
        "length_matched": {"a": {"mean": 0.5}},
        "cold_start": {"a": {}, "b": {"0": {"mean": None}, "4": {"mean": 0.5}}},
        "embedding": {"a": {"x": [0.0, math.nan], "y": [1.0, 2.0]}, "b": {}},
        "generation": {"a": {}, "b": {"ann": {}, "bob": {"length": 3}, "cleo": {"score": {"P3A": None}}}},
    }
    path = report.write_report(tmp_path, summary, [{"model": "a", "prompt": "p"}])
    assert "nan" not in "".join(Page(path.read_text()).text).lower()
    assert "nan" not in printed(summary).lower()


def test_the_ceiling_is_drawn_where_accuracies_are_and_nothing_else_changes(of_users):
    free = plots_users.figures(report.clean({**USER_MODELS, "ceiling": None}))
    changed = {name for name, png in free.items() if png != (of_users / f"{name}.png").read_bytes()}
    assert changed == {"accuracy", "people", "cold_start"}


def test_tables_of_user_models_fit_a_terminal():
    text = printed(USER_MODELS, width=80)
    assert max(len(line) for line in text.splitlines()) <= 80
    for expected in ("43.2", "67.9", "54.3", "98.8", "one <b>each", "20.0", "like"):
        assert expected in text, expected
    # Numbers of comparisons in order of size, not of spelling.
    assert re.search(r"model\W+0\W+2\W+10\W", text)
