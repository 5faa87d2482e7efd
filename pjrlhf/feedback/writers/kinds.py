"""The writers of this folder, one file each: a class derived from `base.Writer`, named `WRITER`.

A config names the file, or a class of yours as "package.module:MyWriter".
"""

from collections.abc import Mapping
from typing import Any

from pjrlhf.feedback import writers
from pjrlhf.feedback.writers.base import Writer
from pjrlhf.registry import ClassFolder
from pjrlhf.settings import parse

_FOLDER = ClassFolder(writers, "WRITER", Writer, "writer")


def kinds() -> dict[str, type[Writer]]:
    """The writers of this package by name."""
    return _FOLDER.classes


def writer(spec: str | Mapping[str, Any], key: str = "writer") -> Writer:
    """The writer that an entry describes.

    Args:
      spec: a kind, or {"kind": ..., setting: value}.
      key: of the setting, for messages.

    Raises:
      UserError: no kind, an unknown one, or a bad setting.
    """
    values = {"kind": spec} if isinstance(spec, str) else dict(spec)
    found = _FOLDER.get(values.pop("kind", None), key, "kind ")
    return parse(found, values, key)
