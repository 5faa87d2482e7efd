"""Tokenizes records once: chat template, one BOS, one token that ends each answer, and the boundary between prompt and
answer, which is found among the tokens.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple, TypeAlias

import jinja2
import numpy as np
from absl import logging

from pjrlhf.data.messages import (
    SAID,
    SYSTEM,
    Answer,
    Conversation,
    Message,
    Prompt,
    as_turns,
    options_of,
    text_of,
    what_needs_template,
    without_system,
    without_template,
)
from pjrlhf.data.records import BadRecords, RecordError
from pjrlhf.data.schema import Example, shared_length
from pjrlhf.errors import UserError
from pjrlhf.models.folders import read_json
from pjrlhf.models.hf_config import read_eos_ids
from pjrlhf.terminal import quiet_libraries
from pjrlhf.types import Json

# Kind of record -> its answers.
ANSWERS = {
    "prompt": (),
    "completion": ("completion",),
    "preference": ("chosen", "rejected"),
}


class RewrittenTurns(RecordError):
    """The chat template renders an earlier turn of the assistant otherwise once more turns follow."""

    def __init__(self):
        super().__init__("chat template rewrites earlier turns", "so an answer of several turns is no one text")


class AnswerIds(NamedTuple):
    """An answer as token ids.

    Attributes:
      ids: tokens, with one that ends the answer.
      scored: which tokens the assistant wrote; between its turns lie those of tools and users.
    """

    ids: list[int]
    scored: list[bool]


class Tokenizer:
    """A Hugging Face tokenizer that sets exactly one BOS and one EOS, and finds the boundary of prompt and answer.

    Attributes:
      backend: the `transformers` tokenizer.
      eos_id, bos_id, unk_id: ids of the special tokens; None where the tokenizer has none (`eos_id` always exists).
      eos_ids: all tokens that end an answer, `eos_id` first. Chat models end a turn with a token of their own, and
        which one depends on the model: the chat template, config.json and generation_config.json name them.
      pad_id: fills rows. Masks decide what is scored and attended to, so it may equal `eos_id`.
      vocab_size: the largest id plus 1.
      rows: the number of ids that the model knows. Of the others none is ever given out.
      add_bos: whether text starts with BOS.
    """

    def __init__(
        self,
        backend: Any,
        *,
        eos_token: str | None = None,
        add_bos: bool | None = None,
        rows: int | None = None,
        eos_ids: Sequence[int] = (),
    ):
        """
        Args:
          backend: a `transformers` tokenizer.
          eos_token: a token of the vocabulary that becomes EOS; the EOS of the backend where None.
          add_bos: whether text starts with BOS; as the backend does where None.
          rows: of the model's embedding; None for a model that is made for this tokenizer.
          eos_ids: further tokens that end an answer, those of the model's config files.

        Raises:
          UserError: there is no EOS, `eos_token` is not in the vocabulary, or EOS or BOS has no row in the embedding.
        """
        vocabulary = backend.get_vocab()
        if eos_token is not None:
            if eos_token not in vocabulary:
                raise UserError(f"eos_token {eos_token!r}: not in the tokenizer's vocabulary; name one of its tokens")
            backend.add_special_tokens({"eos_token": eos_token})
        eos_ids = [i for i in eos_ids if self._is_special(backend, i, rows)]
        if backend.eos_token_id is None and eos_ids:
            backend.add_special_tokens({"eos_token": backend.convert_ids_to_tokens(eos_ids[0])})
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
        if self.has_chat_template:
            check_template(backend)
        fillers = (backend.pad_token_id, backend.unk_token_id)
        others = [i for i in fillers if i is not None and i != self.eos_id and i < self.rows]
        self.pad_id: int = others[0] if others else self.eos_id
        if self.pad_id != backend.pad_token_id:
            logging.info("no padding token that the model knows; padding with %r", self.decode([self.pad_id], False))
        if add_bos is None:
            add_bos = self.bos_id is not None and backend("")["input_ids"][:1] == [self.bos_id]
        self.add_bos = add_bos
        turn_end = self._turn_end() if self.has_chat_template else None
        if turn_end is not None and turn_end not in (self.eos_id, *eos_ids):
            logging.info(
                "the chat template ends a turn with %r, which the configuration of the model does not name as EOS; it "
                "ends answers too",
                self.decode([turn_end], False),
            )
        self.eos_ids: tuple[int, ...] = tuple(
            dict.fromkeys([self.eos_id, *eos_ids, *([] if turn_end is None else [turn_end])])
        )

    @property
    def eos_tokens(self) -> list[str]:
        """The tokens that end an answer: the one that answers are trained to end with, then the others by id."""
        return self.backend.convert_ids_to_tokens([self.eos_id, *sorted({*self.eos_ids} - {self.eos_id})])

    @staticmethod
    def _is_special(backend: Any, token: int, rows: int | None) -> bool:
        """Whether a token of a config file can end an answer; ordinary text must not."""
        if token in backend.added_tokens_decoder and (rows is None or token < rows):
            return True
        name = backend.convert_ids_to_tokens(token) if token < len(backend) else None
        logging.warning(
            "the configuration of the model names token %d as EOS, which is %s; it does not end answers",
            token,
            "not in the tokenizer or the model"
            if name is None or token >= (rows or math.inf)
            else f"the ordinary {name!r}",
        )
        return False

    def _turn_end(self) -> int | None:
        """The token that the chat template writes after an answer; None, with a warning, where it writes other text."""
        marker = "An answer"
        conversation = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": marker}]
        try:
            text = self.backend.apply_chat_template(conversation, tokenize=False)
        except Exception as error:  # templates are programs, and this one may want other messages
            logging.info("the chat template refuses a plain conversation (%s)", error)
            return None
        _, found, tail = text.rpartition(marker)
        if not found or not tail.strip():
            return None
        ids = self.backend(tail.lstrip(), add_special_tokens=False, verbose=False)["input_ids"]
        if ids and ids[0] in self.backend.added_tokens_decoder and ids[0] < self.rows:
            return ids[0]
        logging.warning(
            "the chat template ends a turn with %r, which is no special token: answers end with %r instead; name the "
            "token that ends a turn with --config.model.eos_token",
            tail,
            self.backend.eos_token,
        )
        return None

    @property
    def start_id(self) -> int:
        """The token before an answer to an empty prompt: BOS, or EOS where the tokenizer has no BOS."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def encode_prompt(self, prompt: Prompt, start: str = "") -> list[int]:
        """Ids of a prompt, at least one. A conversation ends with the generation prompt of the chat template.

        Text starts with one BOS where the tokenizer uses BOS; in a conversation the template decides.

        Args:
          start: what the answer starts with.

        Raises:
          RecordError: the template refuses the conversation.
          UserError: the prompt is a conversation and the tokenizer has no chat template.
        """
        text = prompt if isinstance(prompt, str) else self._render(prompt, generate=True)
        (ids,) = self._encode([text + start], bos=isinstance(prompt, str))
        return ids or [self.start_id]

    def encode_answers(self, prompt: Prompt, answers: Sequence[Answer]) -> tuple[list[int], list["AnswerIds"]]:
        """Ids of a prompt and of its answers: prompt + answer are the ids of the whole text up to the first token that
        ends it, one of `eos_ids`; `eos_id` is added where the text has none.

        The prompt ends before the first token in which a whole text differs from the prompt alone. A token that
        straddles the boundary therefore belongs to the answer and is scored.

        Returns:
          (prompt ids, every answer).

        Raises:
          RecordError: an answer has no token, or has an EOS before its end; the template refuses the conversation, does
            not render all of a message, or renders the prompt otherwise once it is answered.
          RewrittenTurns: a `RecordError`, for an answer of several turns.
          UserError: the prompt is a conversation and the tokenizer has no chat template.
        """
        if isinstance(prompt, str):
            texts = [prompt, *(prompt + text_of(answer) for answer in answers)]
        else:
            turns = [_turns(answer) for answer in answers]
            texts = [self._render(prompt, generate=True), *(self._render(prompt, more) for more in turns)]
        alone, *whole = self._encode(texts, bos=isinstance(prompt, str))
        boundary = min(shared_length(alone, ids) for ids in whole)
        if boundary < len(alone) and not isinstance(prompt, str):
            asked = self._render(prompt).rstrip()
            if not all(text.startswith(asked) for text in texts):
                raise RecordError(
                    "the chat template rewrites a prompt once it is answered", "the prompt is not what the model read"
                )
            logging.log_first_n(
                logging.WARNING,
                "the chat template omits its generation prompt before an answer: prompts end with %r in training, and "
                "with %r in generation",
                1,
                self.decode(alone[:boundary], False)[-40:],
                self.decode(alone, False)[-40:],
            )
        encoded = []
        for answer, ids in zip(answers, whole, strict=True):
            ids = [*ids[:boundary], *self._ended(ids[boundary:])]
            spans = [range(boundary, len(ids))]
            if isinstance(prompt, list) and isinstance(answer, list) and len(answer) > 1:
                spans = self._spans(prompt, answer, ids)
            self._check_spans(ids, spans)
            scored = [any(i in span for span in spans) for i in range(boundary, len(ids))]
            encoded.append(AnswerIds(ids[boundary:], scored))
        return alone[:boundary] or [self.start_id], encoded

    def _ended(self, ids: list[int]) -> list[int]:
        """`ids` up to the first token of `eos_ids` that only such tokens and white space follow; `eos_id` is added
        where there is none.
        """
        end = len(ids)
        for i in range(len(ids) - 1, -1, -1):
            if ids[i] in self.eos_ids:
                end = i
            elif self.decode(ids[i : i + 1], False).strip():
                break
        return [*ids[:end], ids[end] if end < len(ids) else self.eos_id]

    def _spans(self, prompt: list[Message], answer: list[Message], whole: list[int]) -> list[range]:
        """Where the turns of the assistant lie in `whole`, the ids of prompt and answer.

        A turn begins after what the model reads before it, and ends with its first token of `eos_ids`.

        Raises:
          RewrittenTurns: the text of a turn is not what the model reads and writes there.
        """
        spans = []
        for i in (i for i, message in enumerate(answer) if message["role"] == "assistant"):
            texts = self._render(prompt, answer[:i], generate=True), self._render(prompt, answer[: i + 1])
            before, after = self._encode(list(texts), bos=False)
            start = shared_length(before, after)
            after = [*after[:start], *self._ended(after[start:])]
            last = i == len(answer) - 1
            if not last and after[-1] == self.eos_id and whole[len(after) - 1 : len(after)] != after[-1:]:
                after = after[:-1]  # nothing in the text ends this turn
            if whole[: len(after)] != after or start < (spans[-1].stop if spans else 0):
                raise RewrittenTurns()
            spans.append(range(start, len(after)))
        return spans

    def _check_spans(self, ids: list[int], spans: Sequence[range]) -> None:
        """Raises RecordError for a turn without tokens, or with an EOS before its end."""
        for span in spans:
            turn = ids[span.start : span.stop]
            if turn and turn[-1] in self.eos_ids:
                turn.pop()
            if not turn:
                raise RecordError("answer without tokens")
            if early := [i for i in turn if i in self.eos_ids]:
                raise RecordError(
                    "end-of-sequence inside an answer", f"the token {self.decode(early[:1], False)!r} before its end"
                )

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; `skip_special` leaves out special tokens."""
        return self.backend.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )

    def decode_answer(self, ids: Sequence[int], prompt: Sequence[int] | None = None) -> str:
        """The text of a sampled answer, without special tokens and without the token that ended it.

        Args:
          prompt: ids of a plain-text prompt, after which the answer keeps its leading space, so that prompt + answer is
            the whole text. None where the answer is a turn of a conversation: white space around it is dropped.
        """
        ids = list(ids[:-1] if len(ids) and int(ids[-1]) in self.eos_ids else ids)
        if prompt is None:
            return self.decode(ids).strip()
        return self.decode([*prompt, *ids])[len(self.decode(prompt)) :]

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the files that `load_tokenizer` and `transformers` read."""
        self.backend.save_pretrained(str(folder))

    def _render(self, prompt: list[Message], more: Sequence[Message] = (), *, generate: bool = False) -> str:
        """The text of a conversation, with its generation prompt where it is the assistant's turn."""
        if not self.has_chat_template:
            raise UserError(
                f"prompt: {what_needs_template(prompt)}, and the tokenizer has no chat template; add chat_template to "
                f"tokenizer_config.json, or {without_template(prompt)}"
            )
        if any(message["role"] in SYSTEM for message in (*prompt, *more)) and not self._knows_system:
            prompt, more = Conversation(without_system(prompt), options_of(prompt)), without_system(more)
        try:
            text = self._apply([*prompt, *more], generate, options_of(prompt))
        except RecordError as error:
            # A template that knows no tool calls fails at a message without content.
            unknown = [name for name in SAID if not self._reads(name) and any(m.get(name) for m in [*prompt, *more])]
            if unknown:
                raise RecordError(f"{unknown[0]} unknown to the chat template", str(error)) from error
            raise
        for name, messages, options in self._ignorable(prompt, more):
            try:
                ignored = self._apply(messages, generate, options) == text
            except RecordError:  # the template needs it
                ignored = False
            if ignored:
                raise RecordError(f"{name} ignored by the chat template", "leave it out, or use another template")
        return text

    @functools.cached_property
    def _knows_system(self) -> bool:
        """Whether the chat template writes what a system turn says: some refuse such a turn, some leave it out, and
        some leave it out once the assistant has answered.
        """
        instruction, question = "An instruction", as_turns("A question")
        system, answer = {"role": "system", "content": instruction}, {"role": "assistant", "content": "An answer"}
        try:
            self._apply(question, True, {})
        except RecordError:
            return True  # it refuses more than that
        try:
            texts = [self._apply([system, *question], True, {}), self._apply([system, *question, answer], False, {})]
            found = all(instruction in text for text in texts)
        except RecordError:
            found = False
        if not found:  # said once, for the first conversation with a system turn
            logging.warning(
                "the chat template knows no system role: what a system turn says begins the next message of the user"
            )
        return found

    def _ignorable(
        self, prompt: list[Message], more: Sequence[Message]
    ) -> Iterator[tuple[str, list[Message], dict[str, Any]]]:
        """What the template may leave out of the text, as (name, messages and options without it).

        Templates may drop the reasoning of earlier turns, but what the last turn of an answer says must be there.
        """
        options, messages = options_of(prompt), [*prompt, *more]
        for name, value in options.items():
            if value and not re.search(rf"{{[{{%][^}}]*\b{re.escape(name)}\b", str(self.backend.chat_template)):
                yield name, messages, {key: item for key, item in options.items() if key != name}
        for name in SAID:
            last = len(messages) - 1 if more and more[-1].get(name) else 0
            if last or (not self._reads(name) and any(message.get(name) for message in messages)):
                without = [{key: item for key, item in message.items() if key != name} for message in messages[last:]]
                yield name, [*messages[:last], *without], options

    def _reads(self, name: str) -> bool:
        """Whether the chat template reads a key of messages, as far as its text tells."""
        return bool(re.search(rf"(\.|['\"]){name}\b", str(self.backend.chat_template)))

    def _apply(self, messages: Sequence[Message], generate: bool, options: Mapping[str, Any]) -> str:
        try:
            return self.backend.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generate, **options
            )
        except Exception as error:  # a template is a program that may fail in any way
            reason = " ".join(str(error).split()) or "no reason given"
            raise RecordError("refused by the chat template", reason) from error

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


def check_template(backend: Any) -> None:
    """Refuses a chat template that is no program, and warns of one that writes today's date.

    Raises:
      UserError: it cannot be read as a template.
    """
    place = f"tokenizer {backend.name_or_path or type(backend).__name__}"
    try:
        template = backend.get_chat_template()
        if not isinstance(template, str):
            raise TypeError(f"a {type(template).__name__}, no text")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateSyntaxError as error:
        # Templates may use tags of extensions that `transformers` adds.
        if "unknown tag" not in str(error):
            reason = " ".join(str(error).split())
            raise UserError(f"{place}: the chat template is no template ({reason}); correct it") from error
    except (TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{place}: the chat template cannot be used ({reason}); give it one, named default") from error
    else:
        if "strftime_now" in template:
            logging.warning(
                "%s: the chat template writes the date of today, so that another day gives other prompts; to fix it, "
                "give records chat_template_kwargs, such as date_string where the template reads that",
                place,
            )


def _turns(answer: Answer) -> list[Message]:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


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
    folder = pathlib.Path(folder)
    backend = load_backend(folder)
    add_bos = setting_of(folder, "add_bos_token")
    return Tokenizer(
        backend,
        eos_token=eos_token,
        add_bos=add_bos if backend.bos_token_id is not None else False,
        rows=rows,
        eos_ids=read_eos_ids(folder),
    )


def setting_of(folder: pathlib.Path, name: str) -> Json:
    """A setting in tokenizer_config.json; None where it is absent.

    transformers 5 ignores `add_bos_token` and `add_eos_token` for the classes that it replaces with its own.
    """
    file = folder / "tokenizer_config.json"
    return read_json(file).get(name) if file.is_file() else None


def load_backend(folder: pathlib.Path) -> Any:
    """The `transformers` tokenizer of a folder, whose code does not run.

    Raises:
      UserError: `transformers` cannot load a tokenizer from the folder.
    """
    quiet_libraries()
    from transformers import AutoTokenizer

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
    if not set(backend.get_vocab()) - set(backend.all_special_tokens):
        # Without files transformers makes one up from config.json.
        raise UserError(f"tokenizer {folder}: has no vocabulary; copy the tokenizer.json that came with the model")
    return backend


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


def tokenize(
    examples: Sequence[Example],
    kind: str,
    tokenizer: Tokenizer,
    lengths: Lengths,
    *,
    source_name: str = "examples",
    max_bad_fraction: float = 0.01,
) -> TokenTable:
    """Tokenizes examples of one kind. Those that do not fit the lengths are left out, logged and kept in `bad`; those
    that are cut to them are counted.

    A completion of several turns whose earlier turns the chat template rewrites becomes one row per turn of the
    assistant, each after the text that the model reads before it.

    Args:
      kind: "prompt", "completion" or "preference".
      source_name: the name of the examples in messages.
      max_bad_fraction: a larger fraction of examples that do not fit is an error, in [0, 1].

    Raises:
      UserError: more than `max_bad_fraction` of the examples do not fit, or all; or a prompt is too long and
        `lengths.long_prompt` is "error".
    """
    names = ANSWERS[kind]
    kept: list[Example] = []
    rows: list[_Row] = []
    bad = BadRecords(source_name, len(examples))
    for example in examples:
        try:
            pairs = list(_rows(example, kind, tokenizer, lengths))
        except RecordError as error:
            bad.add(example.where, error)
            continue
        kept += [one for one, _ in pairs]
        rows += [row for _, row in pairs]
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


class _Row(NamedTuple):
    """An example as tokens: ids by name, masks by name of an answer, and names of what was cut."""

    ids: dict[str, list[int]]
    masks: dict[str, np.ndarray | None]
    cut: list[str]


def _rows(example: Example, kind: str, tokenizer: Tokenizer, lengths: Lengths) -> Iterator[tuple[Example, _Row]]:
    """The rows of an example, each with the example that it is; errors are those of `_fit`."""
    try:
        yield example, _fit(example, kind, tokenizer, lengths)
    except RewrittenTurns:
        prompt, answer = example.prompt, example.completion
        if not isinstance(prompt, list) or not isinstance(answer, list):  # a preference record
            raise
        for i, message in enumerate(answer):
            if message["role"] == "assistant":
                before = Conversation([*prompt, *answer[:i]], options_of(prompt))
                turn = dataclasses.replace(example, prompt=before, completion=[message])
                yield turn, _fit(turn, kind, tokenizer, lengths)


def _fit(example: Example, kind: str, tokenizer: Tokenizer, lengths: Lengths) -> _Row:
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
    return _Row(ids, masks, cut)
