"""JSON as people write it: a key that stands twice in an object is an error, where Python takes the last one."""

import collections
import json
from typing import Any, NoReturn

DIGITS = 300  # of a whole number, at most; all such numbers are finite floats


class RepeatedKey(ValueError):
    """A key stands twice in one object."""


class Constant(ValueError):
    """NaN or an infinity, which JSON does not define."""


def loads(text: str | bytes, constants: bool = True, bounded: bool = False) -> Any:
    """The value of a JSON text.

    Args:
      constants: whether NaN, Infinity and -Infinity are numbers, as Python has them.
      bounded: refuses whole numbers beyond the range of floats.

    Raises:
      RepeatedKey, Constant: a `ValueError`, see there.
      ValueError: no JSON, no Unicode, or a whole number of thousands of digits.
      RecursionError: nested too deeply.
    """
    constant, whole = None if constants else _refuse, _bounded if bounded else None
    return json.loads(text, object_pairs_hook=_object, parse_constant=constant, parse_int=whole)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise RepeatedKey(f"{twice[:100]!r} stands twice in one object")
    return found


def _refuse(text: str) -> NoReturn:
    raise Constant(f"{text} is no number of JSON")


def _bounded(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)
