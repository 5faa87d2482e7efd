"""The one exception for input a person can mend."""

import re


class UserError(ValueError):
    """Bad input: the message names the thing, the reason and the way out; `main` prints it without a traceback."""


def missing_key(error: BaseException) -> tuple[str, str] | None:
    """(key, nearest known key or "") where `error` is how ml_collections says that a config has no such key."""
    # Its AttributeError carries a KeyError, whose text quotes the key; errors of other code do neither.
    inner = error.args[0] if isinstance(error, AttributeError) and error.args else error
    if not isinstance(inner, KeyError) or not inner.args:
        return None
    found = re.fullmatch(r"'(\w+)'(?:\nDid you mean \"(\w+)\" instead of .*)?", str(inner.args[0]))
    return (found[1], found[2] or "") if found else None
