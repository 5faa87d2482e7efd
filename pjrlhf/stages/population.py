"""A population with conflicting tastes: comparisons of the base's answers, each labelled by one person.

Every person draws one taste (a preference of the registry) once, as in the conflicting-length experiment of P-RLHF
(arXiv 2402.05133, section 5.1), and labels pairs by it. Three files: people who are trained on, the same people on
held-out prompts, and new people.
"""

import json
import random
from typing import Any

import jax

from pjrlhf.stages.comparisons import sample_base
from pjrlhf.stages.context import Run
from pjrlhf.training.workdir import disk_errors

TRAIN, HELDOUT, NEW = "train.jsonl", "heldout.jsonl", "new_users.jsonl"


def tastes(names: tuple[str, ...], shares: tuple[float, ...], count: int, rng: random.Random) -> list[str]:
    """`count` tastes in the given shares, as exactly as whole people allow, in random order."""
    bounds = [round(count * sum(shares[: i + 1]) / sum(shares)) for i in range(len(shares))]
    drawn = [name for name, low, high in zip(names, [0, *bounds], bounds, strict=False) for _ in range(high - low)]
    return rng.sample(drawn, len(drawn))


def run(run: Run) -> dict[str, Any]:
    """Writes <workdir>/population/{train,heldout,new_users}.jsonl: TRL preference records with `user_id` and
    `taste`.
    """
    config = run.config.population
    rng = random.Random(run.config.seed + 1)
    people = {f"user{i:02d}": taste for i, taste in enumerate(tastes(config.tastes, config.shares, config.users, rng))}
    strangers = {
        f"new{i:02d}": taste for i, taste in enumerate(tastes(config.tastes, config.shares, config.new_users, rng))
    }
    train, held = run.requests
    folder = run.workdir.stage("population")
    ties = {}
    plans = (
        (TRAIN, people, train, config.pairs_per_user),
        (HELDOUT, people, held, config.heldout_pairs_per_user),
        (NEW, strangers, train + held, config.new_pairs_per_user),
    )
    for number, (name, crowd, requests, pairs) in enumerate(plans):
        users = [user for user in crowd for _ in range(pairs)]
        asked = [rng.choice(requests) for _ in users]
        texts = sample_base(
            run, [run.ask(request) for request in asked] * 2, jax.random.fold_in(run.key, 50 + number), "population"
        )
        records, ties[name] = [], 0
        for user, request, a, b in zip(users, asked, texts[: len(users)], texts[len(users) :], strict=True):
            gap = run.score(request, a, crowd[user]) - run.score(request, b, crowd[user])
            if abs(gap) <= 1e-9 or not a.strip() or not b.strip():
                ties[name] += 1
                continue
            chosen, rejected = (a, b) if gap > 0 else (b, a)
            record = {"prompt": run.ask(request), "chosen": chosen, "rejected": rejected, "user_id": user}
            if run.config.data.chat:
                record |= {side: [{"role": "assistant", "content": record[side]}] for side in ("chosen", "rejected")}
            records.append(record | {"taste": crowd[user], "request": request, "held_out": request in held})
        with disk_errors(folder / name):
            (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return {"people": people, "new_people": strangers, "ties": ties}
