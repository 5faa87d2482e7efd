"""Rewards by comparison: how far an answer is better than a baseline's answer to the same prompt."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pjrlhf.data.messages import Prompt, text_of
from pjrlhf.errors import UserError
from pjrlhf.judges.judge import both_orders, in_orders, of_both
from pjrlhf.judges.language_model import LanguageModelJudge, Planned
from pjrlhf.rewards.sources import RecordColumns, check_column, column_text, is_turns
from pjrlhf.settings import shown

SCORES = ("probability", "outcome")


class Baseline(Protocol):
    """Gives the answers that others are compared with. One that runs on the mesh of the run, which all processes must
    enter together, says so with `on_all_processes = True`.
    """

    def __call__(self, prompts: Sequence[Prompt], columns: Mapping[str, Sequence[Any]]) -> Sequence[str | None]:
        """One answer to each of N prompts, None where there is none; `columns` have N values each."""
        ...

    def check_columns(self, columns: Collection[str]) -> None:
        """Raises UserError where the baseline needs another column than these of the records."""
        ...


class ColumnBaseline:
    """The text in a column of the records.

    Args:
      name: of the setting, for messages.
      column: name of the column.
    """

    on_all_processes = False

    def __init__(self, name: str, column: str):
        self.name, self.column = name, column

    def __call__(self, prompts: Sequence[Prompt], columns: Mapping[str, Sequence[Any]]) -> list[str | None]:
        found = columns.get(self.column, [None] * len(prompts))
        return [None if value is None else text_of(value) if is_turns(value) else column_text(value) for value in found]

    def check_columns(self, columns: Collection[str]) -> None:
        check_column(self.name, self.column, columns)


class SampledBaseline:
    """An answer of the base of the run to the plain prompt.

    Args:
      sample: prompts -> the answers, the same whenever it is asked.
    """

    on_all_processes = True

    def __init__(self, sample: Callable[[Sequence[Prompt]], Sequence[str]]):
        self.sample = sample

    def __call__(self, prompts: Sequence[Prompt], columns: Mapping[str, Sequence[Any]]) -> Sequence[str]:
        return self.sample(prompts)

    def check_columns(self, columns: Collection[str]) -> None:
        """Needs none."""


class ComparisonReward:
    """A reward function: what a judge says of an answer against that of a baseline, in both orders. A tie is 1/2, also
    of equal answers, about which nobody is asked. None where there is no baseline, or no verdict of both orders.

    Args:
      judge: of the criterion that has the name of the objective.
      score: "probability" that the answer is better, (1 + verdict) / 2; or "outcome": 1 for a win, 1/2 for a tie, 0 for
        a loss.

    Attributes:
      asked: answers so far.
      failures: of these the ones without a reward.
    """

    waits = True

    def __init__(self, judge: LanguageModelJudge, objective: str, baseline: Baseline, score: str):
        if score not in SCORES:
            raise UserError(f"rewards.{objective}.score: {shown(score)} is unknown; choose one of {', '.join(SCORES)}")
        self.judge, self.objective, self.baseline, self.score = judge, objective, baseline, score
        self.asked = self.failures = 0

    @property
    def on_all_processes(self) -> bool:
        return getattr(self.baseline, "on_all_processes", False) or self.judge.on_all_processes

    def check_columns(self, columns: Collection[str]) -> None:
        """Raises UserError where baseline or judge need another column than these of the records."""
        self.baseline.check_columns(columns)
        self.judge.check_columns(columns)

    def planned_requests(self, answers: int) -> Planned:
        """What is sent at most about so many answers."""
        return self.judge.planned_requests(answers)

    def __call__(self, prompts: list[Prompt], completions: list[str], **columns: Sequence[Any]) -> list[float | None]:
        others = self.baseline(prompts, columns)
        against = {i: other for i, other in enumerate(others) if other is not None}
        known = list(against)
        asked, own = [prompts[i] for i in known], [completions[i] for i in known]
        records = RecordColumns({name: [values[i] for i in known] for name, values in columns.items()})
        judge, both = self.judge.within(records), both_orders if self.on_all_processes else _here
        verdicts = np.full(len(prompts), math.nan)
        verdicts[known] = both(judge, asked, own, list(against.values()), self.objective)[0] if known else ()
        if self.score == "outcome":
            verdicts = np.sign(verdicts)
        self.asked += len(verdicts)
        self.failures += int(np.isnan(verdicts).sum())
        return [None if math.isnan(verdict) else (1 + verdict) / 2 for verdict in verdicts.tolist()]


def _here(judge: Any, prompts: Any, a: Any, b: Any, criterion: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`both_orders` on this process alone."""
    return of_both(judge, *in_orders(judge, prompts, a, b, criterion))
