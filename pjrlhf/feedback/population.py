"""A population with conflicting personas: comparisons of two answers, each labelled by one person. The answers are the
base's, or those of your own pairs.

Every person draws one persona (a preference of the registry) once, as in the conflicting-length experiment of P-RLHF
(arXiv 2402.05133, section 5.1), or weights of all personas, and labels pairs by them. Three files: people who are
trained on, the same people on held-out prompts, and new people. What they say about themselves (`user_text`) is the
sentence of their persona (of the one that weighs most), or, for those who contradict themselves, of another one.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from pjrlhf.data.comparisons import SIDES
from pjrlhf.data.messages import Request, as_request, text_of
from pjrlhf.errors import UserError
from pjrlhf.feedback.comparisons import preference_record
from pjrlhf.parallel.processes import on_process_zero
from pjrlhf.runtime.answers import sample_base
from pjrlhf.runtime.records import SourceSpec
from pjrlhf.runtime.run import Run, Stage
from pjrlhf.settings import Settings, setting
from pjrlhf.training.workdir import disk_errors, write_lines

TRAIN, HELDOUT, NEW = "train.jsonl", "heldout.jsonl", "new_users.jsonl"
STREAMS = {TRAIN: "population/train", HELDOUT: "population/heldout", NEW: "population/new_users"}
Triple = tuple[Request, str, str]  # a request and two answers
Taste = dict[str, float]  # persona -> its weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopulationSettings(Settings):
    """Simulated people with one persona each."""

    data: str | SourceSpec = setting(
        "base",
        'two answers of the base, or a source of pairs: {"kind": "jsonl", ..., "columns": {...}}',
        choices=("base",),
    )
    pool: int = setting(
        0,
        "of the base: pairs of answers of each of the three files, which everybody draws from, so that many people "
        "cost no more sampling; 0 samples every person's own",
        low=0,
        high=10**7,
    )
    whole_answers: int = setting(
        0, "of a given pair, how many must fit into data.max_completion where longer ones are cut", low=0, high=2
    )
    users: int = setting(10, "people who are trained on", low=1, high=10**7)
    new_users: int = setting(10, "people who are met after training", low=1, high=10**7)
    personas: tuple[str, ...] = setting(("P3A", "P3B"), "preferences, of which everybody has one")
    fractions: tuple[float, ...] = setting((0.7, 0.3), "of the people, one for each persona", low=0.0)
    mixture: float = setting(
        0.0,
        "where positive, everybody weighs all personas, by a Dirichlet distribution of this concentration for each of "
        "equal fractions, so that small numbers give people of few preferences; 0 gives one persona each",
        low=0.0,
        high=1e6,
    )
    contradicting: float = setting(
        0.0, "fraction of the people who state the preference of another persona", low=0.0, high=1.0
    )
    pairs_per_user: int = setting(320, "pairs to train on", low=1, high=10**7)
    pairs_in_turn: tuple[int, ...] = setting(
        (), "in place of pairs_per_user: numbers of pairs that one person after the other gives", low=1, high=10**7
    )
    heldout_pairs_per_user: int = setting(64, "pairs on held-out prompts", low=1, high=10**7)
    new_pairs_per_user: int = setting(96, "pairs of each new person", low=1, high=10**7)

    def check(self) -> None:
        if not self.personas or len(self.personas) != len(self.fractions):
            raise UserError(
                f"fractions: {len(self.fractions)} for {len(self.personas)} personas; give one for each persona"
            )
        if sum(self.fractions) <= 0:
            raise UserError("fractions: they sum to 0; make one of them positive")
        if self.contradicting and len(set(self.personas)) < 2:
            raise UserError("contradicting: there is one persona alone; add another one, or set it to 0")
        if self.pool and self.data != "base":
            raise UserError("pool: the pairs of population.data are all there is; set it to 0")


def personas(names: Sequence[str], fractions: Sequence[float], count: int, rng: random.Random) -> list[str]:
    """`count` personas in the given fractions, as exactly as whole people allow, in random order."""
    bounds = [round(count * sum(fractions[: i + 1]) / sum(fractions)) for i in range(len(fractions))]
    drawn = [name for name, low, high in zip(names, [0, *bounds], bounds, strict=False) for _ in range(high - low)]
    return rng.sample(drawn, len(drawn))


@dataclasses.dataclass(frozen=True)
class Person:
    """Somebody of the population: the weights of personas they label by, and the persona they say they have."""

    taste: Taste
    stated: str

    @property
    def persona(self) -> str:
        """The persona with the largest weight."""
        return max(self.taste, key=lambda name: self.taste[name])

    @property
    def contradicts(self) -> bool:
        """Whether they say what their labels deny."""
        return self.stated != self.persona


def tastes(names: Sequence[str], fractions: Sequence[float], mixture: float, rng: np.random.Generator) -> Taste:
    """Weights of personas, with sum 1: Dirichlet(mixture x number of personas x fractions), as people weigh reward
    models in PersonalLLM (arXiv 2409.20296, section 3).
    """
    used = [(name, fraction) for name, fraction in zip(names, fractions, strict=True) if fraction > 0]
    total = sum(fraction for _, fraction in used)
    weights = rng.dirichlet([mixture * len(used) * fraction / total for _, fraction in used])
    return {name: float(weight) for (name, _), weight in zip(used, weights, strict=True)}


class Labels:
    """Which of two answers a person prefers: the sum of the scores of the personas, by the person's weights.

    Scores of different personas have different units: after `calibrate`, each is divided by its standard deviation.
    """

    def __init__(self, run: Run):
        self.run = run
        self._spread: dict[str, float] = {}
        self._known: dict[tuple[str, str, str], float] = {}

    def calibrate(self, names: Sequence[str], triples: Sequence[Triple]) -> None:
        """Measures the spread of the scores of personas over the answers of pairs."""
        answers = {(repr(request), text): (request, text) for request, *texts in triples for text in texts}
        for name in names:
            spread = float(np.std([self._score(request, text, name) for request, text in answers.values()]))
            self._spread[name] = max(spread, 1e-9)

    def gap(self, taste: Taste, request: Request, first: str, second: str) -> float:
        """How much better the first answer is."""
        gaps = {name: self._score(request, first, name) - self._score(request, second, name) for name in taste}
        return sum(weight * gaps[name] / self._spread.get(name, 1.0) for name, weight in taste.items())

    def _score(self, request: Request, text: str, name: str) -> float:
        if not self._spread:  # each answer is asked about once
            return self.run.audience.score(request, text, name)
        key = (repr(request), text, name)
        if key not in self._known:
            self._known[key] = self.run.audience.score(request, text, name)
        return self._known[key]


def people_of(config: PopulationSettings, prefix: str, count: int, rng: random.Random) -> dict[str, Person]:
    """`count` people by name."""
    if config.mixture:
        draws = np.random.default_rng(rng.randrange(2**63))
        weights = [tastes(config.personas, config.fractions, config.mixture, draws) for _ in range(count)]
    else:
        weights = [{persona: 1.0} for persona in personas(config.personas, config.fractions, count, rng)]
    people = [Person(taste, "") for taste in weights]
    found = {f"{prefix}{i:02d}": dataclasses.replace(one, stated=one.persona) for i, one in enumerate(people)}
    if config.contradicting:
        for name in rng.sample(sorted(found), round(config.contradicting * count)):
            others = [one for one in dict.fromkeys(config.personas) if one != found[name].persona]
            found[name] = dataclasses.replace(found[name], stated=rng.choice(others))
    return found


def given_pairs(run: Run) -> list[Triple]:
    """The pairs of `population.data` that fit into the lengths of the run and of which at least
    `population.whole_answers` fit without being cut off; which answer the source calls chosen does not matter. Answers
    are judged whole, also where the run reads only their beginning (`data.long_completion`).

    Raises:
      UserError: no pair is left.
    """
    source = run.section(PopulationSettings).data
    assert not isinstance(source, str), source  # the base answers there
    examples, name = run.records.comparisons(source, "population.data")
    asked = [dataclasses.replace(example, prompt=run.records.ask(example.prompt), extra={}) for example in examples]
    table = run.text.tokenized(asked, run.text.lengths, name)
    ended = [[ids[-1] in run.workspace.tokenizer.eos_ids for ids in table.tokens[side]] for side in SIDES]
    whole = np.sum(ended, axis=0)
    enough = run.section(PopulationSettings).whole_answers
    fits = {example.where for example, count in zip(table.examples, whole, strict=True) if count >= enough}
    logging.info("%s: %d of %d pairs have at least %d whole answers", name, len(fits), len(table), enough)
    if not fits:
        raise UserError(
            f"population.data: none of {len(table)} pairs has {enough} answers of at most "
            f"{run.text.lengths.completion} tokens; raise data.max_completion, or lower population.whole_answers"
        )
    return [
        (as_request(e.prompt), text_of(e.chosen or ""), text_of(e.rejected or "")) for e in examples if e.where in fits
    ]


def _sampled(run: Run, requests: list[Request], stream: str) -> list[Triple]:
    """Two answers of the base to every request, drawn from a random stream."""
    prompts, keys = [run.records.ask(request) for request in requests], functools.partial(run.streams.key, stream)
    texts = sample_base(run, prompts * 2, keys, f"population: answers for {stream.partition('/')[2]}")
    return list(zip(requests, texts[: len(requests)], texts[len(requests) :], strict=True))


def run(run: Run) -> dict[str, Any]:
    """Writes <workdir>/population/{train,heldout,new_users}.jsonl: TRL preference records with `user_id` and
    `persona`.

    Raises:
      UserError: `population.data` cannot be used, or has no pair on one side of the split by prompt.
    """
    config = run.section(PopulationSettings)
    rng = run.streams.python("population/people")
    people = people_of(config, "user", config.users, rng)
    strangers = people_of(config, "new", config.new_users, rng)
    train, held = run.records.requests
    given = None if config.data == "base" else given_pairs(run)
    folder = run.workdir.stage("population")
    ties, sentences, labels = {}, run.audience.sentences, Labels(run)
    plans = (
        (TRAIN, people, train, config.pairs_in_turn or (config.pairs_per_user,)),
        (HELDOUT, people, held, (config.heldout_pairs_per_user,)),
        (NEW, strangers, train + held, (config.new_pairs_per_user,)),
    )
    for name, crowd, requests, pairs in plans:
        counts = dict(zip(crowd, itertools.cycle(pairs)))
        if given is None and not config.pool:
            users = [user for user in crowd for _ in range(counts[user])]
            triples = _sampled(run, [rng.choice(requests) for _ in users], STREAMS[name])
        else:
            if given is None:
                usable = _sampled(run, [rng.choice(requests) for _ in range(config.pool)], STREAMS[name])
            else:
                known = set(requests)
                usable = [triple for triple in given if triple[0] in known]
            if not usable:
                raise UserError(
                    f"population.data: none of {len(given or ())} pairs belongs to {name}; its prompts must be those "
                    "of data.prompts"
                )
            # Nobody labels a pair twice, so a small source gives fewer than asked for.
            drawn = {user: rng.sample(usable, min(counts[user], len(usable))) for user in crowd}
            users = [user for user in crowd for _ in drawn[user]]
            triples = [triple for user in crowd for triple in drawn[user]]
        if config.mixture and name == TRAIN:
            labels.calibrate(config.personas, triples)
        records, ties[name] = [], 0
        for user, (request, a, b) in zip(users, triples, strict=True):
            person = crowd[user]
            gap = labels.gap(person.taste, request, a, b)
            if abs(gap) <= 1e-9 or not a.strip() or not b.strip():
                ties[name] += 1
                continue
            chosen, rejected = (a, b) if gap > 0 else (b, a)
            columns = {"user_id": user, "persona": person.persona, "held_out": request in held}
            if config.mixture:
                columns["taste"] = person.taste
            if text := sentences.get(person.stated):
                columns |= {"user_text": text, "contradicts": person.contradicts}
            records.append(preference_record(run, request, chosen, rejected, **columns))
        with disk_errors(folder / name):
            on_process_zero(write_lines)(folder / name, records)
    found: dict[str, Any] = {"ties": ties}
    for key, crowd in (("people", people), ("new_people", strangers)):
        found[key] = {user: person.taste if config.mixture else person.persona for user, person in crowd.items()}
    return found if given is None else found | {"given_pairs": len(given)}


STAGE = Stage("population", run, PopulationSettings)
