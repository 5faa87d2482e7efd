"""A real browser for tests: Chromium, driven by Playwright."""

import contextlib
import os
import pathlib
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextlib.contextmanager
def chromium():
    """The browser; the test is skipped where there is none."""
    reason = "pip install -e '.[browser]', and apt-get install chromium or python -m playwright install chromium"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    with playwright.sync_playwright() as started:
        own = started.chromium.executable_path
        path = own if pathlib.Path(own).exists() else next(filter(None, map(shutil.which, NAMES)), None)
        if path is None:
            pytest.skip(reason)
        # The sandbox of Chromium does not start for root.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = started.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()
