"""Fronts: answers of every method over a grid of preference weights, on held-out prompts, scored by the judge.

Scores are put on one scale by quantiles of the base's answers (0 is the low one, 1 the high one; they may lie beyond),
and every method is measured against the same reference point. Preferences that no method was trained on are measured
apart. `algorithms.answering` says how an entry of `config.methods` answers for preference weights.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from pjrlhf.algorithms import methods
from pjrlhf.algorithms.reward import check_quantiles
from pjrlhf.algorithms.targets import NAMED, simplex_points
from pjrlhf.data.messages import Prompt, columns_of
from pjrlhf.errors import UserError
from pjrlhf.evaluation import pareto
from pjrlhf.objectives.multi_objective import target_map
from pjrlhf.protocols.reporting import finish, stated
from pjrlhf.protocols.selection import Rewarded
from pjrlhf.runtime.answers import EvaluatedPolicy, Point, Row, sample_base, sample_rows
from pjrlhf.runtime.run import Run, Stage
from pjrlhf.settings import Settings, setting, shown
from pjrlhf.training.progress import watched


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontSettings(Settings):
    """The comparison of methods on one front."""

    points: str | tuple[tuple[float, ...], ...] = setting(
        (),
        "preference weights: rows, or the name of a set; simplex, those of the literature, where empty",
        choices=lambda: tuple(NAMED),
    )
    unseen: bool = setting(True, "measure weights too that no method was trained on")
    samples_per_prompt: int = setting(1, "answers per held-out prompt and point", low=1, high=10**4)
    base_samples: int = setting(
        8, "answers of the base per held-out prompt, whose quantiles are the scale", low=1, high=10**4
    )
    quantiles: tuple[float, ...] = setting((0.02, 0.98), "of the base that are 0 and 1", low=0.0, high=1.0)
    reference: float = setting(-0.1, "of the hypervolume, on that scale, for every objective", low=-1e3, high=1.0)
    target: str = setting("identity", "the rewards that weights ask for, of the MSE", choices=("identity", "l2", "max"))

    metrics: tuple[str, ...] = setting((), "more front metrics, as package.module:function; see evaluation.pareto")

    def check(self) -> None:
        check_quantiles(self.quantiles)
        try:
            pareto.chosen_metrics(self.metrics)
        except UserError as error:
            raise UserError(f"metrics: {error}") from error


def evaluated_points(settings: FrontSettings, objectives: Sequence[str]) -> list[tuple[float, ...]]:
    """The preference weights at which methods are compared.

    Raises:
      UserError: they are none, or fewer than two.
    """
    try:
        found = simplex_points(settings.points or "simplex", objectives, "points")
    except UserError as error:
        raise UserError(f"evaluate_front.{str(error).removeprefix('preferences.')}") from error
    if len(set(found)) < max(len(found), 2):
        raise UserError(
            f"evaluate_front.points: {shown(settings.points)} is one point, or has one twice; give two or more that "
            "differ"
        )
    return found


class Front:
    """The evaluation of one run."""

    def __init__(self, run: Run):
        self.run, self.config = run, run.section(FrontSettings)
        self.metrics = pareto.chosen_metrics(self.config.metrics)
        self.names = run.audience.objectives
        self.requests = run.records.requests[1]
        self.points = evaluated_points(self.config, self.names)
        self.unseen = simplex_points("between" if self.config.unseen else (), self.names, "unseen")
        texts = sample_base(
            run,
            [run.records.ask(request) for request in self.requests * self.config.base_samples],
            functools.partial(run.streams.key, "evaluate_front/base_answers"),
            "evaluate_front: answers of the base",
        )
        self.sampled: list[dict[str, Any]] = []  # all answers
        scores = self.scores(self.requests * self.config.base_samples, texts)
        self.low, self.high = np.nanquantile(scores, self.config.quantiles, axis=0)
        if not (self.high > self.low).all():
            name = self.names[int(np.argmin(self.high - self.low))]
            raise UserError(f"evaluate_front: the base's answers all score alike by {name!r}; nothing can be scaled")
        self.reference = np.full(len(self.names), self.config.reference)

    def scores(self, requests: Sequence[Prompt], texts: Sequence[str]) -> np.ndarray:
        """The judge's scores [n, N] of answers; NaN where a reward source says nothing.

        Raises:
          UserError: it says nothing about any answer.
        """
        with watched("evaluate_front: judging answers", self.names) as names:
            columns = self.run.records.columns_of(requests)
            scores = np.stack([self.run.audience.scores(requests, texts, name, columns) for name in names], axis=1)
        if (silent := np.isnan(scores)).any():
            name = self.names[int(np.argmax(silent.sum(0)))]
            if silent.all(0).any():
                raise UserError(
                    f"evaluate_front: the reward {name!r} says nothing about any answer; correct its source"
                )
            logging.warning(
                "evaluate_front: the reward %r says nothing about %d of %d answers, which take no part in its means",
                *(name, silent.sum(0).max(), len(scores)),
            )
        return scores

    def answers(self, name: str, evaluated: EvaluatedPolicy, points: Sequence[Point]) -> np.ndarray:
        """Scaled scores [n, P, N] of a method at `points`, for P held-out prompts."""
        requests, N = self.requests * self.config.samples_per_prompt, evaluated.best_of
        each = [(p, q) for p in points for q in requests for _ in range(N)]
        rows = [Row(q, evaluated.words(p), tuple(evaluated.mix(p))) for p, q in each]
        keys = functools.partial(self.run.streams.key, "evaluate_front/answers")
        shown = f"evaluate_front: answers of {name}"
        texts = sample_rows(self.run, evaluated.bank, rows, keys, evaluated.policies, shown)
        if N > 1:
            rewarded = Rewarded(self.run, [q for _, q in each], texts, f"{shown} to choose from")
            weights = np.zeros(rewarded.rewards.shape)
            weights[:, : len(self.names)] = [p for p, _ in each]
            chosen = rewarded.best(N, weights)
            rows, texts = ([one[i] for i in chosen] for one in (rows, texts))
        asked = [(dict(zip(self.names, p, strict=True)), q) for p in points for q in requests]
        self.sampled += [
            {"method": name, "weights": weights, "prompt": q, **columns_of(q), "stated": row.words, "answer": text}
            for (weights, q), row, text in zip(asked, rows, texts, strict=True)
        ]
        scores = self.scores([row.request for row in rows], texts)
        scores = ((scores - self.low) / (self.high - self.low)).reshape(len(points), len(requests), -1)
        # The mean of the others does not change the mean; a point without any gets the low quantile of the base.
        known = ~np.isnan(scores)
        means = np.where(known, scores, 0.0).sum(1, keepdims=True) / np.maximum(known.sum(1, keepdims=True), 1)
        return np.where(known, scores, means)

    def measure(self, points: Sequence[Point], scores: np.ndarray) -> dict[str, Any]:
        """The front metrics of scaled scores [n, P, N] at `points`."""
        weights = np.array(points)
        targets = np.asarray(target_map(weights, self.config.target))  # pyright: ignore[reportArgumentType]
        front = pareto.EvaluatedFront(weights, scores.mean(1), self.reference, targets, scores)
        return pareto.front_metrics(front, self.metrics)

    def method(self, name: str) -> dict[str, Any]:
        """One row of the report."""
        started = time.perf_counter()
        evaluated, run = methods.evaluated(self.run, name), self.run
        points = [p for p in self.points if evaluated.points is None or p in evaluated.points]
        if len(points) < 2:
            raise UserError(f"methods.{name}: has a policy for fewer than two of the evaluated weights; add them")
        unseen = self.unseen if evaluated.points is None else []
        scores = self.answers(name, evaluated, [*points, *unseen])
        of = run.workdir.finished(methods.entry(run, name).stage) or {}
        found = self.measure(points, scores[: len(points)])
        found |= {"samples": of.get("samples", 0), "seconds": of.get("seconds", 0.0)}
        found["unseen"] = self.measure(unseen, scores[len(points) :]) if unseen else None
        found["points"] = {
            "weights": [*points, *unseen],
            "rewards": scores.mean(1).tolist(),
            "unseen": [False] * len(points) + [True] * len(unseen),
        }
        found["evaluation_seconds"] = time.perf_counter() - started
        return found


def run(run: Run) -> dict[str, Any]:
    """Measures every method; writes <workdir>/report."""
    started = time.perf_counter()
    front = Front(run)
    found = {name: front.method(name) for name in run.settings.methods}
    summary = {
        "held_out_prompts": len(front.requests),
        "preferences": stated(run),
        "reward_models": (run.workdir.finished("reward") or {}).get("models", {}),
        "front": {
            "objectives": list(front.names),
            "reference": front.reference.tolist(),
            "low": front.low.tolist(),
            "high": front.high.tolist(),
            "held_out": len(front.unseen),
            "seeds": 1,
            "metrics": pareto.described(front.metrics),
        },
        "methods": found,
    }
    finish(run, "evaluate_front", started, summary, answers=front.sampled)
    return {"held_out_prompts": len(front.requests)}


STAGE = Stage("evaluate_front", run, FrontSettings, writes="report/summary.json")
