"""What stands before the prompts of a person because of what they chose before: the comparisons that a writer reads,
and where its text goes.

A writer reads comparisons of the training part alone, or, of a new person, those on prompts that are not held out, and
never one on the prompt that is asked. Ties tell nothing and are left out.
"""

import collections
import dataclasses
import functools
from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from pjrlhf.data.messages import Request, as_request, text_of
from pjrlhf.data.schema import Example, is_tie
from pjrlhf.feedback.writers.base import Known, Shot, Writer
from pjrlhf.feedback.writers.fewshot import FewShot
from pjrlhf.runtime.features import prompt_features
from pjrlhf.runtime.run import Run

PARTS = ("train", "heldout", "new_users")
STREAM = "preference/history"


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """What is read of a person, and who writes it down.

    Attributes:
      count: comparisons, at most; people with fewer have those they have.
      writer: see `feedback.writers`.
      varied: in the training part, each prompt is after 0 to `count` comparisons, drawn evenly, so that the model can
        be asked with any number of them; of a writer that writes once for a person, `count` as elsewhere.
      similar: the comparisons that are read are those on the prompts most like the one that is asked, the most similar
        last (the retrieval of LaMP, arXiv 2304.11406, section 3, and of EXACT, arXiv 2602.17695); otherwise they are
        random, or the latest. Every prompt then has a text of its own.
      permuted: in the training part, everybody's pairs have the text of somebody else: the control.
      flipped: outside the training part, preferred and other answers are exchanged before they are read: the flip test
        (P-TTT, 2026), after which a model that reads turns its predictions around.
      others: outside the training part, everybody's prompts have the text of one other person of the part.
    """

    count: int
    writer: Writer = dataclasses.field(default_factory=FewShot)
    varied: bool = False
    similar: bool = False
    permuted: bool = False
    flipped: bool = False
    others: bool = False

    @property
    def once(self) -> bool:
        """Whether a person has one text for many prompts."""
        return self.writer.once and not self.similar


def with_history(
    parts: Mapping[str, Sequence[Example]], history: History, run: Run, only: Collection[str] = PARTS
) -> dict[str, list[Example]]:
    """Every example of the parts in `only` as the writer asks it.

    Args:
      parts: "train", "heldout" and perhaps "new_users" -> examples, see `feedback.pairs.split`. Of "new_users",
        comparisons that are not held out are known.
      run: draws, and has the models that writers ask.
    """
    source, writer = _Source(parts, history, run), history.writer
    found = {}
    for name, examples in parts.items():
        if name not in only:
            continue
        source.rng = rng = run.streams.numpy(STREAM, PARTS.index(name))
        owners = source.owners(name, examples)
        # Prompts with the same key have the same text, which is written once.
        keys = list(map(source.key, examples, owners)) if history.once else list(range(len(examples)))
        known: dict[Hashable, Known] = {}
        for key, example, owner in zip(keys, examples, owners, strict=True):
            if key not in known:
                known[key] = source.known(name, example, owner)
        texts = dict(zip(known, writer.write(list(known.values()), RunBase(run)), strict=True))
        found[name] = [
            writer.ask(example, texts[key], name == "train", rng) for example, key in zip(examples, keys, strict=True)
        ]
    return found


@dataclasses.dataclass(frozen=True)
class RunBase:
    """The base of a run, see `feedback.writers.base.Base`."""

    run: Run

    @property
    def sentences(self) -> dict[str, str]:
        return self.run.audience.sentences

    def margins(self, comparisons: Sequence[Example], words: str) -> Float[np.ndarray, " N"]:
        run, found = self.run, np.full(len(comparisons), np.nan)
        asked = [
            dataclasses.replace(one, prompt=run.records.ask(one.original or "", words), extra={"row": row})
            for row, one in enumerate(comparisons)
        ]
        if asked:
            name = f"comparisons with {words!r}" if words else "comparisons without an attribute"
            table = run.text.tokenized(asked, run.text.sampled_lengths, name)
            logps = run.reference(table, run.text.sample_rows)
            found[[example.extra["row"] for example in table.examples]] = np.subtract(*logps.T)
        return found


class _Source:
    """What may be read about people, and the draws from it."""

    def __init__(self, parts: Mapping[str, Sequence[Example]], history: History, run: Run):
        self.history, self.run, self.parts, self.rng = history, run, parts, run.streams.numpy(STREAM, len(PARTS))
        self.trained = {str(example.user_id) for example in parts.get("train", ())}
        self.past = collections.defaultdict[str, list[Example]](list)
        self.records: dict[str, Example] = {}
        self.answers = collections.defaultdict[object, list[Example]](list)
        for name, examples in parts.items():
            for example in examples:
                person = str(example.user_id)
                self.records.setdefault(person, example)
                known = name == "train" or (name == "new_users" and not example.held_out)
                if known and not is_tie(example):
                    self.past[person].append(example)
                if name == "train" and not is_tie(example):
                    self.answers[_answers(example)].append(example)
        self.turned: dict[int, Example] = {}
        # Person -> request -> half.
        self.halves = {person: self._halved(examples) for person, examples in sorted(self.past.items())}

    def _halved(self, examples: Sequence[Example]) -> dict[Request, int]:
        requests = list(dict.fromkeys(as_request(one.original) for one in examples))
        return {requests[i]: place % 2 for place, i in enumerate(self.rng.permutation(len(requests)).tolist())}

    def owners(self, name: str, examples: Sequence[Example]) -> list[str]:
        """Whose text each example gets."""
        owners = [str(example.user_id) for example in examples]
        if self.history.permuted and name == "train":
            return [owners[i] for i in self.rng.permutation(len(owners))]
        if self.history.others and name != "train":
            people = [list(dict.fromkeys(owners))[i] for i in self.rng.permutation(len(set(owners)))]
            other = dict(zip(people, [*people[1:], people[0]], strict=True))
            return [other[owner] for owner in owners]
        return owners

    def key(self, example: Example, owner: str) -> tuple[str, int]:
        """What all prompts with the same text have in common: the owner of the text, and the half of their prompts
        that it is not written from, or -1.
        """
        return owner, self.halves.get(owner, {}).get(as_request(example.original), -1)

    def known(self, name: str, example: Example, owner: str) -> Known:
        """What a writer reads of the owner for the prompt of an example of a part, or for all with the same key."""
        history, past, asked = self.history, self.past.get(owner, []), as_request(example.original)
        if history.once:
            _, half = self.key(example, owner)
            pool = [one for one in past if half < 0 or self.halves[owner][as_request(one.original)] != half]
        else:
            pool = [one for one in past if as_request(one.original) != asked]
        # Drawn whatever the count, so that fewer comparisons are the first of more.
        order, sides = self.rng.permutation(len(pool)), self.rng.random(len(pool)) < 0.5
        count = history.count if history.writer.reads else 0
        share = self.rng.random()
        if history.varied and name == "train" and not history.once:
            count = int(share * (count + 1))
        if history.similar and pool:
            there = np.stack([self._features[as_request(pool[i].original)] for i in order])
            drawn = order[by_similarity(self._features[asked], there)][:count][::-1].tolist()
        elif history.writer.latest:
            drawn = range(max(0, len(pool) - count), len(pool))
        else:
            drawn = order[:count].tolist()
        flipped = history.flipped and name != "train"
        # Turned round, answers keep their places and change their verdicts.
        shots = tuple(Shot(self._turned(pool[i]) if flipped else pool[i], bool(sides[i]) != flipped) for i in drawn)
        return Known(
            person=owner if owner in self.trained else None,
            shots=shots,
            others=tuple(self._others(pool[i], owner) for i in drawn),
            example=self.records.get(owner),
        )

    def _turned(self, example: Example) -> Example:
        """The comparison of somebody who chose the other answer, always the same object."""
        if id(example) not in self.turned:
            self.turned[id(example)] = dataclasses.replace(example, chosen=example.rejected, rejected=example.chosen)
        return self.turned[id(example)]

    @functools.cached_property
    def _features(self) -> dict[Request, np.ndarray]:
        """Request -> features of its prompt, less their mean over what is known."""
        known = {as_request(e.original): e.prompt or "" for past in self.past.values() for e in past}
        asked = {as_request(e.original): e.prompt or "" for part in self.parts.values() for e in part}
        prompts = {**asked, **known}
        found = dict(zip(prompts, prompt_features(self.run, list(prompts.values())), strict=True))
        mean = np.mean([found[request] for request in known], axis=0)
        return {request: features - mean for request, features in found.items()}

    def _others(self, example: Example, owner: str) -> tuple[Example, ...]:
        """What other people were trained on who chose the other of the same answers."""
        alike = self.answers.get(_answers(example), ())
        return tuple(one for one in alike if one.chosen != example.chosen and str(one.user_id) != owner)


def by_similarity(one: Float[np.ndarray, " D"], others: Float[np.ndarray, "n D"]) -> np.ndarray:
    """The rows of `others` by their cosine with `one`, the largest first; rows that are alike keep their order."""
    lengths = np.linalg.norm(others, axis=1) * np.linalg.norm(one)
    return np.argsort(-(others @ one) / np.maximum(lengths, 1e-12), kind="stable")


def _answers(example: Example) -> object:
    """What comparisons of the same answers have in common."""
    sides = sorted(text_of(answer or "") for answer in (example.chosen, example.rejected))
    return as_request(example.original), *sides
