"""docs/papers.md: every config, variant and function that it names is there, and it names every config."""

import importlib
import pathlib
import re

import pytest
from support import tiny_papers

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
ROWS = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| ")][1:]


def test_it_has_every_config_and_variant():
    named, paper = set(), ""
    for row in ROWS:
        found = re.search(r"configs/papers/(\w+)\.py", row[1])
        paper = found[1] if found else paper
        listed = re.sub(r"`.*?`:?", "", row[1])
        if "the same five" in listed:
            named |= {(paper, variant) for variant in tiny_papers.names_of("ric")}
        else:
            named |= {(paper, variant) for variant in re.findall(r"\w+", listed) or [None]}
    assert named == set(tiny_papers.variants())


@pytest.mark.parametrize("named", sorted(set(re.findall(r"`(pjrlhf/[\w/]+\.py:\w+)`", PAGE))))
def test_functions_exist(named):
    file, _, name = named.partition(":")
    assert hasattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)


def test_what_is_not_run_says_so():
    for row in ROWS:
        assert row[4].strip().startswith("not run here") or re.search(r"\]\(results/\w+\.md", row[4]), row[0]
