"""The section of reward models of people in the report: complete, partial and hostile."""

import pytest
from support.pages import Page, printed

from pjrlhf.data.records import as_json
from pjrlhf.evaluation import report, report_user_models

ONE = {
    "kind": "vpl",
    "source": "pairs",
    "state": "latent",
    "injection": "head input",
    "objective": "variational",
    "seeds": [0.701, 0.722],
    "flip": {"flipped": 0.613, "accuracy": 0.204},
    "ece": 0.057,
    "bytes": 128.0,
    "milliseconds": 0.25,
    "seconds": 3.14,
    "loss": 0.5,
    "kl": 1.25,
    "active_units": 0.75,
    "spread": 0.37,
    "new_gain": {"against": "pooled", "comparisons": 16, "mean": 0.083, "low": 0.021, "high": 0.142, "users": 9},
}
POOLED = {key: ONE[key] for key in ("kind", "source", "seeds", "flip", "ece")} | {"bytes": 0.0, "milliseconds": 0.01}
CURVE = {"0": {"mean": 0.5, "low": 0.4, "high": 0.6}, "16": {"mean": 0.75, "low": 0.7, "high": 0.8}}
SUMMARY = {
    "user_models": {"<b>vpl</b>": ONE, "pooled": POOLED},
    "cold_start": {"<b>vpl</b>": CURVE, "pooled": CURVE},
}


def test_the_section_and_its_figure(tmp_path):
    source = report.write_report(tmp_path, SUMMARY).read_text()
    page = Page(source)
    assert page.ids() == {"user-models", "cold-start"}
    assert {path.stem for path in tmp_path.glob("*.png")} == {"cost", "cold_start"}
    text = " ".join("".join(page.text).split())
    for expected in (
        "variational",
        "8.3 (2.1-14.2)",
        "61.3",
        "20.4",
        "5.7",
        "70.1 72.2",
        "128",
        "75.0",
        "1.25",
        "0.37",
    ):
        assert expected in text, expected
    assert "<b>vpl</b>" in text and "<b>vpl</b>" not in source and "nan" not in text.lower()
    assert "variational" in printed(SUMMARY)


# What the figure of costs is drawn from, what a table alone shows and a section: each of the others is of one of these.
QUICK = ("bytes", "flip", "cold_start")


@pytest.mark.parametrize(
    "missing", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in (*ONE, "cold_start")]
)
def test_what_is_missing_is_left_out(tmp_path, missing):
    models = {"vpl": {key: value for key, value in ONE.items() if key != missing}}
    summary = {"user_models": models, **({} if missing == "cold_start" else {"cold_start": {"vpl": CURVE}})}
    page = Page(report.write_report(tmp_path, as_json(summary)).read_text())
    assert "user-models" in page.ids()
    printed(summary)


def test_nothing_makes_no_section(tmp_path):
    assert report_user_models.page({})["user_model_tables"] == {} and report_user_models.figures({}) == {}
    assert "user-models" not in Page(report.write_report(tmp_path, {}).read_text()).ids()
