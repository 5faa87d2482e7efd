"""Between text and token arrays: how the prompts and answers of a run are encoded, padded, packed and decoded."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pjrlhf.data.batching import Completions, buckets, collate_completion, pad_left
from pjrlhf.data.packing import Ids, PackedRows, PackLayout, choose_mode, pack, row_length
from pjrlhf.data.schema import Example, Prompt
from pjrlhf.data.tokenization import Lengths, TokenTable, cut_left, tokenize
from pjrlhf.errors import UserError
from pjrlhf.parallel.processes import to_host
from pjrlhf.rollout.batches import Prompts, Rollout
from pjrlhf.rollout.sampler import Sampling
from pjrlhf.runtime.devices import Devices
from pjrlhf.runtime.records import DataSettings
from pjrlhf.runtime.workspace import Workspace


class Text:
    """The text of a run as token ids.

    Args:
      settings: the section `data`.
      temperature: of all sampling.
      sample_rows: rows sampled or scored at once outside training; rounded up to what the devices can share.
    """

    def __init__(
        self, settings: DataSettings, workspace: Workspace, devices: Devices, temperature: float, sample_rows: int
    ):
        self.settings, self.workspace, self.devices = settings, workspace, devices
        self.temperature = temperature
        self.sample_rows = devices.even(sample_rows)

    # ---- lengths

    @property
    def lengths(self) -> Lengths:
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
        """The lengths for answers that this run sampled: those cut off by the limit have no EOS, and get none."""
        return dataclasses.replace(self.lengths, long_completion="truncate")

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """The lengths that prompts are padded to; each is compiled once."""
        return (*self.settings.prompt_buckets, self.lengths.prompt)

    @property
    def completion_lengths(self) -> tuple[int, ...]:
        """The lengths that completions are padded to; each is compiled once."""
        return (*self.settings.completion_buckets, self.lengths.completion)

    def sampling(self, **changes: Any) -> Sampling:
        """How this run samples; `changes` override."""
        t = self.workspace.tokenizer
        settings = {"max_new_tokens": self.settings.max_completion, "temperature": self.temperature}
        return Sampling(**{"eos_id": t.eos_id, "pad_id": t.pad_id, **settings, **changes})

    # ---- to tokens

    def tokenized(
        self, examples: Sequence[Example], lengths: Lengths, name: str, kind: str = "preference"
    ) -> TokenTable:
        """Records as token ids; `name` is what messages call them."""
        fraction = self.settings.max_bad_fraction
        return tokenize(examples, kind, self.workspace.tokenizer, lengths, source_name=name, max_bad_fraction=fraction)

    def pack(
        self, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]], *, groups: int = 1, user_slots: int = 0
    ) -> PackedRows:
        """Rows of prompts and their answers as `data.packing` says; see `data.packing.pack`."""
        d, model = self.settings, self.workspace.model
        mode = choose_mode(d.packing, model.attention)
        layout = PackLayout(
            mode=mode,
            length=row_length(mode, d.max_prompt + user_slots, d.max_completion, len(answers[0])),
            pad_id=self.workspace.tokenizer.pad_id,
            multiple=self.devices.even(1),
            groups=groups,
            user_slots=user_slots,
            user_offset=model.user_offset,
        )
        return pack(prompts, answers, layout)

    def pad_prompts(self, ids: Sequence[Sequence[int]]) -> Prompts:
        """Prompts [B, P], left-padded to the smallest of `prompt_lengths` that holds them all."""
        length = int(buckets([max(map(len, ids))], self.prompt_lengths)[0])
        return Prompts(*pad_left(ids, length, self.workspace.tokenizer.pad_id))

    def pad_completions(self, rows: Sequence[Mapping[str, Ids]]) -> Completions:
        """Rows {"prompt", "completion"} of token ids, padded to the smallest lengths that hold them all."""
        return collate_completion(
            rows,
            prompt_length=self.prompt_lengths,
            completion_length=self.completion_lengths,
            pad_id=self.workspace.tokenizer.pad_id,
        )

    def encode(self, prompts: Sequence[Prompt]) -> Prompts:
        """Token ids [B, P] of prompts, left-padded to a bucket.

        Raises:
          UserError: a prompt is longer than `data.max_prompt` and is not to be truncated.
        """
        limit, tokenizer = self.lengths.prompt, self.workspace.tokenizer
        ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
        if self.lengths.long_prompt == "truncate_left":
            ids = [cut_left(prompt, limit, tokenizer.bos_id) for prompt in ids]
        longest = max(range(len(ids)), key=lambda i: len(ids[i]))
        if len(ids[longest]) > limit:
            raise UserError(
                f"prompt {str(prompts[longest])[:60]!r}: {len(ids[longest])} tokens, more than data.max_prompt={limit}"
                "; raise it"
            )
        return self.pad_prompts(ids)

    # ---- to text

    def decode(self, prompts: Prompts, rollout: Rollout) -> list[str]:
        """Texts of responses [B, N] to prompts [B, P].

        Where prompts are plain text, an answer keeps its leading space: prompt + answer is the whole text.
        """
        tokenizer = self.workspace.tokenizer
        arrays = to_host((prompts.tokens, prompts.valid, rollout.tokens, rollout.valid))
        texts = []
        for before, before_valid, after, after_valid in zip(*arrays, strict=True):
            ids = after[after_valid].tolist()
            if self.settings.chat:
                texts.append(tokenizer.decode(ids).strip())
            else:
                start = before[before_valid].tolist()
                texts.append(tokenizer.decode(start + ids)[len(tokenizer.decode(start)) :])
        return texts
