"""Reward sources: what scores answers for an objective.

`--config.rewards` gives an objective its source; the others have a reward model that this program trains, an adapter
with a head. Sources run on the host, on text.
"""

import collections
import copy
import dataclasses
import inspect
import json
import math
import pathlib
from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
from absl import logging
from jaxtyping import Float

from pjrlhf.data.messages import Prompt, dialogue
from pjrlhf.data.records import as_json
from pjrlhf.errors import UserError, described
from pjrlhf.registry import Registry, callable_as, load
from pjrlhf.rewards.calls import GIVEN, call, listed, missing_parameter, number
from pjrlhf.rewards.scorers import scorer as named_scorer
from pjrlhf.settings import arguments, made_by, shown
from pjrlhf.types import Json

ADAPTER = "adapter"  # the reward models of the stage reward

Rewards: TypeAlias = Sequence[float | None]


class RewardFunction(Protocol):
    """Any function of lists, also an asynchronous one, such as the `reward_funcs` of other libraries.

    A parameter with the name of a column of the records gets the values of that column; `**columns` gets all of them.

    Process 0 alone asks it. One that runs a program on the mesh of the run, which all processes must enter together,
    says so with an attribute `on_all_processes = True`.
    """

    def __call__(self, prompts: list[Prompt], completions: list[str]) -> Rewards | Awaitable[Rewards]:
        """The rewards of N completions; None where the source says nothing about a completion.

        A prompt is a text where its record has a text, and a list of messages where its record has messages.
        """
        ...


@dataclasses.dataclass(frozen=True)
class SourceContext:
    """What a run offers to the makers of reward sources and judges.

    Attributes:
      devices: gives the mesh of the run and the programs on it, see `runtime.devices.Devices`. None while a config is
        only checked: a source is made then, but never asked.
      rows: answers that are scored at once, `sample_rows` of the run.
      folder: where a source may keep files, the run directory.
      base_answers: (N requests, "greedy" or "sampled") -> one answer of the base to each, the same whenever it is
        asked; all processes must call it. None while a config is only checked.
      shared: what sources of the same model have in common, by a key of its maker. What has a method `close` is closed
        when the run ends.
    """

    devices: Callable[[], Any] | None = None
    rows: int = 32
    folder: pathlib.Path = pathlib.Path()
    base_answers: Callable[[Sequence[Prompt], str], list[str]] | None = None
    shared: MutableMapping[Hashable, Any] = dataclasses.field(default_factory=dict)

    def nested(self) -> "SourceContext":
        """A context that takes models from this one where it has them, and closes no others than its own."""
        return dataclasses.replace(self, shared=collections.ChainMap({}, self.shared))

    def close(self) -> None:
        """Ends what sources hold outside this process, and lets go of their models."""
        own = self.shared.maps[0] if isinstance(self.shared, collections.ChainMap) else self.shared
        for held in own.values():
            if hasattr(held, "close"):
                held.close()
        own.clear()


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
    if inspect.isclass(found):
        raise UserError(
            f"reward function {function!r}: is a class; name an object of it that can be called, or a function"
        )
    if not callable(found):
        raise UserError(f"reward function {function!r}: is not a function of prompts and completions")
    return cast(RewardFunction, found)


@SOURCES.register("scorer")
def by_scorer(scorer: str) -> RewardFunction:
    """A scorer of single answers, see `rewards.scorers`."""
    score = named_scorer(scorer)
    return lambda prompts, completions: [score(p, c) for p, c in zip(prompts, completions, strict=True)]


@dataclasses.dataclass(frozen=True)
class RecordColumns:
    """What the records of N prompts have beside the prompt.

    Attributes:
      columns: name of a column -> its N values, None where a record does not have it.
      where: places of the N records, such as "prompts.jsonl line 17".
    """

    columns: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    where: Sequence[str] = ()

    def select(self, rows: Sequence[int]) -> "RecordColumns":
        """Those of the prompts numbered `rows`."""
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return RecordColumns(columns, [self.where[i] for i in rows] if self.where else ())


NO_COLUMNS = RecordColumns()


def listed_columns(columns: Collection[str]) -> str:
    """The columns of the records in a message."""
    return f"the columns {', '.join(sorted(columns))}" if columns else "no columns"


def is_turns(value: Any) -> bool:
    """Whether the value of a column is a conversation."""
    return isinstance(value, list) and bool(value) and all(isinstance(x, Mapping) and "role" in x for x in value)


def column_text(value: Any) -> str:
    """The value of a column in a prompt: text as it is, a conversation as a dialogue, all else as JSON."""
    if isinstance(value, str):
        return value
    return dialogue(value) if is_turns(value) else json.dumps(as_json(value), ensure_ascii=False)


def check_column(name: str, column: str, columns: Collection[str]) -> None:
    """Raises UserError where a column that the setting `name` names is none of the `columns` of the records."""
    if column not in columns:
        raise UserError(
            f"{name}: {column!r} is no column, and the records of data.prompts have {listed_columns(columns)} beside "
            "the prompt; name one of these, or add it to the data"
        )


class NoReply(UserError):
    """A server gave no reply after all tries. Another request may get one."""


class Unanswered(UserError):
    """A source gave no reward for some answers after all its tries.

    Attributes:
      rewards: of all N answers, None where there is none.
      failed: numbers of the answers that it failed on.
    """

    def __init__(self, message: str, rewards: Sequence[float | None], failed: Sequence[int]):
        super().__init__(message)
        self.rewards, self.failed = rewards, failed


class SourceFailed(UserError):
    """A source failed, and the run stops.

    Attributes:
      batch: what the source was asked, one JSON object per answer.
    """

    def __init__(self, message: str, batch: Sequence[Json]):
        super().__init__(message)
        self.batch = batch


@dataclasses.dataclass(frozen=True)
class _Batch:
    """N answers to score."""

    prompts: list[Prompt]
    completions: list[str]
    records: RecordColumns

    def __len__(self) -> int:
        return len(self.completions)

    def select(self, rows: Sequence[int]) -> "_Batch":
        return _Batch([self.prompts[i] for i in rows], [self.completions[i] for i in rows], self.records.select(rows))

    def named(self, i: int) -> str:
        """Answer `i` in a message."""
        place = f" ({self.records.where[i]})" if self.records.where and self.records.where[i] else ""
        return f"{_cut(self.completions[i])} to {_cut(self.prompts[i])}{place}"

    def lines(self, name: str) -> list[Json]:
        """The answers as JSON objects."""
        found: list[Json] = []
        for i, (prompt, completion) in enumerate(zip(self.prompts, self.completions, strict=True)):
            one = self.records.select([i])
            columns = as_json({column: value for column, (value,) in one.columns.items()})
            line = {"reward": name, "prompt": prompt, "completion": completion, "columns": columns}
            found.append(line | ({"record": one.where[0]} if one.where else {}))
        return found


def _cut(text: Prompt) -> str:
    return repr(dialogue(text)[:60])


@dataclasses.dataclass(frozen=True)
class RewardSource:
    """The source of one objective's rewards.

    Attributes:
      name: the objective.
      function: scores lists of answers.
      missing: the largest fraction of the answers of a call for which it may fail; these then have no reward.
    """

    name: str
    function: RewardFunction
    missing: float = 0.0

    @property
    def on_all_processes(self) -> bool:
        """Whether every process asks the source, and not process 0 alone."""
        return getattr(self.function, "on_all_processes", False)

    @property
    def waits(self) -> bool:
        """Whether the source spends its time waiting for others, so that it is asked beside other sources: asynchronous
        functions, and those with an attribute `waits = True`, such as servers.
        """
        call = getattr(self.function, "__call__", None)  # noqa: B004 - of an object with an asynchronous one
        found = inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(call)
        return found or getattr(self.function, "waits", False)

    def check_columns(self, columns: Collection[str]) -> None:
        """Raises UserError where the function needs a parameter that is none of the `columns` of the records, or where
        its own method `check_columns` does.
        """
        name = missing_parameter(self.function, {*GIVEN, *columns})
        if name is not None:
            raise UserError(
                f"rewards.{self.name}: its function takes {name!r}, and the records of data.prompts have "
                f"{listed_columns(columns)} beside prompts and completions; rename the parameter or the column, or "
                "give it a default"
            )
        check = getattr(self.function, "check_columns", None)
        if check is not None:
            check(columns)

    def planned_requests(self, answers: int) -> list[tuple[Any, int]]:
        """What its function, where that has a method of this name, sends at most about so many answers; see
        `judges.language_model.announce`.
        """
        planned = getattr(self.function, "planned_requests", None)
        return planned(answers) if planned is not None else []

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], records: RecordColumns = NO_COLUMNS
    ) -> Float[np.ndarray, " N"]:
        """Rewards float32 [N]; NaN where the source says nothing, and where it fails within `missing`.

        Args:
          records: what the function may take beside prompts and completions, by the names of its parameters; all of it
            where it takes any.

        Raises:
          SourceFailed: the function raises, or returns other than N finite numbers or None.
        """
        batch = _Batch(list(prompts), list(completions), records)
        try:
            return self._rewards(batch)
        except UserError as error:
            raise SourceFailed(str(error), batch.lines(self.name)) from error

    def _rewards(self, batch: _Batch) -> Float[np.ndarray, " N"]:
        failures: dict[int, str] = {}  # number of an answer -> what its source did
        try:
            values = self._values(batch)
        except Unanswered as error:
            values, failures = list(error.rewards), dict.fromkeys(error.failed, str(error))
        except (Exception, SystemExit) as error:  # the function is other people's code
            _refuse(error)
            if isinstance(error, NoReply) and not self._limit(len(batch)):
                raise
            values, failures = self._around(batch, error)
        found = np.full(len(batch), np.nan, np.float32)
        for i, value in enumerate(values):
            if i in failures or value is None:
                continue
            with np.errstate(over="ignore"):  # beyond float32
                found[i] = number(value)
            if not math.isfinite(found[i]):
                failures[i] = (
                    f"reward {self.name!r}: its source returned {shown(value)} for the answer "
                    f"{_cut(batch.completions[i])}; return a finite number, or None to say nothing"
                )
                found[i] = np.nan
        if failures:
            self._tolerate(failures, len(batch))
        return found

    def _limit(self, count: int) -> int:
        """Of how many of `count` answers the source may fail."""
        return math.floor(self.missing * count + 1e-9)

    def _tolerate(self, failures: Mapping[int, str], count: int) -> None:
        """Logs failures that count as no reward, or raises UserError for too many."""
        first = failures[min(failures)]
        if len(failures) <= self._limit(count):
            logging.warning("%s; no reward for %d of %d answers", first, len(failures), count)
            return
        more = f"; it failed for more than rewards.{self.name}.missing={self.missing:g} of {count} answers"
        raise UserError(first + (more if self.missing else ""))

    def _around(self, batch: _Batch, error: Exception | SystemExit) -> tuple[list[Any], dict[int, str]]:
        """(rewards, failures) of a batch for which the function raised `error`: it is asked for each answer by itself,
        until more fail than may, and then for the others together.
        """
        count, failures = len(batch), {}
        for i in range(count):
            try:
                self._call(batch.select([i]))
            except (Exception, SystemExit) as one:
                _refuse(one)
                failures[i] = self._raised(one, f" for the answer {batch.named(i)}")
                if len(failures) > self._limit(count):
                    return [None] * count, failures
        values: list[Any] = [None] * count
        rest = [i for i in range(count) if i not in failures]
        try:
            if not failures:
                raise error
            for i, value in zip(rest, self._values(batch.select(rest)) if rest else (), strict=True):
                values[i] = value
        except (Exception, SystemExit) as one:  # for no answer by itself
            _refuse(one)
            failures |= dict.fromkeys(rest, self._raised(one, ""))
        return values, failures

    def _raised(self, error: Exception | SystemExit, where: str) -> str:
        if isinstance(error, NoReply):
            return str(error)
        reason = described(error)
        return f"reward {self.name!r}: its source raised {reason}{where}; correct the source"

    def _values(self, batch: _Batch) -> list[Any]:
        """What the function returns for N answers, N values; UserError where it is something else."""
        found = self._call(batch)
        values = listed(found, len(batch))
        if values is None or len(values) != len(batch):
            count = len(found) if hasattr(found, "__len__") and values else len(values or ())
            size = type(found).__name__ if values is None else f"{count} values"
            raise UserError(
                f"reward {self.name!r}: its source returned {size} for {len(batch)} completions; return a list with "
                "one number or None for each"
            )
        return values

    def _call(self, batch: _Batch) -> Any:
        # The function is other people's code, which may change what it gets.
        batch = copy.deepcopy(batch)
        given = {**batch.records.columns, "prompts": batch.prompts, "completions": batch.completions}
        return call(self.function, given)


def _refuse(error: Exception | SystemExit) -> None:
    """Raises errors that no other answer would avoid, such as a wrong setting or the end of a budget."""
    if isinstance(error, UserError) and not isinstance(error, NoReply):
        raise error


def reward_source(name: str, spec: str | Mapping[str, Any], context: SourceContext = NO_RUN) -> RewardSource | None:
    """The source that a config names; None for a reward model that is trained here.

    Args:
      name: the objective.
      spec: "adapter", a function as "package.module:name" or "path/to/file.py:name", or {"kind": ...} with a name in
        `SOURCES` or a maker of your own as "package.module:name", its settings, and `missing`, see `RewardSource`.
      context: of the run; by default that of a check without a run.

    Raises:
      UserError: no such source, or settings that it does not take.
    """
    if isinstance(spec, str):
        spec = {"kind": ADAPTER} if spec == ADAPTER else {"kind": "function", "function": spec}
    if not isinstance(spec, Mapping):
        raise UserError(f'rewards.{name}: {shown(spec)} is no source; name a function, or give {{"kind": ...}}')
    settings = dict(spec)
    kind = settings.pop("kind", None)
    if kind == ADAPTER:
        if settings:
            raise UserError(
                f"rewards.{name}.{min(settings)}: kind 'adapter' has no settings, it is the reward model of the stage "
                "reward; leave it out, and set those of reward"
            )
        return None
    if not isinstance(kind, str) or (kind not in SOURCES and ":" not in kind):
        known = ", ".join((ADAPTER, *SOURCES))
        raise UserError(
            f"rewards.{name}: kind {kind!r} is unknown; choose one of {known}, or name a maker of your own as "
            "package.module:name"
        )
    make = SOURCES.get(kind)
    missing = settings.pop("missing", 0.0)
    if isinstance(missing, bool) or not isinstance(missing, int | float) or not 0 <= missing <= 1:
        raise UserError(f"rewards.{name}.missing: {shown(missing)} is not a fraction; choose a number from 0 to 1")
    settings = arguments(make, settings, f"rewards.{name}")
    given = {"objective": name, "context": context}
    settings |= {key: value for key, value in given.items() if key in inspect.signature(make).parameters}
    function = made_by(make, f"rewards.{name}: kind {kind!r}", "a function", **settings)
    return RewardSource(name, function, float(missing))
