"""How well each person is served: accuracy per user on held-out prompts, the generic user, new people, and answers.

The controls stand beside every personalized figure: pooled DPO on the same data and budget, and permuted user ids.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf.evaluation.report import write_report
from pjrlhf.evaluation.users import cold_start_curve, length_matched, principal_axes, user_accuracy
from pjrlhf.models.adapters import Policies
from pjrlhf.objectives import preference as losses
from pjrlhf.rollout.sampler import generate
from pjrlhf.stages import preference
from pjrlhf.stages.context import Run
from pjrlhf.stages.preference import Pairs, Preference, answer_logps, device_part
from pjrlhf.training.workdir import disk_errors


class Trained:
    """One entry of `preference.models` after training."""

    def __init__(self, run: Run, name: str, pairs: Pairs):
        self.run, self.pairs = run, pairs
        self.method = Preference(run, name, pairs)
        self.trainable = preference.load(run, name)
        self._margins = jax.jit(self._batch_margins, static_argnames="prompt_slots")
        self._answers = jax.jit(self._sample)

    def _batch_margins(self, trainable: Any, base: Any, batch: Any, prompt_slots: int) -> jax.Array:
        batch = {**batch, "prompt_slots": prompt_slots}
        logps, _ = answer_logps(self.run.model, self.run.adapter, self.method.users, trainable, base, batch)
        chosen, rejected = losses.implicit_rewards(*logps, *batch["reference"].T, self.run.config.preference.beta)
        return chosen - rejected

    def margins(
        self, part: str, users: np.ndarray, rows: Sequence[int] | None = None, trainable: Any = None
    ) -> np.ndarray:
        """Implicit reward margins beta Delta, float32, of `rows` of `part` as seen by `users` [N of the part]."""
        table = self.pairs.tables[part]
        rows = range(len(table)) if rows is None else rows
        size, found = self.run.config.preference.batch_size, []
        for start in range(0, len(rows), size):
            index = [rows[i] for i in range(start, min(start + size, len(rows)))]
            padded = [table[i] for i in index + [index[0]] * (size - len(index))]
            arrays, slots = device_part(self.pairs.collate(part, users, padded))
            margins = self._margins(trainable or self.trainable, self.run.base, arrays, prompt_slots=slots)
            found.append(np.asarray(margins)[: len(index)])
        return np.concatenate(found)

    def _sample(self, trainable: Any, base: Any, prompt: Any, users: jax.Array, key: jax.Array) -> Any:
        tokens, mix = self.method.users.apply(trainable["users"], users)
        mix = jnp.ones((1, 1)) if mix is None else mix
        policies = Policies(self.run.model, self.run.adapter, base, trainable["bank"], mix, tokens)
        return generate(policies, self.run.sampling(), prompt["prompt"], prompt["valid"], key)

    def answers(self, prompts: Sequence[Any], users: Sequence[int]) -> list[list[str]]:
        """For each user, an answer to each prompt."""
        asked = [prompt for _ in users for prompt in prompts]
        who = np.repeat(np.asarray(users, np.int32), len(prompts))
        arrays = self.run.encode(asked)
        out = self._answers(self.trainable, self.run.base, arrays, who, jax.random.fold_in(self.run.key, 70))
        texts = self.run.decode(arrays, out)
        return [texts[i * len(prompts) : (i + 1) * len(prompts)] for i in range(len(users))]

    def vectors(self) -> np.ndarray | None:
        """What the user model knows about each user, [U, D'], or None."""
        if not self.method.personal:
            return None
        rows = np.arange(1, self.pairs.registry.capacity + 1)
        tokens, mix = self.method.users.apply(self.trainable["users"], rows)
        return np.asarray(tokens if tokens is not None else mix).reshape(len(rows), -1)


def _lengths(pairs: Pairs, part: str) -> tuple[np.ndarray, np.ndarray]:
    examples = pairs.tables[part].examples
    return tuple(np.array([len(getattr(e, side)) for e in examples]) for side in preference.SIDES)


def run(run: Run) -> dict[str, Any]:
    """Evaluates every trained entry; writes <workdir>/report."""
    from pjrlhf.stages.new_users import fit_new_users

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
