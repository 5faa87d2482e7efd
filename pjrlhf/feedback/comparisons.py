"""Comparisons as in Personalized Soups: two answers per prompt, of the base or of a stronger model, and one label per
preference from the judge.
"""

import dataclasses
import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from pjrlhf.data import preferences
from pjrlhf.data.messages import Prompt, columns_of
from pjrlhf.errors import UserError
from pjrlhf.feedback.samplers import BASE, sampler, sampler_name
from pjrlhf.judges.judge import JUDGES, check_judge, combo_outcomes, judge_name
from pjrlhf.judges.language_model import announce
from pjrlhf.parallel.processes import on_process_zero
from pjrlhf.runtime.audience import Audience
from pjrlhf.runtime.run import Run, Stage
from pjrlhf.settings import Settings, setting
from pjrlhf.training.workdir import disk_errors, write_lines
from pjrlhf.types import Json

FILE = "comparisons.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonsSettings(Settings):
    """Pairs of answers, labelled by a judge."""

    sampler: str | Mapping[str, Any] = setting(
        BASE,
        'who answers; base: the base of the run; the folder of another model; or {"kind": ...} with settings, see '
        "feedback/samplers.py",
        path=True,
    )
    judge: str | Mapping[str, Any] = setting(
        "score",
        'who compares answers; score: by the scorers of the run; or {"kind": ...} with settings, see judges/judge.py',
        choices=tuple(JUDGES),
        extensible=True,
    )
    objectives: tuple[str, ...] = setting(
        (),
        "preferences that pairs are labelled by; those with a reward model where empty. MODPO needs labels of others",
    )
    pairs: int = setting(
        1024, "pairs of answers that are sampled; different ones are labelled once per objective", low=1, high=10**8
    )
    ties: str = setting(
        "drop", "pairs judged equal: left out, or kept as records with preference 0.5", choices=("drop", "keep")
    )

    def check(self) -> None:
        check_judge(self.judge)
        sampler(None, self.sampler)

    def labels(self, audience: Audience) -> tuple[str, ...]:
        """The preferences that pairs are labelled by.

        Raises:
          UserError: an unknown one, one with a reward model that is left out, or none.
        """
        if not self.objectives:
            if not audience.learned:
                raise UserError(
                    "comparisons: the rewards of all objectives have a source, so that no reward model learns from "
                    "labels; leave the stage out, or name in comparisons.objectives what MODPO needs labels of"
                )
            return audience.learned
        if unknown := [name for name in self.objectives if name not in audience.rewards]:
            raise UserError(
                f"comparisons.objectives: {unknown[0]!r} is unknown; choose from {', '.join(audience.rewards)}"
            )
        if missing := [name for name in audience.learned if name not in self.objectives]:
            raise UserError(
                f"comparisons.objectives: {missing[0]!r} has a reward model, which learns from labels; add it"
            )
        return tuple(name for name in audience.rewards if name in self.objectives)


def stated_sets(run: Run, count: int, rng: random.Random) -> list[tuple[str, ...]]:
    """For each of `count` answers, which preferences its prompt states: none, or one each of some dimensions."""
    if run.settings.prompt_preference == "never":
        return [()] * count
    groups = list(preferences.dimensions(run.audience.preferences, run.audience.objectives).values())
    return [tuple(rng.choice(group) for group in groups if rng.random() < 0.5) for _ in range(count)]


def preference_record(run: Run, request: Prompt, chosen: str, rejected: str, **columns: Json) -> dict[str, Any]:
    """A TRL preference record of answers to `request`: messages where this run chats, text where it does not."""
    answers: dict[str, Any] = {"chosen": chosen, "rejected": rejected}
    if run.records.chat:
        answers = {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
    return {"prompt": run.records.ask(request), **answers, **columns, **columns_of(request), "request": request}


def run(run: Run) -> dict[str, Any]:
    """Writes <workdir>/comparisons/comparisons.jsonl: TRL preference records with an `objective` each, and with the
    names of their judge and sampler; counts ties and pairs without a verdict per objective.

    A pair that was sampled twice, in either order, is labelled once. Equal answers are a tie, and nobody is asked.

    Prompts are the plain requests, whatever sentences were stated when the answers were sampled: a reward model is
    that of one preference and needs no sentence to know it.
    """
    config = run.section(ComparisonsSettings)
    judge, names = run.judge(config.judge), config.labels(run.audience)
    announce("comparisons", judge.planned_requests(config.pairs * len(names)))
    rng = run.streams.python("comparisons/prompts")
    requests = [run.records.requests[0][i % len(run.records.requests[0])] for i in range(config.pairs)]
    stated = stated_sets(run, 2 * config.pairs, rng)
    words = [preferences.sentences(run.audience.preferences, names) for names in stated]
    source = sampler_name(config.sampler)
    texts = sampler(run, config.sampler)(requests * 2, words, f"comparisons: answers of {source}")
    first, second = texts[: config.pairs], texts[config.pairs :]

    usable = [i for i in range(config.pairs) if first[i].strip() and second[i].strip()]
    equal = [i for i in usable if first[i] == second[i]]
    pairs = {(requests[i], *sorted((first[i], second[i]))): i for i in reversed(usable) if first[i] != second[i]}
    kept = sorted(pairs.values())  # the first of its kind
    asked, a, b = [requests[i] for i in kept], [first[i] for i in kept], [second[i] for i in kept]
    verdicts = combo_outcomes(judge, asked, a, b, names)
    label = {"judge": judge_name(config.judge), "sampler": source}
    records, ties, unjudged = [], dict.fromkeys(names, len(equal)), dict.fromkeys(names, 0)
    for request, x, y, row in zip(asked, a, b, verdicts.tolist(), strict=True):
        for name, verdict in zip(names, row, strict=True):
            if math.isnan(verdict):
                unjudged[name] += 1
                continue
            ties[name] += not verdict
            if not verdict and config.ties == "drop":
                continue
            chosen, rejected = (x, y) if verdict >= 0 else (y, x)
            soft = {} if abs(verdict) == 1 else {"preference": (1 + abs(verdict)) / 2}
            records.append(preference_record(run, request, chosen, rejected, objective=name, **label, **soft))
    decided = {record["objective"] for record in records if record.get("preference") != 0.5}
    undecided = set(names) - decided
    if undecided:
        name = min(undecided)
        if unjudged[name]:
            raise UserError(
                f"comparisons: the judge gave no verdict by {name!r} on {unjudged[name]} of {len(kept)} pairs of "
                "answers, and a tie on all others; check what it replies, or choose another one in comparisons.judge"
            )
        raise UserError(
            f"comparisons: none of {config.pairs} pairs of answers differs by {name!r}; train the base "
            "longer or raise --config.comparisons.pairs"
        )
    path = run.workdir.stage("comparisons") / FILE
    with disk_errors(path):
        on_process_zero(write_lines)(path, records)
    lengths = [len(text.split()) for text in texts]
    found = {"pairs": config.pairs, "ties": ties, "empty_answers": config.pairs - len(usable)}
    found |= {"equal_answers": len(equal), "repeated_pairs": len(usable) - len(equal) - len(kept), "sampler": source}
    return found | {"unjudged": unjudged, "judge": judge.report(), "mean_words": float(np.mean(lengths))}


STAGE = Stage("comparisons", run, ComparisonsSettings)
