"""What a report says of its judges: agreement, self-consistency, position bias, failures, rates at equal lengths."""

import pytest
from support.pages import Page, printed

from pjrlhf.evaluation import report, report_judges
from pjrlhf.evaluation.length_control import about_length

JUDGE = {
    "name": "chat <b>gpt</b>",
    "asked": 20,
    "judged": 18,
    "consistency": 0.875,
    "position_bias": -0.125,
    "requests": 40,
    "failures": 2,
    "cost": 0.25,
    "self_consistency": {"n": 8, "agreement": 0.9375, "kappa": 0.8},
}
SUMMARY = {
    "judge": JUDGE,
    "judges": [JUDGE, {"name": "score", "asked": 20, "judged": 20}],
    "agreement": [
        {"criterion": "P1A", "judges": ["chat <b>gpt</b>", "score"], "n": 18, "agreement": 0.75, "kappa": 0.4321},
        {"criterion": "P3<i>B", "judges": ["chat <b>gpt</b>", "score"], "n": 0, "agreement": None, "kappa": None},
    ],
    "length_controlled": {
        "P1A": {
            "soups": {
                "rate": 0.6543,
                "controlled": 0.5432,
                "low": 0.4111,
                "high": 0.6222,
                "form": "instructions",
                "length_effect": 1.234,
                "length": 210.4,
                "base_length": 97.0,
                "n": 24,
            }
        }
    },
    "win_rate_by_judge": {
        "chat <b>gpt</b>": {"soups": {"rate": 0.7171, "low": 0.6, "high": 0.8}},
        "score": {"soups": {"rate": 0.6161, "low": 0.5, "high": 0.7}, "rlhf": {"rate": None}},
    },
}


def test_the_page_tells_what_judges_did(tmp_path):
    source = report.write_report(tmp_path, SUMMARY).read_text()
    page = Page(source)
    assert "judges" in page.ids() and "<b>gpt" not in source and "P3<i>B" not in source
    text = "".join(page.text)
    for expected in ("chat <b>gpt</b>", "87.5", "93.8", "-0.12", "0.43", "65.4", "210", "97", "P3<i>B"):
        assert expected in text, expected
    for expected in ("54.3 (41.1 to 62.2)", "instructions", "1.23", "71.7 (60.0 to 80.0)", "61.6"):
        assert expected in text, expected
    assert "None" not in text and "nan" not in text.lower()


def test_the_terminal_tells_the_same():
    text = printed(SUMMARY, width=200)
    for expected in ("Judges", "Agreement of judges", "at equal lengths", "87.5", "93.8", "0.43", "54.3"):
        assert expected in text, expected


def test_columns_that_say_nothing_are_left_out():
    columns, rows = report_judges.tables({"judges": [{"name": "score", "asked": 3, "judged": 3}]})["judges"]
    assert columns == ["judge", "comparisons", "without verdict"] and rows == [["score", "3", "0"]]
    assert not report_judges.page({})["judge_tables"]


@pytest.mark.parametrize(
    ("key", "told"),
    [("agreement", "Cohen's kappa"), ("length_controlled", "rate at equal lengths"), ("judges", "Position bias")],
)
def test_the_page_explains_what_it_shows(tmp_path, key, told):
    alone = {"judges": [{"name": "score", "asked": 3, "judged": 3}]}
    assert told not in report.write_report(tmp_path / "alone", alone).read_text().replace("&#39;", "'")
    shown = report.write_report(tmp_path / "shown", alone | {key: SUMMARY[key]}).read_text()
    assert told in " ".join(shown.replace("&#39;", "'").split())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Generate a response that is concise and to the point, without being verbose.", True),
        ("keep it short .", True),
        ("longer", True),
        ("Generate a response that is very informative, without missing any background information.", True),
        ("informativeness", True),
        ("The response is in depth.", True),
        ("Generate a response in an unfriendly manner.", False),
        ("use easy words .", False),
        ("Generate a response that only a PhD Student in that specific field could understand.", False),
        ("belongs along", False),
    ],
)
def test_which_criteria_are_about_length(text, answer):
    assert about_length(text) is answer
