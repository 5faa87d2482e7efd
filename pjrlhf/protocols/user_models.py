"""Reward models of people side by side: one split, one budget, frozen features, and the controls beside every figure.

    known people     comparisons on prompts that nobody trained on
    new people       the same after 0, 1, 2, ... comparisons of theirs, everything else frozen
    controls         pooled Bradley-Terry; people permuted in training; labels of the context reversed
    cost             bytes and milliseconds of a person

Features are computed once. Every seed parts people and prompts (where the data are not parted already), draws initial
values and batches, and trains all entries anew.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf.algorithms.user_rewards import train
from pjrlhf.errors import UserError
from pjrlhf.evaluation.users import calibration_error, cold_start_curve, paired_gain, principal_axes, user_accuracy
from pjrlhf.feedback.feature_pairs import FeaturePairs, FeatureSettings, Part, TrainingPeople, padded
from pjrlhf.feedback.population import PopulationSettings
from pjrlhf.models.user_models.base import Comparisons, State, UserRewards
from pjrlhf.models.user_models.kinds import user_model
from pjrlhf.protocols.reporting import finish
from pjrlhf.runtime.run import Run, Stage
from pjrlhf.settings import SEEDS, check_names, setting
from pjrlhf.training.progress import progress
from pjrlhf.types import Array, Params

TIMINGS = 20  # of which the median counts


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


@dataclasses.dataclass(frozen=True, eq=False)
class People:
    """Several people: what is known of them, and comparisons to test on.

    Attributes:
      names: of the people, in order.
      rows: int32 [m], their rows of tables.
      context: all that can be told of them; a new person tells a beginning of it.
      tested: comparisons, none of them in the context.
    """

    names: tuple[str, ...]
    rows: np.ndarray
    context: Comparisons
    tested: Comparisons

    def labelled(self, margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(margins, names) of the comparisons that are no padding, from margins [m, n]."""
        real = np.asarray(self.tested.weight) > 0
        return margins[real], np.repeat(self.names, real.sum(1))


def known_people(features: np.ndarray, part: Part, held: Part, people: TrainingPeople, size: int) -> People:
    """The people of training, with a context of their training comparisons; what they are tested on is not in it, also
    where they are tested on training comparisons.
    """
    told, tested = part.of_people(), held.of_people()
    if held is part:
        tested = {name: rows[size:] for name, rows in told.items() if len(rows) > size}
    names = tuple(name for name in tested if name in told)
    if not names:
        raise UserError(
            "user_models: nobody has comparisons in training and held out; give more records of each person"
        )
    context = padded(features, part, [told[name] for name in names], size)
    return People(
        names, people.registry.indices(names), context, padded(features, held, [tested[name] for name in names])
    )


def new_people(features: np.ndarray, part: Part, size: int, pool: int) -> People:
    """The people who are met after training and have `size` comparisons or more to tell, on prompts that others trained
    on, and comparisons to be tested on, on prompts that nobody trained on.

    Args:
      pool: the most comparisons of a context, among which an active user model chooses.
    """
    told, tested = {}, {}
    for name, rows in part.of_people().items():
        own, test = rows[~part.held_out[rows]], rows[part.held_out[rows]]
        if len(own) >= size and len(test):
            told[name], tested[name] = own[:pool], test
    if not told:
        raise UserError(
            f"user_models: no new person has {size} comparisons on prompts of training and others to test on; lower "
            "user_models.counts, or give more records of each person"
        )
    names = tuple(told)
    context = padded(features, part, [told[name] for name in names], pool)
    tests = padded(features, part, [tested[name] for name in names])
    return People(names, np.zeros(len(names), np.int32), context, tests)


class Fitted:
    """A trained entry, ready to be asked about people."""

    def __init__(self, model: UserRewards, params: Params):
        self.model, self.params = model, params

    def known(self, people: People) -> State:
        """States of the people of training, as they stand in a table or by their contexts."""
        return _known(self.model, self.params, people.rows, people.context)

    def met(self, context: Comparisons, count: int) -> State:
        """States of new people after the first `count` comparisons of their contexts."""
        return _met(self.model, self.params, context.first(count))

    def margins(self, state: State, people: People) -> np.ndarray:
        """Float32 [m, n], of the tested comparisons."""
        return np.asarray(_margins(self.model, self.params, state, people.tested))

    def asked(self, context: Comparisons, count: int) -> Comparisons:
        """The first `count` comparisons of each context, in the order in which the model asks for them."""
        people, size = context.weight.shape
        order = np.zeros((people, 0), np.int64)
        for k in range(count):
            rest = np.array([[i for i in range(size) if i not in own] for own in order])
            so_far = _taken(context, np.concatenate([order, rest], axis=1)).first(k)
            value = _informativeness(self.model, self.params, self.met(so_far, k), so_far, context)
            if value is None:
                return _taken(context, np.tile(np.arange(count), (people, 1)))
            value = np.where(np.asarray(context.weight) > 0, value, -np.inf)
            np.put_along_axis(value, order, -np.inf, axis=1)
            order = np.concatenate([order, value.argmax(1)[:, None]], axis=1)
        return _taken(context, order)

    def cost(self, people: People, count: int) -> dict[str, float]:
        """Bytes of a person's state, and the median milliseconds that it takes to make it from `count` comparisons."""
        one = jax.tree.map(lambda x: jnp.asarray(x[:1, :count]), people.context)
        state, seconds = jax.block_until_ready(_met(self.model, self.params, one)), []
        for _ in range(TIMINGS):
            started = time.perf_counter()
            jax.block_until_ready(_met(self.model, self.params, one))
            seconds.append(time.perf_counter() - started)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        return {"bytes": float(size), "milliseconds": 1e3 * float(np.median(seconds))}


# The model is static, so that all seeds share the programs of shapes they have in common.


@functools.partial(jax.jit, static_argnums=0)
def _known(model: UserRewards, params: Params, rows: Array, context: Comparisons) -> State:
    return jax.vmap(functools.partial(model.person, params))(rows, context)


@functools.partial(jax.jit, static_argnums=0)
def _met(model: UserRewards, params: Params, context: Comparisons) -> State:
    return jax.vmap(functools.partial(model.meet, params))(context)


@functools.partial(jax.jit, static_argnums=0)
def _margins(model: UserRewards, params: Params, state: State, pairs: Comparisons) -> Array:
    return jax.vmap(functools.partial(model.margins, params))(state, pairs)


@functools.partial(jax.jit, static_argnums=0)
def _informativeness(
    model: UserRewards, params: Params, state: State, asked: Comparisons, pool: Comparisons
) -> Array | None:
    return jax.vmap(functools.partial(model.informativeness, params))(state, asked, pool)


def _taken(context: Comparisons, order: np.ndarray) -> Comparisons:
    """The comparisons of every person in an order, int [m, n]."""

    def one(x):
        return np.take_along_axis(np.asarray(x), order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)

    return jax.tree.map(one, context)


def _one_seed(run: Run, data: FeaturePairs, settings: UserModelsSettings, seed: int) -> dict[str, dict[str, Any]]:
    """Entry -> what one seed found of it."""
    parts = data.split(seed)
    features, size = data.reduced(parts["train"]), max(settings.counts)
    people = TrainingPeople(parts["train"])
    known = known_people(features, parts["train"], parts["heldout"], people, size)
    on_training = known_people(features, parts["train"], parts["train"], people, size)
    new = new_people(features, parts["new_users"], size, max(settings.pool, size))
    found = {}
    for number, (name, model) in enumerate(settings.entries.items()):
        trained = people
        if model.permuted:
            trained = TrainingPeople(parts["train"], run.streams.numpy("user_models/permutation", seed))
        fitted, metrics, seconds = _train(run, name, model, features, trained, settings, (seed, number))
        with progress(f"user_models: people of {name}", 1):
            found[name] = {
                **_measured(fitted, known, new, settings),
                "loss": metrics["loss"],
                "seconds": seconds,
                "grid": _grid(fitted, on_training, known, new, size),
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


def _measured(fitted: Fitted, known: People, new: People, settings: UserModelsSettings) -> dict[str, Any]:
    """What the report says of a trained entry, from one seed."""
    states, size = fitted.known(known), max(settings.counts)
    margins, names = known.labelled(fitted.margins(states, known))
    nobody = fitted.met(known.context, 0)
    context = fitted.asked(new.context, size)
    curve = {}
    for count in settings.counts:
        curve[count] = new.labelled(fitted.margins(fitted.met(context, count), new))
    opposite = new.labelled(fitted.margins(fitted.met(context.reversed(), size), new))
    flipped = np.sign(opposite[0]) != np.sign(curve[size][0])
    return {
        "known": (margins, names),
        "generic": known.labelled(fitted.margins(nobody, known)),
        "curve": curve,
        "flip": {"flipped": float(flipped.mean()), "accuracy": float((opposite[0] > 0).mean())},
        "ece": calibration_error(margins),
        "cost": fitted.cost(new, size),
        "described": fitted.model.described(states),
        "vectors": _vectors(states, known.names),
    }


def _vectors(states: State, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Person -> the numbers of the state that differ between people; nothing where none do."""
    flat = [np.asarray(leaf).reshape(len(names), -1) for leaf in jax.tree.leaves(states)]
    if not flat:
        return {}
    return dict(zip(names, np.concatenate(flat, axis=1), strict=True))


def _grid(fitted: Fitted, trained: People, known: People, new: People, size: int) -> dict[str, float]:
    """Accuracy by what was known, fractions; new people have told `size` comparisons.

    Args:
      trained: the people of training with training comparisons to test on.
    """
    found = {}
    for cell, people in (("seen_user_seen_prompt", trained), ("seen_user_unseen_prompt", known)):
        found[cell] = people.labelled(fitted.margins(fitted.known(people), people))[0]
    state = fitted.met(fitted.asked(new.context, size), size)
    found["unseen_user_unseen_prompt"] = new.labelled(fitted.margins(state, new))[0]
    return {cell: float((margins > 0).mean()) for cell, margins in found.items()}


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
    summary["notes"] = [
        f"{len(settings.seeds)} seeds; {len(data.states)} answers with {data.states.shape[1]} features each. Known "
        f"people: {counts[0]}."
    ]
    finish(run, "user_models", started, summary)
    return {"answers": len(data.states), "seeds": list(settings.seeds)}


STAGE = Stage("user_models", run, UserModelsSettings, writes="report/summary.json")
