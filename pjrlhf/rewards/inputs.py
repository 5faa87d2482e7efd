"""What a classifier reads of a prompt and an answer: a template, and the tokens of its own tokenizer."""

import pathlib
import string
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from absl import logging

from pjrlhf.data.chat_template import check_template
from pjrlhf.data.messages import SYSTEM, Prompt, options_of, text_of, transcript
from pjrlhf.data.token_table import cut_left
from pjrlhf.data.tokenizer_files import load_backend, setting_of
from pjrlhf.errors import UserError, reason_of
from pjrlhf.rewards.sources import column_text, listed_columns
from pjrlhf.settings import shown

CHAT = "chat"  # the chat template of the classifier's tokenizer
FIELDS = ("prompt", "answer", "text", "transcript", "bos", "eos")
# Formats of public classifiers: a text, or the two texts of a pair. All but the first are those of RiC (arXiv
# 2402.10207): "transcript" of the reward models gpt2-large-harmless and -helpful, "answer" of humor-no-humor, "summary"
# of gpt2_reward_summarization, "faithful" of bart-faithful-summary-detector.
FORMATS: Mapping[str, str | tuple[str, str]] = {
    "pair": ("{prompt}", "{answer}"),
    "transcript": ("{transcript} \n\nAssistant:", "{answer}"),
    "answer": "{answer}",
    "summary": "{answer} {bos} {prompt}",
    "faithful": ("{answer}", "{prompt}"),
}
SIDES = ("left", "right")
_KNOWN = ", ".join(f"{{{field}}}" for field in FIELDS)

Row = dict[str, list[int]]  # "input_ids", and what else the tokenizer gives, such as "token_type_ids"


class Inputs:
    """The rows of token ids that a classifier reads.

    Args:
      name: of the setting, for messages.
      folder: of the tokenizer.
      template: "chat", a name in `FORMATS`, a text with `FIELDS` in braces, or two such texts. "" is "chat" where the
        tokenizer has a chat template, else "pair". {prompt} is the request, or all messages of a conversation;
        {answer} has no space at its ends; {text} is prompt and answer as they are; {transcript} is the conversation in
        the format of HH-RLHF, "\\n\\nHuman: ..."; {bos} and {eos} are tokens of the classifier; any other field is a
        column of the records.
      limit: tokens of an input at most; 0 is what the tokenizer says.
      positions: of the model; None for no limit.
      rows: ids that the model knows.
      truncate: the side on which longer inputs are cut, "left" or "right"; "" is left, and right where the answer
        stands before the prompt in one text.

    Attributes:
      limit: tokens of an input at most; None for no limit.
      asked, cut: inputs so far, and of these the ones that were cut.
      columns: the fields that are columns of the records.

    Raises:
      UserError: a template that cannot be used, by name, or a limit that the model does not have.
    """

    def __init__(
        self,
        name: str,
        folder: pathlib.Path,
        template: str | Sequence[str],
        limit: int,
        positions: int | None,
        rows: int,
        truncate: str,
    ):
        self.name, self.folder, self.rows = name, folder, rows
        self.backend: Any = load_backend(folder)
        if not template:
            template = CHAT if self.backend.chat_template else "pair"
        if template == CHAT and not self.backend.chat_template:
            raise UserError(
                f"{name}.template: chat, but the tokenizer in {folder} has no chat template; choose one of "
                f"{', '.join(FORMATS)}, or write a text with {{prompt}} and {{answer}}"
            )
        found = FORMATS.get(template, template) if isinstance(template, str) else template
        self.parts = (found,) if isinstance(found, str) else tuple(found)
        if len(self.parts) not in (1, 2):
            raise UserError(f"{name}.template: is {len(self.parts)} texts; give one text, or the two of a pair")
        self.chat = self.parts == (CHAT,)
        if self.chat:
            check_template(self.backend)
        first = [self._check(part) for part in self.parts] if not self.chat else []
        used = [field for part in self.parts for field in _fields(part)] if not self.chat else []
        self.columns = tuple(dict.fromkeys(field for field in used if field not in FIELDS))
        self.side = truncate or ("right" if len(first) == 1 and first[0] == "answer" else "left")
        self.pair = "only_first"
        if len(first) == 2 and "answer" in _fields(self.parts[0]):
            self.pair = "only_second"
        self.limit = self._limit(limit, positions)
        self.bos, self.eos = self._wanted("bos", 0), self._wanted("eos", -1)
        self.asked = self.cut = 0

    def check_columns(self, columns: Collection[str]) -> None:
        """Raises UserError where a field of the template is none of the `columns` of the records."""
        if missing := [field for field in self.columns if field not in columns]:
            raise UserError(
                f"{self.name}.template: {{{missing[0]}}} is no field, and no column of the records; choose from "
                f"{_KNOWN}, or a column (data.prompts has {listed_columns(columns)}), and write other braces twice"
            )

    def __call__(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        columns: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    ) -> list[Row]:
        """The rows of N answers; one without tokens where template, prompt and answer are empty, and where a column of
        the template has no value.

        Args:
          columns: of the records, N values each.

        Raises:
          UserError: the chat template refuses a prompt, or a token that the model does not know.
        """
        own = {name: columns.get(name, [None] * len(answers)) for name in self.columns}
        values = [{name: every[i] for name, every in own.items()} for i in range(len(answers))]
        texts = [self._texts(*one) for one in zip(prompts, answers, values, strict=True)]
        whole = [self._encode(one) if one else {"input_ids": []} for one in texts]
        long = [i for i, row in enumerate(whole) if self.limit and len(row["input_ids"]) > self.limit]
        for i in long:
            whole[i] = self._encode(texts[i], self.limit)
        if long and not self.cut:
            logging.info(
                "%s: %d of %d inputs are longer than %d tokens and are cut on the %s, as all such inputs are",
                *(self.name, len(long), len(whole), self.limit, self.side),
            )
        self.asked, self.cut = self.asked + len(whole), self.cut + len(long)
        last = max((i for row in whole for i in row["input_ids"]), default=0)
        if last >= self.rows:
            raise UserError(
                f"{self.name}: the tokenizer in {self.folder} gives the id {last}, and the model has {self.rows} "
                "embeddings; use the tokenizer that came with the model"
            )
        return whole

    # ---- the template

    def _check(self, part: str) -> str:
        """The first field of a text; UserError where it has an unknown one, or none."""
        try:
            fields = _fields(part)
        except ValueError as error:
            raise UserError(
                f"{self.name}.template: {shown(part)} cannot be read ({error}); write braces that are no field twice"
            ) from error
        if unknown := [field for field in fields if not field.isidentifier()]:
            raise UserError(
                f"{self.name}.template: {{{unknown[0]}}} is no field; choose from {_KNOWN} and columns of the records, "
                "and write other braces twice"
            )
        if not fields:
            raise UserError(
                f"{self.name}.template: {shown(part)} has no field and is no name; write a text with fields from "
                f"{_KNOWN}, or choose one of {CHAT}, {', '.join(FORMATS)}"
            )
        for field, token in (("bos", self.backend.bos_token), ("eos", self.backend.eos_token)):
            if field in fields and token is None:
                raise UserError(
                    f"{self.name}.template: {{{field}}}, but the tokenizer in {self.folder} has no such token; "
                    "leave it out"
                )
        return next((field for field in fields if field not in ("bos", "eos")), "")

    def _texts(self, prompt: Prompt, answer: str, columns: Mapping[str, Any]) -> tuple[str, ...]:
        """The texts of an input; none where a column has no value."""
        if any(value is None for value in columns.values()):
            return ()
        if self.chat:
            return (self._render(prompt, answer.strip()),)
        values = {
            "prompt": text_of(prompt),
            "answer": answer.strip(),
            "text": prompt + answer if isinstance(prompt, str) else f"{text_of(prompt)}\n{answer}",
            "transcript": _transcript(prompt),
            "bos": self.backend.bos_token,
            "eos": self.backend.eos_token,
            **{name: column_text(value) for name, value in columns.items()},
        }
        return tuple(part.format_map(values) for part in self.parts)

    def _render(self, prompt: Prompt, answer: str) -> str:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        try:
            return self.backend.apply_chat_template(
                [*messages, {"role": "assistant", "content": answer}], tokenize=False, **options_of(prompt)
            )
        except Exception as error:  # a template is a program that may fail in any way
            reason = reason_of(error)
            raise UserError(
                f"{self.name}: the chat template in {self.folder} refuses the prompt {str(prompt)[:60]!r} ({reason}); "
                "set another template"
            ) from error

    # ---- tokens

    def _limit(self, limit: int, positions: int | None) -> int | None:
        """Tokens at most; a tokenizer without a limit says 10^30."""
        if positions is not None and limit > positions:
            raise UserError(
                f"{self.name}.max_length: {limit} is more than the {positions} positions of the model in "
                f"{self.folder}; lower it"
            )
        known = [x for x in (self.backend.model_max_length, positions) if x is not None and x < 2**31]
        return limit or min(known, default=None)

    def _wanted(self, kind: str, place: int) -> tuple[int | None, bool]:
        """(id, whether it is added) of BOS, at place 0, or EOS, at -1, where the settings of the tokenizer do not say
        what it does; (None, False) where they agree.
        """
        token, wanted = getattr(self.backend, f"{kind}_token_id"), setting_of(self.folder, f"add_{kind}_token")
        ids = self.backend("", verbose=False)["input_ids"]
        added = bool(ids) and ids[place] == token
        return (None, False) if token is None or wanted is None or wanted == added else (token, wanted)

    def _encode(self, texts: tuple[str, ...], limit: int | None = None) -> Row:
        """The ids of a text, or of a pair, cut to `limit`. A chat template writes the special tokens itself; elsewhere
        the tokenizer adds them.
        """
        if self.chat:
            ids = self.backend(*texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            row = dict(ids)
            if limit:
                bos, ids = self.backend.bos_token_id, row["input_ids"]
                row["input_ids"] = cut_left(ids, limit, bos) if self.side == "left" else ids[:limit]
            return {name: values[: len(row["input_ids"])] for name, values in row.items()}
        options: dict[str, Any] = {"return_attention_mask": False, "verbose": False}
        if limit:
            self.backend.truncation_side = self.side
            added = sum(wanted for _, wanted in (self.bos, self.eos))
            options |= {"truncation": self.pair if len(texts) == 2 else True, "max_length": max(1, limit - added)}
        try:
            row = dict(self.backend(*texts, **options))
        except Exception:  # the text that is to be cut is shorter than what is too much
            row = dict(self.backend(*texts, **{**options, "truncation": "longest_first"}))
        return self._with_ends(row)

    def _with_ends(self, row: Row) -> Row:
        """With BOS and EOS as the settings of the tokenizer say, where it does otherwise."""
        for (token, wanted), start in ((self.bos, True), (self.eos, False)):
            ids = row["input_ids"]
            if token is None or wanted == ((ids[:1] if start else ids[-1:]) == [token]):
                continue
            for name, values in row.items():
                new = [token] if name == "input_ids" else values[:1]
                if wanted:
                    row[name] = [*new, *values] if start else [*values, *new]
                else:
                    row[name] = values[1:] if start else values[:-1]
        return row


def _fields(text: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]


def _transcript(prompt: Prompt) -> str:
    """The turns before the answer in the format of HH-RLHF, "\\n\\nHuman: ...\\n\\nAssistant: ..."; what the system
    says stands before the first turn of the person.
    """
    turns = (transcript(prompt) or [{"role": "user", "content": prompt}]) if isinstance(prompt, str) else prompt
    text, said = "", ""
    for turn in turns:
        content = text_of([turn]).strip()
        if turn["role"] in SYSTEM:
            said = f"{content}\n"
            continue
        text += f"\n\n{'Assistant' if turn['role'] == 'assistant' else 'Human'}: {said}{content}"
        said = ""
    return text
