"""The comparisons of a run of user models: tokens, reference log-probs, and who said so."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pjrlhf.data.batching import split_by
from pjrlhf.data.schema import Example, Prompt
from pjrlhf.data.tokenization import TokenTable
from pjrlhf.errors import UserError
from pjrlhf.models.registry import UserRegistry
from pjrlhf.runtime.records import SourceSpec
from pjrlhf.runtime.run import Run
from pjrlhf.settings import Settings, setting

SIDES = ("chosen", "rejected")
PARTS = ("train", "heldout", "new_users")
# What is never on both sides of the split: a prompt, or a pair of answers whoever compared them and however.
SPLITS: dict[str, Callable[[Example], str]] = {
    "prompt": lambda example: repr(example.prompt),
    "pair": lambda example: repr((example.prompt, sorted((example.chosen, example.rejected)))),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSettings(Settings):
    """Comparisons by people, and how they are split."""

    data: str | SourceSpec = setting(
        "population",
        "the pairs of the stage population, or a source of preference records with `user_id`",
        choices=("population",),
    )
    split: str = setting("prompt", "of your own data: what is never on both sides of the split", choices=tuple(SPLITS))
    heldout_fraction: float = setting(0.2, "fraction of the prompts or pairs of your own data", above=0.0, below=1.0)
    new_user_fraction: float = setting(
        0.0, "fraction of the people of your own data, kept out to be met as new people", low=0.0, below=1.0
    )
    batch_size: int = setting(32, "pairs a step", low=1, high=2**20)


def with_text(prompt: Prompt, text: str) -> Prompt:
    """`prompt` after `text`; in a conversation the text stands in the last message, the one to answer."""
    if isinstance(prompt, str):
        return f"{text}\n{prompt}"
    return [*prompt[:-1], {**prompt[-1], "content": f"{text}\n{prompt[-1]['content']}"}]


def _told(example: Example, text: str | None) -> Example:
    if text is None:
        raise UserError(f"{example.where}: no user_text; give every record one, or set user_text=False")
    return dataclasses.replace(example, prompt=with_text(example.prompt, text))


def split(examples: Sequence[Example], config: PairSettings, seed: int) -> dict[str, list[Example]]:
    """Records in parts "train" and "heldout", of the same people, and, where a share of the people is new, "new_users",
    theirs: `extra["held_out"]` says on which side their prompt or pair is. No prompt (or pair) is in two parts but for
    those new users have in common with others, and no new person is anywhere else.

    Args:
      config: `split`, `heldout_fraction` and `new_user_fraction` of the section `preference`.

    Raises:
      UserError: a part that is left empty.
    """
    keys = [SPLITS[config.split](example) for example in examples]
    held = set(split_by(keys, config.heldout_fraction, seed)[1].tolist())
    new: set[int] = set()
    if config.new_user_fraction:
        new = set(split_by([example.user_id for example in examples], config.new_user_fraction, seed)[1].tolist())
    parts: dict[str, list[Example]] = {name: [] for name in PARTS if new or name != "new_users"}
    for i, example in enumerate(examples):
        if i in new:
            extra = {**example.extra, "held_out": i in held}
            parts["new_users"].append(dataclasses.replace(example, extra=extra))
        else:
            parts["heldout" if i in held else "train"].append(example)
    for name, part in parts.items():
        if not part:
            raise UserError(
                f"preference: no record is left for part {name!r}; change preference.heldout_fraction or "
                "preference.new_user_fraction"
            )
    trained, tested = ({SPLITS[config.split](e) for e in parts[name]} for name in ("train", "heldout"))
    if trained & tested or {e.user_id for e in parts.get("new_users", ())} & {e.user_id for e in parts["train"]}:
        raise RuntimeError(f"a {config.split} or a new person is both trained on and held out")
    return parts


class Pairs:
    """The comparisons of a run: tokens, reference log-probs, and who said so, in training and held-out parts.

    Args:
      user_text: put what each person says about themselves before the prompt, for whoever answers it: the user's
        policy, the generic user and the reference read the same text (P-RLHF, arXiv 2402.05133, section 4.2).
      permuted_text: in the training part, everybody's pairs carry the text of somebody else's: the control.

    Raises:
      UserError: records without `user_id` (or `user_text` where it is asked for), or that cannot be split.
    """

    def __init__(self, run: Run, settings: PairSettings, *, user_text: bool = False, permuted_text: bool = False):
        self.run, self.settings, data = run, settings, settings.data
        if data == "population":
            folder, lengths = run.workdir.path / "population", run.text.sampled_lengths
            specs = {name: {"kind": "jsonl", "path": str(folder / f"{name}.jsonl")} for name in PARTS}
            parts = {name: run.records.comparisons(spec) for name, spec in specs.items()}
        else:
            lengths = run.text.lengths
            examples, source = run.records.comparisons(data)
            if run.settings.data.chat:  # as every other request of the run is asked
                asked = [run.records.ask(e.prompt) if isinstance(e.prompt, str) else e.prompt for e in examples]
                examples = [dataclasses.replace(e, prompt=p) for e, p in zip(examples, asked, strict=True)]
            parts = {name: (part, source) for name, part in split(examples, settings, run.settings.seed).items()}
        names = [example.user_id for example in parts["train"][0]]
        if None in names:
            raise UserError(f"{parts['train'][0][names.index(None)].where}: no user_id; give every record one")
        if user_text:
            rng = run.streams.numpy("preference/permutation")
            for name, (examples, source) in parts.items():
                order = rng.permutation(len(examples)) if permuted_text and name == "train" else range(len(examples))
                told = [_told(e, examples[i].user_text) for e, i in zip(examples, order, strict=True)]
                parts[name] = (told, source)
        self.tables = {
            name: run.text.tokenized(examples, lengths, source) for name, (examples, source) in parts.items()
        }
        people = dict.fromkeys(e.user_id for e in self.tables["train"].examples)
        self.registry = UserRegistry.create(people, run.devices.even(len(people) + 1) - 1)  # tables are split by row
        self.reference = {name: self._reference(table) for name, table in self.tables.items()}

    def _reference(self, table: TokenTable) -> np.ndarray:
        return self.run.reference(table, self.run.devices.even(2 * self.settings.batch_size))

    def users(self, name: str) -> np.ndarray:
        """Row in the user table of each pair's person, int32 [N]; 0 for people who were not trained on."""
        return self.registry.indices([example.user_id for example in self.tables[name].examples])

    def collate(self, name: str, users: np.ndarray, rows: Sequence[Any], user_slots: int = 0) -> Any:
        """A batch of B pairs of part `name` with `users` [N] as the people who said so.

        {"rows": see `data.packing.pack`, pair b having answers 2 b, chosen, and 2 b + 1, rejected; "index" int32 [B],
        rows of the table; "user" int32 [B]; "reference" float32 [B, 2]; "counts" float32 [B, 2], scored tokens;
        "margin" float32 [B]}.
        """
        index = np.array([row["index"] for row in rows], np.int32)
        answers = [[row[side] for side in SIDES] for row in rows]
        return {
            "rows": self.run.text.pack([row["prompt"] for row in rows], answers, user_slots=user_slots),
            "index": index,
            "user": users[index],
            "reference": self.reference[name][index],
            "counts": np.array([[len(answer) for answer in pair] for pair in answers], np.float32),
            "margin": np.array([row["margin"] or 0.0 for row in rows], np.float32),
        }
