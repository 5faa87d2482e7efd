"""A population with conflicting personas: comparisons of two answers, each labelled by one person. The answers are the
base's, or those of your own pairs.

Every person draws one persona (a preference of the registry) once, as in the conflicting-length experiment of P-RLHF
(arXiv 2402.05133, section 5.1), and labels pairs by it. Three files: people who are trained on, the same people on
held-out prompts, and new people.
"""

import dataclasses
import functools
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopulationSettings(Settings):
    """Simulated people with one persona each."""

    data: str | SourceSpec = setting(
        "base",
        'two answers of the base, or a source of pairs: {"kind": "jsonl", ..., "columns": {...}}',
        choices=("base",),
    )
    whole_answers: int = setting(
        0, "of a given pair, how many must fit into data.max_completion where longer ones are cut", low=0, high=2
    )
    users: int = setting(10, "people who are trained on", low=1, high=10**7)
    new_users: int = setting(10, "people who are met after training", low=1, high=10**7)
    personas: tuple[str, ...] = setting(("P3A", "P3B"), "preferences, of which everybody has one")
    fractions: tuple[float, ...] = setting((0.7, 0.3), "of the people, one for each persona", low=0.0)
    pairs_per_user: int = setting(320, "pairs to train on", low=1, high=10**7)
    heldout_pairs_per_user: int = setting(64, "pairs on held-out prompts", low=1, high=10**7)
    new_pairs_per_user: int = setting(96, "pairs of each new person", low=1, high=10**7)

    def check(self) -> None:
        if not self.personas or len(self.personas) != len(self.fractions):
            raise UserError(
                f"fractions: {len(self.fractions)} for {len(self.personas)} personas; give one for each persona"
            )
        if sum(self.fractions) <= 0:
            raise UserError("fractions: they sum to 0; make one of them positive")


def personas(names: Sequence[str], fractions: Sequence[float], count: int, rng: random.Random) -> list[str]:
    """`count` personas in the given fractions, as exactly as whole people allow, in random order."""
    bounds = [round(count * sum(fractions[: i + 1]) / sum(fractions)) for i in range(len(fractions))]
    drawn = [name for name, low, high in zip(names, [0, *bounds], bounds, strict=False) for _ in range(high - low)]
    return rng.sample(drawn, len(drawn))


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
    people = {
        f"user{i:02d}": persona
        for i, persona in enumerate(personas(config.personas, config.fractions, config.users, rng))
    }
    strangers = {
        f"new{i:02d}": persona
        for i, persona in enumerate(personas(config.personas, config.fractions, config.new_users, rng))
    }
    train, held = run.records.requests
    given = None if config.data == "base" else given_pairs(run)
    folder = run.workdir.stage("population")
    ties = {}
    plans = (
        (TRAIN, people, train, config.pairs_per_user),
        (HELDOUT, people, held, config.heldout_pairs_per_user),
        (NEW, strangers, train + held, config.new_pairs_per_user),
    )
    for name, crowd, requests, pairs in plans:
        if given is None:
            users = [user for user in crowd for _ in range(pairs)]
            triples = _sampled(run, [rng.choice(requests) for _ in users], STREAMS[name])
        else:
            known = set(requests)
            usable = [triple for triple in given if triple[0] in known]
            if not usable:
                raise UserError(
                    f"population.data: none of {len(given)} pairs belongs to {name}; its prompts must be those of "
                    "data.prompts"
                )
            # Nobody labels a pair twice, so a small source gives fewer than asked for.
            drawn = {user: rng.sample(usable, min(pairs, len(usable))) for user in crowd}
            users = [user for user in crowd for _ in drawn[user]]
            triples = [triple for user in crowd for triple in drawn[user]]
        records, ties[name] = [], 0
        for user, (request, a, b) in zip(users, triples, strict=True):
            gap = run.audience.score(request, a, crowd[user]) - run.audience.score(request, b, crowd[user])
            if abs(gap) <= 1e-9 or not a.strip() or not b.strip():
                ties[name] += 1
                continue
            chosen, rejected = (a, b) if gap > 0 else (b, a)
            columns = {"user_id": user, "persona": crowd[user], "held_out": request in held}
            records.append(preference_record(run, request, chosen, rejected, **columns))
        with disk_errors(folder / name):
            on_process_zero(write_lines)(folder / name, records)
    found = {"people": people, "new_people": strangers, "ties": ties}
    return found if given is None else found | {"given_pairs": len(given)}


STAGE = Stage("population", run, PopulationSettings)
