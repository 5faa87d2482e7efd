"""The columns of a record: those of TRL for prompts, completions and preferences, and those for personalization.

A conversation is a list of messages `{"role": ..., "content": ...}`, see `data.messages`. An answer is plain text: what
follows a text prompt, or the content of the one assistant message that follows a conversation. It is a list of messages
where it has more than that: tool calls, reasoning, or several turns.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

from absl import logging

from pjrlhf.data.messages import (
    SYSTEM,
    Answer,
    Conversation,
    Prompt,
    as_turns,
    options_of,
    read_answer,
    read_messages,
    read_options,
    read_turns,
)
from pjrlhf.data.records import BadRecords, RecordError, name_of, plain
from pjrlhf.errors import UserError
from pjrlhf.settings import shown
from pjrlhf.types import Json

KINDS = ("prompt", "completion", "preference")
_TEXTS = ("prompt", "chosen", "rejected", "completion", "messages", "text")
COLUMNS = (
    *_TEXTS,
    *("tools", "chat_template_kwargs"),
    *("user_id", "user_text", "objective", "preference_weights", "rewards", "margin", "preference"),
)
ASSISTANT_MARKER = "\n\nAssistant:"  # begins a turn in the transcripts of HH-RLHF


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A validated record.

    Text is never blank and numbers are finite. Columns that the record does not have are None.

    Attributes:
      prompt: "" only for a completion without a prompt. Messages are a `Conversation`, also those of a text prompt with
        `tools` or `chat_template_kwargs`.
      chosen, rejected: the answers of a preference record.
      completion: the answer of a completion record.
      user_id: whose preference it is; None for the generic user.
      user_text: what the user says about themselves.
      objective: the preference or criterion that the record is about.
      preference_weights: none below 0, with sum 1 (to 1e-3), by name or in the order of the objectives.
      rewards: scores of a completion by name.
      margin: how much better `chosen` is, for losses that take a margin.
      preference: the probability that `chosen` is the better answer, from 1/2, a tie, to 1; None for 1.
      extra: all other columns, for reward functions.
      held_out: whether nobody trains on its prompt (or pair); None before the records are split.
      request: the prompt as the record has it, where the run asks it as `prompt`; None where they are the same.
      where: place of the record, such as "train.jsonl line 17".
    """

    prompt: Prompt
    chosen: Answer | None = None
    rejected: Answer | None = None
    completion: Answer | None = None
    user_id: str | None = None
    user_text: str | None = None
    objective: str | None = None
    preference_weights: dict[str, float] | list[float] | None = None
    rewards: dict[str, float] | None = None
    margin: float | None = None
    preference: float | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    held_out: bool | None = None
    request: Prompt | None = None
    where: str = ""

    @property
    def original(self) -> Prompt:
        """The prompt as the record has it, which judges and reward functions read."""
        return self.prompt if self.request is None else self.request


def validate(
    records: Sequence[Mapping[str, Any]],
    kind: str,
    *,
    source_name: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_bad_fraction: float = 0.01,
) -> tuple[list[Example], BadRecords]:
    """Parses all records. Bad ones are left out, logged and counted.

    Args:
      records: a `Source`, or any sequence of mappings.
      kind: "prompt", "completion" or "preference".
      source_name: the name of the source in messages; by default its own.
      columns: our column name -> theirs.
      max_bad_fraction: a larger fraction of bad records is an error, in [0, 1].

    Returns:
      (the good records in order, the bad ones).

    Raises:
      UserError: more than `max_bad_fraction` of the records are bad, none is left, or `kind` or a key of `columns` is
        unknown.
    """
    name = source_name or getattr(records, "name", "records")
    name_row = getattr(records, "where", lambda i: f"{name} row {i}")
    examples, bad = [], BadRecords(name, len(records))
    without_prompt, seen = 0, set()
    for i in range(len(records)):
        try:
            record = records[i]
            seen.update(record if isinstance(record, Mapping) else ())
            examples.append(parse(record, kind, columns=columns, where=name_row(i)))
            without_prompt += kind == "preference" and (columns or {}).get("prompt", "prompt") not in record
        except RecordError as error:
            bad.add(name_row(i), error)
    bad.check(max_bad_fraction)
    # Not an error: one mapping serves all sources of a run, and each of them has other columns.
    optional = {ours: theirs for ours, theirs in (columns or {}).items() if ours not in _TEXTS}
    if absent := [f"{theirs!r} ({ours})" for ours, theirs in optional.items() if theirs not in seen]:
        logging.warning("%s: no record has the column %s of data.columns", name, " or ".join(absent))
    if without_prompt:
        logging.warning(
            "%s: %d of %d records have no prompt; it is what both answers start with",
            name,
            without_prompt,
            len(records),
        )
    return examples, bad


def parse(
    record: Mapping[str, Any], kind: str, *, columns: Mapping[str, str] | None = None, where: str = ""
) -> Example:
    """One record as an `Example`.

    kind "prompt":     `prompt`; or `messages`, without the answer of the assistant at their end; or the prompt of a
      preference record.
    kind "completion": `prompt` and `completion`, or `text`, or `messages`: the completion is all from the first turn of
      the assistant on.
    kind "preference": `chosen` and `rejected` with `prompt`; or without this column where both answers start with the
      prompt. Two conversations start with the same messages: these are the prompt. Two transcripts in the format of
      HH-RLHF start with the same text: the prompt ends after its last "\\n\\nAssistant:". Other texts need a prompt.

    Also accepted: text answers to a conversation; conversations as answers to a text prompt, which is then the one user
    turn; answers that repeat the conversation of the prompt.

    Raises:
      RecordError: the record cannot be used.
      UserError: `kind` or a key of `columns` is unknown.
    """
    if kind not in KINDS:
        raise UserError(f"kind {kind!r}: not one of {', '.join(KINDS)}; choose one of them")
    if not isinstance(record, Mapping):
        raise RecordError("not a record", f"a {type(record).__name__}, not an object with named columns")
    values, extra, nulls = _rename(plain(record), columns or {})
    if empty := nulls & _needed(kind, values.keys()):
        raise RecordError(f"{min(empty)} is null", "give it a value, or leave out the record")
    fields = {"prompt": _prompt, "completion": _completion, "preference": _preference}[kind](
        values, _Given(list(record), columns or {})
    )
    options, prompt = read_options(values), fields["prompt"]
    if isinstance(prompt, list):
        fields["prompt"] = Conversation(prompt, options)
    elif options:
        fields["prompt"] = Conversation([{"role": "user", "content": prompt}], options)
    if kind == "prompt":
        extra |= {name: values[name] for name in ("chosen", "rejected", "completion", "text") if name in values}
    return Example(
        **fields,
        user_id=name_of(values["user_id"], "user_id") if "user_id" in values else None,
        user_text=_optional_text(values, "user_text"),
        objective=_optional_text(values, "objective"),
        preference_weights=_weights(values.get("preference_weights")),
        rewards=_named_numbers(values.get("rewards"), "rewards"),
        margin=None if values.get("margin") is None else _number(values["margin"], "margin"),
        preference=_soft_label(values.get("preference")),
        extra=extra,
        where=where,
    )


def other_columns(example: Example) -> dict[str, Any]:
    """The columns of a prompt record beside the prompt, by name: those of this package that it has, and all others."""
    named = ("user_id", "user_text", "objective", "preference_weights", "rewards", "margin", "preference")
    own = {name: getattr(example, name) for name in named}
    return {name: value for name, value in own.items() if value is not None} | example.extra


def in_conversation(example: Example) -> Example:
    """A record whose text prompt, if it has one, is asked as a conversation. The white space around an answer, which
    separated it from the text, is dropped.
    """
    prompt = example.prompt
    if not isinstance(prompt, str) or not prompt:
        return example
    answers = {name: getattr(example, name) for name in ("chosen", "rejected", "completion")}
    stripped = {name: answer.strip() for name, answer in answers.items() if isinstance(answer, str)}
    return dataclasses.replace(example, prompt=Conversation(as_turns(prompt)), request=prompt, **stripped)


def is_tie(example: Example) -> bool:
    """Whether neither answer of a preference record is the better one: there is nothing to get right about it."""
    return example.preference == 0.5


def last_turn(example: Example) -> Example:
    """A completion record with the last turn of the assistant as the completion, and all before it as the prompt."""
    prompt, answer = example.prompt, example.completion
    if not isinstance(prompt, list) or not isinstance(answer, list):
        return example
    before = Conversation([*prompt, *answer[:-1]], options_of(prompt))
    return dataclasses.replace(example, prompt=before, completion=read_answer(answer[-1:], "completion"))


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _rename(record: dict[str, Any], columns: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """(our columns that hold a value, all other columns, our columns that hold null)."""
    if unknown := sorted(set(columns) - set(COLUMNS)):
        raise UserError(f"columns {unknown}: unknown; map only {', '.join(COLUMNS)}")
    if odd := [(ours, name) for ours, name in columns.items() if not isinstance(name, str)]:
        raise UserError(f"columns.{odd[0][0]}: {shown(odd[0][1])} is no name of a column; give it as text")
    taken = set(columns.values())
    theirs = {ours: ours for ours in COLUMNS if ours not in columns and ours not in taken} | dict(columns)
    values = {ours: record[name] for ours, name in theirs.items() if record.get(name) is not None}
    used = set(theirs.values())
    nulls = {ours for ours, name in theirs.items() if name in record and record[name] is None}
    return values, {name: value for name, value in record.items() if name not in used}, nulls


def _needed(kind: str, given: Set[str]) -> set[str]:
    """The columns that a record must have because of those that it has. Columnar files give all records all columns, so
    a record of another form may have an empty completion and prompt.
    """
    if kind == "preference":
        return {"prompt", "chosen", "rejected"}
    if kind == "completion":
        return {"prompt", "completion"} if {"prompt", "completion"} & given else set()
    return set() if "messages" in given or {"chosen", "rejected"} <= given else {"prompt"}


class _Given(NamedTuple):
    """The columns of a record, and the names that a config gives ours."""

    names: list[str]
    theirs: Mapping[str, str]


def _need(values: dict[str, Any], names: Sequence[str], given: _Given, what: str) -> None:
    missing = [name for name in names if name not in values]
    if missing:
        ways = " ".join(f"--config.data.columns.{name}=YOURS" for name in missing)
        absent = [
            f"no column {shown(given.theirs[name])}, which columns.{name} names"
            for name in missing
            if name in given.theirs
        ]
        raise RecordError(
            f"missing {' and '.join(missing)}",
            "; ".join([what, *absent, f"found columns {_listed(given.names)}", f"map them with {ways}"]),
        )


def _listed(names: Sequence[str]) -> str:
    """The first of many names, each cut where it is long."""
    return f"[{', '.join(map(shown, names[:20]))}{', ...' if len(names) > 20 else ''}]"


def _prompt(values: dict[str, Any], given: _Given) -> dict[str, Any]:
    if "prompt" not in values and "messages" in values:
        prompt: Prompt = read_messages(values["messages"], "messages")
        while prompt and prompt[-1]["role"] == "assistant":
            prompt.pop()
        if not prompt:
            raise RecordError("no prompt in messages", "all of them are the assistant's")
    elif "prompt" not in values and {"chosen", "rejected"} <= values.keys():
        prompt = _preference(values, given)["prompt"]
    else:
        _need(values, ["prompt"], given, "prompt data needs prompt, or messages")
        prompt = _read_prompt(values["prompt"])
    if isinstance(prompt, list) and prompt[-1]["role"] in SYSTEM:
        raise RecordError("prompt ends with a system turn", "the last message of a prompt is the one to answer")
    return {"prompt": prompt}


def _completion(values: dict[str, Any], given: _Given) -> dict[str, Any]:
    if "completion" not in values and "messages" in values:
        messages = read_messages(values["messages"], "messages")
        by_assistant = [message["role"] == "assistant" for message in messages]
        # A turn with which the assistant opens the conversation answers nothing, and is part of the prompt.
        starts = [i for i in range(1, len(messages)) if by_assistant[i] and not by_assistant[i - 1]]
        first = starts[0] if starts else len(messages)
        answer = read_answer(messages[first:], "messages")
        return {"prompt": messages[:first], "completion": answer}
    if "completion" not in values and "text" in values:
        return {"prompt": "", "completion": _text(values["text"], "text")}
    _need(values, ["prompt", "completion"], given, "completion data needs prompt and completion, or messages, or text")
    prompt, (completion,) = _explicit(values["prompt"], {"completion": values["completion"]})
    return {"prompt": prompt, "completion": completion}


def _preference(values: dict[str, Any], given: _Given) -> dict[str, Any]:
    _need(
        values,
        ["chosen", "rejected"],
        given,
        "preference data needs chosen and rejected, and prompt unless both repeat it",
    )
    answers = {name: values[name] for name in ("chosen", "rejected")}
    if answers["chosen"] == answers["rejected"]:
        raise RecordError("chosen equals rejected")
    if isinstance(answers["chosen"], str) != isinstance(answers["rejected"], str):
        raise RecordError("chosen and rejected differ in kind", "one is text, the other a conversation")
    prompt, (chosen, rejected) = (
        _explicit(values["prompt"], answers) if "prompt" in values else _implicit(answers, given)
    )
    if chosen == rejected:
        raise RecordError("chosen equals rejected")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _explicit(prompt: Json, answers: dict[str, Any]) -> tuple[Prompt, list[Answer]]:
    if all(isinstance(answer, str) for answer in answers.values()):
        return _read_prompt(prompt), [_text(answer, name) for name, answer in answers.items()]
    if isinstance(prompt, str):  # the one user turn before the answers, which are conversations
        prompt = [{"role": "user", "content": prompt}]
    prompt = _read_prompt(prompt)
    texts = []
    for name, answer in answers.items():
        messages = read_messages(answer, name)
        texts.append(read_answer(messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages, name))
    return prompt, texts


def _implicit(answers: dict[str, Any], given: _Given) -> tuple[Prompt, list[Answer]]:
    if isinstance(answers["chosen"], str):
        texts = [_text(answer, name) for name, answer in answers.items()]
        common = texts[0][: shared_length(*texts)]
        if ASSISTANT_MARKER not in common or "Human:" not in common:
            _need({}, ["prompt"], given, "preference data of texts needs a prompt")
        end = common.rindex(ASSISTANT_MARKER) + len(ASSISTANT_MARKER)
        if not common[:end].strip():
            raise RecordError("no shared prompt", "the transcripts start with an answer; add a prompt column")
        return common[:end], [_text(text[end:], name) for text, name in zip(texts, answers, strict=True)]
    conversations = [read_messages(answer, name) for name, answer in answers.items()]
    shared = conversations[0][: shared_length(*conversations)]
    while shared and shared[-1]["role"] == "assistant":  # the first turns of the answers may be equal
        shared.pop()
    if not shared:
        raise RecordError(
            "no shared prompt", "chosen and rejected do not start with the same message; add a prompt column"
        )
    return shared, [read_answer(c[len(shared) :], name) for c, name in zip(conversations, answers, strict=True)]


def _read_prompt(value: Json) -> Prompt:
    if isinstance(value, str):
        return _text(value, "prompt")
    return read_turns(value, "prompt")


def _text(value: Json, name: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{name} is not text", f"a {type(value).__name__}")
    if not value.strip():
        raise RecordError(f"empty {name}")
    return value


def _optional_text(values: dict[str, Any], name: str) -> str | None:
    return _text(values[name], name) if name in values else None


def _number(value: Json, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecordError(f"bad {name}", f"{shown(value)} is not a finite number")
    return float(value)


def _soft_label(value: Json) -> float | None:
    if value is None:
        return None
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not 0.5 <= number <= 1:
        ways = "exchange the answers, or map another column with --config.data.columns.preference=OTHER"
        raise RecordError("bad preference", f"{shown(value)} is no probability from 0.5 to 1; {ways}")
    return float(number)


def _named_numbers(value: Json, name: str) -> dict[str, float] | None:
    """Numbers by name, without those that are None: columnar files give every record all names."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise RecordError(f"bad {name}", f"a {type(value).__name__}, not numbers by name")
    return {key: _number(item, f"{name}") for key, item in value.items() if item is not None}


def _weights(value: Json) -> dict[str, float] | list[float] | None:
    name = "preference_weights"
    if isinstance(value, list):
        weights = [_number(item, name) for item in value]
        numbers = weights
    else:
        weights = _named_numbers(value, name)
        numbers = list((weights or {}).values())
    if weights is not None and (min(numbers, default=-1) < 0 or abs(sum(numbers) - 1) > 1e-3):
        raise RecordError(f"bad {name}", f"{shown(numbers)} must not be negative and must sum to 1")
    return weights
