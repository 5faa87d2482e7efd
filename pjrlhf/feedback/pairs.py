"""The comparisons of a run of user models: tokens, reference log-probs, and who said so."""

import collections
import dataclasses
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
from absl import logging

from pjrlhf.data.batching import by_hash, split_by
from pjrlhf.data.comparisons import SIDES, PairBatch, pair_batch
from pjrlhf.data.messages import with_text
from pjrlhf.data.schema import Example, is_tie
from pjrlhf.data.token_table import TokenRow, TokenTable
from pjrlhf.errors import UserError
from pjrlhf.feedback.history import PARTS, History, with_history
from pjrlhf.models.registry import UserRegistry
from pjrlhf.runtime.records import SourceSpec, check_heldout
from pjrlhf.runtime.run import Run
from pjrlhf.runtime.text import Text
from pjrlhf.settings import Settings, setting, shown

# What is never on both sides of the split: a prompt, a pair of answers whoever compared them and however, or records
# with one value of the column `group`, such as the turns of a dialogue; those without it are split by prompt.
SPLITS: dict[str, Callable[[Example], str]] = {
    "prompt": lambda example: repr(example.prompt),
    "pair": lambda example: repr((example.prompt, sorted((str(example.chosen), str(example.rejected))))),
    "group": lambda example: repr(example.extra.get("group", example.prompt)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSettings(Settings):
    """Comparisons by people, and how they are split."""

    section: ClassVar[str] = "preference"  # its key in a config, for messages

    data: str | SourceSpec = setting(
        "population",
        "the pairs of the stage population, or a source of preference records with `user_id`",
        choices=("population",),
    )
    split: str = setting("prompt", "of your own data: what is never on both sides of the split", choices=tuple(SPLITS))
    heldout_fraction: float = setting(0.2, "fraction of the prompts or pairs of your own data", above=0.0, below=1.0)
    heldout_data: SourceSpec = setting(
        {}, "a source of held-out records in place of a fraction; training leaves out what `split` says is in it"
    )
    new_user_fraction: float = setting(
        0.0, "fraction of the people of your own data, kept out to be met as new people", low=0.0, below=1.0
    )
    max_pairs: int = setting(
        0, "pairs to train on at most: a random sample, of whole prompts where split is prompt; 0 is all", low=0
    )
    max_heldout_pairs: int = setting(0, "the same of held-out pairs", low=0)
    rows: int = setting(
        0, "of the user table, with room for people who come later; 0: one per person", low=0, high=10**8
    )
    batch_size: int = setting(32, "pairs a step", low=1, high=2**20)

    def check(self) -> None:
        super().check()
        check_heldout(self.data, self.heldout_data, "data")


def _told(example: Example, text: str | None) -> Example:
    if text is None:
        raise UserError(f"{example.where}: no user_text; give every record one, or set user_text=False")
    return dataclasses.replace(example, prompt=with_text(example.prompt, text))


def split(examples: Sequence[Example], config: PairSettings, seed: int) -> dict[str, list[Example]]:
    """Records in parts "train" and "heldout", of the same people, and, where a share of the people is new, "new_users",
    theirs: `held_out` says on which side their prompt or pair is. No prompt (or pair) is in two parts but for those
    new users have in common with others, and no new person is anywhere else. Ties are trained on and never
    tested, because neither answer is the right one.

    Args:
      examples: where `heldout_data` is given, as `Records.with_heldout` returns them.
      config: its `split`, `heldout_fraction`, `heldout_data` and `new_user_fraction` count.

    Raises:
      UserError: a part that is left empty.
    """
    keys = [SPLITS[config.split](example) for example in examples]
    alike = f"the comparisons need several prompts, or --config.{config.section}.split=pair"
    given = [bool(example.held_out) for example in examples] if config.heldout_data else None
    train, held = (set(rows.tolist()) for rows in split_by(keys, config.heldout_fraction, seed, alike, given))
    new: set[int] = set()
    if config.new_user_fraction:
        people = [example.user_id for example in examples]
        alike = f"one person is all there is: set --config.{config.section}.new_user_fraction=0"
        new = set(split_by(people, config.new_user_fraction, seed, alike)[1].tolist())
    parts: dict[str, list[Example]] = {name: [] for name in PARTS if new or name != "new_users"}
    for i, example in enumerate(examples):
        if i not in train and i not in held:
            continue
        if i in new:
            if is_tie(example):
                continue
            parts["new_users"].append(dataclasses.replace(example, held_out=i in held))
        elif i not in held:
            parts["train"].append(example)
        elif not is_tie(example):
            parts["heldout"].append(example)
    for name, part in parts.items():
        if not part and all(map(is_tie, examples)):
            raise UserError(
                f"{config.section}: all {len(examples)} comparisons are ties, which are never held out; add ones with "
                "a preference above 0.5"
            )
        if not part:
            raise UserError(
                f"{config.section}: no record is left for part {name!r}; change {config.section}.heldout_fraction or "
                f"{config.section}.new_user_fraction"
            )
    trained, tested = ({SPLITS[config.split](e) for e in parts[name]} for name in ("train", "heldout"))
    if trained & tested or {e.user_id for e in parts.get("new_users", ())} & {e.user_id for e in parts["train"]}:
        raise RuntimeError(f"a {config.split} or a new person is both trained on and held out")
    return parts


def check_named(examples: Iterable[Example]) -> None:
    """Raises UserError for a record that does not say who compared."""
    for example in examples:
        if example.user_id is None:
            raise UserError(
                f"{example.where}: no user_id; give every record one, or "
                "name its column with --config.data.columns.user_id=YOURS"
            )


def at_most(part: str, examples: list[Example], settings: PairSettings, seed: int, source: str) -> list[Example]:
    """The examples of a part, or a sample of them, as the settings limit it; `source` names them in messages."""
    most = {"train": settings.max_pairs, "heldout": settings.max_heldout_pairs}.get(part, 0)
    if not most or len(examples) <= most:
        return examples
    kept = _sample(examples, most, SPLITS[settings.split], seed)
    logging.info("%s: %d of %d pairs of the part %s", source, len(kept), len(examples), part)
    return kept


def _sample(examples: Sequence[Example], most: int, key: Callable[[Example], str], seed: int) -> list[Example]:
    """At most `most` of `examples`, in their order: whole groups of one key, drawn by a hash of it, at least one."""
    keys = [key(example) for example in examples]
    size, kept, count = collections.Counter(keys), set(), 0
    for name in by_hash(size, seed):
        if kept and count + size[name] > most:
            break
        kept.add(name)
        count += size[name]
    return [example for example, name in zip(examples, keys, strict=True) if name in kept]


def _of_others(examples: Sequence[Example], rng: np.random.Generator) -> list[str | None]:
    """For every example what another person says about themselves, the same one for all examples of a person."""
    texts = {example.user_id: example.user_text for example in examples}
    people = [list(texts)[i] for i in rng.permutation(len(texts))]
    other = dict(zip(people, [*people[1:], people[0]], strict=True))
    return [texts[other[example.user_id]] for example in examples]


# The comparisons of a part as they were given, without a text before their prompts, and the name of their source.
Part: TypeAlias = tuple[Sequence[Example], str]


def given_parts(run: Run, settings: PairSettings) -> dict[str, Part]:
    """The comparisons of a run in training and held-out parts.

    Raises:
      UserError: records without `user_id`, or that cannot be split.
    """
    if isinstance(settings.data, str):  # "population"
        folder = run.workdir.path / "population"
        parts = {name: run.records.made(folder / f"{name}.jsonl", f"{settings.section}.data") for name in PARTS}
    else:
        examples, source = run.records.with_heldout(settings.data, settings.heldout_data, settings.section)
        examples = run.records.asked(examples)
        parts = {name: (part, source) for name, part in split(examples, settings, run.streams.seed).items()}
    for name, (examples, source) in parts.items():
        parts[name] = (at_most(name, examples, settings, run.streams.seed, source), source)
    for part, _ in parts.values():
        check_named(part)
    return dict(parts)


def tables_of(
    run: Run,
    settings: PairSettings,
    *,
    parts: Mapping[str, Part] | None = None,
    user_text: bool = False,
    permuted_text: bool = False,
    others_text: bool = False,
    history: History | None = None,
    only: Collection[str] = PARTS,
) -> dict[str, TokenTable]:
    """The comparisons of a run in training and held-out parts, as token ids.

    Args:
      parts: see `given_parts`; read where None.
      user_text: put what each person says about themselves before the prompt, for whoever answers it: the user's
        policy, the generic user and the reference read the same text (P-RLHF, arXiv 2402.05133, section 4.2).
      permuted_text: in the training part, the pairs carry each other's texts in random order: the control.
      others_text: in the held-out part, everybody's pairs carry the text of one other person.
      history: put what is written of other comparisons of each person before the prompt, as `user_text`.
      only: the parts that are returned.

    Raises:
      UserError: records without `user_id` (or `user_text` where it is asked for), or that cannot be split.
    """
    lengths = run.text.sampled_lengths if isinstance(settings.data, str) else run.text.lengths
    parts = dict(given_parts(run, settings) if parts is None else parts)
    if history:
        told = with_history({name: part for name, (part, _) in parts.items()}, history, run, only)
        parts = {name: (told[name], source) for name, (_, source) in parts.items() if name in only}
    if user_text:
        rng = _rng(run)
        for name, (examples, source) in parts.items():
            texts = [example.user_text for example in examples]
            if permuted_text and name == "train":
                texts = [texts[i] for i in rng.permutation(len(texts))]
            elif others_text and name == "heldout":
                texts = _of_others(examples, rng)
            parts[name] = ([_told(e, text) for e, text in zip(examples, texts, strict=True)], source)
    return {
        name: run.text.tokenized(examples, lengths, source)
        for name, (examples, source) in parts.items()
        if name in only
    }


def _rng(run: Run) -> np.random.Generator:
    return run.streams.numpy("preference/permutation")


def registry_of(run: Run, table: TokenTable, people: int = 0) -> UserRegistry:
    """The people of a training table, with room for `people` or more; user tables are split evenly over the devices."""
    names = dict.fromkeys(str(example.user_id) for example in table.examples)
    _warn_of_twins(names)
    return UserRegistry.create(names, run.devices.even(max(len(names), people) + 1) - 1)


def _warn_of_twins(names: Iterable[str]) -> None:
    """Warns of names that people may take for one: only spaces, case or the form of letters part them."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), name)
        if other != name:
            logging.warning(
                "user_id %s and %s are two people here; if they are one, give their records one spelling",
                *(shown(other), shown(name)),
            )


def read_pairs(run: Run, settings: PairSettings, parts: Mapping[str, Part] | None = None, **texts: Any) -> "Pairs":
    """The comparisons of a run with their reference log-probabilities; further arguments and errors are those of
    `tables_of`.
    """
    parts = given_parts(run, settings) if parts is None else parts
    tables = tables_of(run, settings, parts=parts, **texts)
    rows = run.devices.even(2 * settings.batch_size)
    reference = References(lambda name: run.reference(tables[name], rows))
    return Pairs(tables, registry_of(run, tables["train"], settings.rows), reference, run.text, parts)


class References(dict[str, np.ndarray]):
    """Part -> reference log-probs of its N pairs, float32 [N, 2]; those of a part are computed when first asked for."""

    def __init__(self, compute: Callable[[str], np.ndarray]):
        super().__init__()
        self.compute = compute

    def __missing__(self, part: str) -> np.ndarray:
        self[part] = found = self.compute(part)
        return found


class Pairs:
    """Comparisons of people in training and held-out parts.

    Args:
      tables: part -> its N pairs.
      registry: who has which row of the user table.
      reference: part -> float32 [N, 2], see `PairBatch.reference`.
      text: packs rows.
      parts: what the tables were made from, see `given_parts`.
    """

    def __init__(
        self,
        tables: Mapping[str, TokenTable],
        registry: UserRegistry,
        reference: Mapping[str, np.ndarray],
        text: Text,
        parts: Mapping[str, Part] | None = None,
    ):
        self.tables, self.registry, self.reference, self.text = tables, registry, reference, text
        self.parts = parts
        self.soft = any(table.has_soft_labels for table in tables.values())

    def seen_by(self, registry: UserRegistry) -> "Pairs":
        """The same comparisons for a user table with the rows of another registry."""
        return Pairs(self.tables, registry, self.reference, self.text, self.parts)

    def for_head(self, head: str) -> "Pairs":
        """The same comparisons for a policy, or for a reward model, which has no reference."""
        if head == "policy":
            return self
        zeros = References(lambda part: np.zeros((len(self.tables[part]), len(SIDES)), np.float32))
        return Pairs(self.tables, self.registry, zeros, self.text, self.parts)

    @property
    def people(self) -> set[str]:
        """Everybody who compared something."""
        return {str(example.user_id) for table in self.tables.values() for example in table.examples}

    def users(self, part: str) -> np.ndarray:
        """Row in the user table of each pair's person, int32 [N]; 0 for people who were not trained on."""
        return self.registry.indices([example.user_id for example in self.tables[part].examples])

    def collate(self, part: str, users: np.ndarray, rows: Sequence[TokenRow], num_user_tokens: int = 0) -> PairBatch:
        """A batch of B pairs of a part.

        Args:
          users: int32 [N], the person of every pair of the part.
          rows: B rows of the part's table.
          num_user_tokens: room for user tokens in every prompt.
        """
        index = np.array([row["index"] for row in rows], np.int32)
        packed = self.text.pack(rows, SIDES, num_user_tokens=num_user_tokens)
        return pair_batch(rows, packed, users[index], self.reference[part][index], self.soft)
