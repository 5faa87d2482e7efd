"""The run-time type checker of the tests: beartype, which takes integers for floats (PEP 484)."""

from collections.abc import Callable, Iterator

import beartype
from flax import struct

from pjrlhf.settings import Settings

_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def _subclasses(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def check(function: Callable) -> Callable:
    """`function` with its arguments and result checked.

    Settings check their own fields, and say what is wrong with them; fields of pytrees may hold shapes or shardings in
    place of arrays. Neither is checked when it is made.
    """
    if function.__name__ == "__init__":
        name = function.__module__, function.__qualname__
        for cls in (*_subclasses(Settings), *_subclasses(struct.PyTreeNode)):
            if name == (cls.__module__, f"{cls.__qualname__}.__init__"):
                return function
    return _check(function)
