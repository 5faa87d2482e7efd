"""Faults of a page that axe-core finds (https://github.com/dequelabs/axe-core)."""

import pytest

SERIOUS = ("serious", "critical")


def faults(page):
    """The serious ones, each with the elements that have it; the test is skipped without axe-core."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install -e '.[browser]'")
    violations = axe.Axe().run(page).response["violations"]
    return [
        (one["id"], one["help"], *[f"{node['target']}: {node['failureSummary']}" for node in one["nodes"][:5]])
        for one in violations
        if one["impact"] in SERIOUS
    ]
