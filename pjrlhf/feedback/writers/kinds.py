"""The writers of this folder, one file each: a class derived from `base.Writer`, named `WRITER`.

A config names the file, or a class of yours as "package.module:MyWriter".
"""

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from pjrlhf.errors import UserError
from pjrlhf.feedback import writers
from pjrlhf.feedback.writers.base import Writer
from pjrlhf.registry import load
from pjrlhf.settings import parse, shown


@functools.cache
def kinds() -> dict[str, type[Writer]]:
    """The writers of this package by name."""
    names = [module.name for module in pkgutil.iter_modules(writers.__path__)]
    modules = {name: importlib.import_module(f"{writers.__name__}.{name}") for name in names}
    return {name: module.WRITER for name, module in modules.items() if hasattr(module, "WRITER")}


def writer(spec: str | Mapping[str, Any], key: str = "writer") -> Writer:
    """The writer that an entry describes.

    Args:
      spec: a kind, or {"kind": ..., setting: value}.
      key: of the setting, for messages.

    Raises:
      UserError: no kind, an unknown one, or a bad setting.
    """
    values = {"kind": spec} if isinstance(spec, str) else dict(spec)
    kind = values.pop("kind", None)
    if isinstance(kind, str) and ":" in kind:
        found = load(kind, key)
        if not (isinstance(found, type) and issubclass(found, Writer)):
            raise UserError(f"{key}: {kind} is no writer; derive it from {Writer.__module__}.Writer")
    elif isinstance(kind, str) and kind in kinds():
        found = kinds()[kind]
    else:
        near = difflib.get_close_matches(str(kind), kinds(), n=1)
        hint = f"did you mean {near[0]!r}? Otherwise choose" if near else "choose"
        raise UserError(f"{key}: kind {shown(kind)} is unknown; {hint} one of {', '.join(kinds())}, or name your own")
    return parse(found, values, key)
