"""A language model that takes the place of each person and compares a model's answers to them with those of the base
(P-RLHF on PRISM, arXiv 2402.05133).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pjrlhf.data.messages import Prompt
from pjrlhf.data.schema import Example, other_columns
from pjrlhf.errors import UserError
from pjrlhf.evaluation.users import rate_of_people
from pjrlhf.evaluation.winrate import win_rate
from pjrlhf.judges.judge import BothOrders, JudgeContext, ScoreJudge, judge_from, judge_name
from pjrlhf.judges.language_model import LanguageModelJudge, announce, describe, is_number
from pjrlhf.rewards.sources import column_text
from pjrlhf.runtime.run import Run
from pjrlhf.settings import Settings, setting, shown

PROMPT = "role_play"
UNNAMED = ("user_text",)  # columns whose text says of itself what it is


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersonColumns(Settings):
    """The columns of the comparisons from which a judge learns who a person is."""

    about: tuple[str, ...] = setting(("user_text",), "what the person says of themselves, and demographics")
    stated: tuple[str, ...] = setting(
        (),
        "stated preferences, of which the three largest count: columns of numbers, or one with {preference: number}",
    )
    said: tuple[str, ...] = setting((), "what the person said before: texts, or lists of texts")


def check_role_play(spec: str | Mapping[str, Any]) -> None:
    """Raises UserError for a judge that cannot take the place of people."""
    _judge(spec, lambda full: judge_from(full, JudgeContext(ScoreJudge(lambda *_: 0.0))))


def _judge(spec: str | Mapping[str, Any], make: Any) -> LanguageModelJudge:
    """The judge of a specification, to which each comparison gives its person."""
    settings = {"kind": spec} if isinstance(spec, str) else dict(spec)
    if "person" in settings:
        raise UserError("judge.person: is that of each comparison; leave it out, and set person_columns")
    if settings.get("kind") not in ("chat", "model"):
        raise UserError(
            f"judge.kind: {shown(settings.get('kind'))} cannot take the place of a person; choose chat or model, a "
            "language model"
        )
    judge = make({"prompt": PROMPT, **settings, "person": "that of each comparison"})
    assert isinstance(judge, LanguageModelJudge), settings["kind"]
    return judge


def descriptions(examples: Sequence[Example], columns: PersonColumns) -> dict[str, str]:
    """User -> description, of those whose records have one; of several records of a user the first with a value counts,
    column by column.

    Raises:
      UserError: no record has one of the columns, or a stated preference is no number. `user_text` may be missing
        where another column describes people.
    """
    names = (*columns.about, *columns.stated, *columns.said)
    known: dict[str, dict[str, Any]] = {}
    for example in examples:
        values, own = other_columns(example), known.setdefault(str(example.user_id), {})
        own |= {name: values[name] for name in names if name not in own and values.get(name) not in (None, "")}
    missing = [name for name in names if not any(name in own for own in known.values())]
    if not any(known.values()) or set(missing) - set(UNNAMED):
        raise UserError(
            f"evaluate_users.person_columns: no record has {', '.join(missing) or 'any column'}, so people cannot be "
            "described to the judge; name columns that the comparisons have"
        )
    return {user: text for user, own in known.items() if (text := _description(own, columns))}


def _description(own: Mapping[str, Any], columns: PersonColumns) -> str:
    about = [
        column_text(own[name]) if name in UNNAMED else f"{name}: {column_text(own[name])}"
        for name in columns.about
        if name in own
    ]
    stated: dict[str, Any] = {}
    for name in columns.stated:
        value = own.get(name)
        # A survey may hold a remark beside the numbers.
        given = value if isinstance(value, Mapping) else {name: value} if value is not None else {}
        stated |= {key: x for key, x in given.items() if not isinstance(value, Mapping) or is_number(x)}
    said = [one for name in columns.said if name in own for one in _texts(own[name])]
    return describe({"about": "\n".join(about), "stated": stated, "said": said})


def _texts(value: Any) -> list[str]:
    return [column_text(one) for one in value] if isinstance(value, list) else [column_text(value)]


class RolePlay:
    """Judges answers in the place of the people that they are for.

    Args:
      spec: of the judge, see `check_role_play`.
      people: user -> description.
      resamples: of the bootstrap.
    """

    def __init__(self, run: Run, spec: str | Mapping[str, Any], people: Mapping[str, str], resamples: int):
        self.name, self.people = judge_name(spec), people
        self.options: dict[str, Any] = {"resamples": resamples, "seed": run.streams.seed}
        self.role = _judge(spec, lambda full: run.judge(full).judge)
        self.judge = BothOrders(self.role)

    def announce(self, name: str, comparisons: int) -> None:
        """Logs how many requests the judge sends at most about so many comparisons."""
        announce(name, self.judge.planned_requests(comparisons))

    def __call__(
        self, users: Sequence[str], prompts: Sequence[Prompt], own: Sequence[str], base: Sequence[str]
    ) -> dict[str, Any]:
        """How often people prefer their own answers to those of the base, N answers in all.

        Returns:
          the fields of `winrate.Rate`, whose interval is over people; `people`, how many were judged for; and
          `person_mean`, the mean over people of the fraction won by each, ties as half, with its interval.
        """
        rows = [i for i, user in enumerate(users) if user in self.people]
        who = np.array([users[i] for i in rows])
        self.role.people = [self.people[user] for user in who]
        asked, first, second = [prompts[i] for i in rows], [own[i] for i in rows], [base[i] for i in rows]
        verdicts = self.judge(asked, first, second, "")
        each = rate_of_people(verdicts, who, **self.options)
        rate = dataclasses.asdict(win_rate(verdicts, who, **self.options))
        mean = {key: each[key] for key in ("mean", "low", "high")}
        return {**rate, "people": len(each["users"]), "person_mean": mean, "users": each["users"]}

    def report(self) -> dict[str, Any]:
        """What the judge did, as `report` shows judges."""
        return {"name": self.name, **self.judge.report()}
