"""A language model as a judge: prompts from files, verdicts from log-probabilities or from a strict format."""

import copy
import dataclasses
import hashlib
import math
import pathlib
import re
import string
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from pjrlhf import strict_json
from pjrlhf.data.messages import Prompt, dialogue
from pjrlhf.errors import UserError
from pjrlhf.judges.chat import Body, Chat, ChatSettings
from pjrlhf.judges.client import text_in
from pjrlhf.paths import expand
from pjrlhf.rewards.sources import NO_COLUMNS, RecordColumns, column_text, listed_columns
from pjrlhf.settings import Settings, setting, shown
from pjrlhf.types import Json

FOLDER = pathlib.Path(__file__).parent / "prompts"
FIELDS = ("prompt", "first", "second", "criterion", "person", "low", "high")
ANSWERS = ("letter", "json", "text")
INCONSISTENT = ("tie", "none")
SHOWN_PREFERENCES = 3  # the largest stated preferences of a person
PARSE_RETRIES = 2  # further requests, each with another seed, where a reply cannot be read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """A prompt of a judge, from a TOML file.

    Attributes:
      name: of the file, for messages.
      kind: "pair", which of two responses is better; or "rating", a number for one.
      answer: how the verdict is read: "letter", one token, with log-probabilities where the server gives them; "json",
        an object {"reason", "verdict"}; "text", the last line "Verdict: X".
      system, user: texts with fields {prompt}, {first}, {second}, {criterion}, {person}; {low} and {high} of a
        rating; and the names of columns of the records. {prompt} is all turns of a conversation.
      first, second, tie: the verdicts of a pair; `tie` may be empty.
      inconsistent: of a pair, what it is where the two orders disagree: "tie", or "none", no verdict.
      low, high: the bounds of a rating.
      helpful: the text of the general criterion, which is no preference; "" where the texts do not show the criterion.
    """

    name: str
    kind: str
    answer: str
    system: str
    user: str
    first: str = "A"
    second: str = "B"
    tie: str = ""
    inconsistent: str = "tie"
    low: int = 1
    high: int = 10
    helpful: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The verdicts of a pair, or the ratings."""
        if self.kind == "rating":
            return tuple(map(str, range(self.low, self.high + 1)))
        return tuple(label for label in (self.first, self.second, self.tie) if label)

    def shows(self, field: str) -> bool:
        """Whether the texts have a field."""
        return field in _fields(self.system + self.user)

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that are columns of the records."""
        return tuple(sorted(_fields(self.system + self.user) - set(FIELDS)))

    def check_columns(self, columns: Collection[str]) -> None:
        """Raises UserError where a field is none of the `columns` of the records."""
        if missing := [name for name in self.columns if name not in columns]:
            raise UserError(
                f"judge prompt {self.name!r}: {{{missing[0]}}} is no field, and no column of the records; choose from "
                f"{', '.join(FIELDS)}, or a column (data.prompts has {listed_columns(columns)}), and write other "
                "braces twice"
            )

    def messages(self, values: Mapping[str, str]) -> list[dict[str, str]]:
        """The messages of a request with the values of the fields."""
        filled = {"low": self.low, "high": self.high, **values}
        texts = {"system": self.system.strip(), "user": self.user.strip()}
        return [{"role": role, "content": text.format_map(filled)} for role, text in texts.items() if text]


def _fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def read_template(spec: str) -> Template:
    """The template of a name in `judges/prompts` or of a TOML file of your own.

    Raises:
      UserError: no such file, one that is no template, or an unknown field in its texts.
    """
    path = pathlib.Path(expand(spec)) if spec.endswith(".toml") else FOLDER / f"{spec}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise UserError(f"judge prompt {spec!r}: there is no such file; choose one of {known}, or give a .toml file")
    try:
        template = Template(name=spec, **tomllib.loads(path.read_text(encoding="utf-8")))
        unknown = [name for name in template.columns if not name.isidentifier()]
        if not unknown:
            template.messages(dict.fromkeys((*FIELDS, *template.columns), ""))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"judge prompt {spec!r}: is no template ({reason}); see pjrlhf/judges/prompts") from error
    if unknown:
        raise UserError(
            f"judge prompt {spec!r}: {{{min(unknown)}}} is no field; choose from {', '.join(FIELDS)} and columns of "
            "the records, and write other braces twice"
        )
    if template.kind not in ("pair", "rating") or template.answer not in ANSWERS:
        raise UserError(
            f"judge prompt {spec!r}: kind {template.kind!r} with answer {template.answer!r}; kinds are pair and "
            f"rating, answers are {', '.join(ANSWERS)}"
        )
    _check_verdicts(template)
    return template


def _check_verdicts(template: Template) -> None:
    """Raises UserError for verdicts that cannot be told apart, and for texts that do not show what is judged."""
    name, pair = f"judge prompt {template.name!r}", template.kind == "pair"
    bounds, sides = (template.low, template.high), (template.first, template.second)
    if not pair and not (all(type(bound) is int for bound in bounds) and template.low < template.high):
        raise UserError(
            f"{name}: low {shown(template.low)} and high {shown(template.high)}; give two whole numbers, the lower one "
            "first"
        )
    if pair:
        labels = (*sides, template.tie)
        if not all(isinstance(label, str) and label == label.strip() for label in labels) or not all(sides):
            raise UserError(f"{name}: the verdicts {shown(labels)}; give texts without spaces at their ends")
        if len(set(template.labels)) < len(template.labels):
            raise UserError(f"{name}: two of its verdicts {shown(labels)} are the same; give each its own")
        if template.inconsistent not in INCONSISTENT:
            raise UserError(
                f"{name}: inconsistent {shown(template.inconsistent)} is unknown; choose one of "
                f"{', '.join(INCONSISTENT)}"
            )
    wanted = ("first", "second") if pair else ("first",)
    if unseen := [field for field in wanted if not template.shows(field)]:
        raise UserError(f"{name}: its texts do not show what is judged; write {{{unseen[0]}}} where it stands")
    if not pair and template.shows("second"):
        raise UserError(f"{name}: a rating is of one response; leave {{second}} out")


# ---- requests


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


# ---- verdicts


def verdict_of(template: Template, probabilities: Mapping[str, float]) -> float:
    """What the probabilities of the labels say, of which only the ratios count: of a pair (p(first) - p(second)) / (sum
    of all), from the side of the first response, in [-1, 1]; of a rating the expected number. NaN where all are 0.
    """
    total = sum(probabilities.values())
    if not total > 0:
        return math.nan
    if template.kind == "rating":
        return sum(float(label) * p for label, p in probabilities.items()) / total
    return (probabilities[template.first] - probabilities[template.second]) / total


def read_pair(template: Template, reply: Json) -> float:
    """The verdict of a reply from the side of the first response, in [-1, 1]; NaN where it has none.

    With log-probabilities it is (p(first) - p(second)) / (p(first) + p(second) + p(tie)) over the labels among the
    returned tokens. A label that is not among them has probability 0.
    """
    choice = _choice(reply)
    if template.answer == "letter":
        found = _probabilities(choice, template.labels)
        if found is not None:
            return verdict_of(template, found)
        verdict: Any = _text(choice)
    else:
        verdict = _verdict(template, choice)
    signs = {template.first: 1.0, template.second: -1.0}
    if template.tie:
        signs[template.tie] = 0.0
    return signs.get(verdict, math.nan) if isinstance(verdict, str) else math.nan


def read_rating(template: Template, reply: Json) -> float:
    """The rating of a reply; NaN where it has none within the bounds. With log-probabilities it is the expected rating
    over the numbers among the returned tokens.
    """
    choice = _choice(reply)
    if template.answer == "letter":
        found = _probabilities(choice, template.labels)
        if found is not None:
            return verdict_of(template, found)
        verdict: Any = _text(choice)
    else:
        verdict = _verdict(template, choice)
    try:
        number = float(verdict) if not isinstance(verdict, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if template.low <= number <= template.high else math.nan


def _choice(reply: Json) -> Mapping[str, Json]:
    choices = reply.get("choices") if isinstance(reply, Mapping) else None
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}


def _text(choice: Mapping[str, Json]) -> str:
    message = choice.get("message")
    return text_in(message.get("content")) if isinstance(message, Mapping) else ""


def _probabilities(choice: Mapping[str, Json], labels: Iterable[str]) -> dict[str, float] | None:
    """Probabilities of the labels at the first token; None without log-probabilities, where they have another form than
    that of OpenAI, and where they have no label.
    """
    found = dict.fromkeys(labels, 0.0)
    try:
        first = choice["logprobs"]["content"][0]
        for entry in first.get("top_logprobs") or [first]:
            token = str(entry.get("token", "")).strip()
            if token in found:
                found[token] += math.exp(entry["logprob"])
    except (AttributeError, LookupError, TypeError, OverflowError):
        return None
    return found if 0 < sum(found.values()) < math.inf else None


def _verdict(template: Template, choice: Mapping[str, Json]) -> Any:
    """The verdict of a reply in a format; None where it was cut off or has another format."""
    if choice.get("finish_reason") == "length":
        return None
    text = _text(choice)
    if template.answer == "text":
        found = re.search(r"(?:^|\n)Verdict: *(\S+?)\.?$", text)
        return found[1] if found else None
    try:
        value = strict_json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value.get("verdict") if isinstance(value, dict) else None


# ---- the judge


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
      UserError: see `Chat`.
    """

    def __init__(self, settings: JudgeSettings, chat: Chat, seed: int = 0):
        self.settings, self.chat, self.seed = settings, chat, seed

    def __call__(self, name: str, template: Template, items: Sequence[Mapping[str, str]]) -> list[float]:
        read = read_pair if template.kind == "pair" else read_rating
        found, open_items = [math.nan] * len(items), list(range(len(items)))
        for attempt in range(PARSE_RETRIES + 1):
            seed = self.seed + attempt
            bodies: list[Body] = [request(template, self.settings, items[i], seed) for i in open_items]
            for i, reply in zip(open_items, self.chat(name, bodies), strict=True):
                found[i] = read(template, reply)
            open_items = [i for i in open_items if math.isnan(found[i])]
            if not open_items:
                break
        self.chat.failures += len(open_items)
        return found

    def again(self) -> "ChatBackend":
        """The same model, asked anew: none of its answers is one that this backend got."""
        return ChatBackend(self.settings, self.chat, self.seed + PARSE_RETRIES + 1)

    def report(self) -> dict[str, Any]:
        """The name of the model, its requests, and what they cost."""
        usage = self.chat.usage
        counts = {"requests": usage.requests, "sent": self.chat.sent, "cost": self.chat.cost}
        return {"model": self.settings.model, **counts, "without_token_counts": usage.unknown}


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
        self.columns = columns
        self.people: Sequence[str] = ()

    def __call__(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], criterion: str
    ) -> Float[np.ndarray, " N"]:
        text, people = self.text_of(criterion), self.people or [self.person] * len(prompts)
        verdicts = np.zeros(len(prompts))
        rows = [i for i in range(len(prompts)) if first[i] != second[i]]
        turned = [self.order_invariant and _turned(prompts[i], first[i], second[i]) for i in rows]
        items = []
        for i, turn in zip(rows, turned, strict=True):
            shown = (second[i], first[i]) if turn else (first[i], second[i])
            item = dict(zip(("prompt", "first", "second"), (dialogue(prompts[i]), *shown), strict=True))
            items.append({**item, "criterion": text, "person": people[i]})
        records = self.columns(prompts).select(rows) if self.template.columns else NO_COLUMNS
        found = np.array(self.ask(f"judge: {criterion}", items, records.columns))
        verdicts[rows] = np.where(turned, -found, found)
        return verdicts

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
        other.backend, other.asked, other.failures = self.backend.again(), 0, 0
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
