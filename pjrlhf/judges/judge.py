"""Judges: which of two answers is better by a criterion, and how much the order of asking matters.

A verdict is +1 (first wins), -1 (second wins), 0 (tie), or a soft preference between: swapping the answers changes the
sign, and a tie stays a tie. NaN is no verdict; it stays NaN in any order, and is counted, never taken for a tie.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike

from pjrlhf.data.messages import Prompt, Request, as_request
from pjrlhf.errors import UserError
from pjrlhf.judges.chat import Chat
from pjrlhf.judges.language_model import ChatBackend, JudgeSettings, LanguageModelJudge, Planned
from pjrlhf.judges.own import OwnJudge
from pjrlhf.models.hub import public_name
from pjrlhf.parallel.processes import broadcast_from_zero, is_process_zero
from pjrlhf.registry import Registry, callable_as
from pjrlhf.rewards.calls import listed
from pjrlhf.rewards.sources import NO_COLUMNS, RecordColumns, RewardSource, SourceContext, reward_source
from pjrlhf.settings import arguments, made_by, parse, shown


class Judge(Protocol):
    """Anything that compares answers: a reward model, a rule, a person, a language model behind an API.

    A judge whose verdict cannot depend on the order of the answers may say so with `order_invariant = True`. One whose
    verdicts count only where both orders agree on the side says so with `consistent_only = True`. Process 0 alone is
    asked; one that runs a program on the mesh, which all processes must enter together, says so with
    `on_all_processes = True`.
    """

    def __call__(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], criterion: str
    ) -> np.ndarray:
        """Verdicts [N] in [-1, 1] or NaN for N pairs of answers under one criterion.

        A prompt is a text, or a `Conversation` where its record has messages.
        """
        ...


def combo_outcomes(
    judge: Judge, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str], criteria: Sequence[str]
) -> np.ndarray:
    """Verdicts of answers `a` against `b` under each of C criteria, float64 [N, C]; NaN where there is none.

    Wrap the judge in `BothOrders` if its verdict may depend on the order of the answers.
    """
    if not criteria:
        raise UserError("criteria: the combination is empty; name at least one criterion")
    return np.stack([ask(judge, prompts, a, b, criterion) for criterion in criteria], axis=1)


def ask(
    judge: Judge, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], criterion: str
) -> np.ndarray:
    """The verdicts of `judge`, float64 [N], checked.

    Raises:
      UserError: the lists differ in length, or the judge returned other than N values in [-1, 1], NaN or None.
    """
    _check_lengths(prompts, first, second, criterion)
    found = judge(prompts, first, second, criterion)
    values = listed(found, len(prompts))
    verdicts = np.array([_verdict(value) for value in values or ()], np.float64)
    if values is None or len(values) != len(prompts) or np.isinf(verdicts).any():
        who = f"judge {judge.name!r}" if isinstance(judge, OwnJudge) else "the judge"
        raise UserError(
            f"criterion {criterion!r}: {who} returned {shown(found)}; it must return {len(prompts)} verdicts from -1 "
            "to +1, or None for none"
        )
    return verdicts


def _check_lengths(prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], criterion: str) -> None:
    if not len(prompts) == len(first) == len(second):
        raise UserError(
            f"criterion {criterion!r}: {len(prompts)} prompts, {len(first)} first and {len(second)} second answers; "
            "give one answer of each side per prompt"
        )


def _verdict(value: Any) -> float:
    """A verdict as a number, NaN for none, and infinite for what is no verdict."""
    if value is None:
        return math.nan
    if isinstance(value, str | bytes | bool | np.bool_):  # True says no more than which side it does not choose
        return math.inf
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.inf
    return math.inf if abs(number) > 1 else number


@dataclasses.dataclass
class ScoreJudge:
    """The answer with the higher score wins; a difference of at most `tolerance` is a tie.

    `score(prompt, text, criterion)` is called once per distinct triple, however many opponents an answer meets.
    `together(prompts, texts, criterion)`, where it is given, is called for many instead, on every process; NaN says
    nothing about an answer. Raises UserError for another score that is not finite.
    """

    order_invariant: ClassVar[bool] = True

    score: Callable[[Prompt, str, str], float]
    tolerance: float = 0.0
    together: Callable[[Sequence[Prompt], Sequence[str], str], np.ndarray] | None = None
    cache: dict[tuple[Request, str, str], float] = dataclasses.field(default_factory=dict, repr=False)

    def __call__(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], criterion: str
    ) -> np.ndarray:
        gap = self.scores(prompts, first, criterion) - self.scores(prompts, second, criterion)
        return np.where(np.isnan(gap), np.nan, np.sign(gap) * (np.abs(gap) > self.tolerance))

    @property
    def on_all_processes(self) -> bool:
        return self.together is not None

    def scores(self, prompts: Sequence[Prompt], texts: Sequence[str], criterion: str) -> np.ndarray:
        """Cached scores, float64 [N]."""
        keys = [(as_request(prompt), text, criterion) for prompt, text in zip(prompts, texts, strict=True)]
        missing = [key for key in dict.fromkeys(keys) if key not in self.cache]
        if self.together is not None and missing:
            values = self.together([prompt for prompt, _, _ in missing], [text for _, text, _ in missing], criterion)
            self.cache.update(zip(missing, values.tolist(), strict=True))
        elif missing:
            self.cache.update({key: self._finite(key) for key in missing})
        return np.array([self.cache[key] for key in keys], np.float64)

    def _finite(self, key: tuple[Request, str, str]) -> float:
        score = self.score(*key)
        try:
            value = float(score)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"criterion {key[2]!r}: score {shown(score)} for {key[1][:60]!r}; scores must be finite")
        return value


@dataclasses.dataclass(frozen=True)
class JudgeContext:
    """What a run offers to the makers of judges.

    Attributes:
      scores: the judge by the scores of the run.
      criteria: {criterion: text}, the sentences of the preferences; a text may be empty.
      folder: where a judge may keep files.
      sources: for judges by reward sources, and for those that run on the mesh.
      columns: N requests -> what their records have beside the prompt, for judges by reward sources.
    """

    scores: ScoreJudge
    criteria: Mapping[str, str] = dataclasses.field(default_factory=dict)
    folder: pathlib.Path = pathlib.Path()
    sources: SourceContext = dataclasses.field(default_factory=SourceContext)
    columns: Callable[[Sequence[Prompt]], RecordColumns] = lambda requests: NO_COLUMNS


# Each makes a judge for a run from its context, which it may ignore, and the settings in its specification.
JUDGES: Registry[Callable[..., Judge]] = Registry("judge", callable_as("a function from a JudgeContext to a Judge"))


@JUDGES.register("score")
def by_score(context: JudgeContext) -> Judge:
    """The higher score wins."""
    return context.scores


@JUDGES.register("chat")
def by_chat(context: JudgeContext, **settings: Any) -> Judge:
    """A language model behind an OpenAI-compatible URL; for settings see `JudgeSettings`."""
    own = parse(JudgeSettings, settings, "judge")
    chat = Chat(own, context.folder / "judge.jsonl")
    return LanguageModelJudge(own, context.criteria, ChatBackend(own, chat), context.columns)


@JUDGES.register("reward")
def by_reward(context: JudgeContext, source: str | Mapping[str, Any], tolerance: float = 0.0) -> Judge:
    """The answer with the higher reward wins; `source` is a specification of `rewards.sources`."""
    if not tolerance >= 0:
        raise UserError(f"judge.tolerance: {tolerance} is out of range; choose a number at least 0")
    judge = RewardJudge(source, tolerance, context.sources, context.columns)
    judge.check()
    return judge


@dataclasses.dataclass
class RewardJudge:
    """The answer with the higher reward of a source wins; a difference of at most `tolerance` is a tie, and where the
    source says nothing about one of the two there is no verdict.
    """

    order_invariant: ClassVar[bool] = True

    source: str | Mapping[str, Any]
    tolerance: float = 0.0
    context: SourceContext = dataclasses.field(default_factory=SourceContext)
    columns: Callable[[Sequence[Prompt]], RecordColumns] = lambda requests: NO_COLUMNS
    made: dict[str, RewardSource | None] = dataclasses.field(default_factory=dict, repr=False)  # by criterion

    def __call__(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], criterion: str
    ) -> np.ndarray:
        source, records = self._of(criterion), self.columns(prompts)
        gap = source(prompts, first, records).astype(np.float64) - source(prompts, second, records)
        return np.where(np.isnan(gap), np.nan, np.sign(gap) * (np.abs(gap) > self.tolerance))

    @property
    def on_all_processes(self) -> bool:
        return self._of("judge").on_all_processes

    def planned_requests(self, comparisons: int) -> Planned:
        """What is sent at most about the answers of so many comparisons."""
        return self._of("judge").planned_requests(2 * comparisons)

    def check(self, columns: Collection[str] | None = None) -> None:
        """Raises UserError where the source cannot be made, or needs another column than these of the records."""
        source = self._of("judge")
        if columns is not None:
            source.check_columns(columns)

    def _of(self, criterion: str) -> RewardSource:
        if criterion not in self.made:
            self.made[criterion] = reward_source(criterion, self.source, self.context)
        source = self.made[criterion]
        if source is None:
            raise UserError("judge: a reward model that is trained in the run cannot judge; name another source")
        return source


def judge_from(spec: str | Mapping[str, Any], context: JudgeContext) -> Judge:
    """The judge that a config names.

    Args:
      spec: a name in `JUDGES` or "package.module:name", or {"kind": such a name} with the settings of the judge.

    Raises:
      UserError: no such judge, or settings that it does not take.
    """
    if not isinstance(spec, str | Mapping):
        raise UserError(f'judge: {shown(spec)} is no judge; name its kind, or give {{"kind": ...}}')
    settings = {"kind": spec} if isinstance(spec, str) else dict(spec)
    kind = settings.pop("kind", None)
    if not isinstance(kind, str):
        raise UserError(f"judge: has no kind; choose one of {', '.join(JUDGES)}")
    make = JUDGES.get(kind)
    settings = arguments(make, settings, "judge")
    judge = made_by(make, f"judge {kind!r}:", "a judge", context, **settings)
    ours = isinstance(judge, ScoreJudge | RewardJudge | LanguageModelJudge)
    return judge if ours or ":" not in kind else OwnJudge(kind, judge)


def judge_name(spec: str | Mapping[str, Any]) -> str:
    """The kind of a judge, with its model if it has one, as reports and records show it."""
    if isinstance(spec, str):
        return spec
    path = [public_name(str(spec["path"]))] if spec.get("path") else []
    return " ".join([*(str(spec[key]) for key in ("kind", "model") if spec.get(key)), *path])


def check_judge(spec: str | Mapping[str, Any]) -> None:
    """Raises UserError where `judge_from` would, as far as that does not depend on the run."""
    judge_from(spec, JudgeContext(ScoreJudge(lambda *_: 0.0)))


def check_criteria(
    spec: str | Mapping[str, Any], criteria: Mapping[str, str], known: Sequence[str], asked: Sequence[str]
) -> None:
    """Raises UserError where a judge has no text for a criterion that it will be `asked` for, or a text for one that is
    not `known`.

    Args:
      criteria: see `JudgeContext`.
    """
    judge = judge_from(spec, JudgeContext(ScoreJudge(lambda *_: 0.0), criteria))
    if isinstance(judge, LanguageModelJudge):
        judge.check_criteria(known, asked)


def both_orders(
    judge: Judge, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str], criterion: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Asks for (a, b) and for (b, a); once where the judge is `order_invariant`. Process 0 asks, so that all processes
    have the same verdicts; every process asks a judge on the mesh.

    Returns:
      verdict: float64 [N] from the side of `a`: the mean of the two orders; a tie where hard verdicts disagree; NaN
        where one of them is missing, and where they disagree and the judge is `consistent_only`.
      consistent: bool [N], whether the orders agree on the side, or on a tie.
      bias: float64 [N], from -1 to 1, how much the judge leans to the answer that it sees first.
    """
    orders = np.zeros((2, len(prompts)))
    if getattr(judge, "on_all_processes", False) or is_process_zero():
        orders[:] = in_orders(judge, prompts, a, b, criterion)
    return of_both(judge, *broadcast_from_zero(orders))


def in_orders(
    judge: Judge, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str], criterion: str
) -> tuple[np.ndarray, np.ndarray]:
    """The verdicts [N] of (a, b) and of (b, a), each from the side of the first."""
    if isinstance(judge, LanguageModelJudge) and not judge.order_invariant:
        _check_lengths(prompts, a, b, criterion)
        forward, swapped = judge.in_orders(prompts, a, b, criterion)
        return forward, swapped
    forward = ask(judge, prompts, a, b, criterion)
    invariant = getattr(judge, "order_invariant", False)
    return forward, -forward if invariant else ask(judge, prompts, b, a, criterion)


def of_both(judge: Judge, forward: np.ndarray, swapped: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `both_orders` returns, from what `in_orders` does."""
    backward = -swapped
    mean, consistent = (forward + backward) / 2, np.sign(forward) == np.sign(backward)
    hard = np.isin(forward, (-1, 0, 1)) & np.isin(backward, (-1, 0, 1))
    verdict = np.where(hard & ~consistent, 0.0, mean)
    if getattr(judge, "consistent_only", False):
        verdict = np.where(consistent, verdict, math.nan)
    return verdict, consistent, (forward + swapped) / 2


@dataclasses.dataclass
class BothOrders:
    """A judge that asks `judge` in both orders and counts how often the two verdicts agree.

    Attributes:
      asked: comparisons so far.
      judged: of these the ones with a verdict in both orders.
      consistent: of `judged` the ones whose verdicts agree.
      dropped: of `judged` the ones without a verdict of their own, because the orders disagree.
    """

    judge: Judge
    asked: int = 0
    judged: int = 0
    consistent: int = 0
    dropped: int = 0
    _bias: float = 0.0

    def __call__(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], criterion: str
    ) -> np.ndarray:
        verdict, consistent, bias = both_orders(self.judge, prompts, first, second, criterion)
        known = ~np.isnan(bias)
        self.asked += len(verdict)
        self.judged += int(known.sum())
        self.dropped += int((known & np.isnan(verdict)).sum())
        self.consistent += int(consistent[known].sum())
        self._bias += float(bias[known].sum())
        return verdict

    def again(self) -> "BothOrders | None":
        """The same judge, asked anew where it was asked; None where it would say the same by construction."""
        again = getattr(self.judge, "again", None)
        other = again() if again else None
        return None if other is None else BothOrders(other)

    def planned_requests(self, comparisons: int) -> Planned:
        """What is sent at most about so many comparisons, where the judge is asked by requests."""
        judge = self.judge
        return judge.planned_requests(comparisons) if isinstance(judge, LanguageModelJudge | RewardJudge) else []

    def report(self) -> dict[str, Any]:
        """Counts, and what a judge with a method `report` says of itself, as JSON values."""
        found: dict[str, Any] = {"asked": self.asked, "judged": self.judged - self.dropped}
        if not self._invariant and self.judged:
            found |= {"consistency": self.consistency, "position_bias": self.position_bias}
        report = getattr(self.judge, "report", None)
        return found | (report() if report else {})

    @property
    def _invariant(self) -> bool:
        return getattr(self.judge, "order_invariant", False)

    @property
    def consistency(self) -> float:
        """Fraction of judged comparisons with the same verdict in both orders, 1 without position bias. NaN before the
        first verdict, and for a judge that is `order_invariant`, whose fraction says nothing.
        """
        return math.nan if self._invariant or not self.judged else self.consistent / self.judged

    @property
    def position_bias(self) -> float:
        """Mean preference for the answer shown first, -1 to 1; NaN where `consistency` is."""
        return math.nan if self._invariant or not self.judged else self._bias / self.judged


def agreement(a: ArrayLike, b: ArrayLike) -> dict[str, float]:
    """How far two judges agree on the same comparisons, by the signs of their verdicts [N].

    Returns:
      n: comparisons that both have judged.
      agreement: the fraction of equal signs.
      kappa: Cohen's kappa, (agreement - chance) / (1 - chance), where chance is the agreement of independent judges
        with the same shares of wins, ties and losses (Cohen 1960). NaN where both always give the same sign.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    both = ~(np.isnan(a) | np.isnan(b))
    signs = np.sign(a[both]), np.sign(b[both])
    n = int(both.sum())
    if not n:
        return {"n": 0, "agreement": math.nan, "kappa": math.nan}
    equal = float((signs[0] == signs[1]).mean())
    chance = sum(float((signs[0] == s).mean() * (signs[1] == s).mean()) for s in (-1, 0, 1))
    return {"n": n, "agreement": equal, "kappa": (equal - chance) / (1 - chance) if chance < 1 else math.nan}
