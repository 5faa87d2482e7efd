"""Fronts: answers of every method over a grid of preference weights, on held-out prompts, scored by the judge.

Scores are put on one scale by quantiles of the base's answers (0 is the low one, 1 the high one; they may lie beyond),
and every method is measured against the same reference point. Preferences that no method was trained on are measured
apart. How an entry of `config.methods` answers for weights p:

| entry | weights of its adapters | what the prompt states |
|---|---|---|
| preferences own, or mix "weights" | p: a soup, or the conditioned policy itself | p, where training did so |
| fixed | one-hot on the policy of p, if there is one; a single policy serves everybody | p, where training did so |
| grid, dirichlet, combinations | the one policy | p |
| train "ric" | the one policy | the target of p |
| answer "bone" | `bone_soup_weights`, for fixed mixed rewards | as above |
| answer "mod" | of the next token's log-probs, see `rollout.decoding` | as above |
| train "", without `of` | the base | p as sentences (preference prompting), or with prompted=False nothing |

`of` names another entry whose adapters are used.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pjrlhf.algorithms import methods, policy
from pjrlhf.algorithms.reward import check_quantiles
from pjrlhf.algorithms.targets import Targets, simplex_points
from pjrlhf.data.preferences import PreferencePrompt
from pjrlhf.errors import UserError
from pjrlhf.evaluation import pareto
from pjrlhf.evaluation.report import write_report
from pjrlhf.merging.methods import bone_soup_weights
from pjrlhf.models.adapters import AdapterConfig, is_low_rank
from pjrlhf.models.decoder import Decoder
from pjrlhf.objectives.multi_objective import divergence_alpha, target_map
from pjrlhf.parallel.processes import on_process_zero
from pjrlhf.rollout.decoding import PolicyEnsemble
from pjrlhf.rollout.experience import sample
from pjrlhf.rollout.sampler import Sampling, generate
from pjrlhf.runtime.answers import Row, Sampler, sample_base
from pjrlhf.runtime.run import Run, Stage
from pjrlhf.settings import Settings, setting
from pjrlhf.training.workdir import disk_errors

Point = tuple[float, ...]
ANSWERS = ("soup", "bone", "mod")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontSettings(Settings):
    """The comparison of methods on one front."""

    points: tuple[tuple[float, ...], ...] = setting(
        (), "preference weights; by default those of the literature, see objectives.simplex.simplex_grid"
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


def sample_combined(
    divergence: str | float,
    model: Decoder,
    adapter: AdapterConfig,
    sampling: Sampling,
    base: Any,
    bank: Any,
    weights: jax.Array,
    prompt: Any,
    key: jax.Array,
) -> Any:
    """`experience.sample` for MOD; `weights` [B, K]."""
    policies = PolicyEnsemble(model, adapter, base, bank, weights, divergence)
    return generate(policies, sampling, prompt["prompt"], prompt["valid"], key)


@dataclasses.dataclass(frozen=True)
class EvaluatedPolicy:
    """A method ready to be asked: its bank, and for preference weights p the row of `mix` and the words of the prompt.

    `points` are the only weights it can be asked for, or None for any.
    """

    bank: Any
    mix: Callable[[Point], Sequence[float]]
    words: Callable[[Point], str]
    points: list[Point] | None
    draw: Callable[..., Any]


class Front:
    """The evaluation of one run."""

    def __init__(self, run: Run):
        self.run, self.config = run, run.section(FrontSettings)
        self.metrics = pareto.chosen_metrics(self.config.metrics)
        self.names = run.audience.objectives
        self.requests = run.records.requests[1]
        self.points = simplex_points(self.config.points or "simplex", self.names, "points")
        self.unseen = simplex_points("between" if self.config.unseen else (), self.names, "unseen")
        texts = sample_base(
            run,
            [run.records.ask(request) for request in self.requests * self.config.base_samples],
            run.streams.key("evaluate_front/base_answers"),
            "base",
        )
        scores = self.scores(self.requests * self.config.base_samples, texts)
        self.low, self.high = np.quantile(scores, self.config.quantiles, axis=0)
        if not (self.high > self.low).all():
            name = self.names[int(np.argmin(self.high - self.low))]
            raise UserError(f"evaluate_front: the base's answers all score alike by {name!r}; nothing can be scaled")
        self.reference = np.full(len(self.names), self.config.reference)

    def scores(self, requests: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """The judge's scores [n, N] of answers."""
        pairs = list(zip(requests, texts, strict=True))
        return np.array(
            [[self.run.audience.score(q, text, name) for name in self.names] for q, text in pairs], np.float64
        )

    def player(self, name: str) -> EvaluatedPolicy:
        """The method of an entry. Raises UserError for an entry that cannot answer."""
        run, spec = self.run, methods.entry(self.run, name)
        answer, source = spec.get("answer", "soup"), spec.get("of") or name
        if answer not in ANSWERS:
            raise UserError(f"methods.{name}.answer {answer!r}: unknown; choose one of {', '.join(ANSWERS)}")
        trainer = methods.entry(run, source).get("train", "policy")
        if not trainer:
            say = self._words(PreferencePrompt()) if spec.get("prompted", True) else _silence
            return EvaluatedPolicy(None, lambda p: (), say, None, _drawing(sample))
        settings = methods.settings_of(run, source)
        if trainer == "ric":
            bank = policy.load_bank(run, methods.folder(source), ["policy"])
            words = self._words(settings.prompt_format)

            def goal(p):
                return words(np.asarray(target_map(np.array(p), settings.target)).tolist())

            return EvaluatedPolicy(bank, lambda p: (1.0,), goal, None, _drawing(sample))
        goals = Targets(run, settings)
        bank = policy.load_bank(run, methods.folder(source), goals.adapters)
        mix, points = self._mix(goals, answer, spec.get("extrapolation", 0.0))
        draw = sample
        if answer == "mod":
            if not is_low_rank(bank):
                raise UserError(f"methods.{name}: MOD runs every policy as a row, which takes adapters; set a rank")
            divergence = spec.get("divergence", "reverse_kl")
            try:
                divergence_alpha(divergence)
            except ValueError as error:
                raise UserError(f"methods.{name}: {error}") from error
            draw = functools.partial(sample_combined, divergence)
        return EvaluatedPolicy(
            bank, mix, self._words(goals.prompt_format) if goals.told else _silence, points, _drawing(draw)
        )

    def _words(self, prompt_format: PreferencePrompt) -> Callable[[Point], str]:
        return functools.partial(prompt_format, self.run.audience.registry, self.names)

    def _mix(self, goals: Targets, answer: str, away: Any) -> tuple[Callable[[Point], Point], list[Point] | None]:
        """Weights p -> a row of `mix`, and the only p there is one for (None: any)."""
        if goals.kind == "own" or goals.mix == "weights":
            more = len(goals.adapters) - len(self.names)  # the general policy has no part in a soup
            return lambda p: p + (0.0,) * more, None
        if answer == "bone":
            return lambda p: tuple(bone_soup_weights(p, goals.points, away).tolist()), None
        if goals.kind == "fixed" and len(goals.points) > 1:
            one_hot = np.eye(len(goals.points))
            return lambda p: tuple(one_hot[goals.points.index(p)].tolist()), list(goals.points)
        return lambda p: (1.0,), None

    def answers(self, player: EvaluatedPolicy, points: Sequence[Point]) -> np.ndarray:
        """Scaled scores [n, P, N] of a method at `points`, for P held-out prompts."""
        requests = self.requests * self.config.samples_per_prompt
        rows = [Row(q, player.words(p), tuple(player.mix(p))) for p in points for q in requests]
        texts = Sampler(self.run, player.bank, player.draw)(rows, self.run.streams.key("evaluate_front/answers"))
        scores = self.scores([row.request for row in rows], texts)
        return ((scores - self.low) / (self.high - self.low)).reshape(len(points), len(requests), -1)

    def measure(self, points: Sequence[Point], scores: np.ndarray) -> dict[str, Any]:
        """The front metrics of scaled scores [n, P, N] at `points`."""
        weights = np.array(points)
        targets = np.asarray(target_map(weights, self.config.target))
        front = pareto.EvaluatedFront(weights, scores.mean(1), self.reference, targets, scores)
        return pareto.front_metrics(front, self.metrics)

    def method(self, name: str) -> dict[str, Any]:
        """One row of the report."""
        started = time.perf_counter()
        player, run = self.player(name), self.run
        points = [p for p in self.points if player.points is None or p in player.points]
        if len(points) < 2:
            raise UserError(f"methods.{name}: has a policy for fewer than two of the evaluated weights; add them")
        unseen = self.unseen if player.points is None else []
        scores = self.answers(player, [*points, *unseen])
        of = run.workdir.finished(methods.folder(methods.entry(run, name).get("of") or name)) or {}
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


def _silence(_: Point) -> str:
    return ""


def _drawing(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(function, static_argnums=(0, 1, 2))


def run(run: Run) -> dict[str, Any]:
    """Measures every method; writes <workdir>/report."""
    started = time.perf_counter()
    front = Front(run)
    found = {name: front.method(name) for name in run.settings.methods}
    seconds = {name: info["seconds"] for name in run.settings.stages if (info := run.workdir.finished(name))}
    seconds["evaluate_front"] = time.perf_counter() - started
    names = ("seed", "objectives", "adapter", "methods")
    summary = {
        "title": run.settings.title,
        "config": {name: run.settings.to_dict()[name] for name in names},
        "stage_seconds": seconds,
        "total_seconds": sum(seconds.values()),
        "held_out_prompts": len(front.requests),
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
    with disk_errors(run.workdir.path / "report"):
        on_process_zero(write_report)(run.workdir.path / "report", summary, metrics=run.workdir.path / "metrics.jsonl")
    return {"held_out_prompts": len(front.requests)}


STAGE = Stage("evaluate_front", run, FrontSettings)
