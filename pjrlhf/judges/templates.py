"""Prompts of judges, from files, and the verdicts that replies to them hold."""

import dataclasses
import math
import pathlib
import re
import string
import tomllib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pjrlhf import strict_json
from pjrlhf.errors import UserError
from pjrlhf.judges.client import text_in
from pjrlhf.paths import expand
from pjrlhf.rewards.sources import listed_columns
from pjrlhf.settings import shown
from pjrlhf.types import Json

FOLDER = pathlib.Path(__file__).parent / "prompts"
FIELDS = ("prompt", "first", "second", "criterion", "person", "low", "high")
ANSWERS = ("letter", "json", "text")
INCONSISTENT = ("tie", "none")


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
    found, verdict = _told(template, reply)
    if found is not None:
        return verdict_of(template, found)
    signs = {template.first: 1.0, template.second: -1.0}
    if template.tie:
        signs[template.tie] = 0.0
    return signs.get(verdict, math.nan) if isinstance(verdict, str) else math.nan


def read_rating(template: Template, reply: Json) -> float:
    """The rating of a reply; NaN where it has none within the bounds. With log-probabilities it is the expected rating
    over the numbers among the returned tokens.
    """
    found, verdict = _told(template, reply)
    if found is not None:
        return verdict_of(template, found)
    try:
        number = float(verdict) if not isinstance(verdict, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if template.low <= number <= template.high else math.nan


def wanted(template: Template) -> str:
    """What a reply has to be, for messages."""
    numbers = f"a number from {template.low} to {template.high}"
    one = f"one of {', '.join(template.labels)}" if template.kind == "pair" else numbers
    forms = {
        "letter": f"{one} and nothing else",
        "json": f'an object {{"reason": text, "verdict": {one}}}',
        "text": f"text whose last line is Verdict: and {one}",
    }
    return forms[template.answer]


def text_of_reply(template: Template, reply: Json) -> str:
    """The text of a reply as messages show it: its start, and whether its end is missing."""
    choice = _choice(reply)
    cut = template.answer != "letter" and choice.get("finish_reason") == "length"
    return shown(_text(choice)) + (" (cut off at max_tokens)" if cut else "")


def _told(template: Template, reply: Json) -> tuple[dict[str, float] | None, Any]:
    """What a reply holds: (probabilities of the labels, None) where there are any, else (None, its verdict)."""
    choice = _choice(reply)
    if template.answer != "letter":
        return None, _verdict(template, choice)
    found = _probabilities(choice, template.labels)
    return found, None if found is not None else _text(choice)


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
