"""Text as token ids: chat template, one BOS, one token that ends each answer, and the boundary between prompt and
answer, which is found among the tokens.
"""

import functools
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from pjrlhf.data.chat_template import ChatTemplate, check_template
from pjrlhf.data.messages import (
    Answer,
    Message,
    Prompt,
    text_of,
)
from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import shared_length
from pjrlhf.data.tokenizer_files import load_backend, setting_of
from pjrlhf.errors import UserError
from pjrlhf.models.hf_config import read_eos_ids


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
        self._template = ChatTemplate(backend)
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
        text = prompt if isinstance(prompt, str) else self._template.render(prompt, generate=True)
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
            render = functools.partial(self._template.render, prompt)
            texts = [render(generate=True), *map(render, turns)]
        alone, *whole = self._encode(texts, bos=isinstance(prompt, str))
        boundary = min(shared_length(alone, ids) for ids in whole)
        if boundary < len(alone) and not isinstance(prompt, str):
            asked = self._template.render(prompt).rstrip()
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
            scored = [False] * (len(ids) - boundary)
            for span in spans:
                scored[span.start - boundary : span.stop - boundary] = [True] * len(span)
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
            render = functools.partial(self._template.render, prompt)
            before, after = self._encode([render(answer[:i], generate=True), render(answer[: i + 1])], bos=False)
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

    def unknown(self, ids: Sequence[int] | np.ndarray) -> int:
        """How many tokens stand for a text that the tokenizer does not know. Where that token also begins or ends a
        text, as in GPT-2, whose tokenizer knows all texts, there are none.
        """
        if self.unk_id in (None, self.bos_id, *self.eos_ids):
            return 0
        return int(np.count_nonzero(np.asarray(ids) == self.unk_id))

    def misfit(self, unknown: int, total: int) -> str:
        """A warning for texts of `total` tokens, of which so many are unknown; empty where these are at most 1 %."""
        if unknown <= total / 100:
            return ""
        return (
            f"the tokenizer does not know {100 * unknown / total:.1f} % of all tokens: a model reads each of them as "
            f"{self.decode([self.unk_id or 0], False)}; choose a model whose tokenizer knows the language of these "
            "records"
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
