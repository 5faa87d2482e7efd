"""The sections of several methods on one front: complete, partial and hostile."""

import html
import json
import math
import re

import numpy as np
import pytest
from matplotlib.text import Text
from support.pages import Page, printed
from support.summaries import SUMMARY, USER_MODELS

from pjrlhf.data.records import as_json
from pjrlhf.evaluation import plots, plots_front, plots_users, report, report_front
from pjrlhf.evaluation.formats import estimate

NAMES = ("soup", "one <script>alert(1)</script>", "Méthode & <b>fils</b>")
FRONT = {
    "objectives": ["helpful", "<u>harmless</u>"],
    "reference": np.array([0.0, -0.1]),
    "low": [-1.5, 0.25],
    "high": [2.5, math.nan],
    "held_out": 1,
    "seeds": 3,
}
WEIGHTS = np.array([[1, 0], [0.4, 0.6], [0, 1], [0.5, 0.5]])
REWARDS = np.array([[0.9375, 0.125], [0.4, 0.4], [0.125, 0.875], [0.5, 0.5]])  # the second is worse than the last
METRICS = {
    "hypervolume": {"mean": 0.7123, "low": 0.69, "high": 0.74},
    "spearman": 0.8765,
    "tau": {"mean": -0.31, "low": -0.42, "high": -0.21},
    "mse": 0.0123,
    "mip": 0.4567,
    "eum": 0.5678,
    "dominated": 0.25,
}
METHODS = {
    name: METRICS
    | {
        "unseen": {"hypervolume": 0.3456, "dominated": {"mean": 0.125, "low": 0.0, "high": 0.5}} if i == 1 else None,
        "samples": {"mean": 1280.0, "low": 1280, "high": 1280},
        "seconds": 75.0,
        "points": {"weights": WEIGHTS, "rewards": REWARDS, "unseen": np.arange(4) == 3},
    }
    for i, name in enumerate(NAMES)
}
SCALING = {
    "new": ["P4A", "<i>P4B</i>"],
    "methods": {NAMES[1]: {"samples": 64, "seconds": 61.0, "ingredients_trained": 2}, "retrained": {"samples": None}},
    "win_rate": {NAMES[1]: {"retrained": {"rate": 0.6543, "low": 0.6, "high": 0.7}}, "retrained": {NAMES[1]: 0.3457}},
}
FRONTS = {"front": FRONT, "methods": METHODS, "claims": ["Soups <em>suffice</em>."], "scaling": SCALING}


@pytest.fixture(scope="module")
def of_fronts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fronts")
    report.write_report(folder, FRONTS)
    return folder


def circles(source):
    """(attributes, title) of every circle of the page."""
    found = re.findall(r"<circle[^>]*><title>([^<]*)</title></circle>", source)
    tags = [attributes for tag, attributes in Page(source).tags if tag == "circle"]
    return list(zip(tags, map(html.unescape, found), strict=True))


def test_fronts_have_their_sections_and_figures(of_fronts):
    page = Page((of_fronts / "index.html").read_text())
    assert page.ids() == {"claims", "front", "scaling"}
    assert {path.stem for path in of_fronts.glob("*.png")} == {"control"}
    text = " ".join("".join(page.text).split())
    metrics = ("0.712 (0.690-0.740)", "0.88", "-0.31 (-0.42 to -0.21)", "0.012", "0.457", "0.568", "25.0")
    unseen, cost = ("0.346", "12.5 (0.0-50.0)"), ("1280", "1 min 15 s", "1 min 1 s", "65.4 (60.0-70.0)", "34.6")
    for expected in (*metrics, *unseen, *cost, "-1.50", "never trained on (1)", "over 3 seeds"):
        assert expected in text, expected
    assert "nan" not in text.lower() and "None" not in text
    order = [text.index(name) for name in NAMES]
    assert order == sorted(order)
    assert json.loads((of_fronts / "summary.json").read_text())["front"]["high"] == [2.5, None]


def test_names_of_methods_objectives_and_preferences_are_text(of_fronts):
    source = (of_fronts / "index.html").read_text()
    page = Page(source)
    assert not {"script", "link", "iframe", "em", "u", "i"} & {tag for tag, _ in page.tags}
    text = "".join(page.text)
    for expected in (*NAMES, "reward of <u>harmless</u>", "Soups <em>suffice</em>.", "P4A, <i>P4B</i>"):
        assert expected in text, expected
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert len(links) == 1 and all(link.startswith("data:image/png;base64,") for link in links)
    assert not re.search(r"url\(|@import|https?:", source)


def test_every_point_is_a_circle_that_tells_its_values(of_fronts):
    found = circles((of_fronts / "index.html").read_text())
    assert len(found) == len(NAMES) * len(WEIGHTS)
    kinds = [attributes["class"] for attributes, _ in found[: len(WEIGHTS)]]
    assert kinds == ["", "dominated", "unseen", ""]  # by rising first weight
    titles = [title for _, title in found]
    assert titles[:3] == [
        "soup\nweights: helpful 0, <u>harmless</u> 1\nrewards: helpful 0.125, <u>harmless</u> 0.875",
        "soup, dominated\nweights: helpful 0.4, <u>harmless</u> 0.6\nrewards: helpful 0.400, <u>harmless</u> 0.400",
        "soup, not trained on\nweights: helpful 0.5, <u>harmless</u> 0.5\n"
        "rewards: helpful 0.500, <u>harmless</u> 0.500",
    ]
    assert titles[4].startswith(f"{NAMES[1]}\nweights: ")


def test_the_drawing_stays_readable_on_small_screens(tmp_path):
    """Every pair of objectives is a drawing of its own, about as wide as the screen; the names stand beside them."""
    for objectives in (2, 3, 5):
        rewards = np.eye(objectives)
        summary = {"methods": {"one": {"points": {"weights": rewards, "rewards": rewards}}}}
        drawing = plots_front.drawing(as_json(summary))
        page = report.write_report(tmp_path / str(objectives), summary).read_text()
        boxes = re.findall(r'<svg viewBox="(\d+) 0 (\d+) (\d+)" role', page)
        assert len(boxes) == len(drawing["panels"]) and {int(width) for _, width, _ in boxes} == {drawing["width"]}
        assert drawing["width"] <= 440 and '<ul class="keys">' in page
        for panel, (left, width, height) in zip(drawing["panels"], boxes, strict=True):
            assert int(left) < panel["left"] < panel["right"] < int(left) + int(width)
            assert 0 < panel["top"] < panel["bottom"] < int(height)
        for circle in drawing["methods"]["one"]["circles"]:
            panel = drawing["panels"][circle["panel"]]
            assert panel["left"] <= circle["x"] <= panel["right"] and panel["top"] <= circle["y"] <= panel["bottom"]


def test_places_in_the_drawing_follow_the_rewards():
    drawing = plots_front.drawing(as_json(FRONTS))
    (panel,) = drawing["panels"]
    first, *_, last = drawing["methods"]["soup"]["circles"]
    assert first["x"] < last["x"] and first["y"] < last["y"]  # up is less in SVG
    x, y = panel["reference"]
    assert panel["left"] <= x < first["x"] and first["y"] < y <= panel["bottom"]
    ticks = {number: place for place, number in panel["x_ticks"]}
    np.testing.assert_allclose(last["x"], ticks["0"] + 0.9375 * (ticks["1"] - ticks["0"]))
    assert drawing["methods"]["soup"]["lines"][0].split()[0] == f"{first['x']:.1f},{first['y']:.1f}"


@pytest.mark.parametrize(("objectives", "panels"), [(2, 1), (3, 3), (5, 6)])
def test_more_objectives_have_a_panel_per_pair(tmp_path, objectives, panels):
    rewards = np.eye(objectives)
    methods = {f"method {i}": {"points": {"weights": rewards, "rewards": rewards + i}} for i in range(14)}
    path = report.write_report(tmp_path, {"methods": methods})
    source = path.read_text()
    assert len(circles(source)) == 14 * objectives * panels
    assert len(plots_front.drawing({"methods": as_json(methods)})["panels"]) == panels
    assert source.count("<polyline") == (14 if objectives == 2 else 0)
    looks = plots_front._fronts({"methods": as_json(methods)}).values()
    assert len({(one["colour"], one["marker"]) for one in looks}) == 14
    assert "objective 1" in source and "dominated" not in "".join(
        attributes["class"] for attributes, _ in circles(source)
    )


def test_control_averages_points_of_equal_weight(monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots_front, "draw", lambda makers: drawn.update({key: make() for key, make in makers.items()}))
    weights = [[0.2, 0.3, 0.5], [0.2, 0.5, 0.3], [0.6, 0.2, 0.2]]
    points = {"weights": weights, "rewards": [[1.0, 0, 0], [2.0, 0, 0], [4.0, 0, 0]]}
    plots_front.figures({"methods": {"soup": {"points": points}}})
    assert [one.get_title(loc="left") or one.get_title() for one in drawn["control"][0].axes] == [
        f"objective {k}" for k in (1, 2, 3)
    ]
    line = drawn["control"][0].axes[0].lines[0]
    assert line.get_xydata().tolist() == [[0.2, 1.5], [0.6, 4.0]]


def test_a_summary_chooses_the_columns(tmp_path):
    """Also metrics that no code here knows; those without a heading are in the summary alone."""
    metrics = {
        "tau": {"heading": "tau", "digits": 2, "scale": 1, "averaged": True},
        "kindness": {"heading": "kindness, %", "digits": 1, "scale": 100, "averaged": True},
        "secret": {"heading": "", "digits": 1, "scale": 1, "averaged": True},
    }
    summary = {"front": {"metrics": metrics}, "methods": {"a": {"tau": 0.5, "kindness": 0.123, "secret": 7.5}}}
    columns, rows = report_front.tables(summary)["front"]
    assert columns == ["method", "tau", "kindness, %"] and rows[0][:3] == ["a", "0.50", "12.3"]
    assert "kindness, %" in report.write_report(tmp_path, summary).read_text()


@pytest.mark.parametrize("key", FRONTS)
def test_a_section_of_fronts_may_stand_alone(tmp_path, key):
    summary = {key: FRONTS[key]}
    page = Page(report.write_report(tmp_path, summary).read_text())
    assert page.ids() == ({"methods": {"front"}, "front": set()} | {n: {n} for n in ("claims", "scaling")})[key]
    assert {path.stem for path in tmp_path.glob("*.png")} == ({"control"} if key == "methods" else set())
    printed(summary)


def test_numbers_of_fronts_may_be_missing(tmp_path):
    empty = {"mean": None, "low": math.nan, "high": None}
    weights, rewards = [[1.0, 0.0], [None, 1.0]], [[math.nan, 1.0], [0.0, 1.0]]
    summary = {
        "front": {"objectives": ["a", "b"], "reference": [None, 0.0], "low": [None], "held_out": None, "seeds": None},
        "methods": {
            "a": {},
            "b": dict.fromkeys(METRICS, empty) | {"samples": math.nan, "seconds": empty, "unseen": {"tau": None}},
            "c": {"points": {"weights": weights, "rewards": rewards}, "tau": math.nan},
            "d": {"points": {"weights": [*weights, [0.5, 0.5]], "rewards": [*rewards, [0.5, 0.5]], "unseen": None}},
        },
        "claims": None,
        "scaling": {"new": None, "methods": {"a": {}}, "win_rate": {"b": {"a": None, "c": {"rate": math.nan}}}},
    }
    source = report.write_report(tmp_path, summary).read_text()
    cells = re.findall(r'<td class="n">(.*)</td>', source)
    assert set(cells) == {"\N{EN DASH}", "0.00"}  # the one known number is the reference of b
    assert len(circles(source)) == 1
    assert "nan" not in "".join(Page(source).text).lower()
    text = printed(summary, width=160)
    assert "nan" not in text.lower() and "None" not in text


@pytest.mark.slow
@pytest.mark.parametrize("summary", [SUMMARY, USER_MODELS])
def test_reports_without_fronts_are_as_before(tmp_path, summary):
    empty = {"front": {}, "methods": None, "claims": [], "scaling": {}}
    path = report.write_report(tmp_path / "without", summary)
    assert report.write_report(tmp_path / "empty", summary | empty).read_text() == path.read_text()
    assert printed(summary | empty) == printed(summary)
    page = Page(path.read_text())
    assert not {"front", "claims", "scaling"} & page.ids() and "svg" not in {tag for tag, _ in page.tags}
    assert "control" not in {image.stem for image in (tmp_path / "without").glob("*.png")}


def test_tables_of_fronts_fit_a_terminal():
    wide, narrow = printed(FRONTS, width=220), printed(FRONTS, width=80)
    assert max(len(line) for line in narrow.splitlines()) <= 80
    assert "continued" in narrow and "continued" not in wide
    titles = [line.strip() for line in wide.splitlines() if line[:1].isalpha()]
    new = "Adding preferences: P4A, <i>P4B</i>"
    assert titles == ["Fronts", "Fronts, preferences never trained on", new, "Findings"]
    for expected in ("0.712 (0.690-0.740)", "-0.31 (-0.42 to -0.21)", "25.0", "1280", "65.4 (60.0-70.0)", "<em>"):
        assert expected in wide, expected
    # A number is never broken over lines.
    for number in ("(0.690-0.740)", "0.346", "(60.0-70.0)", "1280"):
        assert number in narrow, number


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.714, "0.71"),
        (3, "3"),
        (None, "\N{EN DASH}"),
        ({"mean": None, "low": 0.1, "high": 0.2}, "\N{EN DASH}"),
        ({"mean": 0.714, "low": 0.69, "high": None}, "0.71"),
        ({"mean": 0.714, "low": 0.69, "high": 0.74}, "0.71 (0.69-0.74)"),
        ({"mean": 0.0, "low": -0.1, "high": 0.1}, "0.00 (-0.10 to 0.10)"),
    ],
)
def test_estimates_read_as_a_number_and_its_interval(value, shown):
    assert estimate(value) == shown


@pytest.mark.slow
def test_text_of_figures_is_readable_on_small_screens(tmp_path, monkeypatch):
    """In pixels, where the page shows a figure 500 pixels wide."""
    sizes = {}
    drawn = plots._png

    def measured(figure):
        texts = [one for one in figure.findobj(Text) if one.get_visible() and one.get_text()]
        least = min(texts, key=lambda one: one.get_size())
        sizes[least.get_text()] = least.get_size() / 72 * 500 / figure.get_figwidth()
        return drawn(figure)

    monkeypatch.setattr(plots, "_png", measured)
    lines = [
        {"stage": stage, "step": step, "samples": 16 * step, **{f"objective/{x}/P{i}A": 0.1 * step for i in range(5)}}
        for stage in ("policy", "methods/moc_per_preference")
        for x in ("scores", "kl")
        for step in range(3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole = as_json(SUMMARY | USER_MODELS | FRONTS)
    assert len(plots.figures(whole, tmp_path / "metrics.jsonl")) == 4
    assert plots_front.figures(whole).keys() == {"control"} and plots_users.figures(whole)
    assert len(sizes) > 4 and min(sizes.values()) > 8, sizes
    assert min(size for text, size in sizes.items() if text not in ("ann", "bob")) > 9.9, sizes
