"""Reward models of people side by side: one split, one budget, frozen features, and the controls beside every figure.

    known people     comparisons on prompts that nobody trained on
    new people       the same after 0, 1, 2, ... comparisons of theirs, everything else frozen
    controls         pooled Bradley-Terry; people permuted in training; labels of the context reversed
    cost             bytes and milliseconds of a person

Features are computed once. Every seed parts people and prompts (where the data are not parted already), draws initial
values and batches, and trains all entries anew.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pjrlhf.algorithms.user_rewards import train
from pjrlhf.errors import UserError
from pjrlhf.evaluation.users import calibration_error, cold_start_curve, paired_gain, principal_axes, user_accuracy
from pjrlhf.feedback.feature_pairs import FeaturePairs, FeatureSettings, TrainingPeople
from pjrlhf.feedback.population import PopulationSettings
from pjrlhf.models.storage import save_tree
from pjrlhf.models.user_models.base import State, Table, UserRewards
from pjrlhf.models.user_models.kinds import user_model
from pjrlhf.protocols.met_people import Fitted, People, known_people, new_people
from pjrlhf.protocols.reporting import finish
from pjrlhf.rollout.features import Reduction
from pjrlhf.runtime.run import Run, Stage
from pjrlhf.serving.people.rewards import FILE
from pjrlhf.settings import SEEDS, check_names, setting
from pjrlhf.training.progress import progress
from pjrlhf.training.workdir import disk_errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserModelsSettings(FeatureSettings):
    """Reward models of people on frozen features."""

    models: Mapping[str, Any] = setting(
        {
            "pooled": {"kind": "pooled"},
            "individual": {"kind": "individual"},
            "lore": {"kind": "lore"},
            "pref": {"kind": "pref"},
            "vpl": {"kind": "vpl"},
            "gpo": {"kind": "gpo"},
            "mrm": {"kind": "mrm"},
            "pttt": {"kind": "pttt"},
            "permuted": {"kind": "pttt", "permuted": True},
        },
        'name -> entry {"kind": ..., settings of that user model}',
    )
    seeds: tuple[int, ...] = setting((0, 1, 2), "of split, initial values and batches", low=SEEDS[0], high=SEEDS[1])
    batch_size: int = setting(128, "comparisons a step, those of a context not counted", low=1, high=2**20)
    query: int = setting(8, "comparisons of a person in a step", low=1, high=2**16)
    counts: tuple[int, ...] = setting(
        (0, 1, 2, 4, 8, 16), "comparisons that a new person gives; the most is the size of a context", low=0, high=4096
    )
    pool: int = setting(
        48, "comparisons of a new person, at most, among which an active user model chooses", low=1, high=4096
    )
    resamples: int = setting(2000, "of the bootstrap over people", low=2, high=10**6)

    def check(self) -> None:
        super().check()
        if not self.new_user_fraction and not isinstance(self.data, str):
            raise UserError("new_user_fraction: is 0, and nobody is new; set it to 0.25")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: {self.seeds} is empty or repeats one; give different ones")
        if not self.counts or max(self.counts) < 1:
            raise UserError(f"counts: {self.counts} has no number above 0; add one, such as 16")
        if self.batch_size < self.query:
            raise UserError(f"batch_size: {self.batch_size} is less than query={self.query}; raise it")
        if not self.models:
            raise UserError("models: there is none; add an entry such as {'pooled': {'kind': 'pooled'}}")
        check_names("models", self.models)
        self.entries  # noqa: B018 - reads every entry

    @property
    def entries(self) -> dict[str, UserRewards]:
        """The entries of `models`; UserError for one that cannot be read."""
        return {name: user_model(values, f"models.{name}") for name, values in self.models.items()}


def _one_seed(run: Run, data: FeaturePairs, settings: UserModelsSettings, seed: int) -> dict[str, dict[str, Any]]:
    """Entry -> what one seed found of it."""
    parts = data.split(seed)
    reduction, size = data.reduction(parts["train"]), max(settings.counts)
    features = reduction(data.states)
    people = TrainingPeople(parts["train"])
    known = known_people(features, parts["train"], parts["heldout"], people, size)
    on_training = known_people(features, parts["train"], parts["train"], people, size)
    new = new_people(features, parts["new_users"], size, max(settings.pool, size))
    found = {}
    for number, (name, model) in enumerate(settings.entries.items()):
        trained = people
        if model.permuted:
            trained = TrainingPeople(parts["train"], run.streams.numpy("user_models/permutation", seed))
            model = model.replace(permuted=False)  # so that it shares the programs of its like
        fitted, metrics, seconds = _train(run, name, model, features, trained, settings, (seed, number))
        if seed == settings.seeds[0] and trained is people:
            _save(run, name, fitted, reduction, settings)
        with progress(f"user_models: people of {name}", 1):
            found[name] = {
                **_measured(fitted, on_training, known, new, settings),
                "loss": metrics["loss"],
                "seconds": seconds,
            }
    personas = {
        str(name): persona
        for part in parts.values()
        for name, persona in zip(part.people, part.personas, strict=True)
        if persona is not None
    }
    return {name: {**one, "personas": personas} for name, one in found.items()}


def _train(run, name, model, features, people, settings, indices) -> tuple[Fitted, dict[str, float], float]:
    started = time.perf_counter()
    params, metrics = train(
        name,
        model,
        features,
        people,
        run.streams.key("user_models/init", *indices),
        run.streams.numpy("user_models/batches", indices[0]),
        batch=settings.batch_size // settings.query,
        context=max(settings.counts),
        query=settings.query,
    )
    return Fitted(model, params), metrics, time.perf_counter() - started


def _save(run: Run, name: str, fitted: Fitted, reduction: Reduction, settings: UserModelsSettings) -> None:
    """Writes <workdir>/user_models/<name>/model.safetensors, which a server reads: the entry of the first seed, without
    the people it was trained on.
    """
    path, workspace, params = run.workdir.path / "user_models" / name / FILE, run.workspace, fitted.params
    if isinstance(fitted.model, Table):
        params = {**params, "table": jax.tree.map(lambda x: x[:1], params["table"])}
    note = {
        **workspace.provenance,
        "base_folder": workspace.base_from(path.parent),
        "quantize": workspace.settings.quantize,
        "chat": run.records.chat,
        "user_rewards": {**fitted.model.to_dict(), "kind": settings.models[name]["kind"]},
        "states": list(settings.states),
        "encoder": settings.encoder,
        "context": max(settings.counts),
    }
    run.workdir.stage(f"user_models/{name}")
    with disk_errors(path):
        save_tree(path, {"params": params, "reduction": jax.tree.map(np.asarray, vars(reduction))}, note)


def _measured(
    fitted: Fitted, trained: People, known: People, new: People, settings: UserModelsSettings
) -> dict[str, Any]:
    """What the report says of a trained entry, from one seed.

    Args:
      trained: the people of training with training comparisons to test on.
    """
    states, size = fitted.known(known), max(settings.counts)
    margins, names = known.labelled(fitted.margins(states, known))
    nobody = fitted.nobody(known.context, len(known.names))
    context = fitted.asked(new.context, size)
    curve = {}
    for count in settings.counts:
        curve[count] = new.labelled(fitted.margins(fitted.met(context, count), new))
    opposite = new.labelled(fitted.margins(fitted.met(context.reversed(), size), new))
    flipped = np.sign(opposite[0]) != np.sign(curve[size][0])
    cells = {
        "seen_user_seen_prompt": trained.labelled(fitted.margins(fitted.known(trained), trained))[0],
        "seen_user_unseen_prompt": margins,
        "unseen_user_unseen_prompt": curve[size][0],
    }
    return {
        "known": (margins, names),
        "generic": known.labelled(fitted.margins(nobody, known)),
        "curve": curve,
        "flip": {"flipped": float(flipped.mean()), "accuracy": float((opposite[0] > 0).mean())},
        "ece": calibration_error(margins),
        "cost": fitted.cost(new, size),
        "grid": {cell: float((found > 0).mean()) for cell, found in cells.items()},
        "described": fitted.model.described(states),
        "vectors": _vectors(states, known.names),
    }


def _vectors(states: State, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Person -> the numbers of the state that differ between people; nothing where none do."""
    flat = [np.asarray(leaf).reshape(len(names), -1) for leaf in jax.tree.leaves(states)]
    if not flat:
        return {}
    return dict(zip(names, np.concatenate(flat, axis=1), strict=True))


def summarized(
    settings: UserModelsSettings, runs: Sequence[Mapping[str, Mapping[str, Any]]], seed: int
) -> dict[str, Any]:
    """The sections of the report, see `evaluation.report`, from what every seed found.

    A person's accuracy is that over their comparisons in all seeds; intervals are over people.
    """
    options: dict[str, Any] = {"resamples": settings.resamples, "seed": seed}
    entries = settings.entries
    summary: dict[str, Any] = {"controls": [name for name, model in entries.items() if model.permuted]}
    summary |= {section: {} for section in ("accuracy", "gain", "grid", "cold_start", "user_models", "embedding")}
    last = max(settings.counts)
    new_accuracy = {}
    for name, model in entries.items():
        ones = [found[name] for found in runs]
        personas = {person: persona for one in ones for person, persona in one["personas"].items()}
        accuracy = user_accuracy(*_joined([one["known"] for one in ones]), groups=personas or None, **options)
        accuracy["generic"] = user_accuracy(*_joined([one["generic"] for one in ones]), **options)["mean"]
        summary["accuracy"][name] = accuracy
        each = {k: user_accuracy(*_joined([one["curve"][k] for one in ones]), **options) for k in settings.counts}
        new_accuracy[name] = each[last]["users"]
        summary["cold_start"][name] = cold_start_curve(
            {k: [one["accuracy"] for one in found["users"].values()] for k, found in each.items()}, **options
        )
        summary["grid"][name] = {cell: _mean(one["grid"].get(cell) for one in ones) for cell in ones[0]["grid"]}
        summary["user_models"][name] = {
            "kind": settings.models[name]["kind"],
            **dataclasses.asdict(model.slots),
            "seeds": [user_accuracy(*one["known"], **options)["mean"] for one in ones],
            "flip": {key: _mean(one["flip"][key] for one in ones) for key in ("flipped", "accuracy")},
            "ece": _mean(one["ece"] for one in ones),
            **{key: _mean(one["cost"][key] for one in ones) for key in ("bytes", "milliseconds")},
            **{key: _mean(one[key] for one in ones) for key in ("seconds", "loss")},
            **{key: _mean(one["described"][key] for one in ones) for key in ones[0]["described"]},
        }
        vectors = ones[0]["vectors"]
        if vectors and np.ptp(list(vectors.values()), axis=0).any():
            axes, users = principal_axes(list(vectors.values())), list(vectors)
            who = [personas.get(user) for user in users]
            summary["embedding"][name] = {"users": users, "groups": who, "x": axes[:, 0], "y": axes[:, 1]}
    pooled = next((name for name, model in entries.items() if model.slots.source == "nobody"), None)
    for name in entries if pooled else ():
        if name != pooled:
            own, other = (summary["accuracy"][one]["users"] for one in (name, pooled))
            summary["gain"][name] = {"against": pooled, **paired_gain(own, other, **options)}
            gain = paired_gain(new_accuracy[name], new_accuracy[pooled], **options)
            summary["user_models"][name]["new_gain"] = {"against": pooled, "comparisons": last, **gain}
    return summary


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    margins, names = zip(*parts, strict=True)
    return np.concatenate(margins), np.concatenate(names)


def _mean(values) -> float:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


def run(run: Run) -> dict[str, Any]:
    """Trains and evaluates every entry with every seed; writes <workdir>/report."""
    started = time.perf_counter()
    settings = run.section(UserModelsSettings)
    data = FeaturePairs(run, settings)
    runs = [_one_seed(run, data, settings, seed) for seed in settings.seeds]
    summary = summarized(settings, runs, run.streams.seed)
    personas = [one["group"] for found in list(summary["accuracy"].values())[:1] for one in found["users"].values()]
    if all(personas) and not run.section(PopulationSettings).mixture:
        largest = max(personas.count(persona) for persona in set(personas))
        summary["ceiling"] = {"majority_fraction": largest / len(personas)}
    counts = [len(one["users"]) for one in summary["accuracy"].values()][:1]
    source = f"by the encoder {settings.encoder}" if settings.encoder else "states of the base"
    summary["notes"] = [
        f"{len(settings.seeds)} seeds; {len(data.states)} answers with {data.states.shape[1]} features each, "
        f"{source}. Known people: {counts[0]}."
    ]
    finish(run, "user_models", started, summary)
    return {"answers": len(data.states), "seeds": list(settings.seeds)}


STAGE = Stage("user_models", run, UserModelsSettings, writes="report/summary.json")
