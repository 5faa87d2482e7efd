"""The sections of user models in the report: complete, partial and hostile."""

import json
import math
import re

import pytest
from support.pages import Page, printed
from support.summaries import ACCURACY, MODELS, SUMMARY, USER_MODELS

from pjrlhf.data.records import as_json
from pjrlhf.evaluation import plots, plots_users, report, report_users

USER_SAMPLES = [{"model": MODELS[1], "prompt": "Why?", "answers": {"bob": "<script>x</script>", "unheard": "so"}}]
USER_SECTIONS = {"accuracy", "choices", "length-matched", "grid", "cold-start", "embedding", "generation"}
USER_SECTIONS |= {"by-people", "changed-minds", "context", "people-win-rate"}
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
    fractions = ("43.2", "67.9 %", "98.8", "54.3", "9.8", "0.50", "83.3", "7.8", "61.6", "31.3", "13.1", "84.8", "72.7")
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
    figures |= {
        name: set()
        for name in ("ceiling", "gain", "choices", "by_people", "changed_minds", "context", "people_win_rate")
    }
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
        "by_people": {"a": {}, "b": {"comparisons": {"0": {"mean": math.nan}, "1": {}}}},
        "changed_minds": {"a": {}, "b": {"all": {}, "new": {"0": {"mean": math.nan}}}},
        "context": {"a": {}, "b": {"own": {"mean": math.nan}, "turned": math.nan}},
        "people_win_rate": {"a": {}, "b": {"mean": math.nan, "groups": {"x": {}, "y": {"mean": math.nan}}}},
        "embedding": {"a": {"x": [0.0, math.nan], "y": [1.0, 2.0]}, "b": {}},
        "generation": {"a": {}, "b": {"ann": {}, "bob": {"length": 3}, "cleo": {"score": {"P3A": None}}}},
    }
    path = report.write_report(tmp_path, summary, [{"model": "a", "prompt": "p"}])
    assert "nan" not in "".join(Page(path.read_text()).text).lower()
    assert "nan" not in printed(summary).lower()


def test_the_ceiling_is_drawn_where_accuracies_are_and_nothing_else_changes(of_users):
    free = plots_users.figures(as_json({**USER_MODELS, "ceiling": None}))
    changed = {name for name, png in free.items() if png.light != (of_users / f"{name}.png").read_bytes()}
    assert changed == {"accuracy", "people", "cold_start"}


def test_tables_of_user_models_fit_a_terminal():
    text = printed(USER_MODELS, width=80)
    assert max(len(line) for line in text.splitlines()) <= 80
    for expected in ("43.2", "67.9", "54.3", "98.8", "one <b>each", "20.0", "like"):
        assert expected in text, expected
    # Numbers of comparisons in order of size, not of spelling.
    assert re.search(r"model\W+0\W+2\W+10\W", text)


@pytest.mark.parametrize(
    ("users", "difference", "shown"),
    [(("ann",), 0.1, False), (("ann", "bob"), 0.736, False), (("ann", "bob"), 0.2987, True)],
)
def test_pairs_of_like_length_count_where_they_are_alike_and_of_several_people(tmp_path, users, difference, shown):
    people = {user: {"accuracy": 1.0, "pairs": 4} for user in users}
    found = {"mean": 0.9191, "low": 0.9, "high": 1.0, "pairs": 4, "users": people, "max_difference": difference}
    summary = {"accuracy": {"pooled": ACCURACY}, "length_matched": {"pooled": found}}
    page = " ".join("".join(Page(report.write_report(tmp_path, summary).read_text()).text).split())
    note = f"people {len(users)}, pairs 4, lengths differ by at most {100 * difference:.1f} %"
    for text in (page, " ".join(printed(summary).split())):
        assert note in text and ("91.9" in text) == shown and ("too few pairs" in text) != shown
    assert bool(plots_users.of_like_length(as_json(summary))) == shown


# ---- names, captions, columns and axes

# A report of all figures takes seconds: what goes together stands in one name.
# Markup of HTML, of rich and of formulas; foreign letters; control characters.
HOSTILE = "_a$b_$[bold]<b>& 你好 🐘\x1b[31m\x00\nb"


def renamed(value, old, new):
    if isinstance(value, dict):
        return {renamed(key, old, new): renamed(one, old, new) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [renamed(one, old, new) for one in value]
    return new if isinstance(value, str) and value == old else value


def test_names_of_people_models_personas_and_criteria_are_data_everywhere(tmp_path, recwarn):
    summary = as_json(USER_MODELS | SUMMARY)
    for old in ("ann", "pooled", "short", "P3A", "P1A", "expertise", "Soups"):
        summary = renamed(summary, old, HOSTILE)
    page = Page(report.write_report(tmp_path, summary).read_text())
    assert HOSTILE.split("\x00")[0] in "".join(page.text)
    text = printed(summary)
    assert "\x1b" not in text and "\x00" not in text
    assert not [one for one in recwarn if "Glyph" in str(one.message)]


def own_records():
    """What a run on records without personas and without new people reports."""
    summary = {key: as_json(value) for key, value in USER_MODELS.items() if key not in ("ceiling", "cold_start")}
    for one in summary["accuracy"].values():
        for key in ("majority", "minority"):
            one.pop(key)
        for user in one["users"].values():
            user["group"] = None
    for people in summary["generation"].values():
        for one in people.values():
            one["group"] = None
    for one in summary["embedding"].values():
        one["groups"] = [None] * 3
    cells = {"seen_user_seen_prompt": 0.8, "seen_user_unseen_prompt": 0.7}
    return summary | {"grid": dict.fromkeys(MODELS, cells)}


@pytest.mark.slow
def test_captions_and_columns_promise_nothing_that_is_not_there(tmp_path):
    summary = own_records()
    text = " ".join("".join(Page(report.write_report(tmp_path, summary).read_text()).text).split())
    for absent in ("persona", "ceiling", "dashed", "new people", "New people", "intervals."):
        assert absent not in text, absent
    terminal = printed(summary, width=300)
    for absent in ("majority", "minority", "new people", "persona "):
        assert absent not in terminal, absent
    whole = " ".join("".join(Page(report.write_report(tmp_path, USER_MODELS).read_text()).text).split())
    for present in ("majority persona", "dashed, the ceiling", "new people, known prompts", "coloured by persona"):
        assert present in whole, present


def test_answers_to_people_without_personas_are_told_by_person(tmp_path):
    """As long as there are few; a persona that nobody has lumps no one together."""
    summary = {"generation": own_records()["generation"]}
    page = "".join("".join(Page(report.write_report(tmp_path, summary).read_text()).text).split())
    assert "aseveryperson;meansovertheanswers.modelpersonmeanlengthscoreofP3A" in page and "ann10.00.25" in page
    terminal = " ".join(re.sub("[│┃]", " ", printed(summary)).split())
    assert "Answers by person" in terminal and "model person mean length P3A" in terminal
    assert "pooled ann 10.0 0.25" in terminal
    many = {f"person {i}": {"group": None, "length": float(i), "score": {}} for i in range(20)}
    terminal = " ".join(re.sub("[│┃]", " ", printed({"generation": {"pooled": many}})).split())
    assert "Answers to all people" in terminal and "pooled 20 9.5" in terminal and "person 1" not in terminal


def test_how_many_answers_the_means_are_of_is_told(tmp_path):
    """Where they are few, a model that does not know people seems to answer each in another way."""
    people = {user: {"answers": 4, "length": length, "score": {}} for user, length in (("ann", 7.8), ("bob", 13.0))}
    summary = {"generation": {"pooled": people}}
    for text in ("".join(Page(report.write_report(tmp_path, summary).read_text()).text), printed(summary)):
        assert "Answers per person: 4. Each is sampled by itself" in " ".join(text.split())
    summary["generation"]["cluster"] = {"ann": {"answers": 9, "length": 7.0}}
    assert "Answers per person: 4 to 9." in printed(summary)
    assert "per person" not in printed({"generation": {"pooled": {"ann": {"length": 7.0, "score": {}}}}})


def cards_of(**changes):
    return [(card["number"], card["text"]) for card in report_users.cards(as_json(USER_MODELS | changes))]


def test_the_headline_compares_with_the_model_that_does_not_know_people():
    first, second, third, *_ = cards_of()
    assert first == ("+7.8 points", f"accuracy of {MODELS[1]} over pooled, person by person, 3 people (1.2 to 15.0)")
    assert f"accuracy of {MODELS[1]}, mean over 3 people" in second[1] and "accuracy of pooled" in third[1]


def test_neither_the_base_nor_a_control_is_the_headline():
    tied = {name: ACCURACY for name in ("base", "permuted", "individualized", "pooled")}
    gain = {"against": "pooled", "low": -0.1, "high": 0.1, "users": 3}
    gains = {"permuted": gain | {"mean": 0.05}, "individualized": gain | {"mean": 0.0}}
    first, *_ = cards_of(accuracy=tied, gain=gains, controls=["permuted"])
    assert first[0] == "0.0 points" and "accuracy of individualized over pooled" in first[1]
    first, *_ = cards_of(accuracy={name: tied[name] for name in ("base", "pooled")}, gain={})
    assert "accuracy of pooled" in first[1]


def gain_of(mean, low, high):
    return {"against": "pooled", "mean": mean, "low": low, "high": high, "users": 12}


def people_of(right):
    """12 people, all with one accuracy."""
    return {"mean": right, "users": {f"p{i}": {"accuracy": right} for i in range(12)}}


@pytest.mark.parametrize(
    ("gain", "permuted", "said"),
    [
        (gain_of(0.0, 0.0, 0.0), 0.5, report_users.NOTHING_PERSONAL),
        (gain_of(-0.01, -0.04, 0.02), 0.5, report_users.NOTHING_PERSONAL),
        (gain_of(0.33, 0.0, 1.0), 0.5, report_users.UNDECIDED),
        (gain_of(0.03, 0.01, 0.05), 0.5, ""),
        (gain_of(-0.03, -0.05, -0.01), 0.5, ""),
        (gain_of(0.01, -0.02, 0.04), 0.4, ""),  # what permuted ids do not have is personal
        (None, 0.5, ""),
    ],
)
def test_a_report_says_that_nothing_personal_shows_where_no_interval_excludes_zero(tmp_path, gain, permuted, said):
    gains = {"permuted": gain_of(0.2, 0.1, 0.3), "surface_personal": gain_of(0.2, 0.1, 0.3)}
    summary = {
        "controls": ["permuted"],
        "accuracy": {"pooled": people_of(0.5), "individualized": people_of(0.5), "permuted": people_of(permuted)},
        "gain": gains | ({"individualized": gain} if gain else {}),
    }
    assert report_users.nothing_personal(summary).startswith(said)
    assert bool(said) == bool(report_users.nothing_personal(summary))
    if said:
        page = "".join(Page(report.write_report(tmp_path, summary).read_text()).text)
        assert said in page and said in printed(summary, width=1000)
    assert bool(said) == ("personal was learned" in printed(summary, width=1000))


@pytest.mark.parametrize(
    ("low", "high", "least", "bounds", "expected"),
    [
        (49.0, 52.0, 40.0, (0, 100), (30.5, 70.5)),
        (97.0, 99.0, 40.0, (0, 100), (60.0, 100.0)),
        (1.0, 2.0, 40.0, (0, 100), (0.0, 40.0)),
        (10.0, 90.0, 40.0, (0, 100), (10.0, 90.0)),
        (0.5, 0.5, 0.2, None, (0.4, 0.6)),
    ],
)
def test_an_axis_is_not_filled_by_noise(low, high, least, bounds, expected):
    assert plots.span(low, high, least, bounds) == pytest.approx(expected)


def test_the_page_has_two_themes_shrinks_and_says_how_the_run_was_made(tmp_path):
    made = {"command": "python -m pjrlhf.main --config=configs/pdpo.py", "versions": "jax 1", "base": "runs/x"}
    source = report.write_report(tmp_path, USER_MODELS | {"run": made}).read_text()
    page = Page(source)
    assert (
        sum(tag == "source" for tag, _ in page.tags) == sum(tag == "img" for tag, _ in page.tags) == len(USER_FIGURES)
    )
    assert "prefers-color-scheme: dark" in source and "min-width: 720" not in source
    # A figure that is wider than the screen scrolls in a frame of its own.
    assert source.count('<figure><div class="scroll" tabindex="0"><picture>') == len(USER_FIGURES)
    text = "".join(page.text)
    assert all(value in text for value in made.values())
