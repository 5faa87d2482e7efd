"""The routes of the page: files, headers, what the page is told, and the report of the run."""

import html.parser
import json
import pathlib
import re
from typing import Any
from unittest import mock

import pytest
from support.serving import send, served

from pjrlhf.data.preferences import PAPER, Preference
from pjrlhf.serving.catalogue import Catalogue
from pjrlhf.serving.run_notes import RunNotes, read_notes
from pjrlhf.serving.web_page import COOKIE, FILES

NAMES = ("P1A", "P2B", "mine")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a report and what must not be read from outside of it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "report").mkdir()
    (folder / "report" / "index.html").write_text("<!doctype html><title>the report</title>")
    (folder / "report" / "a b.png").write_bytes(b"PNG")
    (folder / "config.json").write_text("secret")
    (folder / "report-of-others").mkdir()
    (folder / "report-of-others" / "x.html").write_text("secret")
    (folder / "report" / "link.html").symlink_to(folder / "config.json")
    (folder / "report" / "outside").symlink_to(folder)
    return folder


# These routes ask no model.
ENGINE: Any = mock.Mock(context=64)
MODEL: Any = None


@pytest.fixture(scope="module")
def place(run):
    notes = RunNotes("A title", PAPER, ("what is rain ?",))
    with served(Catalogue(MODEL, NAMES, run=run, notes=notes), ENGINE) as place:
        yield place


@pytest.fixture(scope="module")
def locked(run):
    with served(Catalogue(MODEL, NAMES, run=run), ENGINE, key="secret") as place:
        yield place


def get(place, path, method="GET", **headers):
    return send(place, None, path, method, **headers)


class Links(html.parser.HTMLParser):
    """What a page loads or names, and whether it has code or styles of its own."""

    def __init__(self, text):
        super().__init__()
        self.found, self.inline = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.found += [values[key] for key in ("src", "href") if key in values]
        self.inline += [key for key in values if key == "style" or key.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in values):
            self.inline.append(tag)


def test_the_page_and_all_it_names_come_from_this_server(place):
    status, text, headers = get(place, "/")
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    links = Links(text)
    assert not links.inline
    for link in links.found:
        assert re.fullmatch(r"#\w+|report/|page/[\w.]+", link)
        if link.startswith("page/"):
            assert get(place, f"/{link}")[0] == 200


@pytest.mark.parametrize("name", [path.name for path in sorted(FILES.iterdir())])
def test_every_file_is_served_and_names_nothing_outside(place, name):
    status, text, headers = get(place, f"/page/{name}")
    assert status == 200 and headers["x-content-type-options"] == "nosniff"
    elsewhere = re.findall(r"(?:https?:)?//[\w.]+\.\w+", text.replace("http://www.w3.org/2000/svg", ""))
    assert not elsewhere
    for module in re.findall(r'from "\./([\w.]+)"', text):
        assert (FILES / module).is_file()
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)


def test_headers_allow_this_server_alone(place):
    for path in ("/", "/page/page.js", "/page/page.css"):
        policy = get(place, path)[2]["content-security-policy"]
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        assert rules.pop("default-src") == "'none'"
        assert {rules.pop(name) for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
        assert set(rules.values()) == {"'self'"}


def test_there_is_an_icon_wherever_a_browser_looks(place):
    assert get(place, "/favicon.ico")[2]["content-type"] == "image/svg+xml"


def test_the_package_holds_the_files():
    package_data = pathlib.Path(__file__).parents[2].joinpath("setup.cfg").read_text()
    assert "serving/page/*" in package_data


def test_the_page_is_told_what_is_served(place):
    status, about, headers = get(place, "/page/about")
    assert status == 200 and headers["cache-control"] == "no-store"
    assert (about["title"], about["report"], about["examples"]) == ("A title", True, ["what is rain ?"])
    assert [one["name"] for one in about["ingredients"]] == list(NAMES)
    first, _, own = about["ingredients"]
    assert first["label"] == PAPER["P1A"].label and first["description"] == PAPER["P1A"].sentence
    assert first["dimension"] == "expertise"
    assert own == {"name": "mine", "label": "", "description": "", "dimension": ""}
    assert about["mixing"] and not about["locked"]
    assert not about["people"] and not about["learns"]  # this catalogue has no people


def test_models_have_descriptions(place):
    found = {one["id"]: one.get("description") for one in get(place, "/v1/models")[1]["data"]}
    assert found["P1A"] == PAPER["P1A"].sentence
    assert found["mine"] is None


@pytest.mark.parametrize("path", ["/page/nothing.js", "/page/..%2fweb_page.py", "/page/about/x", "/page/.", "/page/"])
def test_there_are_no_other_files(place, path):
    assert get(place, path)[0] == 404


# ---- the report


@pytest.mark.parametrize("path", ["/report/", "/report/index.html", "/report/a%20b.png", "/report/./index.html"])
def test_the_report_is_read(place, path):
    status, _, headers = get(place, path)
    assert status == 200
    assert "script-src" not in headers["content-security-policy"]
    assert headers["content-type"].startswith("image/png" if path.endswith("png") else "text/html")


@pytest.mark.parametrize(
    "path",
    [
        "../config.json",
        "%2e%2e/config.json",
        "..%2fconfig.json",
        "%2e%2e%2fconfig.json",
        "x/../../config.json",
        "..%5cconfig.json",
        "..\\config.json",
        "../report-of-others/x.html",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "//etc/passwd",
        "link.html",
        "outside/config.json",
        "outside",
        "%00",
        "index.html%00.png",
        "a" * 5000,
        "%ff%fe",
        "%ed%a0%80",
        "index.html/x",
        "~root",
    ],
)
def test_nothing_outside_of_the_report_is_read(place, path):
    status, body, _ = get(place, f"/report/{path}")
    assert status == 404
    assert "secret" not in json.dumps(body) and "root:x" not in json.dumps(body)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", ["/", "/page/page.js", "/report/index.html"])
def test_nothing_is_written(place, path, method):
    assert send(place, {}, path, method)[0] == 405


def test_without_a_run_there_is_no_report():
    with served(Catalogue(MODEL, NAMES), ENGINE) as place:
        assert not get(place, "/page/about")[1]["report"]
        assert get(place, "/report/")[0] == 404


# ---- with a key


def test_the_page_is_open_and_tells_nothing_without_the_key(locked):
    assert get(locked, "/")[0] == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        status, about, answered = get(locked, "/page/about", **headers)
        assert status == 200 and about == {"locked": True}
        assert "set-cookie" not in answered
        assert get(locked, "/report/", **headers)[0] == 401


def test_the_key_opens_the_report_by_a_cookie(locked):
    _, about, headers = get(locked, "/page/about", Authorization="Bearer secret")
    assert about["locked"] is False and about["report"]
    cookie = headers["set-cookie"]
    assert all(part in cookie for part in ("HttpOnly", "Path=/report", "SameSite=strict"))
    assert "secret" not in cookie
    pair = cookie.split(";")[0]
    assert get(locked, "/report/", Cookie=pair)[0] == 200
    assert get(locked, "/report/", Authorization="Bearer secret")[0] == 200
    for wrong in (f"{COOKIE}=x", f"{pair}0", f"{COOKIE}=", f"{COOKIE}=\xff"):
        assert get(locked, "/report/", Cookie=wrong)[0] == 401
    assert get(locked, "/v1/models", Cookie=pair)[0] == 401


# ---- what a run says


def test_notes_come_from_the_config():
    own = {"mine": {"dimension": "length", "sentence": "Be brief."}}
    config = {"stages": ["sft"], "title": "T", "preferences": own, "data": {"prompts": "synthetic"}}
    notes = read_notes(config)
    assert notes.preferences["mine"] == Preference(dimension="length", sentence="Be brief.")
    assert notes.describe("mine")["description"] == "Be brief."
    assert notes.describe("other")["description"] == ""
    assert notes.title == "T" and notes.examples


def test_examples_are_for_the_synthetic_environment_alone():
    config = {"stages": ["policy"], "title": "T", "preferences": "paper", "data": {"prompts": {"kind": "jsonl"}}}
    assert read_notes(config).examples == ()
