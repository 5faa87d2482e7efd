"""Reward sources: what scores answers for an objective.

`--config.rewards` gives an objective its source; the others have a reward model that this program trains, an adapter
with a head. Sources run on the host, on text.
"""

import asyncio
import dataclasses
import inspect
import math
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
from jaxtyping import Float

from pjrlhf.errors import UserError
from pjrlhf.registry import Registry, callable_as, load
from pjrlhf.rewards.scorers import scorer as named_scorer

ADAPTER = "adapter"  # the reward models of the stage reward

Rewards: TypeAlias = Sequence[float | None]


class RewardFunction(Protocol):
    """Any function of lists, also an asynchronous one, such as the `reward_funcs` of other libraries.

    Process 0 alone asks it. One that runs a program on the mesh of the run, which all processes must enter together,
    says so with an attribute `on_all_processes = True`.
    """

    def __call__(self, prompts: list[str], completions: list[str]) -> Rewards | Awaitable[Rewards]:
        """The rewards of N completions; None where the source says nothing about a completion."""
        ...


@dataclasses.dataclass(frozen=True)
class SourceContext:
    """What a run offers to the makers of reward sources and judges.

    Attributes:
      devices: gives the mesh of the run and the programs on it, see `runtime.devices.Devices`. None while a config is
        only checked: a source is made then, but never asked.
      rows: answers that are scored at once, `sample_rows` of the run.
      shared: what sources of the same model have in common, by a key of its maker. What has a method `close` is closed
        when the run ends.
    """

    devices: Callable[[], Any] | None = None
    rows: int = 32
    shared: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    def close(self) -> None:
        """Ends what sources hold outside this process."""
        for held in self.shared.values():
            if hasattr(held, "close"):
                held.close()
        self.shared.clear()


NO_RUN = SourceContext()  # of a check

# Each makes a reward function from the settings in its specification; from the name of the objective where it has a
# parameter `objective`, and from a `SourceContext` where it has a parameter `context`.
SOURCES: Registry[Callable[..., RewardFunction]] = Registry(
    "reward source", callable_as("a function that returns a reward function")
)


@SOURCES.register("function")
def by_function(function: str) -> RewardFunction:
    """The function "package.module:name" or "path/to/file.py:name"."""
    found = load(function, "reward function")
    if not callable(found):
        raise UserError(f"reward function {function!r}: is not a function of prompts and completions")
    return cast(RewardFunction, found)


@SOURCES.register("scorer")
def by_scorer(scorer: str) -> RewardFunction:
    """A scorer of single answers, see `rewards.scorers`."""
    score = named_scorer(scorer)
    return lambda prompts, completions: [score(p, c) for p, c in zip(prompts, completions, strict=True)]


@dataclasses.dataclass(frozen=True)
class RewardSource:
    """The source of one objective's rewards.

    Attributes:
      name: the objective.
      function: scores lists of answers.
    """

    name: str
    function: RewardFunction

    @property
    def on_all_processes(self) -> bool:
        """Whether every process asks the source, and not process 0 alone."""
        return getattr(self.function, "on_all_processes", False)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Float[np.ndarray, " N"]:
        """Rewards float32 [N]; NaN where the source says nothing.

        Raises:
          UserError: the function raises, or returns other than N finite numbers or None.
        """
        asked, answers = list(prompts), list(completions)
        try:
            found = self._call(asked, answers)
        except UserError:
            raise
        except Exception as error:  # the function is other people's code
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            where = self._failing(asked, answers)
            raise UserError(f"reward {self.name!r}: its source raised {reason}{where}; correct the source") from error
        values = list(found) if isinstance(found, Sequence | np.ndarray) else None
        if values is None or len(values) != len(answers):
            size = type(found).__name__ if values is None else f"{len(values)} values"
            raise UserError(
                f"reward {self.name!r}: its source returned {size} for {len(answers)} completions; return a list with "
                "one number or None for each"
            )
        return np.array([self._checked(value, answers[i]) for i, value in enumerate(values)], np.float32)

    def _call(self, prompts: list[str], completions: list[str]) -> Any:
        async def result() -> Any:
            return await cast(Awaitable[Any], found)

        found = self.function(prompts=prompts, completions=completions)
        if not inspect.isawaitable(found):
            return found
        # In a thread, because a notebook has an event loop of its own.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, result()).result()

    def _failing(self, prompts: list[str], completions: list[str]) -> str:
        """Which answer the function fails on by itself."""
        for prompt, completion in zip(prompts, completions, strict=True):
            try:
                self._call([prompt], [completion])
            except Exception:
                return f" for the answer {completion[:60]!r} to {prompt[:60]!r}"
        return ""

    def _checked(self, value: Any, completion: str) -> float:
        if value is None:
            return math.nan
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"reward {self.name!r}: its source returned {value!r} for the answer {completion[:60]!r}; return a "
                "finite number, or None to say nothing"
            )
        return number


def reward_source(name: str, spec: str | Mapping[str, Any], context: SourceContext = NO_RUN) -> RewardSource | None:
    """The source that a config names; None for a reward model that is trained here.

    Args:
      name: the objective.
      spec: "adapter", a function as "package.module:name" or "path/to/file.py:name", or {"kind": ...} with a name in
        `SOURCES` or a maker of your own as "package.module:name", and its settings.
      context: of the run; by default that of a check without a run.

    Raises:
      UserError: no such source, or settings that it does not take.
    """
    if isinstance(spec, str):
        spec = {"kind": ADAPTER} if spec == ADAPTER else {"kind": "function", "function": spec}
    settings = dict(spec)
    kind = settings.pop("kind", None)
    if kind == ADAPTER and not settings:
        return None
    if not isinstance(kind, str) or (kind not in SOURCES and ":" not in kind):
        known = ", ".join((ADAPTER, *SOURCES))
        raise UserError(
            f"rewards.{name}: kind {kind!r} is unknown; choose one of {known}, or name a maker of your own as "
            "package.module:name"
        )
    make = SOURCES.get(kind)
    given = {"objective": name, "context": context}
    settings |= {key: value for key, value in given.items() if key in inspect.signature(make).parameters}
    try:
        inspect.signature(make).bind(**settings)
    except TypeError as error:
        raise UserError(
            f"rewards.{name}: kind {kind!r} does not take these settings ({error}); correct them"
        ) from error
    function = make(**settings)
    if not callable(function):
        raise UserError(f"rewards.{name}: kind {kind!r} made a {type(function).__name__}; it must make a function")
    return RewardSource(name, function)
