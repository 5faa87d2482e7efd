"""How functions of other people are called, with lists and with columns of the records, and what they may return."""

import asyncio
import inspect
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

GIVEN = ("prompts", "completions")  # what every reward function may take
ONE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a function; None where Python does not know them."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def missing_parameter(function: Callable[..., Any], known: Collection[str]) -> str | None:
    """A parameter without default that `call` cannot fill from values with the names `known`, if there is one."""
    for name, parameter in (parameters_of(function) or {}).items():
        if parameter.kind in ONE and parameter.default is parameter.empty and name not in known:
            return name
    return None


def call(function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """What a function, also an asynchronous one, returns for `values` by the names of its parameters.

    `**columns` gets all values without a parameter of their own. `*args` without `**columns`, and a function whose
    parameters Python does not know, get prompts and completions, in this order.

    Raises:
      TypeError: see `missing_parameter`.
    """
    positional, named = _arguments(function, values)
    return awaited(function(*positional, **named))


def _arguments(function: Callable[..., Any], values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """(positional arguments, arguments by name)."""
    parameters = parameters_of(function)
    if parameters is None:
        return [values[name] for name in GIVEN], {}
    kinds = {parameter.kind for parameter in parameters.values()}
    own = {name for name, parameter in parameters.items() if parameter.kind in ONE}
    rest = inspect.Parameter.VAR_POSITIONAL in kinds and inspect.Parameter.VAR_KEYWORD not in kinds
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for name, parameter in parameters.items():
        in_order = parameter.kind is parameter.POSITIONAL_ONLY or (
            rest and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        )
        if parameter.kind is parameter.VAR_POSITIONAL and rest:
            positional += [values[one] for one in GIVEN if one not in own]
        elif parameter.kind is parameter.VAR_KEYWORD:
            named |= {key: value for key, value in values.items() if key not in own}
        elif in_order:
            if name not in values and parameter.default is parameter.empty:
                raise TypeError(f"missing a required argument: {name!r}")
            positional.append(values.get(name, parameter.default))
        elif parameter.kind in ONE and name in values:
            named[name] = values[name]
    return positional, named


def awaited(found: Any) -> Any:
    """What an awaitable gives, the values of an asynchronous generator as a list, and anything else as it is."""

    async def result() -> Any:
        return [value async for value in found] if inspect.isasyncgen(found) else await found

    if not inspect.isawaitable(found) and not inspect.isasyncgen(found):
        return found
    # In a thread, because a notebook has an event loop of its own.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, result()).result()


def listed(found: Any, count: int) -> list[Any] | None:
    """The values of anything that is gone through in order, such as a list, an array or a generator, of which `count`
    are expected and at most one more is taken; None for anything else.
    """
    if isinstance(found, str | bytes | bytearray | Mapping | Set) or not isinstance(found, Iterable):
        return None
    try:
        values = iter(found)
    except TypeError:  # an array without dimensions
        return None
    return list(itertools.islice(values, count + 1))


def number(value: Any) -> float:
    """A value as a number, NaN where it is none."""
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)
    except Exception:  # the conversion of other people's objects, and of whole numbers beyond floats
        return math.nan
