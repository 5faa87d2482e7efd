"""Registries of what a setting may name, in this package or in other code."""

import difflib
import functools
import hashlib
import importlib
import importlib.util
import os
import pathlib
import pkgutil
import sys
from collections.abc import Callable, ItemsView, Iterator
from types import ModuleType
from typing import Any, Generic, TypeVar

from pjrlhf.errors import UserError, described
from pjrlhf.paths import expand
from pjrlhf.settings import shown

T = TypeVar("T")
X = TypeVar("X")


class Registry(Generic[T]):
    """Entries by name, in the order of registration; `get` also loads entries from other code.

        LOSSES: Registry[Loss] = Registry("pairwise loss")

        @LOSSES.register("hinge")
        def hinge(...): ...

        LOSSES.get("hinge")
        LOSSES.get("my_package.my_module:my_loss")
        LOSSES.get("losses/mine.py:my_loss")

    Args:
      noun: what an entry is, for error messages.
      accept: turns a registered or loaded object into an entry; by default the object is the entry. It raises a
        ValueError for an object that cannot be an entry, with a message such as "is not a function".
    """

    def __init__(self, noun: str, accept: Callable[[Any], T] = lambda thing: thing):
        self.noun = noun
        self._accept = accept
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[X], X]:
        """A decorator that adds an object under `name` and returns it unchanged.

        Raises:
          ValueError: the name is in use, or the object cannot be an entry.
        """

        def add(thing: X) -> X:
            if name in self._entries:
                raise ValueError(f"{self.noun} {name!r} is registered already")
            self._entries[name] = self._accept(thing)
            return thing

        return add

    def get(self, spec: str) -> T:
        """The entry that `spec` names: a registered name, "package.module:name", or "path/to/file.py:name".

        Raises:
          UserError: an unknown name, a module, file or attribute that does not exist, a module that cannot be imported,
            or an object that cannot be an entry.
        """
        if spec in self:
            return self._entries[spec]
        if not isinstance(spec, str) or ":" not in spec:
            raise UserError(f"{self.noun} {spec!r}: unknown; {self._advice(spec)}")
        thing = load(spec, self.noun)
        try:
            return self._accept(thing)
        except ValueError as error:
            raise UserError(f"{self.noun} {spec!r}: {error}") from error

    def _advice(self, spec: object) -> str:
        near = difflib.get_close_matches(str(spec), self._entries, n=3)
        known = f"choose one of {', '.join(self._entries)}, or name your own as package.module:name"
        return f"did you mean {' or '.join(near)}? Otherwise {known}" if near else known

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def items(self) -> ItemsView[str, T]:
        return self._entries.items()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class ClassFolder(Generic[T]):
    """The classes of a package that has one file for each, and of other code: a file `name` holds the class of that
    name, as `constant`.

    Args:
      package: the package of the files.
      base: what all classes are derived from.
      noun: what a class is, for error messages.
    """

    def __init__(self, package: ModuleType, constant: str, base: type[T], noun: str):
        self._package, self._constant, self._base, self._noun = package, constant, base, noun

    @functools.cached_property
    def classes(self) -> dict[str, type[T]]:
        """The classes of the package by name; imports its files."""
        names = [module.name for module in pkgutil.iter_modules(self._package.__path__)]
        modules = {name: importlib.import_module(f"{self._package.__name__}.{name}") for name in names}
        return {
            name: vars(module)[self._constant] for name, module in modules.items() if self._constant in vars(module)
        }

    def get(self, kind: object, key: str, label: str = "") -> type[T]:
        """The class that `kind` names: a file of the package, or "package.module:Name".

        Args:
          key: of the setting, for messages.
          label: stands before an unknown kind in the message.

        Raises:
          UserError: an unknown name, code that cannot be loaded, or a class that is not derived from the base.
        """
        if isinstance(kind, str) and ":" in kind:
            found = load(kind, key)
            if not (isinstance(found, type) and issubclass(found, self._base)):
                base = f"{self._base.__module__}.{self._base.__name__}"
                raise UserError(f"{key}: {kind} is no {self._noun}; derive it from {base}")
            return found
        if isinstance(kind, str) and kind in self.classes:
            return self.classes[kind]
        near = difflib.get_close_matches(str(kind), self.classes, n=1)
        hint = f"did you mean {near[0]!r}? Otherwise choose" if near else "choose"
        listed = ", ".join(self.classes)
        raise UserError(f"{key}: {label}{shown(kind)} is unknown; {hint} one of {listed}, or name your own")


def callable_as(what: str) -> Callable[[Any], Any]:
    """An `accept` of a `Registry` that takes anything callable; `what` it must be, such as "a function of x"."""

    def accept(thing: Any) -> Any:
        if not callable(thing):
            raise ValueError(f"is not {what}")
        return thing

    return accept


def load(spec: str, noun: str) -> object:
    """The object that "package.module:name" or "path/to/file.py:name" names.

    Modules are also searched in the working directory.

    Args:
      noun: what the object is, for error messages.

    Raises:
      UserError: no such module, file or attribute, or the import fails.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise UserError(f"{noun} {shown(spec)}: cannot be read; write package.module:name or path/to/file.py:name")
    try:
        module = _from_file(pathlib.Path(expand(place))) if place.endswith(".py") else _from_path(place)
    except UserError as error:
        raise UserError(f"{noun} {spec!r}: {error}") from error
    except (Exception, SystemExit) as error:  # the module's own code may raise anything, or end the process
        reason = described(error)
        raise UserError(f"{noun} {spec!r}: {place} cannot be imported ({reason}); correct that first") from error
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, vars(module), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "check the name"
        raise UserError(f"{noun} {spec!r}: {place} has no {name}; {hint}")
    return getattr(module, name)


def _from_path(name: str) -> ModuleType:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A failed import inside the module is an error of its own.
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(f"no module {error.name}; install it, or start in the folder that holds it") from error
        raise


def _from_file(path: pathlib.Path) -> ModuleType:
    """The module of a file, imported once."""
    if not path.is_file():
        raise UserError(f"no file {path}; check the path")
    path = path.resolve()
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader, path  # always present for names that end in .py
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
