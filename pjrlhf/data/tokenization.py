"""Tokenizes records once: chat template, one BOS, one EOS, and the boundary between prompt and answer, which is found
among the tokens.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, TypeAlias

import numpy as np
from absl import logging

from pjrlhf.data.records import BadRecords, RecordError
from pjrlhf.data.schema import Example, Prompt, shared_length
from pjrlhf.errors import UserError
from pjrlhf.terminal import quiet_libraries
from pjrlhf.types import Json

# Kind of record -> its answers.
ANSWERS = {
    "prompt": (),
    "completion": ("completion",),
    "preference": ("chosen", "rejected"),
}


class Tokenizer:
    """A Hugging Face tokenizer that sets exactly one BOS and one EOS, and finds the boundary of prompt and answer.

    Attributes:
      backend: the `transformers` tokenizer.
      eos_id, bos_id, unk_id: ids of the special tokens; None where the tokenizer has none (`eos_id` always exists).
      pad_id: fills rows. Masks decide what is scored and attended to, so it may equal `eos_id`.
      vocab_size: the largest id plus 1.
      rows: the number of ids that the model knows. Of the others none is ever given out.
      add_bos: whether text starts with BOS.
    """

    def __init__(
        self, backend: Any, *, eos_token: str | None = None, add_bos: bool | None = None, rows: int | None = None
    ):
        """
        Args:
          backend: a `transformers` tokenizer.
          eos_token: a token of the vocabulary that becomes EOS; the EOS of the backend where None.
          add_bos: whether text starts with BOS; as the backend does where None.
          rows: of the model's embedding; None for a model that is made for this tokenizer.

        Raises:
          UserError: the backend has no EOS, `eos_token` is not in the vocabulary, or EOS or BOS has no row in the
            embedding.
        """
        vocabulary = backend.get_vocab()
        if eos_token is not None:
            if eos_token not in vocabulary:
                raise UserError(f"eos_token {eos_token!r}: not in the tokenizer's vocabulary; name one of its tokens")
            backend.add_special_tokens({"eos_token": eos_token})
        if backend.eos_token_id is None:
            raise UserError(
                f"tokenizer {backend.name_or_path or type(backend).__name__}: has no end-of-sequence token, so answers "
                "cannot end; name one of its tokens with --config.model.eos_token=..."
            )
        self.backend = backend
        self.eos_id: int = backend.eos_token_id
        self.bos_id: int | None = backend.bos_token_id
        self.unk_id: int | None = backend.unk_token_id
        self.vocab_size = max(vocabulary.values()) + 1
        self.rows = self.vocab_size if rows is None else rows
        for name, i in (("EOS", self.eos_id), ("BOS", self.bos_id)):
            if i is not None and i >= self.rows:
                remedy = "use the tokenizer that came with the model"
                if name == "EOS":
                    remedy += ", or name another token with --config.model.eos_token=..."
                raise UserError(f"tokenizer {backend.name_or_path}: {name} {self._unknown(i)}; {remedy}")
        self.has_chat_template = bool(backend.chat_template)
        fillers = (backend.pad_token_id, backend.unk_token_id)
        others = [i for i in fillers if i is not None and i != self.eos_id and i < self.rows]
        self.pad_id: int = others[0] if others else self.eos_id
        if self.pad_id != backend.pad_token_id:
            logging.info("no padding token that the model knows; padding with %r", self.decode([self.pad_id], False))
        if add_bos is None:
            add_bos = self.bos_id is not None and backend("")["input_ids"][:1] == [self.bos_id]
        self.add_bos = add_bos

    @property
    def start_id(self) -> int:
        """The token before an answer to an empty prompt: BOS, or EOS where the tokenizer has no BOS."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, at least one. A conversation ends with the generation prompt of the chat template.

        Text starts with one BOS where the tokenizer uses BOS; in a conversation the template decides.

        Raises:
          RecordError: the template refuses the conversation.
          UserError: the prompt is a conversation and the tokenizer has no chat template.
        """
        (ids,) = self._encode([self._render(prompt)], bos=isinstance(prompt, str))
        return ids or [self.start_id]

    def encode_answers(self, prompt: Prompt, answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Ids of a prompt and of its answers: prompt + answer are the ids of the whole text, followed by one EOS.

        The prompt ends before the first token in which a whole text differs from the prompt alone. A token that
        straddles the boundary therefore belongs to the answer and is scored.

        Returns:
          (prompt ids, ids of every answer).

        Raises:
          RecordError: an answer has no token, or has an EOS before its end; or the template refuses the conversation.
          UserError: the prompt is a conversation and the tokenizer has no chat template.
        """
        texts = [self._render(prompt), *(self._render(prompt, answer) for answer in answers)]
        alone, *whole = self._encode(texts, bos=isinstance(prompt, str))
        boundary = min(shared_length(alone, ids) for ids in whole)
        if boundary < len(alone) and not isinstance(prompt, str):
            logging.log_first_n(
                logging.WARNING,
                "the chat template omits its generation prompt before an answer: prompts end with %r in training, and "
                "with %r in generation",
                1,
                self.decode(alone[:boundary], False)[-40:],
                self.decode(alone, False)[-40:],
            )
        answer_ids = [ids[boundary:] for ids in whole]
        for ids in answer_ids:
            if not ids:
                raise RecordError("answer without tokens")
            if self.eos_id in ids:
                raise RecordError(
                    "end-of-sequence inside an answer", f"the token {self.backend.eos_token!r} before its end"
                )
        return alone[:boundary] or [self.start_id], [[*ids, self.eos_id] for ids in answer_ids]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; `skip_special` leaves out special tokens."""
        return self.backend.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the files that `load_tokenizer` and `transformers` read."""
        self.backend.save_pretrained(str(folder))

    def _render(self, prompt: Prompt, answer: str | None = None) -> str:
        """The text of a prompt with its generation prompt, or of prompt and answer without the final EOS."""
        if isinstance(prompt, str):
            return prompt if answer is None else prompt + self._without_eos(answer)
        if not self.has_chat_template:
            raise UserError(
                "prompt: is a conversation, and the tokenizer has no chat template; add chat_template to "
                "tokenizer_config.json, or give prompts as text"
            )
        messages = prompt if answer is None else [*prompt, {"role": "assistant", "content": answer}]
        try:
            text = self.backend.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
        except Exception as error:  # a template is code, and raises what it likes
            raise RecordError(
                "refused by the chat template", " ".join(str(error).split()) or "no reason given"
            ) from error
        return text if answer is None else self._without_eos(text)

    def _without_eos(self, text: str) -> str:
        """`text` without the EOS tokens at its end, which templates and some data sets write, and the space after."""
        while (cut := text.rstrip()).endswith(self.backend.eos_token):
            text = cut.removesuffix(self.backend.eos_token)
        return text

    def _encode(self, texts: list[str], *, bos: bool) -> list[list[int]]:
        rows = self.backend(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if unknown := max((i for ids in rows for i in ids if i >= self.rows), default=0):
            raise RecordError("has a token that the model does not know", self._unknown(unknown))
        start = self.bos_id
        if not self.add_bos or start is None:
            return rows
        return [[start] * (bos or ids[:1] == [start]) + _drop_leading(ids, start) for ids in rows]

    def _unknown(self, i: int) -> str:
        """What is wrong with an id beyond the embedding."""
        return f"{self.backend.convert_ids_to_tokens(i)!r} has id {i}, and the model's embedding has {self.rows} rows"


def _drop_leading(ids: list[int], token: int) -> list[int]:
    return ids[next((i for i, x in enumerate(ids) if x != token), len(ids)) :]


def load_tokenizer(folder: str | os.PathLike, *, eos_token: str | None = None, rows: int | None = None) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face folder; the file tokenizer.json is enough, and no code of the folder runs.

    Args:
      eos_token, rows: see `Tokenizer`.

    Raises:
      UserError: `transformers` cannot load a tokenizer from the folder, the tokenizer has no EOS, or the model does not
        know its EOS or BOS.
    """
    quiet_libraries()
    from transformers import AutoTokenizer

    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"tokenizer {folder}: no such folder; give one with a tokenizer.json")
    try:
        backend = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the library `tokenizers` raises nothing narrower
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"tokenizer {folder}: {reason}; give a folder with a tokenizer.json that transformers "
            f"{metadata.version('transformers')} and tokenizers {metadata.version('tokenizers')} can read"
        ) from error
    settings = folder / "tokenizer_config.json"
    # transformers 5 ignores this setting for the classes that it replaces with its own.
    add_bos = json.loads(settings.read_text()).get("add_bos_token") if settings.is_file() else None
    add_bos = add_bos if backend.bos_token_id is not None else False
    return Tokenizer(backend, eos_token=eos_token, add_bos=add_bos, rows=rows)


def write_folder(folder: pathlib.Path, tokenizer: Any, **settings: Json) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
      tokenizer: of the library `tokenizers`, with the special tokens <s>, </s> and <pad>.
      settings: further keys of tokenizer_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


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
                f"context of {self.context}; shorten one of them"
            )
        for name, choices in (
            ("long_prompt", ("drop", "truncate_left", "error")),
            ("long_completion", ("drop", "truncate")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} {getattr(self, name)!r}: not one of {', '.join(choices)}; choose one of them")


# A row of a `TokenTable`: `index`, its place there; `prompt` and the answers of its kind, int32 [length] each; and
# `user_id`, `objective`, `margin`, `where` of its example.
TokenRow: TypeAlias = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TokenTable(Sequence[TokenRow]):
    """Tokenized examples in order.

    Attributes:
      kind: "prompt", "completion" or "preference".
      examples: the records themselves.
      tokens: "prompt" and the answers of `kind` -> int32 [length] for every example.
      bad: the examples that do not fit.
    """

    kind: str
    examples: tuple[Example, ...]
    tokens: dict[str, tuple[np.ndarray, ...]]
    bad: BadRecords

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> TokenRow:  # pyright: ignore[reportIncompatibleMethodOverride] - no slices
        example = self.examples[i]
        row = {name: getattr(example, name) for name in ("user_id", "objective", "margin", "where")}
        return row | {name: ids[i] for name, ids in self.tokens.items()} | {"index": range(len(self))[i]}

    def select(self, rows: Sequence[int]) -> "TokenTable":
        """The table of the given rows; its `index` starts at 0."""
        tokens = {name: tuple(ids[i] for i in rows) for name, ids in self.tokens.items()}
        return dataclasses.replace(self, examples=tuple(self.examples[i] for i in rows), tokens=tokens)


def cut_left(ids: list[int], limit: int, bos_id: int | None) -> list[int]:
    """The last `limit` ids of a prompt, with its BOS where it starts with one."""
    if len(ids) <= limit:
        return ids
    start = ids[:1] if ids[0] == bos_id and limit > 1 else []
    return start + ids[len(ids) - limit + len(start) :]


def tokenize(
    examples: Sequence[Example],
    kind: str,
    tokenizer: Tokenizer,
    lengths: Lengths,
    *,
    source_name: str = "examples",
    max_bad_fraction: float = 0.01,
) -> TokenTable:
    """Tokenizes examples of one kind. Those that do not fit the lengths are left out, logged and kept in `bad`.

    Args:
      kind: "prompt", "completion" or "preference".
      source_name: the name of the examples in messages.
      max_bad_fraction: a larger fraction of examples that do not fit is an error, in [0, 1].

    Raises:
      UserError: more than `max_bad_fraction` of the examples do not fit, or all; or a prompt is too long and
        `lengths.long_prompt` is "error".
    """
    kept, rows, bad = [], [], BadRecords(source_name, len(examples))
    for example in examples:
        try:
            rows.append(_fit(example, kind, tokenizer, lengths))
            kept.append(example)
        except RecordError as error:
            bad.add(example.where, error)
    bad.check(max_bad_fraction)
    columns = zip(*rows, strict=True)
    as_ids = functools.partial(np.asarray, dtype=np.int32)
    tokens = {name: tuple(map(as_ids, ids)) for name, ids in zip(("prompt", *ANSWERS[kind]), columns, strict=True)}
    return TokenTable(kind, tuple(kept), tokens, bad)


def _fit(example: Example, kind: str, tokenizer: Tokenizer, lengths: Lengths) -> list[list[int]]:
    """Ids of the prompt and of every answer, within the lengths.

    Raises:
      RecordError: a text is too long or has no tokens, or both answers have the same ids.
    """
    names = ANSWERS[kind]
    if names:
        prompt, answers = tokenizer.encode_answers(example.prompt, [getattr(example, name) for name in names])
    else:
        prompt, answers = tokenizer.encode_prompt(example.prompt), []
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
    for name, ids in zip(names, answers, strict=True):
        if len(ids) > lengths.completion and lengths.long_completion == "drop":
            ways = "raise --config.data.max_completion, or cut answers with --config.data.long_completion=truncate"
            detail = f"{len(ids)} tokens, the limit is {lengths.completion}"
            raise RecordError(f"{name} too long", f"{detail}; {ways}")
    answers = [ids[: lengths.completion] for ids in answers]
    if kind == "preference" and answers[0] == answers[1]:
        raise RecordError("chosen equals rejected", f"in the first {len(answers[0])} tokens")
    return [prompt, *answers]
