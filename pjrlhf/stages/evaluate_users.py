"""How well each person is served: accuracy per user on held-out prompts, the generic user, new people, and answers.

The controls stand beside every personalized figure: pooled DPO on the same data and budget, and permuted user ids.
"""

import time
from typing import Any

import numpy as np

from pjrlhf.evaluation.report import write_report
from pjrlhf.evaluation.users import cold_start_curve, length_matched, principal_axes, user_accuracy
from pjrlhf.stages.context import Run
from pjrlhf.stages.new_users import fit_new_users
from pjrlhf.stages.pairs import SIDES, Pairs
from pjrlhf.stages.trained import Trained
from pjrlhf.training.workdir import disk_errors


def _lengths(pairs: Pairs, part: str) -> tuple[np.ndarray, np.ndarray]:
    examples = pairs.tables[part].examples
    return tuple(np.array([len(getattr(e, side)) for e in examples]) for side in SIDES)


def run(run: Run) -> dict[str, Any]:
    """Evaluates every trained entry; writes <workdir>/report."""
    started = time.perf_counter()
    config = run.config.evaluate_users
    pairs = Pairs(run)
    held = pairs.tables["heldout"].examples
    names = [example.user_id for example in held]
    groups = {e.user_id: e.extra["taste"] for e in held if e.extra.get("taste")} or None
    settings = {"groups": groups, "resamples": config.resamples, "seed": run.config.seed}
    summary: dict[str, Any] = {"title": run.config.title, "config": {"seed": run.config.seed}}
    sections = ("accuracy", "length_matched", "grid", "embedding", "cold_start", "generation")
    summary |= {section: {} for section in sections}
    samples: list[dict[str, Any]] = []
    for name in run.config.preference.models:
        trained = Trained(run, name, pairs)
        own, nobody = pairs.users("heldout"), np.zeros(len(held), np.int32)
        margins = trained.margins("heldout", own)
        generic = user_accuracy(trained.margins("heldout", nobody), names, **settings)
        summary["accuracy"][name] = {**user_accuracy(margins, names, **settings), "generic": generic["mean"]}
        lengths = _lengths(pairs, "heldout")
        summary["length_matched"][name] = length_matched(margins, names, *lengths, **settings)
        summary["grid"][name] = _grid(trained)
        vectors = trained.vectors()
        if vectors is not None:
            axes = principal_axes(vectors)
            users = [user for user in pairs.registry.names[1:] if user]
            who = [(groups or {}).get(user) for user in users]
            summary["embedding"][name] = {"users": users, "groups": who, "x": axes[:, 0], "y": axes[:, 1]}
        if name in config.cold_start_models and config.cold_start:
            found = fit_new_users(trained, config.cold_start, config.cold_start_steps, config.cold_start_learning_rate)
            summary["cold_start"][name] = cold_start_curve(found)
        if config.generate_for:
            section, shown = _generation(trained, groups or {}, config.generate_for)
            summary["generation"][name] = section
            samples += shown
    if groups:
        counts = list(groups.values())
        summary["ceiling"] = {"majority_share": max(counts.count(taste) for taste in set(counts)) / len(counts)}
    stages = {name: run.workdir.finished(name) for name in run.config.stages}
    seconds = {name: info["seconds"] for name, info in stages.items() if info}
    seconds["evaluate_users"] = time.perf_counter() - started
    summary |= {"stage_seconds": seconds, "total_seconds": sum(seconds.values())}
    with disk_errors(run.workdir.path / "report"):
        write_report(run.workdir.path / "report", summary, samples, metrics=run.workdir.path / "metrics.jsonl")
    return {"pairs": len(held), "users": pairs.registry.capacity}


def _grid(trained: Trained) -> dict[str, float]:
    """Accuracy of seen and unseen users on seen and unseen prompts; unseen users are the generic one."""
    pairs = trained.pairs
    parts = {"seen_user_seen_prompt": ("train", None), "seen_user_unseen_prompt": ("heldout", None)}
    if "new_users" in pairs.tables:
        parts |= {"unseen_user_seen_prompt": ("new_users", False), "unseen_user_unseen_prompt": ("new_users", True)}
    found = {}
    for cell, (part, held_out) in parts.items():
        examples = pairs.tables[part].examples
        rows = [i for i, e in enumerate(examples) if held_out is None or bool(e.extra.get("held_out")) == held_out]
        # Evenly spaced, for the file is ordered by user; a thousand pairs tell a share within 3 %.
        rows = rows[:: max(1, len(rows) // 1000)]
        if rows:
            found[cell] = float((trained.margins(part, pairs.users(part), rows) > 0).mean())
    return found


def _generation(trained: Trained, groups: dict[str, str], count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Length and judge scores of answers as every user, and the answers to the first prompt."""
    run, registry = trained.run, trained.pairs.registry
    requests = list(dict.fromkeys(repr(e.prompt) for e in trained.pairs.tables["heldout"].examples))[:count]
    by_text = {repr(e.prompt): e.prompt for e in trained.pairs.tables["heldout"].examples}
    prompts = [by_text[text] for text in requests]
    users = [user for user in registry.names[1:] if user]
    answers = trained.answers(prompts, registry.indices(users).tolist())
    tastes = sorted(set(groups.values()))
    plain = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    section = {}
    for user, texts in zip(users, answers, strict=True):
        scores = {
            taste: float(np.mean([run.score(p, text, taste) for p, text in zip(plain, texts, strict=True)]))
            for taste in tastes
        }
        length = float(np.mean([len(text.split()) for text in texts]))
        section[user] = {"group": groups.get(user), "length": length, "score": scores}
    shown = {user: texts[0] for user, texts in zip(users, answers, strict=True)}
    return section, [{"prompt": plain[0], "model": trained.method.name, "answers": shown}]
