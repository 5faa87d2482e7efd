"""The run-time type checker of the tests: beartype, which takes integers for floats (PEP 484)."""

import pathlib
from collections.abc import Callable

import beartype

import pjrlhf

PACKAGE = pathlib.Path(pjrlhf.__file__).parent
_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """`function` with its arguments and result checked.

    Dataclasses are not checked when they are made: settings check their own fields and say what is wrong with them, and
    fields of pytrees may hold shapes or shardings in place of arrays.
    """
    written = PACKAGE in pathlib.Path(function.__code__.co_filename).parents
    return _check(function) if written or function.__name__ != "__init__" else function
