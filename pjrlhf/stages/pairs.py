"""The comparisons of a run of user models: tokens, reference log-probs, and who said so."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pjrlhf.data.batching import collate_preference, split_by
from pjrlhf.data.tokenization import TokenTable
from pjrlhf.errors import UserError
from pjrlhf.models.huggingface import fingerprint
from pjrlhf.models.registry import UserRegistry
from pjrlhf.rollout.reference import reference_logps
from pjrlhf.stages.context import Run

SIDES = ("chosen", "rejected")
PARTS = ("train", "heldout", "new_users")


class Pairs:
    """The comparisons of a run: tokens, reference log-probs, and who said so, in training and held-out parts."""

    def __init__(self, run: Run):
        self.run = run
        data = run.config.preference.data
        if data == "population":
            folder = run.workdir.path / "population"
            specs = {name: {"kind": "jsonl", "path": str(folder / f"{name}.jsonl")} for name in PARTS}
            tables = {name: run.pairs(spec, run.sampled_lengths) for name, spec in specs.items()}
        else:
            table = run.pairs(data, run.lengths)
            train, held = split_by(
                [repr(e.prompt) for e in table.examples], run.config.preference.heldout_share, run.config.seed
            )
            tables = {"train": table.select(train), "heldout": table.select(held)}
            self._check_split(tables)
        self.tables = tables
        names = [example.user_id for example in tables["train"].examples]
        if None in names:
            raise UserError(f"{tables['train'].examples[names.index(None)].where}: no user_id; give every record one")
        self.registry = UserRegistry.create(dict.fromkeys(names))
        self.base_hash = fingerprint(run.base_folder)
        self.reference = {name: self._reference(table) for name, table in tables.items()}

    def _check_split(self, tables: Mapping[str, TokenTable]) -> None:
        shared = set.intersection(*({repr(e.prompt) for e in table.examples} for table in tables.values()))
        if shared:
            raise RuntimeError(f"{len(shared)} prompts are both trained on and held out")

    def _reference(self, table: TokenTable) -> np.ndarray:
        run = self.run
        return reference_logps(
            table,
            run.model,
            run.adapter,
            run.base,
            self.base_hash,
            prompt_lengths=run.prompt_lengths,
            completion_lengths=run.completion_lengths,
            pad_id=run.tokenizer.pad_id,
            rows=run.config.preference.batch_size,
            folder=run.cache_folder / "reference",
        )

    def users(self, name: str) -> np.ndarray:
        """Row in the user table of each pair's person, int32 [N]; 0 for people who were not trained on."""
        return self.registry.indices([example.user_id for example in self.tables[name].examples])

    def collate(self, name: str, users: np.ndarray, rows: Sequence[Any]) -> Any:
        """A batch of pairs of part `name` with `users` [N] as the people who said so."""
        run = self.run
        batch = collate_preference(
            rows,
            prompt_length=list(run.prompt_lengths),
            completion_length=list(run.completion_lengths),
            pad_id=run.tokenizer.pad_id,
        )
        batch["user"] = users[batch["index"]]
        batch["reference"] = self.reference[name][batch["index"]]
        return batch


def device_part(batch: Any) -> tuple[Any, int]:
    """The arrays of a collated batch that a step reads, and P."""
    arrays = {side: {name: batch[side][name] for name in ("tokens", "valid")} for side in SIDES}
    arrays |= {name: batch[name] for name in ("user", "reference", "margin")}
    return arrays, int(np.argmax(batch["chosen"]["loss_mask"].any(0)))
