"""Lists and objects that the cells of CSV files hold as text."""

import ast
from typing import Any

from pjrlhf.data.records import RecordError, from_json
from pjrlhf.settings import shown


def literal(value: Any, name: str) -> Any:
    """The value of a text in JSON or in Python's notation, which `str` of a list gives; anything but text as it is.

    Args:
      name: of the column, for messages.

    Raises:
      RecordError: the text is neither of them.
    """
    if not isinstance(value, str):
        return value
    try:
        return from_json(value)
    except RecordError:
        pass
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise RecordError(f"bad {name}", f"{shown(value)} is neither JSON nor a Python literal") from None
