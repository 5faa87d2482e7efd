"""The user models of this folder, one file each: a class derived from `base.UserRewards`, named `MODEL`.

A config names the file, or a class of yours as "package.module:MyModel".
"""

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from pjrlhf.errors import UserError
from pjrlhf.models import user_models
from pjrlhf.models.user_models.base import UserRewards
from pjrlhf.registry import load
from pjrlhf.settings import parse, shown


@functools.cache
def kinds() -> dict[str, type[UserRewards]]:
    """The user models of this package by name."""
    names = [module.name for module in pkgutil.iter_modules(user_models.__path__)]
    modules = {name: importlib.import_module(f"{user_models.__name__}.{name}") for name in names}
    return {name: module.MODEL for name, module in modules.items() if hasattr(module, "MODEL")}


def user_model(values: Any, key: str) -> UserRewards:
    """The user model that an entry describes: its kind, and settings that differ from their defaults.

    Args:
      values: {"kind": ..., setting: value}.
      key: dotted key of the entry, for messages.

    Raises:
      UserError: no entry, an unknown kind, or a bad setting.
    """
    if not isinstance(values, Mapping) or "kind" not in values:
        raise UserError(f"{key}: {shown(values)} has no kind; choose one of {', '.join(kinds())}")
    kind = values["kind"]
    if isinstance(kind, str) and ":" in kind:
        found = load(kind, f"{key}.kind")
        if not (isinstance(found, type) and issubclass(found, UserRewards)):
            raise UserError(f"{key}.kind: {kind} is no user model; derive it from {UserRewards.__module__}.UserRewards")
    elif isinstance(kind, str) and kind in kinds():
        found = kinds()[kind]
    else:
        near = difflib.get_close_matches(str(kind), kinds(), n=1)
        hint = f"did you mean {near[0]!r}? Otherwise choose" if near else "choose"
        raise UserError(f"{key}.kind: {shown(kind)} is unknown; {hint} one of {', '.join(kinds())}, or name your own")
    return parse(found, {name: value for name, value in values.items() if name != "kind"}, key)
