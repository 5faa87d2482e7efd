"""One finished tiny run that many tests look at."""

import shutil

import pytest
import tiny


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished run of `tiny.settings()`; not to be changed."""
    return tiny.run(tmp_path_factory.mktemp("finished") / "run", tiny.settings())


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")
