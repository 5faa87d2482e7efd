"""Encodes, pads, packs and decodes the prompts and answers of a run."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from pjrlhf.data.batching import Completions, buckets, collate_completion, pad_left
from pjrlhf.data.messages import dialogue
from pjrlhf.data.packing import Ids, PackedRows, PackLayout, choose_mode, pack, row_length
from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import Example, Prompt
from pjrlhf.data.token_table import Encode, Encoded, Lengths, TokenRow, TokenTable, cut_left, tokenize
from pjrlhf.errors import UserError
from pjrlhf.parallel.processes import in_shares, to_host
from pjrlhf.rollout.batches import Prompts, Rollout
from pjrlhf.rollout.sampler import Sampling
from pjrlhf.runtime.devices import Devices
from pjrlhf.runtime.records import DataSettings
from pjrlhf.runtime.workspace import Workspace
from pjrlhf.settings import shown
from pjrlhf.training.progress import watched

_SHOWN = 20  # tokens at either end of a part of a row that is logged


class Text:
    """Converts between the text of a run and token arrays.

    Args:
      settings: the section `data`.
      workspace: has the tokenizer and the model.
      temperature: of all sampling.
      sample_rows: rows sampled or scored at once outside training, rounded up to a multiple that splits evenly over the
        devices.
    """

    def __init__(
        self, settings: DataSettings, workspace: Workspace, devices: Devices, temperature: float, sample_rows: int
    ):
        self.settings, self.workspace, self.devices = settings, workspace, devices
        self.temperature = temperature
        self.sample_rows = devices.even(sample_rows)
        self._shown: set[str] = set()

    # ---- lengths

    @property
    def lengths(self) -> Lengths:
        """The limits on prompts and completions; UserError where they exceed the context of the model."""
        d = self.settings
        return Lengths(
            prompt=d.max_prompt,
            completion=d.max_completion,
            context=self.workspace.model_config.max_length,
            long_prompt=d.long_prompt,
            long_completion=d.long_completion,
        )

    @property
    def sampled_lengths(self) -> Lengths:
        """The limits for answers that this run sampled: an answer that reached the limit has no EOS, and gets none."""
        return dataclasses.replace(self.lengths, long_completion="truncate")

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """The lengths to which prompts are padded; every length compiles once."""
        return _lengths(self.settings.prompt_buckets, self.lengths.prompt)

    @property
    def completion_lengths(self) -> tuple[int, ...]:
        """The lengths to which completions are padded; every length compiles once."""
        return _lengths(self.settings.completion_buckets, self.lengths.completion)

    def sampling(self, **changes: Any) -> Sampling:
        """The sampling settings of this run, with `changes` to fields of `Sampling`."""
        t = self.workspace.tokenizer
        settings = {"max_new_tokens": self.settings.max_completion, "temperature": self.temperature}
        return Sampling(**{"eos_ids": t.eos_ids, "pad_id": t.pad_id, **settings, **changes})

    # ---- to tokens

    def tokenized(
        self, examples: Sequence[Example], lengths: Lengths, name: str, kind: str = "preference"
    ) -> TokenTable:
        """Tokenizes records of one kind, each process its share; see `data.token_table.tokenize`. All must call it.

        Args:
          name: of the records in messages.

        Raises:
          UserError: too many records do not fit.
        """
        fraction = self.settings.max_bad_fraction
        tokenizer = self.workspace.tokenizer

        def shared(examples: Sequence[Example], encode: Encode) -> list[Encoded]:
            def own(share: Sequence[Example]) -> list[Encoded]:
                with watched(f"tokenizing {name}", share) as rows:
                    return encode(rows)

            return in_shares(examples, own)

        table = tokenize(examples, kind, tokenizer, lengths, source_name=name, max_bad_fraction=fraction, shared=shared)
        self.check_known(name, itertools.chain.from_iterable(table.tokens.values()))
        self.show(name, {part: (ids[0], table.mask(part, 0)) for part, ids in table.tokens.items()})
        return table

    def check_known(self, name: str, rows: Iterable[Ids]) -> None:
        """Warns where the tokenizer does not know more than 1 % of the tokens, once for every `name` of records."""
        if name in self._shown:
            return
        tokenizer, ids = self.workspace.tokenizer, np.concatenate([*rows])
        if text := tokenizer.misfit(tokenizer.unknown(ids), len(ids)):
            logging.warning("%s: %s", name, text)

    def show(self, name: str, parts: Mapping[str, tuple[Ids, np.ndarray | None]]) -> None:
        """Logs a row as the model reads it, once for every `name` of records: its tokens, and which are scored.

        Args:
          parts: "prompt", and answers by name -> ids, and which of an answer's are scored; None for all.
        """
        if name in self._shown:
            return
        self._shown.add(name)
        lines = []
        for part, (ids, mask) in parts.items():
            scored = np.full(len(ids), part != "prompt") if mask is None else mask
            edges = [0, *(np.flatnonzero(np.diff(scored)) + 1), len(ids)]
            for start, stop in itertools.pairwise(map(int, edges)):
                count = f"{stop - start} token{'s' * (stop - start != 1)}"
                lines.append(f"  {part}, {count}, mask {int(scored[start])}: {self._pieces(ids[start:stop])}")
        logging.info("%s: the first row as the model reads it (mask 1: trained on)\n%s", name, "\n".join(lines))

    def _pieces(self, ids: Ids) -> str:
        """Every token as text in quotes and its id; of many, the first and the last."""
        pieces = [f"{self.workspace.tokenizer.decode([i], False)!r}:{int(i)}" for i in ids]
        if len(pieces) > 2 * _SHOWN:
            pieces = [*pieces[:_SHOWN], f"... {len(pieces) - 2 * _SHOWN} more ...", *pieces[-_SHOWN:]]
        return " ".join(pieces)

    @property
    def packing(self) -> str:
        """The mode of `data.packing.MODES` that `data.packing` stands for."""
        return choose_mode(self.settings.packing, self.workspace.model.attention)

    def pack(
        self,
        rows: Sequence[TokenRow],
        names: Sequence[str],
        *,
        groups: int = 1,
        num_user_tokens: int = 0,
        shape: tuple[int, int] | None = None,
    ) -> PackedRows:
        """Packs the prompts of rows and their answers `names` as `data.packing` sets, or into packed rows of `shape`
        (B, T); see `data.packing.pack`.
        """
        d, model = self.settings, self.workspace.model
        longest = d.max_prompt + num_user_tokens + d.max_completion
        if model.config.positions == "learned" and longest > model.config.max_length:
            raise UserError(
                f"user tokens: {num_user_tokens} with prompts of {d.max_prompt} and completions of {d.max_completion} "
                f"tokens are more than the {model.config.max_length} positions of the model; lower data.max_prompt or "
                "data.max_completion"
            )
        mode, count = ("pack", shape[0]) if shape else (self.packing, 0)
        length = row_length(mode, d.max_prompt + num_user_tokens, d.max_completion, len(names))
        layout = PackLayout(
            mode=mode,
            length=shape[1] if shape else length,
            rows=count,
            pad_id=self.workspace.tokenizer.pad_id,
            multiple=self.devices.even(1),
            groups=groups,
            num_user_tokens=num_user_tokens,
            user_offset=model.user_offset,
        )
        answers = [[row[name] for name in names] for row in rows]
        masks = [[row[f"{name}_mask"] for name in names] for row in rows]
        return pack([row["prompt"] for row in rows], answers, layout, masks)

    def pad_prompts(self, ids: Sequence[Sequence[int]]) -> Prompts:
        """Prompts [B, P], left-padded to the smallest of `prompt_lengths` that holds all.

        Raises:
          ValueError: a prompt is longer than all of `prompt_lengths`.
        """
        length = int(buckets([max(map(len, ids))], self.prompt_lengths)[0])
        return Prompts(*pad_left(ids, length, self.workspace.tokenizer.pad_id))  # pyright: ignore[reportArgumentType]

    def pad_completions(self, rows: Sequence[TokenRow]) -> Completions:
        """The "prompt" and "completion" ids of rows, padded to the smallest lengths that hold all, with masks."""
        return collate_completion(
            rows,
            prompt_length=self.prompt_lengths,
            completion_length=self.completion_lengths,
            pad_id=self.workspace.tokenizer.pad_id,
        )

    def encode(self, prompts: Sequence[Prompt]) -> Prompts:
        """Tokenizes prompts and left-pads them to a bucket, [B, P].

        Raises:
          UserError: a prompt is longer than `data.max_prompt`, and `data.long_prompt` does not truncate it.
        """
        limit, ids = self.lengths.prompt, [self.prompt_ids(prompt) for prompt in prompts]
        longest = max(range(len(ids)), key=lambda i: len(ids[i]))
        if len(ids[longest]) > limit:
            raise UserError(
                f"prompt {shown(dialogue(prompts[longest]))}: {len(ids[longest])} tokens, more than data.max_prompt="
                f"{limit}; raise it, or cut prompts with --config.data.long_prompt=truncate_left"
            )
        return self.pad_prompts(ids)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, which may be longer than `data.max_prompt` where `data.long_prompt` does not truncate.

        Raises:
          UserError: the chat template refuses the prompt, or it has a token that the model does not know.
        """
        tokenizer = self.workspace.tokenizer
        try:
            ids = tokenizer.encode_prompt(prompt)
        except RecordError as error:
            raise UserError(
                f"prompt {shown(dialogue(prompt))}: {error}; correct the template or the prompt, or set "
                "--config.data.chat=False"
            ) from error
        if self.lengths.long_prompt == "truncate_left":
            ids = cut_left(ids, self.lengths.prompt, tokenizer.bos_id)
        return ids

    def fitting(self, examples: Sequence[Example], name: str) -> Sequence[Example]:
        """Those of `examples` whose prompts the model can read, within `data.max_prompt` as `data.long_prompt` says.

        Args:
          name: of the examples in messages.

        Raises:
          UserError: too many cannot be read.
        """
        fraction = self.settings.max_bad_fraction
        with watched(f"tokenizing {name}", examples) as rows:
            return tokenize(
                rows, "prompt", self.workspace.tokenizer, self.lengths, source_name=name, max_bad_fraction=fraction
            ).examples

    # ---- to text

    def decode(self, prompts: Prompts, rollout: Rollout) -> list[str]:
        """The texts of responses [B, N] to prompts [B, P].

        An answer to a plain-text prompt keeps its leading space, so that prompt + answer is the whole text.
        """
        tokenizer = self.workspace.tokenizer
        arrays = to_host((prompts.tokens, prompts.valid, rollout.tokens, rollout.valid))
        texts = []
        for before, before_valid, after, after_valid in zip(*arrays, strict=True):
            start = None if self.workspace.records.chat else before[before_valid].tolist()
            texts.append(tokenizer.decode_answer(after[after_valid].tolist(), start))
        return texts


def _lengths(buckets: Sequence[int], longest: int) -> tuple[int, ...]:
    return (*(bucket for bucket in buckets if bucket < longest), longest)
