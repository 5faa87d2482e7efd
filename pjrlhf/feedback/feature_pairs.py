"""Comparisons of people as rows of frozen features: parts of a split, contexts of people, and batches of a step."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
from absl import logging

from pjrlhf.data.comparisons import SIDES
from pjrlhf.data.messages import Prompt, text_of
from pjrlhf.data.schema import Example, is_tie
from pjrlhf.data.token_table import TokenRow, TokenTable
from pjrlhf.errors import UserError
from pjrlhf.feedback.pairs import PARTS, PairSettings, at_most, check_named, split, tables_of
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.user_models.base import Comparisons, Person
from pjrlhf.rollout.features import STATES, Reduction, answer_key
from pjrlhf.runtime.features import encoded, encoder, features_of
from pjrlhf.runtime.run import Run
from pjrlhf.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureSettings(PairSettings):
    """Comparisons of people on features of the frozen base, or of another encoder."""

    section: ClassVar[str] = "user_models"

    states: tuple[str, ...] = setting(
        STATES,
        "features of an answer: the base's state at its last token, and the mean over its tokens",
        choices=STATES,
    )
    encoder: str = setting(
        "",
        "package.module:function or file.py:function (prompts, completions) -> a vector for each answer, in place of "
        "the states of the base; the base if empty",
    )
    components: int = setting(
        64, "principal components that the features are reduced to; 0 keeps all", low=0, high=2**20
    )
    new_user_fraction: float = setting(
        0.25, "fraction of the people of your own data, kept out to be met as new people", low=0.0, below=1.0
    )

    def check(self) -> None:
        super().check()
        if self.rows:
            raise UserError("rows: everybody of the training part has one row; set it to 0")
        if not self.states:
            raise UserError(f"states: is empty; give some of {', '.join(STATES)}")
        if self.encoder:
            if self.states != STATES:
                raise UserError("states: are those of the base, and an encoder is given; leave out one of the two")
            encoder(self.encoder)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """n comparisons of a part of the data, without ties.

    Attributes:
      answers: int [n, 2], rows of the features of chosen and rejected.
      people: str [n].
      held_out: bool [n], whether the prompt (or pair) is one that nobody trains on.
      personas: str or None for each.
    """

    answers: np.ndarray
    people: np.ndarray
    held_out: np.ndarray
    personas: tuple[str | None, ...]

    def of_people(self) -> dict[str, np.ndarray]:
        """The rows of every person, in order of name."""
        return {str(name): np.flatnonzero(self.people == name) for name in np.unique(self.people)}


class FeaturePairs:
    """The comparisons of a run, and the features of their answers.

    Attributes:
      states: float32 [A, D], features of the A different answers.

    Raises:
      UserError: as `tables_of`.
    """

    def __init__(self, run: Run, settings: FeatureSettings):
        self.settings = settings
        given = isinstance(settings.data, str)
        self._tables = tables_of(run, settings) if given else {"all": _table(run, settings)}
        answers, texts, self._numbers = _unique(self._tables, by_text=bool(settings.encoder))
        if settings.encoder:
            self.states = encoded(settings.encoder, *zip(*texts, strict=True))
        else:
            found = features_of(run, answers)
            self.states = np.concatenate([found[:, STATES.index(name)] for name in settings.states], axis=1)
        self._places = {(name, e.where): i for name, t in self._tables.items() for i, e in enumerate(t.examples)}

    def split(self, seed: int) -> dict[str, Part]:
        """Parts "train", "heldout" (the same people, prompts or pairs that nobody trains on) and "new_users" (other
        people). Pairs of the stage population are parted already; others are parted by the seed.

        Raises:
          UserError: a part without comparisons.
        """
        if "all" in self._tables:
            parts = {}
            for name, examples in split(self._tables["all"].examples, self.settings, seed).items():
                kept = at_most(name, examples, self.settings, seed, "user models")
                parts[name] = self._part("all", kept, name)
        else:
            parts = {name: self._part(name, table.examples, name) for name, table in self._tables.items()}
        for name in PARTS:
            if name not in parts or not len(parts[name].people):
                raise UserError(
                    f"user_models: no comparison is left for part {name!r}; change user_models.heldout_fraction or "
                    "user_models.new_user_fraction, or give more records"
                )
        return parts

    def _part(self, table: str, examples: Sequence[Example], part: str) -> Part:
        kept = [example for example in examples if not is_tie(example)]
        if len(kept) < len(examples):
            logging.info("user models: %d ties of part %s are left out", len(examples) - len(kept), part)
        rows = [self._places[table, example.where] for example in kept]
        return Part(
            answers=self._numbers[table][rows].reshape(-1, 2),
            people=np.array([str(example.user_id) for example in kept], str),
            held_out=np.array([part == "heldout" or bool(e.held_out) for e in kept], bool),
            personas=tuple(example.extra.get("persona") for example in kept),
        )

    def reduction(self, part: Part) -> Reduction:
        """How features are reduced, by the answers of a part alone."""
        return Reduction.fitted(self.states[np.unique(part.answers)], self.settings.components)

    def reduced(self, part: Part) -> np.ndarray:
        """The features of all answers, float32 [A, components], by the `reduction` of a part."""
        return self.reduction(part)(self.states)


def _table(run: Run, settings: FeatureSettings) -> TokenTable:
    assert not isinstance(settings.data, str)
    examples, source = run.records.with_heldout(settings.data, settings.heldout_data, settings.section)
    check_named(examples)
    return run.text.tokenized(run.records.asked(examples), run.text.lengths, source)


def _unique(
    tables: Mapping[str, TokenTable], by_text: bool
) -> tuple[list[TokenRow], list[tuple[Prompt, str]], dict[str, np.ndarray]]:
    """(the different answers of all tables, their prompts and texts, table -> int [n, 2] the number of chosen and
    rejected among them).

    Args:
      by_text: answers with the same tokens are different where their texts, which may be cut, are.
    """
    places: dict[bytes | str, int] = {}
    rows: list[TokenRow] = []
    texts: list[tuple[Prompt, str]] = []
    numbers = {name: np.zeros((len(table), len(SIDES)), np.int64) for name, table in tables.items()}
    for name, table in tables.items():
        for i, prompt in enumerate(table.tokens["prompt"]):
            for column, side in enumerate(SIDES):
                row = {"prompt": prompt, "completion": table.tokens[side][i]}
                text = table.examples[i].prompt, text_of(getattr(table.examples[i], side))
                place = places.setdefault(repr(text) if by_text else answer_key(row), len(rows))
                if place == len(rows):
                    rows.append(row)
                    texts.append(text)
                numbers[name][i, column] = place
    return rows, texts, numbers


class TrainingPeople:
    """The comparisons of a training part, by person.

    Args:
      permuted: the generator that exchanges the people of the pairs at random; None leaves them.

    Attributes:
      registry: who has which row; row 0 is nobody.
      pairs: int32 [N, 2], answers of all comparisons.
      rows: int32 [N], whose they are.
    """

    def __init__(self, part: Part, permuted: np.random.Generator | None = None):
        people = part.people if permuted is None else permuted.permutation(part.people)
        self.registry = UserRegistry.create([str(name) for name in np.unique(part.people)])
        self.pairs = part.answers.astype(np.int32)
        self.rows = self.registry.indices([str(name) for name in people])
        self._of = [np.flatnonzero(self.rows == row) for row in range(self.registry.capacity + 1)]

    def batches(self, steps: int, people: int, context: int, query: int, rng: np.random.Generator) -> "Batches":
        """Batches of `people` people with up to `context` and `query` comparisons each, for so many steps.

        A person's comparisons of a step are drawn without replacement, so none is in context and query. The size of a
        context is uniform from 0 to `context`, so that a model learns to serve people with few and with many.
        """
        shape = (steps, people)
        found = Batches(
            rows=rng.integers(1, self.registry.capacity + 1, shape).astype(np.int32),
            context=np.zeros((*shape, context), np.int32),
            context_weight=np.zeros((*shape, context), np.float32),
            query=np.zeros((*shape, query), np.int32),
            query_weight=np.zeros((*shape, query), np.float32),
            counts=np.zeros(shape, np.float32),
        )
        sizes = rng.integers(0, context + 1, shape)
        for place in np.ndindex(shape):
            own = self._of[found.rows[place]]
            drawn = rng.permutation(own)
            asked = drawn[: min(query, max(1, len(own) // 2))]
            told = drawn[len(asked) : len(asked) + sizes[place]]
            for name, chosen in (("query", asked), ("context", told)):
                getattr(found, name)[place][: len(chosen)] = chosen
                getattr(found, f"{name}_weight")[place][: len(chosen)] = 1.0
            found.counts[place] = len(own)
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Comparisons of steps, as rows of the training part: int32 or float32 with leading axes [steps, people]."""

    rows: np.ndarray
    context: np.ndarray
    context_weight: np.ndarray
    query: np.ndarray
    query_weight: np.ndarray
    counts: np.ndarray

    def chunks(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of `size` steps at a time."""
        for start in range(0, len(self.rows), size):
            yield {f.name: getattr(self, f.name)[start : start + size] for f in dataclasses.fields(self)}


def comparisons(features, pairs, index, weight) -> Comparisons:
    """The comparisons `index` [..., n] among `pairs` [N, 2] of answers with `features` [A, D]."""
    answers = pairs[index]
    return Comparisons(features[answers[..., 0]], features[answers[..., 1]], weight)


def people_of(features, pairs, batch) -> Person:
    """What a step sees of its people, from the arrays of a batch."""
    context = comparisons(features, pairs, batch["context"], batch["context_weight"])
    query = comparisons(features, pairs, batch["query"], batch["query_weight"])
    return Person(row=batch["rows"], count=batch["counts"], context=context, query=query)


def padded(features: np.ndarray, part: Part, rows: Sequence[np.ndarray], size: int = 0) -> Comparisons:
    """The comparisons `rows` of each of several people, padded to `size` (that of the longest where 0)."""
    size = size or max((len(own) for own in rows), default=0)
    index, weight = np.zeros((len(rows), size), np.int64), np.zeros((len(rows), size), np.float32)
    for i, own in enumerate(rows):
        own = own[:size]
        index[i, : len(own)], weight[i, : len(own)] = own, 1.0
    return comparisons(features, part.answers, index, weight)
