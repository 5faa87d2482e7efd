"""Settings: frozen dataclasses with the default, range and help text of every setting, checked at construction.

A config file builds its `ml_collections.ConfigDict` from these classes with `to_config`, and a run reads it back with
`parse`. A bad value raises a UserError that names the key, the value and the allowed values.
"""

import ast
import dataclasses
import difflib
import functools
import hashlib
import inspect
import math
import numbers
import types
import typing
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ml_collections
from ml_collections import config_dict

from pjrlhf.errors import UserError, described
from pjrlhf.paths import expand

T = TypeVar("T", bound="Settings")

SEEDS = (-(2**63), 2**64 - 1)  # the least and the greatest seed

# Old key -> new key. A section is given where the new key depends on it.
RENAMED = {
    "keep": "max_to_keep",
    "heldout_share": "heldout_fraction",
    "max_bad_share": "max_bad_fraction",
    "new_user_share": "new_user_fraction",
    "missing_eos": "missing_eos_penalty",
    "value_weight": "vf_coef",
    "statement": "prompt_format",
    "told": "prompted",
    "tastes": "personas",
    "shares": "fractions",
    "ric.keep": "base_fraction",
}
RENAMED_VALUES = {"world": "synthetic", "world16": "synthetic16"}


def fold_seed(seed: int) -> int:
    """A seed as 32 bits, which all generators accept: itself where it fits, else a hash of it."""
    return seed if 0 <= seed < 2**32 else int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")


@dataclasses.dataclass(frozen=True)
class Rule:
    """The values that a field may have, within its type. In a tuple, the rule applies to every item.

    Attributes:
      help: one line for users.
      low, high: inclusive bounds.
      above, below: exclusive bounds.
      choices: the allowed values, or a function that returns them; () for any value.
      extensible: "package.module:name" is also allowed.
      path: the value is a path, in which ~ is the home folder.
    """

    help: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] | Callable[[], tuple[Any, ...]] = ()
    extensible: bool = False
    path: bool = False

    @property
    def allowed(self) -> tuple[Any, ...]:
        """The choices."""
        return tuple(self.choices() if callable(self.choices) else self.choices)

    def describe(self) -> str:
        """The interval in words; "" without bounds."""
        parts = []
        if self.low is not None:
            parts.append(f"at least {_number(self.low)}")
        if self.above is not None:
            parts.append(f"above {_number(self.above)}")
        if self.high is not None:
            parts.append(f"at most {_number(self.high)}")
        if self.below is not None:
            parts.append(f"below {_number(self.below)}")
        return " and ".join(parts)

    def holds(self, value: float) -> bool:
        """Whether a number is in the interval."""
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def setting(default: object, help: str = "", **rule: Any) -> Any:
    """A field of a `Settings` class.

    Args:
      default: a value, a mapping or a `Settings`.
      help: one line for users.
      rule: further attributes of `Rule`.
    """
    metadata = {"rule": Rule(help=help, **rule)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=functools.partial(dict, default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of all settings.

    Raises:
      UserError: a value of the wrong type, out of range, not finite or not among the choices; or values that contradict
        each other, see `check`. The message starts with the name of a field.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = checked(field.name, getattr(self, field.name), _hints(type(self))[field.name], rule_of(field))
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Raises UserError for values that contradict each other; the message starts with the name of a field."""

    def replace(self: T, path: str = "", **changes: Any) -> T:
        """A copy with changed values; nested mappings change nested settings.

        Args:
          path: dotted key of these settings, for messages.

        Raises:
          UserError: see `parse`.
        """
        return overlay(self, changes, path)

    def to_dict(self) -> dict[str, Any]:
        """The settings as nested dictionaries of plain values."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


# Models that a server offers beside those of a run.
SERVED = {"base": "the base itself", "personal": "the soup of the person who asks"}


def check_names(key: str, names: typing.Iterable[str], taken: Mapping[str, str] = types.MappingProxyType({})) -> None:
    """Checks names that folders, metrics, tables of reports and served models are called by.

    Args:
      key: dotted key of the setting, or flag, that holds them, for messages.
      taken: names that mean something else, beside `SERVED` -> what they mean.

    Raises:
      UserError: a name that cannot name a folder or a served model, that is taken, or that looks like another one.
    """
    taken, alike = {**SERVED, **taken}, {}
    for name in names:
        if name in taken:
            raise UserError(f"{key}: {shown(name)} is the name of {taken[name]}; choose another one")
        odd = [c for c in name if c in "/\\=,:" or c.isspace() or not c.isprintable()]
        if odd or name.strip(".") == "" or len(name.encode("utf-8", "replace")) > 100:
            reason = f"holds {odd[0]!r}" if odd else "is empty, too long or dots alone"
            several = " (several are a tuple, as in \"('a', 'b')\")" if odd[:1] == [","] else ""
            raise UserError(
                f"{key}: {shown(name)} {reason}, so it cannot name a folder and a served model; choose another one"
                f"{several}"
            )
        # On some file systems these would be one folder.
        folded = unicodedata.normalize("NFKC", name).casefold()
        if folded in alike:
            how = "come twice" if alike[folded] == name else "look alike"
            raise UserError(
                f"{key}: {shown(name)} and {shown(alike[folded])} {how}; choose another name for one of them"
            )
        alike[folded] = name


def rule_of(field: dataclasses.Field) -> Rule:
    """The rule of a field; without bounds or choices where it has none."""
    return field.metadata.get("rule", Rule())


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def fields_of(cls: type, prefix: str = "") -> dict[str, tuple[Any, dataclasses.Field]]:
    """Dotted key -> (type, field) of all settings of a class and of its nested classes."""
    found = {}
    for field in dataclasses.fields(cls):
        hint, key = _hints(cls)[field.name], f"{prefix}{field.name}"
        nested = nested_class(hint)
        if nested:
            found |= fields_of(nested, f"{key}.")
        else:
            found[key] = (hint, field)
    return found


def nested_class(hint: object) -> type | None:
    """The `Settings` class in a type annotation, alone or in a union; None without one."""
    for option in _options(hint):
        if isinstance(option, type) and issubclass(option, Settings):
            return option
    return None


def _options(hint: object) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "nothing"}


_SEVERAL = {int: "a list of whole numbers", float: "a list of numbers", str: "a list of texts"}


def _name(hint: object) -> str:
    if typing.get_origin(hint) is tuple:
        return _SEVERAL.get(typing.get_args(hint)[0], "a list")
    return _NAMES.get(hint, "a section of settings")


def checked(name: str, value: object, hint: object, rule: Rule) -> Any:
    """`value` converted to the type of its field; UserError where type or rule do not hold."""
    options = _options(hint)
    is_open = any(typing.get_origin(option) in (dict, Mapping) for option in options)
    section = ", or give a section" if is_open else ""
    if is_open and isinstance(value, str) and value.lstrip().startswith("{"):
        value = _section_of(name, value)
    for option in options:
        matched, converted = _converted(value, option)
        if matched:
            if isinstance(converted, Mapping):
                converted = _open_section(name, converted)
            _check_rule(name, converted, rule, section)
            return _expanded(converted) if rule.path else converted
    if str in options and isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], str):
        return checked(name, value[0], hint, rule)  # what a flag gives where the default is a list
    if isinstance(value, str) and rule.allowed:
        _check_rule(name, value, rule, section)  # a message with the choices helps more than one with the type
    wanted = " or ".join(dict.fromkeys(_name(option) for option in options if option is not type(None)))
    raise UserError(f"{name}: {shown(value)} is not {wanted}{_hint_of(rule)}")


def _section_of(name: str, text: str) -> Any:
    """The section that a flag gives as text where the default is a name."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise UserError(
            f"{name}: {shown(text)} is no section; write such as {{'kind': NAME, 'path': 'FILE'}}"
        ) from None


def _expanded(value: Any) -> Any:
    """A path, or each path of a tuple, with ~ as the home folder."""
    if isinstance(value, tuple):
        return tuple(_expanded(one) for one in value)
    return expand(value) if isinstance(value, str) else value


def _converted(value: Any, hint: object) -> tuple[bool, Any]:
    """(whether `value` fits the type, the converted value)."""
    if hint is Any:
        return True, value
    if hint is type(None):
        return value is None, value
    if hint is bool:
        return isinstance(value, bool), value
    if hint is int:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return whole, int(value) if whole else value
    if hint is float:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return real and _fits_float(value), float(value) if real and _fits_float(value) else value
    if hint is str:
        return isinstance(value, str), value
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False, value
        inner = typing.get_args(hint)[0]
        parts = [next((c for ok, c in (_converted(x, o) for o in _options(inner)) if ok), _MISSING) for x in value]
        return _MISSING not in parts, tuple(parts)
    if origin in (dict, Mapping):
        if isinstance(value, ml_collections.ConfigDict):
            value = value.to_dict()
        return isinstance(value, Mapping), value
    if isinstance(hint, type) and issubclass(hint, Settings):
        return isinstance(value, hint), value
    raise TypeError(f"settings cannot be of type {hint}")


def _open_section(name: str, value: object) -> Any:
    """A section whose keys a config chooses, numbers as those of Python, or UserError where JSON cannot hold it."""
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise UserError(f"{name}: the key {shown(odd[0])} is not text; write it in quotes")
        for key in value:
            _check_text(name, key)
        return {key: _open_section(f"{name}.{key}", one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_open_section(name, one) for one in value)
    if isinstance(value, str):
        _check_text(name, value)
    if value is None or isinstance(value, str | bool | Settings):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise UserError(f"{name}: {shown(value)} is not text, a number, a list or a section of such; give one of these")


_MISSING = object()


def _fits_float(value: numbers.Real) -> bool:
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _check_rule(name: str, value: object, rule: Rule, section: str = "") -> None:
    """UserError where the rule does not hold; `section` is appended to the list of choices."""
    if isinstance(value, tuple):
        for one in value:
            _check_rule(name, one, rule, section)
        return
    if isinstance(value, str):
        _check_text(name, value)
    if rule.choices and isinstance(value, str) and value not in rule.allowed and not (rule.extensible and ":" in value):
        if RENAMED_VALUES.get(value) in rule.allowed:
            raise UserError(f"{name}: {shown(value)} is called {RENAMED_VALUES[value]!r} now; write that")
        near = difflib.get_close_matches(value, [c for c in rule.allowed if isinstance(c, str)], 1)
        raise UserError(
            f"{name}: {shown(value)} is unknown; "
            + (f"did you mean {near[0]!r}? The choices are " if near else "choose one of ")
            + f"{_listed(rule)}{section}"
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}: {value} is not finite{_hint_of(rule) or '; give a finite number'}")
        if not rule.holds(value):
            raise UserError(f"{name}: {shown(value)} is out of range; choose a number {rule.describe()}")


def _check_text(name: str, value: str) -> None:
    """UserError for text that is not UTF-8: no report and no checkpoint could be written with it."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{name}: {shown(value)} is not UTF-8; write it in UTF-8") from None


def _listed(rule: Rule) -> str:
    choices = ", ".join(str(choice) or repr("") for choice in rule.allowed)
    return f"{choices}, or package.module:name" if rule.extensible else choices


def _hint_of(rule: Rule) -> str:
    if rule.allowed:
        return f"; choose one of {_listed(rule)}"
    return f"; choose a number {rule.describe()}" if rule.describe() else ""


def shown(value: object) -> str:
    """A value in a message: one line, cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no whole number of thousands of digits
        text = f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: object) -> Any:
    if isinstance(value, Settings):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


# ---- configs


def to_config(settings: Settings) -> ml_collections.ConfigDict:
    """The settings as a mutable config, which flags can override."""
    config = ml_collections.ConfigDict()
    with config.ignore_type():
        for field in dataclasses.fields(settings):
            value, hint = getattr(settings, field.name), _hints(type(settings))[field.name]
            if isinstance(value, Settings):
                config[field.name] = to_config(value)
            elif isinstance(value, Mapping):
                config[field.name] = _open(value)
            elif value is None:
                kinds = [option for option in _options(hint) if option in (int, float, str, bool)]
                if kinds:
                    config[field.name] = config_dict.placeholder(kinds[0])
            else:
                config[field.name] = value
    return config


def _open(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A section with keys of the user's choice, which may contain dots."""
    config = ml_collections.ConfigDict()
    with config.ignore_type():
        for key, value in values.items():
            config[key] = _open(value) if isinstance(value, Mapping) else value
    return config


def fill(config: ml_collections.ConfigDict, settings: Settings) -> None:
    """Adds the keys that a config section omits, at every depth, with their values in `settings`."""
    for key, value in to_config(settings).items(preserve_field_references=True):
        if key not in config:
            config[key] = value
            continue
        section, defaults = config[key], getattr(settings, key)
        if isinstance(section, ml_collections.ConfigDict) and isinstance(defaults, Settings):
            fill(section, defaults)


def parse(cls: type[T], values: Any, path: str = "") -> T:
    """Settings from a config section; omitted keys keep their defaults.

    Args:
      values: a ConfigDict or a mapping.
      path: dotted key of the section, for messages.

    Raises:
      UserError: an unknown or renamed key, or a bad value; the message starts with its dotted key.
    """
    return overlay(cls(), values, path)


def overlay(settings: T, values: Any, path: str = "") -> T:
    """`settings` with the values of `values`; nested mappings change nested settings.

    Raises:
      UserError: see `parse`.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = dict(values.items(preserve_field_references=False))
    if not isinstance(values, Mapping):
        raise UserError(f"{path or 'config'}: {shown(values)} is not a section of settings; give keys and values")
    known = {field.name for field in dataclasses.fields(settings)}
    changes = {}
    for key, value in values.items():
        dotted = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise UnknownKey(dotted, known)
        current = getattr(settings, key)
        nested = nested_class(_hints(type(settings))[key])
        if nested and isinstance(value, Mapping | ml_collections.ConfigDict):
            value = overlay(current if isinstance(current, Settings) else nested(), value, dotted)
        elif isinstance(value, ml_collections.ConfigDict):
            value = value.to_dict()
        changes[key] = value
    try:
        return dataclasses.replace(settings, **changes)
    except UserError as error:
        raise (error.within(path) if path else error) from error.__cause__


def arguments(make: Callable[..., Any], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The settings `given` to a function, converted to the types of its parameters. A parameter without a type, or of
    one that settings do not have, takes anything.

    Args:
      path: dotted key of the section, for messages.

    Raises:
      UserError: a value of another type.
    """
    try:
        hints = typing.get_type_hints(make)
    except Exception:  # the annotations of other people's code may be anything
        hints = {}

    def converted(key: str, value: Any) -> Any:
        try:
            return checked(f"{path}.{key}", value, hints.get(key, Any), Rule())
        except TypeError:
            return value

    return {key: converted(key, value) for key, value in given.items()}


def check_arguments(make: Callable[..., Any], name: str, *given: Any, **settings: Any) -> None:
    """Raises UserError, which begins with `name`, where the function cannot be called with `given` and `settings`."""
    try:
        inspect.signature(make).bind(*given, **settings)
    except TypeError as error:
        raise UserError(f"{name} does not take these settings ({error}); correct them") from error


def made_by(make: Callable[..., Any], name: str, what: str, *given: Any, **settings: Any) -> Any:
    """What a maker, which may be other people's code, makes of `given` and `settings`: something that can be called.

    Args:
      name: begins messages.
      what: it must make, such as "a function".

    Raises:
      UserError: see `check_arguments`; the maker raises, or makes something that cannot be called.
    """
    check_arguments(make, name, *given, **settings)
    try:
        found = make(*given, **settings)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        reason = described(error)
        raise UserError(f"{name} raised {reason} when it was made; correct it, it must make {what}") from error
    if not callable(found):
        if inspect.iscoroutine(found):
            found.close()  # nobody will await it
        raise UserError(f"{name} made a {type(found).__name__}; it must make {what}")
    return found


def is_open(cls: type, key: str) -> bool:
    """Whether the dotted `key` of a class is in a section whose keys a config chooses, or is such a section."""
    for part in key.split("."):
        hint = _hints(cls).get(part)
        nested = nested_class(hint)
        if nested is None:
            return any(typing.get_origin(option) in (dict, Mapping) for option in _options(hint))
        cls = nested
    return False


class UnknownKey(UserError):
    """A key that is not known: its message says its new name, a key `elsewhere`, or the nearest of the `known` ones,
    each with its section.

    Args:
      dotted: the key.
      elsewhere: dotted keys of the same name in other sections.
    """

    def __init__(self, dotted: str, known: typing.Iterable[str], elsewhere: typing.Iterable[str] = ()):
        self.dotted, self.known, self.elsewhere = dotted, sorted(known), sorted(elsewhere)
        super().__init__(self._message())

    def within(self, path: str) -> "UserError":
        return UnknownKey(f"{path}.{self.dotted}", self.known, self.elsewhere)

    def _message(self) -> str:
        section, dot, key = self.dotted.rpartition(".")
        new = RENAMED.get(f"{section.rpartition('.')[2]}.{key}", RENAMED.get(key))
        if new in self.known:
            return f"{self.dotted}: is called {section}{dot}{new} now; rename it"
        near = [f"{section}{dot}{name}" for name in difflib.get_close_matches(key, self.known, 1)]
        found = " or ".join(self.elsewhere or near)
        hint = f"did you mean {found}?" if found else f"known keys: {', '.join(self.known)}"
        return f"{self.dotted}: no such setting; {hint}"
