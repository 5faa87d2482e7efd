"""The user models of this folder, one file each: a class derived from `base.UserRewards`, named `MODEL`.

A config names the file, or a class of yours as "package.module:MyModel".
"""

from collections.abc import Mapping
from typing import Any

from pjrlhf.errors import UserError
from pjrlhf.models import user_models
from pjrlhf.models.user_models.base import UserRewards
from pjrlhf.registry import ClassFolder
from pjrlhf.settings import parse, shown

_FOLDER = ClassFolder(user_models, "MODEL", UserRewards, "user model")


def kinds() -> dict[str, type[UserRewards]]:
    """The user models of this package by name."""
    return _FOLDER.classes


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
    found = _FOLDER.get(values["kind"], f"{key}.kind")
    return parse(found, {name: value for name, value in values.items() if name != "kind"}, key)
