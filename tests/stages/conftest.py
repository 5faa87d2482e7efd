"""Finished tiny runs that many tests look at."""

import shutil

import pytest
import tiny
import tiny_users

from pjrlhf.stages.context import Run


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Where runs keep what depends on content alone: not in the cache folder of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "cache_folder", property(lambda run: folder))
        yield folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished run of `tiny.settings()`; not to be changed."""
    return tiny.run(tmp_path_factory.mktemp("finished") / "run", tiny.settings())


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="session")
def people(tmp_path_factory, cache_folder):
    """The folder of a finished run of `tiny_users.settings()`; not to be changed."""
    return tiny.run(tmp_path_factory.mktemp("people") / "run", tiny_users.settings())
