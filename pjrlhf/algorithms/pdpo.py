"""P-DPO and P-RM: a user model learned jointly with a policy, or a reward model, from everybody's comparisons (P-RLHF,
arXiv 2402.05133).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Int

from pjrlhf.algorithms.pdpo_entries import policies_of, save, soup_bank, user_model
from pjrlhf.algorithms.pdpo_objective import PairMargins, preference_loss
from pjrlhf.algorithms.pdpo_settings import Entry, PreferenceSettings
from pjrlhf.data.batching import batches
from pjrlhf.data.comparisons import PairBatch
from pjrlhf.data.messages import text_of
from pjrlhf.data.token_table import TokenRow
from pjrlhf.feedback.pairs import Pairs, given_parts, read_pairs
from pjrlhf.models.adapters import Backbone, init_bank
from pjrlhf.models.users import KINDS, UserModel, fit_clusters, gather_rows
from pjrlhf.objectives import preference as losses
from pjrlhf.parallel.processes import is_process_zero
from pjrlhf.rollout import scoring
from pjrlhf.rollout.preference import PreferenceConfig
from pjrlhf.runtime.devices import Devices
from pjrlhf.runtime.heldout_answers import HeldoutAnswers, once, rows_of
from pjrlhf.runtime.run import Run, Stage
from pjrlhf.runtime.scorer import Scorer
from pjrlhf.runtime.streams import Streams
from pjrlhf.training.accumulation import gradient_of, in_parts, parts_of
from pjrlhf.training.completions import Row, spread
from pjrlhf.training.lazy_adam import LazyAdam, lazy_adam
from pjrlhf.training.loop import Method
from pjrlhf.training.metrics import Metrics
from pjrlhf.training.optimizer import make_optimizer, make_schedule, passes, per_ingredient, steps_of
from pjrlhf.training.state import State
from pjrlhf.types import Array, Params, PRNGKey


class Optimizers(NamedTuple):
    """`dense` moves everything but the table of users, whose rows `table` moves one by one."""

    dense: optax.GradientTransformationExtraArgs
    table: LazyAdam

    @classmethod
    def create(cls, entry: Entry, trainable: Params) -> "Optimizers":
        """Those of an entry: per policy for adapters and heads, and one for what all users share.

        Args:
          trainable: parameters, or their shapes; an optimizer without any is left out.
        """
        made = {
            "policy": per_ingredient(make_optimizer(entry.optimizer, entry.steps)),
            "users": make_optimizer(entry.user_optimizer, entry.steps),
        }
        dense, _ = _split(trainable)
        labels = {
            name: jax.tree.map(lambda _, label="users" if name == "users" else "policy": label, tree)
            for name, tree in dense.items()
        }
        parts = {label: made[label] for label in {*jax.tree.leaves(labels)}}
        return cls(optax.multi_transform(parts, labels), lazy_adam(make_schedule(entry.user_optimizer, entry.steps)))

    def init(self, trainable: Params) -> Params:
        """{"dense", "table"}: the state before the first update."""
        dense, table = _split(trainable)
        return {"dense": self.dense.init(dense), "table": {} if table is None else self.table.init(table)}

    def update(
        self, gradient: Params, indices: Int[Array, " C"] | None, trainable: Params, state: Params
    ) -> tuple[Params, Params]:
        """(trainable, state) after one update.

        Args:
          gradient: of `trainable`, but for the table of users that of the rows `indices`, see `gather_rows`.
        """
        dense, table = _split(trainable)
        slopes, row_slopes = _split(gradient)
        updates, dense_state = self.dense.update(slopes, state["dense"], dense)
        dense, state = cast(Params, optax.apply_updates(dense, updates)), {**state, "dense": dense_state}
        if table is None or indices is None:
            return dense, state
        table, rows = self.table.update(indices, row_slopes, state["table"], table)
        return {**dense, "users": {**dense["users"], "table": table}}, {**state, "table": rows}


def _split(trainable: Params) -> tuple[Params, Params | None]:
    """(everything but the table of users, the table or None)."""
    users = dict(trainable["users"])
    table = users.pop("table", None)
    return {**trainable, "users": users}, table


def copies(objective: PreferenceConfig, batch: PairBatch, key: PRNGKey) -> PairBatch:
    """The batch with its part for the generic user: a second copy of every pair ("exact"), or pairs that lose their
    user with probability 1 - alpha ("dropout").
    """
    if objective.alpha == 1:
        return batch
    if objective.mixture == "exact":
        return batch.both_copies()
    return batch.replace(users=losses.user_dropout(key, batch.users, objective.alpha))


class Preference(Method):
    """The method for `training.loop.run`: the training of one entry, or a part of it.

    Args:
      start: parameters to go on from, {"bank", "users"}. A user model that mixes adapters only needs their "bank",
        which is not trained.
      shown: held-out pairs of a table.
      answers: (user model, numbers of held-out pairs) -> what policies answer in a table.
    """

    show = ("loss", "rewards/accuracies")

    def __init__(
        self,
        entry: Entry,
        pairs: Pairs,
        devices: Devices,
        backbone: Backbone,
        streams: Streams,
        start: Params | None = None,
        shown: int = 16,
        answers: Callable[[UserModel, Sequence[int]], HeldoutAnswers] | None = None,
    ):
        self.shown = shown
        pairs = pairs.for_head(entry.objective.head)
        self.entry, self.pairs, self.devices, self.streams = entry, pairs, devices, streams
        self.backbone, self.objective = backbone, entry.objective
        self.rates = entry.optimizer.rates() | entry.user_optimizer.rates("user_optimizer")
        given = dict(start or {})
        width = backbone.model.config.hidden_size
        self.users = user_model(entry, pairs.registry.capacity, width, given.get("bank"))
        # What the policies are made of beside the base but is not trained.
        self.frozen = {"bank": given.pop("bank")} if self.users.mixes else {}
        self.start = given or None
        self.shifted = "delta" in losses.PAIRWISE.get(self.objective.loss).options
        self.optimizers = Optimizers.create(entry, jax.eval_shape(self._trainable, backbone, self.start))
        users = pairs.users("train")
        if entry.users.permuted:
            # The control: the same people and pairs, but nobody's pairs are their own.
            users = streams.numpy("preference/permutation").permutation(users)
        collate = functools.partial(self.collate, "train", users)
        collate = in_parts(collate, entry.accumulation_steps)
        self.batches = batches(
            pairs.tables["train"],
            entry.batch_size,
            seed=streams.seed,
            collate=collate,
            key="preference.batch_size",
            rows="pairs",
        )
        self.answers = None
        if answers and self.objective.head == "policy":
            numbers = spread(len(pairs.tables["heldout"]), shown)
            self.answers = once(functools.partial(answers, self.users, numbers))
        self._margins = PairMargins(entry, self.users, pairs, backbone, Scorer(devices, entry.batch_size))
        self._update = devices.training_step(self._step)
        self.programs = (self._update,)

    def collate(self, part: str, users: np.ndarray, rows: Sequence[TokenRow]) -> PairBatch:
        """A batch with room for the user tokens of this entry, see `Pairs.collate`."""
        return self.pairs.collate(part, users, rows, self.users.num_tokens)

    def init(self) -> State:
        # The step donates its state; what was given as a start stays the caller's.
        return self.devices.create(self._initial, self.backbone, self.start)

    def _trainable(self, backbone: Backbone, start: Params | None) -> Params:
        """The parameters before the first step."""
        if start is not None:
            return start
        key, base = self.streams.key("preference/init"), backbone.base
        trainable = {"users": self.users.init(jax.random.fold_in(key, 1), base["embed"]["embedding"])}
        if not self.frozen:
            trainable["bank"] = init_bank(base, backbone.adapter, self.users.policies, jax.random.fold_in(key, 0))
        if self.objective.head == "reward":
            width = backbone.model.config.hidden_size
            trainable["heads"] = scoring.init_heads(1, width, jax.random.fold_in(key, 3))
        return trainable

    def _initial(self, backbone: Backbone, start: Params | None) -> State:
        trainable = self._trainable(backbone, start)
        extra = {"shift": jnp.zeros(2)} if self.shifted else {}
        rng = jax.random.fold_in(self.streams.key("preference/init"), 2)
        return State(jnp.zeros((), jnp.int32), rng, trainable, self.optimizers.init(trainable), extra)

    def _step(self, state: State, backbone: Backbone, frozen: Params, *parts: PairBatch) -> tuple[State, Metrics]:
        trainable, indices = state.trainable, None
        moving = trainable
        if self.users.personal:
            keys = [state.key, *(jax.random.fold_in(state.key, i) for i in range(2, len(parts) + 1))]
            mixed = [copies(self.objective, part, key) for part, key in zip(parts, keys, strict=True)]
            # Only the rows of users in the batch are differentiated.
            users = jnp.concatenate([part.users for part in mixed])
            small, local, indices = gather_rows(trainable["users"], users)
            moving = {**trainable, "users": small}
            parts = tuple(part.replace(local=x) for part, x in zip(mixed, jnp.split(local, len(mixed)), strict=True))
        parts = tuple(part.replace(**state.extra) for part in parts)

        def loss(moving: Params, batch: PairBatch, key: PRNGKey) -> tuple[Array, Metrics]:
            return preference_loss(backbone, self.users, self.objective, {**frozen, **moving}, batch, key)

        gradient, metrics = gradient_of(loss, moving, parts, jax.random.fold_in(state.key, 1))
        trainable, opt_state = self.optimizers.update(gradient, indices, trainable, cast(Params, state.opt_state))
        norm = optax.global_norm(gradient)
        metrics = {**metrics, "grad_norm": (norm, jnp.ones_like(norm))}
        extra = {}
        if self.shifted:
            # Every part adds its rewards to those before the batch.
            shift = jnp.stack(metrics["rewards/shift"]) - (len(parts) - 1) * cast(Params, state.extra)["shift"]
            metrics, extra = {**metrics, "rewards/shift": tuple(shift)}, {"shift": shift}
        return state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state, extra=extra), metrics

    def step(self, state: State, batch: PairBatch | tuple[PairBatch, ...]) -> tuple[State, Metrics]:
        return self._update(state, self.backbone, self.frozen, *map(self.devices.place, parts_of(batch)))

    def evaluate(self, state: State) -> dict[str, float]:
        """Accuracy on the held-out pairs, each as its own user sees it."""
        trainable = {**self.frozen, **state.trainable}
        margins = self._margins(trainable, "heldout", self.pairs.users("heldout"))
        return {"accuracy": float((margins > 0).mean())}

    def rows(self, state: State) -> Sequence[Row]:
        """Held-out pairs with their margins, and what a policy answers; both as people see them."""
        table, users = self.pairs.tables["heldout"], self.pairs.users("heldout")
        numbers = spread(len(table), self.shown)
        trainable = {**self.frozen, **state.trainable}
        margins = self._margins(trainable, "heldout", users, numbers)
        found = [
            {
                "user": example.user_id or "",
                "prompt": text_of(example.prompt or ""),
                "chosen": text_of(example.chosen or ""),
                "rejected": text_of(example.rejected or ""),
                "margin": margin,
            }
            for example, margin in zip((table.examples[i] for i in numbers), margins.tolist(), strict=True)
        ]
        answers = rows_of(self.answers, trainable) or [{}] * len(found)
        return [{**row, **answer} for row, answer in zip(found, answers, strict=True)]


def heldout_answers(run: Run, pairs: Pairs, users: UserModel, numbers: Sequence[int]) -> HeldoutAnswers:
    """What policies in training answer the people of held-out pairs."""
    examples = [pairs.tables["heldout"].examples[i] for i in numbers]
    return HeldoutAnswers(
        run,
        functools.partial(run.streams.key, "preference/completions"),
        [example.prompt or "" for example in examples],
        [{}] * len(examples),
        policies=functools.partial(policies_of, users),
        data=pairs.users("heldout")[list(numbers)],
    )


def announced(settings: PreferenceSettings) -> str:
    """The entries in the order of their training, each with its length."""
    told = []
    for name in settings.models:
        users = settings.entry(name).users
        first = 0 if KINDS.get(users.kind).mixes else round(users.warm_start * settings.steps)
        part = f", the first {first} as {name}/individualized" if first else ""
        # How many steps an epoch has is known when the pairs of the entry are read.
        told.append(f"{name} ({f'epochs={settings.epochs:g}' if settings.epochs else f'{settings.steps} steps{part}'})")
    return ", ".join(told)


def run(run: Run) -> dict[str, Any]:
    """Trains every entry of `preference.models`; writes <workdir>/preference/<name>/model.safetensors with the
    users' names.
    """
    settings = run.section(PreferenceSettings)
    made = functools.cache(functools.partial(read_pairs, run, settings, given_parts(run, settings)))
    parts, counts = (run.devices, run.workspace.backbone, run.streams), {}
    shown = run.settings.completion_prompts
    if is_process_zero():
        logging.info("preference: trains, in this order, %s", announced(settings))
    for name in settings.models:
        entry = settings.entry(name)
        pairs = made(**entry.users.trained_texts)
        answers = functools.partial(heldout_answers, run, pairs)
        rows = len(pairs.tables["train"])
        steps = steps_of(settings.steps, settings.epochs, rows, settings.batch_size)
        if settings.epochs:
            settings.check_steps(steps, "preference.", passes(settings.epochs, rows, settings.batch_size))
        pairs.for_head(entry.objective.head).reference["train"]  # computed before the first step
        entry = dataclasses.replace(entry, steps=steps)
        first, start = round(entry.users.warm_start * entry.steps), None
        if KINDS.get(entry.users.kind).mixes:
            start = {"bank": soup_bank(run)}
        elif first:
            method = Preference(entry.part(first, "individualized"), pairs, *parts, shown=shown, answers=answers)
            start = run.train(method, f"preference/{name}/individualized", first).trainable
            people = sorted(pairs.registry.rows.values())
            vectors = method.users, start["users"], entry.users.clusters, run.streams.key("preference/clusters")
            start = {**start, "users": fit_clusters(*vectors, user_rows=people)}
        rest = entry.steps - first
        method = Preference(entry.part(rest, entry.users.kind), pairs, *parts, start, shown, answers)
        trainable = run.train(method, f"preference/{name}", rest).trainable
        save(run, entry, method.users, pairs.registry, {**method.frozen, **trainable})
        tables = {part: len(table) for part, table in pairs.tables.items()}
        counts = {"pairs": tables, "users": len(pairs.registry.rows)}
    return counts


STAGE = Stage("preference", run, PreferenceSettings)
