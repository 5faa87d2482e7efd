"""The evaluation of Personalized Soups (arXiv 2310.11564, section 5) on held-out prompts, and the report.

Per kind of person (a combination of one preference per dimension): pairwise judgements, one criterion at a time and in
both orders, among the base, the base told the preferences (preference prompting), RLHF on one general reward, policies
trained for all combinations (Prompted-MORL, entries of `config.methods`), the soup with equal weights, and on request
the best of N answers of the base by the rewards of the person; each ingredient on its own criterion; and a sweep of the
weights between opposite preferences.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf.algorithms import banks, methods
from pjrlhf.algorithms.targets import TargetSection, targets_of
from pjrlhf.data import preferences
from pjrlhf.data.messages import columns_of
from pjrlhf.errors import UserError
from pjrlhf.evaluation.statistics import chord_gap, spearman
from pjrlhf.evaluation.winrate import aggregate, win_rate
from pjrlhf.judges.judge import JUDGES, check_judge
from pjrlhf.protocols.judging import Panel, at_equal_lengths
from pjrlhf.protocols.reporting import finish, stated
from pjrlhf.protocols.selection import Rewarded
from pjrlhf.runtime.answers import Keys, Row, sample_rows
from pjrlhf.runtime.run import Run, Stage
from pjrlhf.settings import Settings, setting
from pjrlhf.training.progress import watched

# Methods that every report has, or may have, beside the entries of `methods`.
OWN = {
    "base": "the base itself",
    "prompting": "the base that is told the preferences",
    "soups": "the soups",
    "soups_untold": "the soups that are not told the preferences",
    "rlhf": "the policy of the general reward",
    "best_of_n": "the best of several answers of the base",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoupsSettings(Settings):
    """The comparison of soups with the base, prompting, RLHF and Prompted-MORL."""

    judge: str | Mapping[str, Any] = setting(
        "score",
        'who compares answers; score: by the scorers of the run; or {"kind": ...} with settings, see judges/judge.py',
        choices=tuple(JUDGES),
        extensible=True,
    )
    judges: tuple[str | Mapping[str, Any], ...] = setting(
        (),
        "further judges, like judge, of the same comparisons: their win rates, and how far each two agree",
        choices=tuple(JUDGES),
        extensible=True,
    )
    asked_twice: int = setting(
        0, "comparisons of each ingredient that judges are asked twice, for their self-consistency", low=0, high=10**6
    )
    length_controlled: tuple[str, ...] = setting(
        (), "criteria whose win rates against the base are also given at equal lengths; none that is about length"
    )
    weight_scale: float = setting(
        1.0, "sum of a soup's weights; 1 gives 1/3 each for three criteria, as in the paper", low=-100.0, high=100.0
    )
    sweep_points: int = setting(11, "weights from one preference to its opposite", low=2, high=10**4)
    samples_per_prompt: int = setting(1, "answers per prompt in the comparison of methods", low=1, high=10**4)
    best_of: int = setting(
        0,
        "answers of the base per prompt, of which the one with the highest rewards of a person is the further method "
        "best_of_n; 0 is without",
        low=0,
        high=10**4,
    )
    sweep_samples: int = setting(3, "answers per prompt and point of a sweep", low=1, high=10**4)
    resamples: int = setting(2000, "of the bootstrap", low=2, high=10**6)
    shown: int = setting(2, "sample answers per combination in the report", low=0, high=10**4)
    prompted: tuple[str, ...] = setting(
        ("soups",),
        "methods whose prompt states the preferences, beside prompting and Prompted-MORL",
        choices=("soups", "base", "rlhf"),
    )
    new_preferences: tuple[str, ...] = setting((), "preferences that came later")
    scaling: Mapping[str, Any] = setting({}, "method -> the entries of `methods` trained for the new preferences")

    def check(self) -> None:
        for spec in (self.judge, *self.judges):
            check_judge(spec)


def adapters(run: Run) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
    """(the bank of all that answer, the names of its adapters, those of them that are told whole combinations): the
    policies of the stage of that name, then the entries of `methods` for preferences of their own or combinations.
    """
    parts, names, prompted = [], [], []
    if "policy" in run.settings.stages:
        parts.append(banks.load(run))
        names += run.audience.rewards
    for name in run.settings.methods if "methods" in run.settings.stages else ():
        settings = methods.settings_of(run, name)
        targets = targets_of(run, settings) if isinstance(settings, TargetSection) else None
        if targets is None or targets.kind not in ("own", "combinations"):
            kind = f"kind {targets.kind!r}" if targets else "it"
            raise UserError(f"methods.{name}: {kind} has no place among combinations; use evaluate_front")
        parts.append(banks.load(run, methods.folder(name), targets.adapters))
        own = targets.adapters if targets.kind == "own" else (name,)
        prompted += own if targets.kind == "combinations" else ()
        names += own
    if missing := [name for name in run.audience.objectives if name not in names]:
        raise UserError(
            f"evaluate: nothing is trained for {missing[0]!r}; add the stage policy, or an entry of methods"
        )
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts), tuple(names), tuple(prompted)


def scaling(run: Run, rates: Mapping[str, Any]) -> dict[str, Any]:
    """What adding preferences took: `evaluate.scaling` names, for each method, the entries trained when they came."""
    found = {}
    for method, entries in run.section(SoupsSettings).scaling.items():
        info = [run.workdir.finished(methods.folder(name)) or {} for name in entries]
        found[method] = {
            "samples": sum(one["samples"] for one in info),
            "seconds": sum(one["seconds"] for one in info),
            "ingredients_trained": sum(len(one["ingredients"]) for one in info),
        }
    return {"new": list(run.section(SoupsSettings).new_preferences), "methods": found, "win_rate": rates}


class Evaluation:
    """Everything the report says about one run."""

    def __init__(self, run: Run):
        self.run, self.config = run, run.section(SoupsSettings)
        bank, self.names, self.prompted = adapters(run)
        self.requests = run.records.requests[1]
        self.sample = functools.partial(sample_rows, run, bank)
        self.answers: list[dict[str, Any]] = []  # all that were sampled
        self.scorer = run.scores
        self.panel = Panel(run, (self.config.judge, *self.config.judges), self.config.asked_twice)
        self.judge = next(iter(self.panel.judges.values()))
        self.combos = preferences.combinations(run.audience.preferences, run.audience.objectives)
        self.rate = functools.partial(win_rate, resamples=self.config.resamples, seed=run.streams.seed)

    def keys(self, stream: str) -> Keys:
        """The PRNG keys of a random stream."""
        return functools.partial(self.run.streams.key, stream)

    def weights(self, **given: float) -> tuple[float, ...]:
        """A row of `mix` with the named policies' weights."""
        return tuple(float(given.get(name, 0.0)) for name in self.names)

    def scores(self, texts: Sequence[str], criterion: str) -> float:
        """Mean score of answers to the held-out requests (repeated as often as needed)."""
        repeats = len(texts) // len(self.requests)
        return float(np.nanmean(self.scorer.scores(self.requests * repeats, texts, criterion)))

    def _keep(self, part: str, row: Row, text: str, **more: str) -> None:
        """Keeps an answer with all that it takes to judge it again."""
        mix = {name: weight for name, weight in zip(self.names, row.mix, strict=True) if weight}
        kept = {"part": part, **more, "prompt": row.request, **columns_of(row.request), "stated": row.words}
        kept |= {"mix": mix, "answer": text}
        self.answers.append(kept)

    def _judged(self, items: Sequence[Any], what: str) -> Iterator[Any]:
        """`items` one by one, with the progress of judging them."""
        with watched(f"evaluate: judging {what}", items) as seen:
            yield from seen

    def announce(self) -> None:
        """Logs how often judges are asked at most, before the first time."""
        prompts, twice = len(self.requests), 2 * len(self.requests)
        methods = len(self.methods(self.combos[0])) + bool(self.config.best_of)
        pairs = methods * (methods - 1) // 2 * prompts * self.config.samples_per_prompt
        alone = len(self.ingredient_names)
        anew = alone * min(self.config.asked_twice, twice)
        self.panel.announce("evaluate", pairs * sum(map(len, self.combos)) + alone * twice, anew)

    # ---- eight kinds of people

    def methods(self, combo: tuple[str, ...]) -> dict[str, tuple[str, tuple[float, ...]]]:
        """Method -> (what its prompt states, weights of the policies) for one kind of person."""
        share = self.config.weight_scale / len(combo)
        soup = self.weights(**dict.fromkeys(combo, share))
        weights = {"base": self.weights(), "prompting": self.weights(), "soups": soup, "soups_untold": soup}
        if self.run.settings.general:
            weights["rlhf"] = self.weights(**{self.run.settings.general: 1.0})
        weights |= {name: self.weights(**{name: 1.0}) for name in self.prompted}
        told = {"prompting", *self.prompted, *self.config.prompted}
        if "soups" not in told:
            del weights["soups_untold"]
        words = preferences.sentences(self.run.audience.preferences, combo)
        if not words.strip():
            # Nothing can be said to this model, so prompting is the base.
            del weights["prompting"]
        return {name: (words if name in told else "", mix) for name, mix in weights.items()}

    def people(self) -> dict[str, Any]:
        """The sections win_rate, win_rate_average, win_rate_by_judge, combos, ablation, length_controlled and
        position_consistency, and sample answers.
        """
        repeats = self.config.samples_per_prompt
        plans = {combo: self.methods(combo) for combo in self.combos}
        keys = [(combo, method) for combo in self.combos for method in plans[combo]]
        rows = [
            Row(request, *plans[combo][method])
            for combo, method in keys
            for _ in range(repeats)
            for request in self.requests
        ]
        texts = self.sample(rows, self.keys("evaluate/people"), name="evaluate: answers for kinds of people")
        size = repeats * len(self.requests)
        answers = {key: texts[i * size : (i + 1) * size] for i, key in enumerate(keys)}
        if self.config.best_of:
            best = self.best_of(repeats)
            answers |= {(combo, "best_of_n"): texts for combo, texts in best.items()}
        for row, (combo, method), text in zip(rows, (key for key in keys for _ in range(size)), texts, strict=True):
            self._keep("people", row, text, combo="+".join(combo), method=method)

        methods = [*plans[self.combos[0]], *(["best_of_n"] if self.config.best_of else [])]
        outcomes: dict[tuple[str, str], list[np.ndarray]] = {}
        own_base: dict[tuple[str, str], list[np.ndarray]] = {}  # see `judging.at_equal_lengths`
        by_judge: dict[tuple[str, str], list[np.ndarray]] = {}  # (judge, method) -> outcomes against the base
        combos: dict[str, Any] = {}
        for combo in self._judged(self.combos, "kinds of people"):
            table: dict[str, Any] = {method: {} for method in methods if method != "soups_untold"}
            for a, b in itertools.combinations(methods, 2):
                found = self.panel(self.requests * repeats, answers[combo, a], answers[combo, b], combo)
                results = {judge: self.by_prompt(verdicts) for judge, verdicts in found.items()}
                verdicts, result = (next(iter(each.values())) for each in (found, results))
                if a == "base":
                    sizes = [np.array([len(text) for text in answers[combo, method]]) for method in (b, a)]
                    numbers = np.tile(np.arange(len(self.requests)), repeats)
                    for name, verdict in zip(combo, -verdicts.T, strict=True):
                        own_base.setdefault((name, b), []).append(np.stack([verdict, *sizes, numbers]))
                    for judge, own in results.items():
                        by_judge.setdefault((judge, b), []).append(-own)
                outcomes.setdefault((a, b), []).append(result)
                outcomes.setdefault((b, a), []).append(-result)
                if a in table and b in table:
                    table[a][b], table[b][a] = self.rate(result), self.rate(-result)
            combos["+".join(combo)] = table
        pooled = {pair: np.concatenate(parts, axis=1) for pair, parts in outcomes.items()}
        shown = [method for method in methods if method != "soups_untold"]
        rates = {a: {b: self.rate(pooled[a, b]) for b in shown if b != a} for a in shown}
        average = {
            a: self.rate(np.concatenate([pooled[a, b] for b in shown if b != a], axis=1))
            for a in shown
            if len(shown) > 1
        }
        samples = [
            {
                "combo": "+".join(combo),
                "prompt": request,
                "answers": {method: answers[combo, method][i] for method in shown},
            }
            for combo in self.combos
            for i, request in enumerate(self.requests[: self.config.shown])
        ]
        sections = {
            "win_rate": rates,
            "win_rate_average": average,
            "combos": combos,
            "position_consistency": self.judge.consistency,
            "length_controlled": at_equal_lengths(
                self.config.length_controlled, own_base, resamples=self.config.resamples, seed=self.run.streams.seed
            ),
        }
        if len(self.panel.judges) > 1:
            rates = {key: self.rate(np.concatenate(parts, axis=1)) for key, parts in by_judge.items()}
            sections["win_rate_by_judge"] = {
                judge: {method: rates[judge, method] for method in shown if method != "base"}
                for judge in self.panel.judges
            }
        if "soups_untold" in methods:
            sections["ablation"] = {"soups_untold": {b: self.rate(pooled["soups_untold", b]) for b in shown}}
        return {"sections": sections, "samples": samples}

    def best_of(self, repeats: int) -> dict[tuple[str, ...], list[str]]:
        """Combination -> for each held-out request, `repeats` times over, the best of `evaluate.best_of` answers of the
        base, by the equally weighted rewards of the combination; see `selection.Rewarded`.
        """
        N, requests = self.config.best_of, self.requests * repeats
        asked = [request for request in requests for _ in range(N)]
        rows = [Row(request, "", self.weights()) for request in asked]
        texts = self.sample(rows, self.keys("evaluate/best_of"), name="evaluate: answers of the base to choose from")
        rewarded = Rewarded(self.run, asked, texts, "evaluate: answers to choose from")
        found = {}
        for combo in self.combos:
            weights = np.array([(name in combo) / len(combo) for name in self.run.audience.rewards])
            chosen = rewarded.best(N, weights)
            found[combo] = [texts[i] for i in chosen]
            for i in chosen:
                self._keep("people", rows[i], texts[i], combo="+".join(combo), method="best_of_n")
        return found

    def by_prompt(self, verdicts: np.ndarray) -> np.ndarray:
        """Outcomes [prompts, repeats] of verdicts [repeats * prompts, C]."""
        return aggregate(verdicts).reshape(-1, len(self.requests)).T

    # ---- ingredients

    @property
    def ingredient_names(self) -> list[str]:
        """The policies with a criterion of their own."""
        return [name for name in self.names if name not in self.prompted]

    def ingredients(self) -> dict[str, Any]:
        """Each policy alone against the base by its own criterion, two plain answers per held-out request."""
        requests = self.requests * 2
        rows = [Row(request, "", self.weights()) for request in requests]
        names = self.ingredient_names
        for name in names:
            rows += [Row(request, "", self.weights(**{name: 1.0})) for request in requests]
        texts = self.sample(rows, self.keys("evaluate/ingredients"), name="evaluate: answers of the ingredients")
        for row, text in zip(rows, texts, strict=True):
            self._keep("ingredients", row, text)
        size = len(requests)
        base = texts[:size]
        kl = last_kl(self.run)
        found = {}
        for k, name in self._judged(list(enumerate(names)), "ingredients"):
            own = texts[(k + 1) * size : (k + 2) * size]
            verdicts = self.panel(requests, own, base, (name,))
            self.panel.again(requests, own, base, name, verdicts)
            found[name] = {
                "win_rate_vs_base": self.rate(self.by_prompt(next(iter(verdicts.values())))),
                "kl": kl.get(name),
                "length": float(np.mean([len(text.split()) for text in own])),
                "score": self.scores(own, name),
                "base_score": self.scores(base, name),
            }
        return found

    # ---- weights

    def sweep(self) -> dict[str, Any]:
        """From one end of every two-sided dimension to the other in equal steps, the prompt telling nothing."""
        grid = np.linspace(0.0, 1.0, self.config.sweep_points)
        groups = preferences.dimensions(self.run.audience.preferences, self.run.audience.objectives)
        pairs = {dimension: ends for dimension, ends in groups.items() if len(ends) == 2}
        rows = [
            Row(request, "", self.weights(**{low: 1.0 - w, high: w}))
            for low, high in pairs.values()
            for w in grid
            for request in self.requests * self.config.sweep_samples
        ]
        sampled = self.sample(rows, self.keys("evaluate/sweep"), name="evaluate: answers of the sweep") if rows else []
        for row, text in zip(rows, sampled, strict=True):
            self._keep("sweep", row, text)
        texts = iter(sampled)
        size = len(self.requests) * self.config.sweep_samples
        found = {}
        for dimension, (low, high) in self._judged(list(pairs.items()), "the sweep"):
            answers = [list(itertools.islice(texts, size)) for _ in grid]
            scores = {name: [self.scores(at, name) for at in answers] for name in (low, high)}
            # Each score is set against the weight of its own preference.
            own = {low: 1.0 - grid, high: grid}
            found[dimension] = {
                "low": low,
                "high": high,
                "weights": grid.tolist(),
                "scores": scores,
                "length": [float(np.mean([len(text.split()) for text in at])) for at in answers],
                "spearman": {name: spearman(own[name], scores[name]) for name in scores},
                "chord_gap": {name: chord_gap(own[name], scores[name]) for name in scores},
            }
        return found


def last_kl(run: Run) -> dict[str, float]:
    """Policy -> its KL to the base in the last steps of its training, wherever it was trained; see the stage policy."""
    found: dict[str, float] = {}
    for stage in ("policy", *map(methods.folder, run.settings.methods)):
        found |= (run.workdir.finished(stage) or {}).get("kl", {})
    return found


def _notes(sweep: dict[str, Any]) -> list[str]:
    """Where the soups lie against the straight line between their ends, in words."""
    notes = []
    for dimension, part in sweep.items():
        for name, gap in part["chord_gap"].items():
            side = "above" if gap["mean"] > 0 else "below"
            notes.append(
                f"{dimension}, {name}: the soups lie on average {abs(gap['mean']):.3f} {side} the straight line "
                f"between their ends ({gap['min']:+.3f} to {gap['max']:+.3f})."
            )
    return notes


def run(run: Run) -> dict[str, Any]:
    """Evaluates the run on its held-out prompts; writes <workdir>/report."""
    started = time.perf_counter()
    evaluation = Evaluation(run)
    evaluation.announce()
    people = evaluation.people()
    ingredients = evaluation.ingredients()
    sweep = evaluation.sweep()
    reward = (run.workdir.finished("reward") if "reward" in run.settings.stages else None) or {}
    summary = {
        "held_out_prompts": len(evaluation.requests),
        "preferences": stated(run),
        "reward_models": reward.get("models", {}),
        "ingredients": ingredients,
        **people["sections"],
        **evaluation.panel.sections(),
        "sweep": sweep,
        "notes": _notes(sweep),
    }
    if run.section(SoupsSettings).scaling:
        summary["scaling"] = scaling(run, people["sections"]["win_rate"])
    finish(run, "evaluate", started, summary, people["samples"], evaluation.answers)
    return {"held_out_prompts": len(evaluation.requests)}


STAGE = Stage("evaluate", run, SoupsSettings, writes="report/summary.json")
