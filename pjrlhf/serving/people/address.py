"""Where the people of a run are kept, in a module that needs no database."""

import os
import pathlib

STORE = "people.sqlite"  # in a run directory
PEOPLE_VARIABLE = "PJRLHF_PEOPLE"  # the store, whose address may hold a password


def address(run: pathlib.Path | None, url: str = "") -> str:
    """The address of a store: `url`, else that of the environment variable `PEOPLE_VARIABLE`, else `STORE` in the run
    directory; "" where there is none of them.
    """
    return url or os.environ.get(PEOPLE_VARIABLE, "") or ("" if run is None else str(run / STORE))


def is_kept(run: pathlib.Path | None, url: str = "") -> bool:
    """Whether a store is named, or the run has one."""
    return bool(address(None, url)) or (run is not None and (run / STORE).is_file())
