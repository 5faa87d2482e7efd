"""P-DPO and P-RM: a user model learned jointly with a policy, or a reward model, from everybody's comparisons (P-RLHF,
arXiv 2402.05133).

Each entry of `preference.models` is one run of the same training on the same pairs with the same budget; the
controls, pooled DPO and permuted user ids, are two more entries. An entry has the settings of its user model
(`EntrySettings`), and may have those of `PreferenceConfig` where they differ from the section's.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from pjrlhf.algorithms import banks
from pjrlhf.data.batching import batches
from pjrlhf.data.messages import text_of
from pjrlhf.data.tokenization import TokenRow
from pjrlhf.errors import UserError
from pjrlhf.feedback.pairs import SIDES, PairBatch, Pairs, PairSettings, read_pairs
from pjrlhf.models.adapters import Backbone, bank_size, init_bank, is_low_rank
from pjrlhf.models.hub import model_file
from pjrlhf.models.provenance import check_provenance, check_shapes
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.models.users import KINDS, STARTS, UserModel, fit_clusters, gather_rows
from pjrlhf.objectives import preference as losses
from pjrlhf.parallel.processes import on_process_zero, to_host
from pjrlhf.rollout import scoring
from pjrlhf.runtime.devices import Devices
from pjrlhf.runtime.run import Run, Stage
from pjrlhf.runtime.scorer import Scorer
from pjrlhf.runtime.streams import Streams
from pjrlhf.settings import Settings, check_names, parse, setting
from pjrlhf.training.accumulation import check_accumulation, gradient_of, in_parts, parts_of
from pjrlhf.training.completions import Row
from pjrlhf.training.lazy_adam import LazyAdam, lazy_adam
from pjrlhf.training.loop import Method
from pjrlhf.training.metrics import Metrics
from pjrlhf.training.optimizer import (
    OptimizerSettings,
    check_warmup,
    make_optimizer,
    make_schedule,
    passes,
    per_ingredient,
    steps_of,
)
from pjrlhf.training.state import State
from pjrlhf.training.workdir import disk_errors
from pjrlhf.types import Array, Json, Params, PRNGKey, Tree

HEADS = ("policy", "reward")
MODEL = "model.safetensors"
PAIRS_SHOWN = 64  # held-out pairs in a table


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig(Settings):
    """The objective.

    `head` "policy" scores an answer by beta log(pi / reference), as DPO does; "reward" by a scalar head on its last
    token, without a reference and with beta 1 (P-RM, arXiv 2402.05133, section 4.1). `loss` and `label_smoothing` as
    in `objectives.preference.pairwise_loss`; `alpha` is the share of the user-specific term; `mixture` "exact" puts
    every pair in twice (its user, the generic user), "dropout" once with the user dropped with probability 1 - alpha:
    the same gradient in expectation at half the cost.
    """

    head: str = setting("policy", "policy (P-DPO), or reward (P-RM)", choices=HEADS)
    loss: str = setting(
        "sigmoid", "see objectives/preference.py", choices=lambda: tuple(losses.PAIRWISE), extensible=True
    )
    beta: float = setting(0.1, "inverse temperature of the implicit reward", above=0.0, high=1e6)
    alpha: float = setting(
        0.5, "fraction of the user-specific term; the rest trains the generic user", low=0.0, high=1.0
    )
    mixture: str = setting(
        "exact", "exact: every pair twice; dropout: once, at half the cost", choices=("exact", "dropout")
    )
    label_smoothing: float = setting(0.0, "fraction of labels taken for wrong", low=0.0, below=0.5)
    sft_weight: float = setting(0.0, "weight of the log-likelihood of the chosen answers", low=0.0, high=1e6)

    def check(self) -> None:
        try:
            loss = losses.PAIRWISE.get(self.loss)
        except UserError as error:
            raise UserError(f"loss: {error}") from error
        if self.label_smoothing and "label_smoothing" not in loss.options:
            raise UserError(f"label_smoothing: loss {self.loss!r} has none; set it to 0 or choose another loss")
        if self.head == "reward" and (self.sft_weight or not loss.for_rewards):
            known = [name for name, other in losses.PAIRWISE.items() if other.for_rewards]
            raise UserError(
                f"head: 'reward' with loss {self.loss!r} and sft_weight {self.sft_weight} needs a policy; choose from "
                f"{', '.join(known)}, and sft_weight 0"
            )

    @property
    def scale(self) -> float:
        """What a score difference is multiplied by: beta for log-ratios, 1 for rewards."""
        return self.beta if self.head == "policy" else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntrySettings(Settings):
    """An entry of `preference.models`: a user model, and what differs from the section where it differs."""

    kind: str = setting("individualized", "the user model", choices=lambda: tuple(KINDS), extensible=True)
    tokens: int = setting(10, "user tokens, of the kinds that have them", low=1, high=4096)
    clusters: int = setting(5, "of kind cluster", low=1, high=10**6)
    start: str = setting("vocabulary", "what user tokens start from", choices=STARTS)
    std: float = setting(0.02, "of user tokens that start normal", low=0.0, high=1e3)
    zero_offset: bool = setting(True, "every user starts equal to the generic one")
    permuted: bool = setting(False, "train on the same pairs under wrong names (or texts): the control")
    warm_start: float = setting(
        0.0,
        "of kind cluster: fraction of the steps that train vectors of everybody's own, then clustered",
        low=0.0,
        below=1.0,
    )
    user_text: bool = setting(False, "what people say about themselves stands before the prompt")

    @property
    def added(self) -> int:
        """Number of user tokens that stand before a prompt."""
        return self.tokens if "tokens" in KINDS.get(self.kind).sizes else 0

    def check(self) -> None:
        try:
            KINDS.get(self.kind)
        except UserError as error:
            raise UserError(f"kind: {error}") from error
        if self.warm_start and self.kind != "cluster":
            raise UserError(f"warm_start: kind {self.kind!r} has no clusters to start; set it to 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One training: a user model, its objective and its budget.

    Attributes:
      name: in `preference.models`.
      steps, batch_size: updates, and pairs of each.
      accumulation_steps: parts of a batch.
      optimizer, user_optimizer: of the policy or reward model, and of the user model.
    """

    name: str
    users: EntrySettings
    objective: PreferenceConfig
    steps: int
    batch_size: int
    accumulation_steps: int
    optimizer: OptimizerSettings
    user_optimizer: OptimizerSettings

    def part(self, steps: int, kind: str) -> "Entry":
        """A part of the training, with another kind of user model."""
        return dataclasses.replace(self, steps=steps, users=self.users.replace(kind=kind, warm_start=0.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceSettings(PairSettings, PreferenceConfig):
    """Entries of user models, trained on the same pairs with the same budget."""

    models: Mapping[str, Any] = setting(
        {
            "pooled": {"kind": "uniform"},
            "individualized": {"kind": "individualized", "tokens": 4},
            "cluster": {"kind": "cluster", "tokens": 4, "clusters": 2, "warm_start": 0.5},
            "permuted": {"kind": "individualized", "tokens": 4, "permuted": True},
        },
        "name -> entry; an entry may differ from the section in everything from head to sft_weight",
    )
    bank: str = setting(
        "",
        "for entries of kind soup: policy, or bank.safetensors of a stage policy on the same base, its folder, or its "
        "name on the hub",
        path=True,
    )
    steps: int = setting(160, "updates of each entry", low=1, high=10**9)
    epochs: float = setting(0.0, "passes over the pairs instead of steps; 0 is steps", low=0.0, high=1e6)
    accumulation_steps: int = setting(1, "parts of a batch that are computed one after the other", low=1, high=2**20)
    optimizer: OptimizerSettings = setting(
        OptimizerSettings(learning_rate=3e-3, schedule="cosine", warmup_steps=5), "of the policy or reward model"
    )
    user_optimizer: OptimizerSettings = setting(
        OptimizerSettings(learning_rate=3e-2, schedule="cosine"), "of the user model"
    )

    def check(self) -> None:
        super().check()
        check_accumulation(self.accumulation_steps, self.batch_size)
        if not self.models:
            raise UserError("models: there is none; add an entry such as {'pooled': {'kind': 'uniform'}}")
        check_names("models", self.models)
        for name in self.models if not self.bank else ():
            if KINDS.get(self.entry(name).users.kind).mixes:
                raise UserError(
                    f"bank: entry {name!r} mixes policies; name the bank.safetensors of a stage policy with "
                    "--config.preference.bank, or policy for that of this run"
                )
        if not self.epochs:
            self.check_steps(self.steps)

    def check_steps(self, steps: int, section: str = "", source: str = "") -> None:
        """Raises UserError for a warm-up that leaves none of so many updates.

        Args:
          section: prefix of keys in messages.
          source: where the number of updates comes from.
        """
        for name in self.models:
            share = self.entry(name).users.warm_start
            # Two parts where the first trains vectors for the clusters.
            first = round(share * steps)
            for order, part in (("before", first), ("after", steps - first)):
                told = f" {order} models.{name}.warm_start={share:g} of {steps} steps" if first else ""
                for key in ("optimizer", "user_optimizer") if part else ():
                    check_warmup(getattr(self, key), part, f"{section}{key}", f"{told}{source}")

    def entry(self, name: str) -> Entry:
        """An entry of `models`.

        Raises:
          UserError: a setting of the entry that is not known or does not fit.
        """
        values = self.models[name]
        if not isinstance(values, Mapping):
            raise UserError(f"models.{name}: {values!r} is not an entry; give it a kind")
        objective = {field.name: getattr(self, field.name) for field in dataclasses.fields(PreferenceConfig)}
        objective |= {key: value for key, value in values.items() if key in objective}
        own = {key: value for key, value in values.items() if key not in objective}
        if "kind" not in own:
            raise UserError(f"models.{name}: has no kind; choose one of {', '.join(KINDS)}")
        return Entry(
            name=name,
            users=parse(EntrySettings, own, f"models.{name}"),
            objective=parse(PreferenceConfig, objective, f"models.{name}"),
            steps=self.steps,
            batch_size=self.batch_size,
            accumulation_steps=self.accumulation_steps,
            optimizer=self.optimizer,
            user_optimizer=self.user_optimizer,
        )


# ---- the objective


def answer_scores(
    backbone: Backbone, users: UserModel, trainable: Params, batch: PairBatch, dropout_key: PRNGKey | None = None
) -> Float[Array, "2 B"]:
    """Scores of the chosen and rejected answers as each pair's user sees them: summed log-probs, nats, or, where
    `trainable` has "heads", rewards.

    Args:
      trainable: {"bank": the adapters, "users": parameters of the user model, whose table has a row for each of
        `batch.places`}, and "heads" of a reward model.
      dropout_key: see `Policies`.
    """
    user_tokens, mix = users.apply(trainable["users"], batch.places)
    one = jnp.ones((1, 1))
    policies = backbone.policies(trainable["bank"], one if mix is None else mix, user_tokens, dropout_key)
    if "heads" in trainable:
        scores = scoring.packed_rewards(policies, trainable["heads"], one, batch.rows)
    else:
        scores = scoring.packed_logps(policies, batch.rows)
    return scores.reshape(-1, 2).T


def _references(config: PreferenceConfig, batch: PairBatch) -> Float[Array, "2 B"]:
    """What the scores of `answer_scores` are measured against; rewards against nothing."""
    return batch.reference.T if config.head == "policy" else jnp.zeros_like(batch.reference.T)


def pair_rewards(
    config: PreferenceConfig, scores: Float[Array, "2 B"], batch: PairBatch
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(chosen, rejected) rewards from what `answer_scores` gives, constants to the gradient: those of the head, or beta
    log(pi / reference), per token where the loss is.
    """
    chosen, rejected = losses.implicit_rewards(scores, _references(config, batch), config.scale)
    if "lengths" in losses.PAIRWISE.get(config.loss).options:
        return chosen / batch.counts[:, 0], rejected / batch.counts[:, 1]
    return chosen, rejected


def reward_shift(config: PreferenceConfig, scores: Float[Array, "2 B"], batch: PairBatch) -> Float[Array, "2"]:
    """Sum and number of the rewards of both answers so far: `batch.shift` and those of the batch. Their
    mean is the reward shift of BCO (arXiv 2404.04656).
    """
    rewards = jnp.stack(losses.implicit_rewards(scores, _references(config, batch), config.scale))
    before = jnp.zeros(2) if batch.shift is None else batch.shift
    return before + jnp.stack([rewards.sum(), jnp.asarray(float(rewards.size))])


def pair_losses(config: PreferenceConfig, scores: Float[Array, "2 B"], batch: PairBatch) -> Float[Array, " B"]:
    """The loss of every pair from what `answer_scores` gives."""
    takes, options = losses.PAIRWISE.get(config.loss).options, {}
    if "lengths" in takes:
        options["lengths"] = batch.counts.T
    if "label_smoothing" in takes:
        options["label_smoothing"] = config.label_smoothing
    if "margin" in takes:
        options["margin"] = batch.margin
    if "delta" in takes:
        total, count = reward_shift(config, scores, batch)
        options["delta"] = total / count
    references = _references(config, batch)
    return losses.pairwise_loss(config.loss, scores, references, config.scale, preference=batch.preference, **options)


def preference_loss(
    backbone: Backbone,
    users: UserModel,
    config: PreferenceConfig,
    trainable: Params,
    batch: PairBatch,
    dropout_key: PRNGKey | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The personalized loss of a batch (P-RLHF, arXiv 2402.05133): alpha times the mean over pairs as their users see
    them, and 1 - alpha times the mean over the copies of the generic user. Without such copies (`batch.generic` is
    None) every pair counts once, as in plain DPO.

    `trainable` and `dropout_key` are those of `answer_scores`.
    """
    scores = answer_scores(backbone, users, trainable, batch, dropout_key)
    pairwise = pair_losses(config, scores, batch)
    if config.sft_weight:
        pairwise = pairwise + config.sft_weight * losses.sft_term(scores[0], batch.counts[:, 0])
    ones = jnp.ones_like(pairwise)
    if batch.generic is None:
        pair = (pairwise.sum(), ones.sum())
    else:
        pair = losses.mixture(pairwise, batch.generic, config.alpha)
    chosen, rejected = pair_rewards(config, scores, batch)
    counted = ones if batch.generic is None else 1.0 - batch.generic
    hits, decided = losses.accuracy(chosen, rejected), counted
    if batch.preference is not None:  # a tie has no better answer
        decided = jnp.where(batch.preference > 0.5, counted, 0.0)
    metrics = {
        "loss": pair,
        "rewards/accuracies": (jnp.where(decided > 0, hits * decided, 0.0).sum(), decided.sum()),
        "rewards/margins": (((chosen - rejected) * counted).sum(), counted.sum()),
        "rewards/chosen": ((chosen * counted).sum(), counted.sum()),
        "rewards/rejected": ((rejected * counted).sum(), counted.sum()),
        "wasted_tokens": scoring.wasted_tokens(batch.rows),
    }
    if batch.shift is not None:
        metrics["rewards/shift"] = tuple(reward_shift(config, scores, batch))
    if config.head == "policy":
        for side, logps in zip(SIDES, scores, strict=True):
            metrics[f"logps/{side}"] = ((logps * counted).sum(), counted.sum())
    return pair[0] / pair[1], metrics


class PairMargins:
    """Reward margins of comparisons by an entry: the reward of chosen minus that of rejected, as people see them."""

    def __init__(self, entry: Entry, users: UserModel, pairs: Pairs, backbone: Backbone, scorer: Scorer):
        self.objective, self.users, self.pairs, self.backbone = entry.objective, users, pairs, backbone
        self.name, self.scorer = entry.name, scorer
        self._margins = jax.jit(self._of_batch)

    def _of_batch(self, backbone: Backbone, trainable: Params, batch: PairBatch) -> Float[Array, " B"]:
        chosen, rejected = pair_rewards(self.objective, answer_scores(backbone, self.users, trainable, batch), batch)
        return chosen - rejected

    def __call__(
        self, trainable: Params, part: str, users: np.ndarray, rows: Sequence[int] | None = None
    ) -> np.ndarray:
        """Float32 [M], of `rows` of a part (all by default), as seen by `users` int32 [N], rows of the user table for
        all N pairs of the part. Of a policy these are the implicit margins, beta Delta log(pi / reference).
        """
        table = self.pairs.tables[part]
        rows = range(len(table)) if rows is None else rows
        return self.scorer(
            f"margins of pairs by {self.name} ({part})",
            rows,
            lambda chunk: self.pairs.collate(part, users, [table[i] for i in chunk], self.users.num_tokens),
            functools.partial(self._margins, self.backbone, trainable),
        )


# ---- one update


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


def soup_bank(run: Run) -> Params:
    """The trained adapters that kind soup mixes, from `preference.bank`, on the mesh.

    Raises:
      UserError: no such file, a damaged one, or adapters of another base or other settings.
    """
    path = run.section(PreferenceSettings).bank
    if path == "policy":
        path = run.workdir.path / "policy" / "bank.safetensors"
    bank, note = load_tree(model_file(path, "bank.safetensors"))
    if not is_low_rank(bank):
        raise UserError(f"{path}: holds full parameters, of which every pair would need a copy; train adapters instead")
    check_provenance(path, note, run.workspace.provenance)
    check_shapes(path, bank, run.workspace.bank_like(bank_size(bank)))
    return run.devices.shard(bank)


def user_model(entry: Entry, capacity: int, width: int, bank: Params | None = None) -> UserModel:
    """The user model of an entry.

    Args:
      capacity: people it has room for.
      width: of the base.
      bank: adapters that it mixes, of kinds that do.

    Raises:
      UserError: sizes that the kind refuses.
    """
    own = {key: getattr(entry.users, key) for key in ("kind", "tokens", "clusters", "start", "std", "zero_offset")}
    adapters = bank_size(bank) if KINDS.get(entry.users.kind).mixes and bank is not None else 0
    try:
        return UserModel(num_users=capacity, width=width, adapters=adapters, **own)
    except ValueError as error:
        raise UserError(f"preference.models.{entry.name}: {error}") from error


class Preference(Method):
    """The method for `training.loop.run`: the training of one entry, or a part of it.

    Args:
      start: parameters to go on from, {"bank", "users"}. A user model that mixes adapters only needs their "bank",
        which is not trained.
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
    ):
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
            trainable["bank"] = init_bank(base, backbone.adapter, 1, jax.random.fold_in(key, 0))
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

    def step_with_rows(self, state: State, batch: Tree) -> tuple[State, Metrics, Sequence[Row]]:
        """The same update, and a table of held-out pairs with their margins after it."""
        state, metrics = self.step(state, batch)
        examples = self.pairs.tables["heldout"].examples[:PAIRS_SHOWN]
        trainable, users = {**self.frozen, **state.trainable}, self.pairs.users("heldout")
        margins = self._margins(trainable, "heldout", users, range(len(examples)))
        rows = [
            {
                "user": example.user_id or "",
                "prompt": text_of(example.prompt or ""),
                "chosen": text_of(example.chosen or ""),
                "rejected": text_of(example.rejected or ""),
                "margin": margin,
            }
            for example, margin in zip(examples, margins.tolist(), strict=True)
        ]
        return state, metrics, rows


def run(run: Run) -> dict[str, Any]:
    """Trains every entry of `preference.models`; writes <workdir>/preference/<name>/model.safetensors with the
    users' names.
    """
    settings = run.section(PreferenceSettings)
    made = functools.cache(functools.partial(read_pairs, run, settings))
    parts, counts = (run.devices, run.workspace.backbone, run.streams), {}
    for name in settings.models:
        entry = settings.entry(name)
        texts = entry.users.user_text
        pairs = made(user_text=texts, permuted_text=texts and entry.users.permuted)
        rows = len(pairs.tables["train"])
        steps = steps_of(settings.steps, settings.epochs, rows, settings.batch_size)
        if settings.epochs:
            settings.check_steps(steps, "preference.", passes(settings.epochs, rows, settings.batch_size))
        entry = dataclasses.replace(entry, steps=steps)
        first, start = round(entry.users.warm_start * entry.steps), None
        if KINDS.get(entry.users.kind).mixes:
            start = {"bank": soup_bank(run)}
        elif first:
            method = Preference(entry.part(first, "individualized"), pairs, *parts)
            start = run.train(method, f"preference/{name}/individualized", first).trainable
            people = sorted(pairs.registry.rows.values())
            vectors = method.users, start["users"], entry.users.clusters, run.streams.key("preference/clusters")
            start = {**start, "users": fit_clusters(*vectors, user_rows=people)}
        rest = entry.steps - first
        method = Preference(entry.part(rest, entry.users.kind), pairs, *parts, start)
        trainable = run.train(method, f"preference/{name}", rest).trainable
        save(run, entry, method.users, pairs.registry, {**method.frozen, **trainable})
        tables = {part: len(table) for part, table in pairs.tables.items()}
        counts = {"pairs": tables, "users": len(pairs.registry.rows)}
    return counts


def _file(run: Run, name: str) -> pathlib.Path:
    return run.workdir.path / "preference" / name / MODEL


def save(run: Run, entry: Entry, users: UserModel, registry: UserRegistry, params: Params) -> None:
    """Writes a trained entry with all that `language_model.load_personal` needs to rebuild it. A policy that is the
    same for everybody is also an ingredient of merges, in the folder ingredient.

    Args:
      params: as `load` returns them.

    Raises:
      UserError: the disk is full or unwritable.
    """
    path, workspace = _file(run, entry.name), run.workspace
    note = {
        "users": registry.to_json(),
        "user_model": {field.name: getattr(users, field.name) for field in dataclasses.fields(users)},
        "base_folder": workspace.base_from(path.parent),
        "quantize": workspace.settings.quantize,
        "chat": run.records.chat,
        **_provenance(run, entry),
    }
    run.workdir.stage(f"preference/{entry.name}")
    params = to_host(params)
    with disk_errors(path):
        save_tree(path, params, note)
        if entry.objective.head == "policy" and not (users.num_tokens or users.mixes):
            one = jax.tree.map(lambda x: x[0], params["bank"])
            on_process_zero(banks.export)(run, path.parent / "ingredient", one)


def _provenance(run: Run, entry: Entry) -> dict[str, Json]:
    """What a trained entry belongs to."""
    found = {f"entry.{name}": value for name, value in entry.users.to_dict().items()}
    found |= {f"objective.{name}": value for name, value in entry.objective.to_dict().items()}
    return run.workspace.provenance | found


def load(run: Run, entry: Entry) -> tuple[Params, UserRegistry]:
    """A trained entry: ({"bank", "users"}, and "heads" of a reward model, on the mesh; the people of the rows of its
    user table).

    Raises:
      UserError: the file is missing or damaged, or belongs to another base or other settings.
    """
    path = _file(run, entry.name)
    tree, note = load_tree(path)
    check_provenance(path, note, _provenance(run, entry))
    params, registry = {"users": {}, **tree}, UserRegistry.from_json(note["users"])
    backbone, users = (
        run.workspace.backbone,
        user_model(entry, registry.capacity, run.workspace.model_config.hidden_size, params["bank"]),
    )
    like = {"bank": run.workspace.bank_like(bank_size(params["bank"]))}
    like["users"] = jax.eval_shape(lambda: users.init(jax.random.key(0), backbone.base["embed"]["embedding"]))
    if entry.objective.head == "reward":
        like["heads"] = jax.eval_shape(lambda: scoring.init_heads(1, users.width))
    check_shapes(path, params, like)
    return run.devices.shard(params), registry


STAGE = Stage("preference", run, PreferenceSettings)
