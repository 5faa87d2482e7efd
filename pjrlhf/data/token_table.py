"""Tokenizes the records of a source once, within limits on their lengths."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from absl import logging

from pjrlhf.data.messages import Conversation, options_of
from pjrlhf.data.records import BadRecords, RecordError
from pjrlhf.data.schema import Example
from pjrlhf.data.tokenization import RewrittenTurns, Tokenizer
from pjrlhf.errors import UserError

# Kind of record -> its answers.
ANSWERS = {
    "prompt": (),
    "completion": ("completion",),
    "preference": ("chosen", "rejected"),
}


def in_room(prompt: int, completion: int, room: int) -> tuple[int, int]:
    """The limits of prompts and completions, in the same proportion, that together take `room` tokens."""
    shorter = max(1, room * completion // (prompt + completion))
    return room - shorter, shorter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Limits on lengths, in tokens, and what happens to longer texts.

    Attributes:
      prompt: limit of a prompt, with BOS.
      completion: limit of a completion, with EOS.
      context: of the model; None does not check it.
      long_prompt: "drop" leaves the record out, "truncate_left" keeps BOS and the end, "error" stops the run.
      long_completion: "drop" leaves the record out, "truncate" keeps the start, without EOS.

    Raises:
      UserError: a limit is below 1, both limits exceed the context, or an unknown choice.
    """

    prompt: int
    completion: int
    context: int | None = None
    long_prompt: str = "drop"
    long_completion: str = "drop"

    def __post_init__(self):
        if min(self.prompt, self.completion) < 1:
            raise UserError(
                f"lengths: prompt {self.prompt} and completion {self.completion}: both must be at least 1; raise them"
            )
        if self.context is not None and self.prompt + self.completion > self.context:
            raise UserError(
                f"lengths: prompt {self.prompt} + completion {self.completion} tokens are more than the model's "
                f"context of {self.context}; lower --config.data.max_prompt or --config.data.max_completion"
            )
        for name, choices in (
            ("long_prompt", ("drop", "truncate_left", "error")),
            ("long_completion", ("drop", "truncate")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} {getattr(self, name)!r}: not one of {', '.join(choices)}; choose one of them")


# A row of a `TokenTable`: `index`, its place there; `prompt` and the answers of its kind, int32 [length] each; for each
# answer <name>_mask, bool [length], which tokens are scored, or None for all; and `user_id`, `objective`, `margin`,
# `preference`, `where` of its example.
TokenRow: TypeAlias = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TokenTable(Sequence[TokenRow]):
    """Tokenized examples in order.

    Attributes:
      kind: "prompt", "completion" or "preference".
      examples: the records themselves.
      tokens: "prompt" and the answers of `kind` -> int32 [length] for every example.
      bad: the examples that do not fit.
      masks: answers of `kind` -> bool [length] for every example, which tokens are scored; None for all of an answer.
        Without an entry, all tokens of all answers are scored.
      cut: "prompt" and the answers of `kind` -> how many were cut to the length limit.
    """

    kind: str
    examples: tuple[Example, ...]
    tokens: dict[str, tuple[np.ndarray, ...]]
    bad: BadRecords
    masks: dict[str, tuple[np.ndarray | None, ...]] = dataclasses.field(default_factory=dict)
    cut: dict[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> TokenRow:  # pyright: ignore[reportIncompatibleMethodOverride] - no slices
        example = self.examples[i]
        row = {name: getattr(example, name) for name in ("user_id", "objective", "margin", "preference", "where")}
        row |= {name: ids[i] for name, ids in self.tokens.items()} | {"index": range(len(self))[i]}
        return row | {f"{name}_mask": self.mask(name, i) for name in ANSWERS[self.kind]}

    @functools.cached_property
    def has_soft_labels(self) -> bool:
        """Whether it is uncertain of any pair which answer is the better one."""
        return any(example.preference not in (None, 1.0) for example in self.examples)

    def mask(self, name: str, i: int) -> np.ndarray | None:
        """Which tokens of an answer of row i are scored, bool [length]; None for all."""
        return self.masks[name][i] if name in self.masks else None

    def select(self, rows: Sequence[int]) -> "TokenTable":
        """The table of the given rows; its `index` starts at 0."""
        tokens, masks = (
            {name: tuple(items[i] for i in rows) for name, items in columns.items()}
            for columns in (self.tokens, self.masks)
        )
        examples = tuple(self.examples[i] for i in rows)
        return dataclasses.replace(self, examples=examples, tokens=tokens, masks=masks)


def cut_left(ids: list[int], limit: int, bos_id: int | None) -> list[int]:
    """The last `limit` ids of a prompt, with its BOS where it starts with one."""
    if len(ids) <= limit:
        return ids
    start = ids[:1] if ids[0] == bos_id and limit > 1 else []
    return start + ids[len(ids) - limit + len(start) :]


class EncodedRow(NamedTuple):
    """An example as tokens: ids by name, masks by name of an answer, and names of what was cut."""

    ids: dict[str, list[int]]
    masks: dict[str, np.ndarray | None]
    cut: list[str]


# What becomes of an example: its rows, or why it does not fit.
Encoded: TypeAlias = list[tuple[Example | None, EncodedRow]] | RecordError
Encode: TypeAlias = Callable[[Sequence[Example]], list[Encoded]]
Shared: TypeAlias = Callable[[Sequence[Example], Encode], list[Encoded]]


def alone(examples: Sequence[Example], encode: Encode) -> list[Encoded]:
    """`Shared` of a process that encodes all examples itself."""
    return encode(examples)


def tokenize(
    examples: Sequence[Example],
    kind: str,
    tokenizer: Tokenizer,
    lengths: Lengths,
    *,
    source_name: str = "examples",
    max_bad_fraction: float = 0.01,
    shared: Shared = alone,
) -> TokenTable:
    """Tokenizes examples of one kind. Those that do not fit the lengths are left out, logged and kept in `bad`; those
    that are cut to them are counted.

    A completion of several turns whose earlier turns the chat template rewrites becomes one row per turn of the
    assistant, each after the text that the model reads before it.

    Args:
      kind: "prompt", "completion" or "preference".
      source_name: the name of the examples in messages.
      max_bad_fraction: a larger fraction of examples that do not fit is an error, in [0, 1].
      shared: who encodes which of the examples, such as `parallel.processes.in_shares`.

    Raises:
      UserError: more than `max_bad_fraction` of the examples do not fit, or all; or a prompt is too long and
        `lengths.long_prompt` is "error".
    """
    names = ANSWERS[kind]
    kept: list[Example] = []
    rows: list[EncodedRow] = []
    bad = BadRecords(source_name, len(examples))
    encode = functools.partial(_encoded, kind=kind, tokenizer=tokenizer, lengths=lengths)
    for example, found in zip(examples, shared(examples, encode), strict=True):
        if isinstance(found, RecordError):
            bad.add(example.where, found)
            continue
        kept += [turn or example for turn, _ in found]
        rows += [row for _, row in found]
    bad.check(max_bad_fraction)
    table = TokenTable(
        kind,
        tuple(kept),
        {name: tuple(np.asarray(row.ids[name], np.int32) for row in rows) for name in ("prompt", *names)},
        bad,
        {name: tuple(row.masks[name] for row in rows) for name in names},
        {name: sum(name in row.cut for row in rows) for name in ("prompt", *names)},
    )
    if counts := ", ".join(f"{count} {name}s" for name, count in table.cut.items() if count):
        logging.info(
            "%s: cut to the length limits (prompt %d, completion %d): %s of %d rows; data.max_prompt and "
            "data.max_completion raise them",
            *(source_name, lengths.prompt, lengths.completion, counts, len(table)),
        )
    return table


def _encoded(examples: Sequence[Example], kind: str, tokenizer: Tokenizer, lengths: Lengths) -> list[Encoded]:
    """What becomes of each example; raises UserError as `encode_example` does."""
    found: list[Encoded] = []
    for example in examples:
        try:
            found.append(list(_rows(example, kind, tokenizer, lengths)))
        except RecordError as error:
            found.append(error)
    return found


def _rows(
    example: Example, kind: str, tokenizer: Tokenizer, lengths: Lengths
) -> Iterator[tuple[Example | None, EncodedRow]]:
    """The rows of an example, each with the turn that it is, None where it is the whole; errors are those of
    `encode_example`.
    """
    try:
        yield None, encode_example(example, kind, tokenizer, lengths)
    except RewrittenTurns:
        prompt, answer = example.prompt, example.completion
        if not isinstance(prompt, list) or not isinstance(answer, list):  # a preference record
            raise
        for i, message in enumerate(answer):
            if message["role"] == "assistant":
                before = Conversation([*prompt, *answer[:i]], options_of(prompt))
                turn = dataclasses.replace(example, prompt=before, completion=[message])
                yield turn, encode_example(turn, kind, tokenizer, lengths)


def encode_example(example: Example, kind: str, tokenizer: Tokenizer, lengths: Lengths) -> EncodedRow:
    """An example within the lengths.

    Raises:
      RecordError: a text is too long or has no tokens, or both answers have the same ids.
    """
    names = ANSWERS[kind]
    if names:
        prompt, answers = tokenizer.encode_answers(example.prompt, [getattr(example, name) for name in names])
    else:
        prompt, answers = tokenizer.encode_prompt(example.prompt), []
    cut = []
    if len(prompt) > lengths.prompt:
        detail = f"{len(prompt)} tokens, the limit is {lengths.prompt}"
        if lengths.long_prompt == "drop":
            ways = "raise --config.data.max_prompt, or cut prompts with --config.data.long_prompt=truncate_left"
            raise RecordError("prompt too long", f"{detail}; {ways}")
        if lengths.long_prompt == "error":
            raise UserError(
                f"{example.where}: prompt too long ({detail}); raise --config.data.max_prompt, or drop or shorten "
                "such prompts with --config.data.long_prompt=drop or truncate_left"
            )
        prompt = cut_left(prompt, lengths.prompt, tokenizer.bos_id)
        cut.append("prompt")
    ids, masks = {"prompt": prompt}, {}
    for name, answer in zip(names, answers, strict=True):
        if len(answer.ids) > lengths.completion:
            if lengths.long_completion == "drop":
                ways = "raise --config.data.max_completion, or cut answers with --config.data.long_completion=truncate"
                detail = f"{len(answer.ids)} tokens, the limit is {lengths.completion}"
                raise RecordError(f"{name} too long", f"{detail}; {ways}")
            cut.append(name)
        ids[name], scored = answer.ids[: lengths.completion], answer.scored[: lengths.completion]
        masks[name] = None if all(scored) else np.array(scored)
        if not any(scored):
            raise RecordError(f"{name} too long", f"its first {lengths.completion} tokens are not the assistant's")
    if kind == "preference" and ids["chosen"] == ids["rejected"]:
        raise RecordError("chosen equals rejected", f"in the first {len(ids['chosen'])} tokens")
    return EncodedRow(ids, masks, cut)
