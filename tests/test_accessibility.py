"""Reports and the documentation site in a browser, in light and dark, wide and narrow: axe finds no serious fault."""

import contextlib
import os
import pathlib
import subprocess
import sys

import pytest
from support.accessibility import faults
from support.browser import chromium
from support.summaries import SUMMARY, USER_MODELS

from pjrlhf.evaluation import report

ROOT = pathlib.Path(__file__).parents[1]
SITE = (
    "index.html",
    "start/quickstart.html",
    "concepts/mix_and_bank.html",
    "methods/pdpo.html",
    "results/soups.html",
    "reference/settings/run.html",
    "reference/api.html",
)
screens = pytest.mark.parametrize(("scheme", "width"), [(s, w) for s in ("light", "dark") for w in (1280, 390)])


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@contextlib.contextmanager
def opened(browser, file, scheme, width):
    options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme, "reduced_motion": "reduce"}
    context = browser.new_context(**options)
    try:
        page = context.new_page()
        page.goto(file.as_uri())
        yield page
    finally:
        context.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    samples = [{"combo": ("P1A", "P2A"), "prompt": "Why?", "answers": {"Soups": "an answer", "Base": "another"}}]
    people = [{"model": "pooled", "prompt": "Why?", "answers": {"bob": "an answer"}}]
    return {
        "soups": report.write_report(folder / "soups", SUMMARY, samples),
        "users": report.write_report(folder / "users", USER_MODELS, people),
    }


@screens
@pytest.mark.parametrize("name", ["soups", "users"])
def test_a_report(browser, reports, name, scheme, width):
    with opened(browser, reports[name], scheme, width) as page:
        assert not faults(page)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@screens
def test_the_site(browser, site, scheme, width):
    found = {}
    for name in SITE:
        with opened(browser, site / name, scheme, width) as page:
            page.wait_for_load_state("networkidle")
            if wrong := faults(page):
                found[name] = wrong
    assert not found
