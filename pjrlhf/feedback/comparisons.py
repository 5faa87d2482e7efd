"""Comparisons as in Personalized Soups: two answers of the base per prompt, one label per preference from the judge."""

import dataclasses
import functools
import random
from typing import Any

import numpy as np

from pjrlhf.data import preferences
from pjrlhf.errors import UserError
from pjrlhf.parallel.processes import on_process_zero
from pjrlhf.runtime.answers import sample_base
from pjrlhf.runtime.run import Run, Stage
from pjrlhf.settings import Settings, setting
from pjrlhf.training.workdir import disk_errors, write_lines
from pjrlhf.types import Json

FILE = "comparisons.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonsSettings(Settings):
    """Pairs of answers of the base, labelled by the judge."""

    pairs: int = setting(1024, "pairs of answers, each labelled once per objective", low=1, high=10**8)


def stated_sets(run: Run, count: int, rng: random.Random) -> list[tuple[str, ...]]:
    """For each of `count` answers, which preferences its prompt states: none, or one each of some dimensions."""
    if run.settings.prompt_preference == "never":
        return [()] * count
    groups = list(preferences.dimensions(run.audience.preferences, run.audience.objectives).values())
    return [tuple(rng.choice(group) for group in groups if rng.random() < 0.5) for _ in range(count)]


def preference_record(run: Run, request: str, chosen: str, rejected: str, **columns: Json) -> dict[str, Any]:
    """A TRL preference record of answers to `request`: messages where this run chats, text where it does not."""
    answers: dict[str, Any] = {"chosen": chosen, "rejected": rejected}
    if run.settings.data.chat:
        answers = {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
    return {"prompt": run.records.ask(request), **answers, **columns, "request": request}


def run(run: Run) -> dict[str, Any]:
    """Writes <workdir>/comparisons/comparisons.jsonl: TRL preference records with an `objective` each; counts ties
    per objective.

    Prompts are the plain requests, whatever sentences were stated when the answers were sampled: a reward model is
    that of one preference and needs no sentence to know it.
    """
    config = run.section(ComparisonsSettings)
    rng = run.streams.python("comparisons/prompts")
    requests = [run.records.requests[0][i % len(run.records.requests[0])] for i in range(config.pairs)]
    stated = stated_sets(run, 2 * config.pairs, rng)
    said = [preferences.sentences(run.audience.preferences, names) for names in stated]
    prompts = [run.records.ask(request, words) for request, words in zip(requests * 2, said, strict=True)]
    keys = functools.partial(run.streams.key, "comparisons/answers")
    texts = sample_base(run, prompts, keys, "comparisons: answers of the base")
    first, second = texts[: config.pairs], texts[config.pairs :]

    records, ties, unusable = [], dict.fromkeys(run.audience.learned, 0), 0
    for request, a, b in zip(requests, first, second, strict=True):
        if not a.strip() or not b.strip():
            unusable += 1
            continue
        for name in run.audience.learned:
            gap = run.audience.score(request, a, name) - run.audience.score(request, b, name)
            if abs(gap) <= 1e-9:
                ties[name] += 1
                continue
            chosen, rejected = (a, b) if gap > 0 else (b, a)
            records.append(preference_record(run, request, chosen, rejected, objective=name))
    undecided = set(run.audience.learned) - {record["objective"] for record in records}
    if undecided:
        raise UserError(
            f"comparisons: none of {config.pairs} pairs of answers differs by {min(undecided)!r}; train the base "
            "longer or raise --config.comparisons.pairs"
        )
    path = run.workdir.stage("comparisons") / FILE
    with disk_errors(path):
        on_process_zero(write_lines)(path, records)
    lengths = [len(text.split()) for text in texts]
    return {"pairs": config.pairs, "ties": ties, "empty_answers": unusable, "mean_words": float(np.mean(lengths))}


STAGE = Stage("comparisons", run, ComparisonsSettings)
