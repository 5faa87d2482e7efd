"""A language model as a judge: what it is asked, and what its verdicts become."""

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging
from jaxtyping import Float

from pjrlhf.data.messages import Prompt, dialogue
from pjrlhf.errors import UserError
from pjrlhf.judges.chat import Body, Chat, ChatSettings
from pjrlhf.judges.templates import (
    INCONSISTENT,
    Template,
    read_pair,
    read_rating,
    read_template,
    text_of_reply,
    wanted,
)
from pjrlhf.parallel.processes import is_process_zero
from pjrlhf.rewards.sources import NO_COLUMNS, RecordColumns, column_text
from pjrlhf.settings import Settings, setting, shown
from pjrlhf.types import Json

SHOWN_PREFERENCES = 3  # the largest stated preferences of a person
PARSE_RETRIES = 2  # further requests, each with another seed, where a reply cannot be read
PROBE = 8  # the first items of a judge; where no reply about them can be read, it is asked nothing more


def request(template: Template, settings: "JudgeSettings", values: Mapping[str, str], seed: int = 0) -> dict[str, Json]:
    """The body of a request; further requests about the same have other seeds."""
    body: dict[str, Json] = {"model": settings.model, "messages": template.messages(values)}
    body["temperature"] = settings.temperature
    if template.answer == "letter":
        body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": settings.top_logprobs}
    else:
        body["max_tokens"] = settings.max_tokens
    if template.answer == "json":
        verdict: Json = {"type": "string", "enum": list(template.labels)}
        if template.kind == "rating":
            verdict = {"type": "integer", "minimum": template.low, "maximum": template.high}
        schema = {
            "type": "object",
            "properties": {"reason": {"type": "string"}, "verdict": verdict},
            "required": ["reason", "verdict"],
            "additionalProperties": False,
        }
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "verdict", "schema": schema, "strict": True},
        }
    if seed:
        body["seed"] = seed
    return body


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSettings(Settings):
    """What a language model is asked."""

    prompt: str = setting("", "the prompt, a name in judges/prompts or a .toml file of your own")
    criteria: Mapping[str, Any] = setting({}, "{criterion: text}; others have the sentence of their preference")
    orders: int = setting(
        2, "in which the two answers of a comparison are shown; 1: one of the two, drawn for each pair", low=1, high=2
    )
    inconsistent: str = setting(
        "",
        "what two answers are that the two orders judge differently: a tie (of soft verdicts their mean), or none, no "
        "verdict; as the prompt says where empty",
        choices=("", *INCONSISTENT),
    )
    person: str | Mapping[str, Any] = setting(
        "",
        'whose place the judge takes, for prompts that show it: a text, or {"about": text, "stated": {preference: how '
        'much it matters}, "said": [texts]}',
    )

    def check(self) -> None:
        super().check()
        for name, text in self.criteria.items():
            if not isinstance(text, str):
                raise UserError(f"criteria.{name}: {shown(text)} is not text; say what is judged")
        describe(self.person)
        if self.prompt:
            read_template(self.prompt)
        if self.inconsistent == "none" and self.orders == 1:
            raise UserError("inconsistent: none compares two orders, and orders is 1; leave one of them out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeSettings(PromptSettings, ChatSettings):
    """A language model behind an OpenAI-compatible URL as a judge."""

    temperature: float = setting(0.0, "of the judge", low=0.0, high=100.0)
    top_logprobs: int = setting(20, "alternatives to the first token that the server returns", low=1, high=20)
    max_tokens: int = setting(512, "of a reply with a reason", low=1, high=2**20)


def is_number(value: object) -> bool:
    """Whether a value says how much something matters: a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def describe(person: str | Mapping[str, Any]) -> str:
    """What a prompt shows of a person (P-RLHF on PRISM, arXiv 2402.05133, appendix): who they are, their three largest
    stated preferences, the largest first, and what they said.

    Raises:
      UserError: another key, or a stated preference that is no number.
    """
    if isinstance(person, str):
        return person
    if unknown := set(person) - {"about", "stated", "said"}:
        raise UserError(f"person: has no {min(unknown)!r}; give about, stated and said")
    stated, heard = person.get("stated") or {}, person.get("said") or ()
    if not isinstance(stated, Mapping):
        raise UserError(f"person: stated is {shown(stated)}; give {{preference: how much it matters}}")
    if isinstance(heard, str) or not isinstance(heard, Sequence):
        raise UserError(f"person: said is {shown(heard)}; give a list of texts")
    if not all(map(is_number, stated.values())):
        raise UserError(f"person: the stated preferences {shown(dict(stated))} are no numbers; rate each of them")
    # The largest, not those that were shown first.
    largest = sorted(stated, key=lambda name: -stated[name])[:SHOWN_PREFERENCES]
    parts = [str(person.get("about") or "")]
    if largest:
        parts.append(f"What matters most to this person, in this order: {', '.join(largest)}.")
    if heard:
        parts.append("\n".join(["This person said:", *(f"- {text}" for text in heard)]))
    return "\n\n".join(filter(None, parts))


class Backend(Protocol):
    """Answers the questions of a prompt. One that runs on the mesh says so with `on_all_processes = True`."""

    def __call__(self, name: str, template: Template, items: Sequence[Mapping[str, str]]) -> list[float]:
        """Verdicts or ratings for items, the values of the fields of `template`; NaN where there is none.

        Args:
          name: of the progress bar.
        """
        ...

    def report(self) -> dict[str, Any]:
        """What it is and what it took, as JSON values."""
        ...


class ChatBackend:
    """A model behind an OpenAI-compatible URL. It is asked again where its reply cannot be read.

    Args:
      chat: sends the requests.
      seed: of the first request about an item.

    Raises:
      UserError: see `Chat`; or none of the replies about the first items can be read.
    """

    def __init__(self, settings: JudgeSettings, chat: Chat, seed: int = 0):
        self.settings, self.chat, self.seed = settings, chat, seed
        self._readable = self._unreadable = 0  # items

    def __call__(self, name: str, template: Template, items: Sequence[Mapping[str, str]]) -> list[float]:
        # A prompt that the model does not follow is found out before the budget is spent on it.
        few = 0 if self._readable else PROBE
        return [found for part in (items[:few], items[few:]) if part for found in self._ask(name, template, part)]

    def _ask(self, name: str, template: Template, items: Sequence[Mapping[str, str]]) -> list[float]:
        read = read_pair if template.kind == "pair" else read_rating
        found, open_items, sample = [math.nan] * len(items), list(range(len(items))), ""
        for attempt in range(PARSE_RETRIES + 1):
            seed = self.seed + attempt
            bodies: list[Body] = [request(template, self.settings, items[i], seed) for i in open_items]
            part = f"{name} (again: unreadable replies)" if attempt else name
            for i, reply in zip(open_items, self.chat(part, bodies), strict=True):
                found[i] = read(template, reply)
                sample = text_of_reply(template, reply) if math.isnan(found[i]) else sample
            open_items = [i for i in open_items if math.isnan(found[i])]
            if not open_items:
                break
        self.chat.failures += len(open_items)
        self._readable += len(items) - len(open_items)
        if open_items:
            self._tell_unreadable(name, template, len(open_items), len(items), sample)
        return found

    def _tell_unreadable(self, name: str, template: Template, count: int, items: int, sample: str) -> None:
        """Warns at the first items without a reply that can be read; raises where there were none but such items."""
        first, self._unreadable = not self._unreadable, self._unreadable + count
        reason = f"such as {sample}; prompt {template.name!r} wants {wanted(template)}"
        if not self._readable and self._unreadable >= PROBE:
            raise UserError(
                f"{name}: model {self.settings.model!r} was asked about {self._unreadable} items "
                f"({self.chat.sent} requests), and none of its replies can be read, {reason}; set another prompt or "
                f"model of the judge. The replies are kept in {self.chat.cache.path}: delete it where the server was "
                "at fault"
            )
        if first and is_process_zero():
            logging.warning(
                "%s: the replies of model %r about %d of %d items cannot be read, also when asked again, %s; these "
                "have no verdict, and the report counts them",
                name,
                self.settings.model,
                count,
                items,
                reason,
            )

    def again(self) -> "ChatBackend":
        """The same model, asked anew: none of its answers is one that this backend got."""
        other = ChatBackend(self.settings, self.chat, self.seed + PARSE_RETRIES + 1)
        other._readable = self._readable
        return other

    def report(self) -> dict[str, Any]:
        """The name of the model, its requests, and what they cost."""
        usage = self.chat.usage
        counts = {"requests": usage.requests, "sent": self.chat.sent, "cost": self.chat.cost}
        return {"model": self.settings.model, **counts, "without_token_counts": usage.unknown}


# Models, and how many requests each gets at most, further ones about unreadable replies left out.
Planned = list[tuple[Chat, int]]


def announce(name: str, planned: Planned) -> None:
    """Logs how many requests a stage sends at most and what the budget says to it, before the first is sent; a warning
    where the budget may end the stage.

    Args:
      name: of the stage.
      planned: of all judges of the stage. What asks one model within one budget is told as one.
    """
    together: dict[tuple[Any, ...], tuple[Chat, int]] = {}
    for chat, most in planned if is_process_zero() else ():
        s = chat.settings
        if most and not s.replay:
            key = id(chat.usage), s.max_requests, s.max_cost, s.prices
            together[key] = chat, most + together.get(key, (chat, 0))[1]
    for chat, most in together.values():
        enough, budget = chat.allows(most)
        text = (
            f"{name}: at most {most:,} requests to model {chat.settings.model!r}, of which those in its cache are not "
            f"sent, and {PARSE_RETRIES} more for each reply that cannot be read; {budget}"
        )
        if enough:
            logging.info("%s", text)
        else:
            logging.warning("%s: it may end there, and the same command goes on once the limit is raised", text)


class _Asking:
    """Asks a language model about items.

    Attributes:
      asked: items so far.
      failures: of these the ones without an answer that can be read.
    """

    kind = ""

    def __init__(self, settings: PromptSettings, sentences: Mapping[str, str], backend: Backend, default: str):
        self.backend, self.template = backend, read_template(settings.prompt or default)
        if self.template.kind != self.kind:
            raise UserError(
                f"judge prompt {self.template.name!r}: is one of kind {self.template.kind}, not {self.kind}; choose "
                "another"
            )
        self.person = describe(settings.person)
        if self.template.shows("person") and not self.person:
            raise UserError(f"judge prompt {self.template.name!r}: shows a person; set person to a description")
        if self.person and not self.template.shows("person"):
            raise UserError(
                f"judge prompt {self.template.name!r}: does not show the person; choose one that does, such as "
                "role_play, or leave out person"
            )
        self.criteria = {**sentences, **settings.criteria}
        self.asked, self.failures = 0, 0

    @property
    def on_all_processes(self) -> bool:
        return getattr(self.backend, "on_all_processes", False)

    def text_of(self, criterion: str) -> str:
        """What the prompt says of a criterion.

        Raises:
          UserError: the prompt does not show criteria, and this one has a text; or it shows them, and there is none.
        """
        text = self.criteria.get(criterion, "")
        if not self.template.shows("criterion"):
            if text:
                raise UserError(
                    f"judge prompt {self.template.name!r}: does not show the criterion {criterion!r}; choose one that "
                    "does, such as criterion"
                )
            return ""
        # A preference without a sentence is about something else than general helpfulness.
        text = text or ("" if criterion in self.criteria else self.template.helpful)
        if not text:
            raise UserError(f"judge: criterion {criterion!r} has no text; add it to criteria")
        return text

    def _planned(self, items: int) -> Planned:
        """What is sent at most about so many items: to a model on the mesh, nothing."""
        return [(self.backend.chat, items)] if isinstance(self.backend, ChatBackend) else []

    def check_columns(self, columns: Collection[str]) -> None:
        """Raises UserError where the prompt shows another column than these of the records."""
        self.template.check_columns(columns)

    def ask(self, name: str, items: Sequence[Mapping[str, str]], columns: Mapping[str, Sequence[Any]]) -> list[float]:
        """What the model answers about N items; NaN where it does not, and where a column that the prompt shows has no
        value, which nobody is asked about.

        Args:
          columns: of the records, N values each.
        """
        own = {column: columns.get(column, [None] * len(items)) for column in self.template.columns}
        known = [i for i in range(len(items)) if all(values[i] is not None for values in own.values())]
        whole = [{**items[i], **{column: column_text(values[i]) for column, values in own.items()}} for i in known]
        found = [math.nan] * len(items)
        for i, answer in zip(known, self.backend(name, self.template, whole) if whole else (), strict=True):
            found[i] = answer
        self.asked += len(items)
        self.failures += sum(map(math.isnan, found))
        return found


class LanguageModelJudge(_Asking):
    """Compares answers; a `Judge`. Identical answers are a tie, without a request.

    Args:
      sentences: {criterion: text}.
      columns: N requests -> what their records have beside the prompt.

    Attributes:
      people: whose place the judge takes, one description per comparison of the next calls; where empty, that of
        `person` in all of them.

    Raises:
      UserError: see `read_template`.
    """

    kind = "pair"

    def __init__(
        self,
        settings: PromptSettings,
        sentences: Mapping[str, str],
        backend: Backend,
        columns: Callable[[Sequence[Prompt]], RecordColumns] = lambda requests: NO_COLUMNS,
    ):
        super().__init__(settings, sentences, backend, "criterion")
        self.order_invariant = settings.orders == 1
        self.consistent_only = (settings.inconsistent or self.template.inconsistent) == "none"
        self.columns, self.label = columns, "judge"
        self.people: Sequence[str] = ()

    def __call__(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], criterion: str
    ) -> Float[np.ndarray, " N"]:
        rows = [i for i in range(len(prompts)) if first[i] != second[i]]
        turned = [self.order_invariant and _turned(prompts[i], first[i], second[i]) for i in rows]
        found = self._ask_pairs(prompts, first, second, criterion, list(zip(rows, turned, strict=True)))
        verdicts = np.zeros(len(prompts))
        verdicts[rows] = np.where(turned, -found, found)
        return verdicts

    def in_orders(
        self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str], criterion: str
    ) -> Float[np.ndarray, "2 N"]:
        """The verdicts of (a, b) and of (b, a), each from the side of the first, of a judge that asks in both orders.
        Both are asked at the same time.
        """
        rows = [i for i in range(len(prompts)) if a[i] != b[i]]
        asked = [(i, turn) for turn in (False, True) for i in rows]
        verdicts = np.zeros((2, len(prompts)))
        verdicts[:, rows] = self._ask_pairs(prompts, a, b, criterion, asked).reshape(2, len(rows))
        return verdicts

    def _ask_pairs(
        self,
        prompts: Sequence[Prompt],
        first: Sequence[str],
        second: Sequence[str],
        criterion: str,
        asked: Sequence[tuple[int, bool]],
    ) -> Float[np.ndarray, " M"]:
        """Verdicts from the side of the answer that is shown first.

        Args:
          asked: M (number of a pair, whether its second answer is shown first).
        """
        text, people = self.text_of(criterion), self.people or [self.person] * len(prompts)
        items = []
        for i, turn in asked:
            sides = {"first": second[i], "second": first[i]} if turn else {"first": first[i], "second": second[i]}
            items.append({"prompt": dialogue(prompts[i]), **sides, "criterion": text, "person": people[i]})
        rows = [i for i, _ in asked]
        records = self.columns(prompts).select(rows) if self.template.columns else NO_COLUMNS
        return np.array(self.ask(": ".join(filter(None, (self.label, criterion))), items, records.columns), np.float64)

    def planned_requests(self, comparisons: int) -> Planned:
        """What is sent at most about so many comparisons, each in all its orders."""
        return self._planned(comparisons if self.order_invariant else 2 * comparisons)

    def within(self, records: RecordColumns) -> "LanguageModelJudge":
        """The judge for prompts that have these records; it shares the model with this one."""
        other = copy.copy(self)
        other.columns = lambda prompts: records
        return other

    def check_criteria(self, known: Sequence[str], asked: Sequence[str]) -> None:
        """Raises UserError where there is no text for a criterion that is `asked` for, or one for a criterion that is
        not `known`.
        """
        if unknown := [name for name in self.criteria if name not in known]:
            raise UserError(
                f"judge: criteria has {unknown[0]!r}, which is no criterion of the run; choose from {', '.join(known)}"
            )
        for name in asked:
            self.text_of(name)

    def again(self) -> "LanguageModelJudge | None":
        """A judge that is asked anew where this one was asked; None where it would say the same by construction."""
        if not isinstance(self.backend, ChatBackend):
            return None
        other = copy.copy(self)
        other.backend, other.asked, other.failures, other.label = self.backend.again(), 0, 0, "judge, asked twice"
        return other

    def report(self) -> dict[str, Any]:
        """What the model is and what it took, as JSON values."""
        return {**self.backend.report(), "failures": self.failures}


def _turned(prompt: Prompt, first: str, second: str) -> bool:
    """Whether the second of two answers is shown first where they are shown in one order: one of the two orders, drawn
    for the pair, in whichever order it is given.
    """
    pair = sorted((first, second))
    digest = hashlib.sha256("\0".join((dialogue(prompt), *pair)).encode("utf-8", "surrogatepass")).digest()
    return (first == pair[0]) == bool(digest[0] & 1)


class LanguageModelRating(_Asking):
    """Rates answers by one criterion; a reward function.

    Args:
      objective: its name.
      criterion: its text.
    """

    kind, waits = "rating", True

    def __init__(self, settings: PromptSettings, objective: str, criterion: str, backend: Backend):
        super().__init__(settings, {objective: criterion}, backend, "rating")
        for name, given in (("orders", settings.orders != 2), ("inconsistent", settings.inconsistent)):
            if given:
                raise UserError(
                    f"rewards.{objective}.{name}: is of comparisons, and a rating is of one answer; leave it out"
                )
        _check_objective(self, settings, objective, criterion)
        self.objective = objective
        self.shared = {"criterion": self.text_of(objective), "person": self.person}

    def __call__(self, prompts: list[Prompt], completions: list[str], **columns: Sequence[Any]) -> list[float | None]:
        items = [{"prompt": dialogue(p), "first": c, **self.shared} for p, c in zip(prompts, completions, strict=True)]
        found = self.ask(f"rating: {self.objective}", items, columns)
        return [None if math.isnan(value) else value for value in found]

    def planned_requests(self, answers: int) -> Planned:
        """What is sent at most about so many answers."""
        return self._planned(answers)


def objective_judge(settings: PromptSettings, objective: str, criterion: str, backend: Backend) -> LanguageModelJudge:
    """The judge of one objective, whose criterion has this text.

    Raises:
      UserError: see `read_template`; other criteria, or none where the prompt shows it.
    """
    judge = LanguageModelJudge(settings, {objective: criterion}, backend)
    _check_objective(judge, settings, objective, criterion)
    judge.text_of(objective)
    return judge


def _check_objective(asking: _Asking, settings: PromptSettings, objective: str, criterion: str) -> None:
    if settings.criteria:
        raise UserError(f"rewards.{objective}: has criteria; leave them out, because criterion says what is judged")
    if asking.template.shows("criterion") and not criterion.strip():
        raise UserError(f"rewards.{objective}.criterion: is empty; say what is judged")
