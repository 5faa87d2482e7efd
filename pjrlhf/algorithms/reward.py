"""Reward models: one Bradley-Terry adapter with a scalar head per preference, all K trained in one program on the
frozen base.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import struct
from jaxtyping import Float

from pjrlhf.data.batching import Batches, batches, soft_labels, split_by
from pjrlhf.data.messages import text_of
from pjrlhf.data.packing import PackedRows
from pjrlhf.data.schema import Prompt, is_tie
from pjrlhf.data.token_table import TokenRow, TokenTable
from pjrlhf.errors import UserError
from pjrlhf.feedback.comparisons import FILE
from pjrlhf.models.adapters import Backbone, init_bank
from pjrlhf.models.hub import model_file
from pjrlhf.models.provenance import check_provenance, check_shapes
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.objectives.preference import accuracy, bradley_terry_loss
from pjrlhf.rollout import scoring
from pjrlhf.rollout.batches import Prompts, Rollout
from pjrlhf.rollout.experience import raw_rewards, sample
from pjrlhf.rollout.reference import SIDES
from pjrlhf.runtime.answers import sample_base
from pjrlhf.runtime.devices import Devices
from pjrlhf.runtime.inputs import fingerprints
from pjrlhf.runtime.records import SourceSpec, check_heldout
from pjrlhf.runtime.run import Run, Stage
from pjrlhf.runtime.scorer import Scorer
from pjrlhf.runtime.streams import Streams
from pjrlhf.runtime.text import Text
from pjrlhf.settings import Settings, setting
from pjrlhf.training.accumulation import check_accumulation, gradient_of, in_parts, parts_of
from pjrlhf.training.completions import Row, spread
from pjrlhf.training.loop import Method
from pjrlhf.training.metrics import Metrics
from pjrlhf.training.optimizer import OptimizerSettings, check_warmup, make_optimizer, per_ingredient, steps_of
from pjrlhf.training.state import State
from pjrlhf.training.workdir import disk_errors
from pjrlhf.types import Array, Params, PRNGKey

B = TypeVar("B")  # a batch

MODEL = "model.safetensors"
SCALE = ("mean", "std", "low", "high")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings(Settings):
    """Reward models, one per objective."""

    data: str | SourceSpec = setting(
        "comparisons",
        "the pairs of the stage comparisons, or a source of preference records with `objective`",
        choices=("comparisons",),
    )
    path: str = setting(
        "",
        "reward models of another run to use instead of training them: their file, its folder, or a name on the hub",
        path=True,
    )
    steps: int = setting(160, "updates", low=1, high=10**9)
    epochs: float = setting(0.0, "passes over the pairs instead of steps; 0 is steps", low=0.0, high=1e6)
    batch_size: int = setting(8, "pairs per objective and step", low=1, high=2**20)
    accumulation_steps: int = setting(1, "parts of a batch that are computed one after the other", low=1, high=2**20)
    heldout_fraction: float = setting(0.2, "fraction of the prompts", above=0.0, below=1.0)
    heldout_data: SourceSpec = setting(
        {}, "a source of held-out records in place of a fraction; training leaves out prompts in it"
    )
    calibration_samples: int = setting(256, "answers of the base that the scale is measured on", low=1, high=10**7)
    quantiles: tuple[float, ...] = setting(
        (0.02, 0.98), "rewards of the base that the scale quantiles puts at 0 and 1", low=0.0, high=1.0
    )
    optimizer: OptimizerSettings = setting(OptimizerSettings(learning_rate=5e-3, schedule="cosine"))

    def check(self) -> None:
        check_heldout(self.data, self.heldout_data, "data")
        check_quantiles(self.quantiles)
        if not self.epochs:
            check_warmup(self.optimizer, self.steps)
        check_accumulation(self.accumulation_steps, self.batch_size)


def check_quantiles(quantiles: Sequence[float]) -> None:
    """Raises UserError unless these are two rising quantiles."""
    if len(quantiles) != 2 or quantiles[0] >= quantiles[1]:
        raise UserError(f"quantiles: {tuple(quantiles)} is not a low and a high quantile; give two that rise")


class GroupedSettings(Protocol):
    """The settings of the batches of several models that are trained in step."""

    @property
    def batch_size(self) -> int: ...

    @property
    def accumulation_steps(self) -> int: ...


class Grouped:
    """Row i holds one row of every table, so that a batch has equally many rows of each objective.

    Its length is that of the longest table; shorter ones are gone through again, each time in another order.
    """

    def __init__(self, tables: Sequence[Sequence[TokenRow]], seed: int):
        self.tables = tables
        self.seed = seed

    def __len__(self) -> int:
        return max(len(table) for table in self.tables)

    @property
    def described(self) -> str:
        """What a row is, for messages."""
        objective = max(self.tables, key=len)[0]["objective"]
        return f"pairs of every objective (most are of {objective})"

    def __getitem__(self, i: int) -> list[TokenRow]:
        return [table[self._place(len(table), i)] for table in self.tables]

    def batches(
        self, settings: "GroupedSettings", collate: Callable[[Sequence[Sequence[TokenRow]]], B], key: str
    ) -> Batches[B | tuple[B, ...]]:
        """Batches of rows, in parts where `settings` say so; `key` is their setting of the batch size."""
        return batches(
            self,
            settings.batch_size,
            seed=self.seed,
            collate=in_parts(collate, settings.accumulation_steps),
            key=key,
            rows=self.described,
        )

    def _place(self, size: int, i: int) -> int:
        return int(_order(size, self.seed, i // size)[i % size])


@functools.lru_cache(maxsize=256)
def _order(size: int, seed: int, turn: int) -> np.ndarray:
    return np.random.default_rng((seed, turn)).permutation(size)


def by_model(text: Text, rows: Sequence[Sequence[TokenRow]]) -> tuple[PackedRows, list[TokenRow]]:
    """n lists of K pairs -> (packed rows, and the K n pairs in their order). Pair k n + i belongs to model k, which is
    the owner of its tokens; its answers are 2 (k n + i), chosen, and the one after.
    """
    K = len(rows[0])
    pairs = [each[k] for k in range(K) for each in rows]
    return text.pack(pairs, SIDES, groups=K).by_group(K), pairs


class RewardBatch(struct.PyTreeNode):
    """n pairs for each of K reward models; NumPy arrays on the host.

    Attributes:
      rows: see `by_model`.
      margin: by how much the reward of chosen must exceed that of rejected.
      preference: the probability that chosen is better; None where that is certain for all pairs of a run.
    """

    # The order of a program's arguments, on which the rounding of its results depends.
    margin: Float[Array, "K n"]
    rows: PackedRows
    preference: Float[Array, "K n"] | None = None


def pair_rewards(
    backbone: Backbone, trainable: Params, rows: PackedRows, dropout_key: PRNGKey | None = None
) -> tuple[Float[Array, "K n"], Float[Array, "K n"]]:
    """Raw rewards (chosen, rejected).

    Args:
      trainable: {"bank", "heads"} of K reward models.
      rows: see `by_model`.
      dropout_key: see `Policies`.
    """
    K = trainable["heads"]["bias"].shape[0]
    mix = jnp.eye(K)
    policies = backbone.policies(trainable["bank"], mix, dropout_key=dropout_key)
    rewards = scoring.packed_rewards(policies, trainable["heads"], mix, rows).reshape(K, -1, 2)
    return rewards[..., 0], rewards[..., 1]


def reward_loss(
    backbone: Backbone, trainable: Params, batch: RewardBatch, dropout_key: PRNGKey | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """Sum over the K models of their mean Bradley-Terry losses, with margins where the records have them; metrics
    [K].
    """
    chosen, rejected = pair_rewards(backbone, trainable, batch.rows, dropout_key)
    losses = jax.vmap(bradley_terry_loss)(chosen, rejected, batch.margin, preference=batch.preference)
    count = jnp.full(losses.shape, chosen.shape[1], jnp.float32)
    hits, decided = accuracy(chosen, rejected), count
    if batch.preference is not None:  # a tie has no better answer
        hits, decided = jnp.where(batch.preference > 0.5, hits, 0.0), (batch.preference > 0.5).sum(1, jnp.float32)
    metrics = {
        "loss": (losses * count, count),
        "rewards/accuracies": (hits.sum(1), decided),
        "rewards/margins": ((chosen - rejected).sum(1), count),
        "rewards/chosen": (chosen.sum(1), count),
        "rewards/rejected": (rejected.sum(1), count),
        "wasted_tokens": scoring.wasted_tokens(batch.rows),
    }
    return losses.sum(), metrics


Scale = Mapping[str, Float[Array, " K"]]  # "mean", "std", "low", "high" of K rewards
Tables = Mapping[str, TokenTable]  # objective -> its pairs


def sides(table: TokenTable, settings: RewardSettings, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the training and of the held-out pairs, split by prompt, or as the sources say."""
    prompts = [json.dumps(example.prompt) for example in table.examples]
    tested = [bool(example.held_out) for example in table.examples] if settings.heldout_data else None
    return split_by(prompts, settings.heldout_fraction, seed, "the comparisons need several prompts", tested)


def split_tables(
    table: TokenTable, objectives: Sequence[str], settings: RewardSettings, seed: int
) -> tuple[Tables, Tables]:
    """(training, held-out) pairs of every objective, by their `sides`; held-out ties, which tell nothing about
    accuracy, are left out.

    Raises:
      UserError: a pair of another objective, or an objective without pairs on one side.
    """
    for example in table.examples:
        if example.objective not in objectives:
            raise UserError(
                f"{example.where}: objective {example.objective!r} is not one of {', '.join(objectives)}; "
                "mend the record or add it to --config.objectives"
            )
    train, held = sides(table, settings, seed)
    tables = []
    for side, name in ((train, "training"), ([i for i in held if not is_tie(table.examples[i])], "held-out")):
        rows = {objective: [i for i in side if table.examples[i].objective == objective] for objective in objectives}
        empty = [objective for objective in objectives if not rows[objective]]
        if empty:
            raise UserError(
                f"{table.bad.source_name}: no {name} pair for objective {empty[0]!r}; add comparisons, or leave it "
                "out of --config.objectives"
            )
        tables.append({objective: table.select(rows[objective]) for objective in objectives})
    return tables[0], tables[1]


class Reward(Method):
    """Trains the reward models.

    Args:
      tables: (training, held-out) pairs of every objective.
      shown: held-out pairs of every objective in a table.
    """

    show = ("loss", "rewards/accuracies")

    def __init__(
        self,
        settings: RewardSettings,
        devices: Devices,
        backbone: Backbone,
        text: Text,
        streams: Streams,
        tables: tuple[Tables, Tables],
        shown: int = 16,
    ):
        self.shown = shown
        self.train, self.heldout = tables
        self.soft = any(table.has_soft_labels for table in self.train.values())
        source = Grouped(list(self.train.values()), streams.seed)
        s = settings
        steps = steps_of(s.steps, s.epochs, len(source), s.batch_size, "reward", s.optimizer)
        self.settings = settings = settings.replace(steps=steps)
        self.devices, self.backbone, self.text, self.streams = devices, backbone, text, streams
        self.rates = settings.optimizer.rates()
        self.ingredients = tuple(self.train)
        self.optimizer = per_ingredient(make_optimizer(settings.optimizer, settings.steps))
        self.batches = source.batches(settings, self.collate, "reward.batch_size")
        self._update = devices.training_step(self._step)
        self._rewards = jax.jit(self._side_by_side)
        self.programs = (self._update,)

    def collate(self, rows: Sequence[Sequence[TokenRow]]) -> RewardBatch:
        """n lists of K pairs -> a batch."""
        packed, pairs = by_model(self.text, rows)
        margin: Any = np.array([pair["margin"] or 0.0 for pair in pairs], np.float32).reshape(-1, len(rows))
        preference: Any = soft_labels(pairs).reshape(margin.shape) if self.soft else None
        return RewardBatch(rows=packed, margin=margin, preference=preference)

    def init(self) -> State:
        return self.devices.create(self._initial, self.backbone)

    def _initial(self, backbone: Backbone) -> State:
        K, streams = len(self.ingredients), self.streams
        trainable = {
            "bank": init_bank(backbone.base, backbone.adapter, K, streams.key("reward/adapter")),
            "heads": scoring.init_heads(K, backbone.model.config.hidden_size, streams.key("reward/head")),
        }
        return State.create(streams.key("reward/state"), trainable, self.optimizer)

    def _step(self, state: State, backbone: Backbone, *parts: RewardBatch) -> tuple[State, Metrics]:
        def loss(trainable: Params, batch: RewardBatch, key: PRNGKey) -> tuple[Array, Metrics]:
            return reward_loss(backbone, trainable, batch, key)

        gradient, metrics = gradient_of(loss, state.trainable, parts, state.key)
        return state.apply_gradients(gradient, self.optimizer), metrics

    def step(self, state: State, batch: RewardBatch | tuple[RewardBatch, ...]) -> tuple[State, Metrics]:
        # Margins are few: every device has them all.
        parts = (part.replace(rows=self.devices.place(part.rows)) for part in parts_of(batch))
        return self._update(state, self.backbone, *parts)

    def evaluate(self, state: State) -> dict[str, float]:
        """Held-out accuracy per objective."""
        return {f"accuracy/{name}": found["accuracy"] for name, found in self.heldout_accuracy(state.trainable).items()}

    def _side_by_side(self, backbone: Backbone, trainable: Params, rows: PackedRows) -> Float[Array, "n K 2"]:
        """Raw rewards of chosen and rejected."""
        return jnp.stack(pair_rewards(backbone, trainable, rows), axis=-1).swapaxes(0, 1)

    def heldout_rewards(self, trainable: Params, count: int = 0) -> dict[str, Float[np.ndarray, "n 2"]]:
        """Raw rewards of chosen and rejected of the held-out pairs of every objective, or of up to `count` of each."""
        chosen = {name: spread(len(table), count or len(table)) for name, table in self.heldout.items()}
        longest = max(map(len, chosen.values()))
        rewards = Scorer(self.devices, self.settings.batch_size)(
            "reward: held-out pairs",
            [[self.heldout[name][rows[i % len(rows)]] for name, rows in chosen.items()] for i in range(longest)],
            lambda rows: by_model(self.text, rows)[0],
            functools.partial(self._rewards, self.backbone, trainable),
        )
        return {name: rewards[: len(rows), k] for k, (name, rows) in enumerate(chosen.items())}

    def heldout_accuracy(self, trainable: Params) -> dict[str, dict[str, float]]:
        """Held-out accuracy and number of pairs per objective.

        Raises:
          UserError: a reward that is NaN.
        """
        found = {}
        for name, rewards in self.heldout_rewards(trainable).items():
            if np.isnan(rewards).any():
                raise UserError(f"reward: the model of {name!r} gives NaN on held-out pairs; lower its learning rate")
            share = np.asarray(accuracy(*rewards.T)).mean(dtype=np.float64)
            found[name] = {"accuracy": float(share), "pairs": len(rewards)}
        return found

    def rows(self, state: State) -> Sequence[Row]:
        """Held-out pairs of every objective with their raw rewards."""
        found = []
        for name, rewards in self.heldout_rewards(state.trainable, self.shown).items():
            examples = self.heldout[name].examples
            for i, (chosen, rejected) in zip(spread(len(examples), self.shown), rewards.tolist(), strict=True):
                texts = {side: text_of(getattr(examples[i], side) or "") for side in ("prompt", *SIDES)}
                found.append({"objective": name, **texts, "rewards/chosen": chosen, "rewards/rejected": rejected})
        return found

    def calibrate(self, trainable: Params, prompts: Sequence[Prompt]) -> Scale:
        """The scale of raw rewards on samples of the base, measured once: "mean", "std", and "low", "high", the
        quantiles `reward.quantiles`, float32 [K] each.

        Args:
          prompts: which the samples answer, taken from the first on, and again where there are too few.
        """
        everything = jnp.arange(len(self.ingredients))[None]
        draw = jax.jit(functools.partial(sample, sampling=self.text.sampling()))

        @jax.jit
        def score(backbone: Backbone, trainable: Params, prompts: Prompts, rollout: Rollout) -> Array:
            tokens = scoring.join(prompts.tokens, rollout.tokens)
            valid = scoring.join(prompts.valid, rollout.valid)
            return raw_rewards(backbone, trainable, everything, tokens, valid)

        backbone, chunks = self.backbone, itertools.count()

        def rewards(prompts: Prompts) -> jax.Array:
            key = self.streams.key("reward/calibration", next(chunks))
            return score(backbone, trainable, prompts, draw(backbone, None, None, prompts, key=key))

        size = self.text.sample_rows
        count = max(1, self.settings.calibration_samples // size) * size
        rows = [prompts[i % len(prompts)] for i in range(count)]
        raw = Scorer(self.devices, size)("reward: calibration", rows, self.text.encode, rewards)
        return scale_of(raw, self.settings.quantiles, least=1e-6)


def scale_of(raw: Float[np.ndarray, "B K"], quantiles: Sequence[float], least: float) -> Scale:
    """The scale of raw rewards, float32 [K] each; `least` is that of rewards that are all the same."""
    raw = raw.astype(np.float64)  # the squares of large rewards are beyond float32
    low, high = np.quantile(raw, quantiles, axis=0)
    scale = {"mean": raw.mean(0), "std": np.maximum(raw.std(0), least)}
    scale |= {"low": low, "high": np.maximum(high, low + least)}
    return {name: jnp.asarray(x, jnp.float32) for name, x in scale.items()}


# ---- the stage


def comparisons(run: Run) -> TokenTable:
    """The pairs of reward models: those of the stage comparisons, or of `reward.data` and `reward.heldout_data`."""
    settings, lengths = run.section(RewardSettings), run.text.lengths
    if isinstance(settings.data, str):  # "comparisons"
        lengths = run.text.sampled_lengths
        examples, name = run.records.made(run.workdir.path / "comparisons" / FILE, "reward.data")
    else:
        examples, name = run.records.with_heldout(settings.data, settings.heldout_data, "reward")
    return run.text.tokenized(run.records.asked(examples), lengths, name)


def method_of(run: Run) -> Reward:
    """The method for the reward models of a run."""
    settings, table = run.section(RewardSettings), comparisons(run)
    # Labels of objectives whose rewards have a source are for MODPO.
    table = table.select([i for i, e in enumerate(table.examples) if e.objective not in run.audience.sources])
    tables = split_tables(table, run.audience.learned, settings, run.streams.seed)
    shown = run.settings.completion_prompts
    return Reward(settings, run.devices, run.workspace.backbone, run.text, run.streams, tables, shown)


def source_scale(run: Run) -> dict[str, Scale]:
    """The scale of the rewards of each source on samples of the base; rewards that are all the same count as they are.

    Raises:
      UserError: a source says nothing about any sample.
    """
    settings, requests, found = run.section(RewardSettings), run.records.requests[0], {}
    asked = [requests[i % len(requests)] for i in range(settings.calibration_samples)]
    run.audience.announce("reward", len(asked))
    keys = functools.partial(run.streams.key, "reward/calibration")
    texts = sample_base(run, [run.records.ask(request) for request in asked], keys, "calibration")
    raw = run.audience.host_rewards(asked, texts, records=run.records.columns_of(asked))
    for name in run.audience.sources:
        column = raw[:, run.audience.rewards.index(name)]
        known = column[~np.isnan(column)]
        if not len(known):
            raise UserError(
                f"reward {name!r}: its source says nothing about any answer of the base; correct the source"
            )
        constant = known.min() == known.max()
        if constant:
            logging.warning("reward %s: all answers of the base get %g; the reward is not scaled", name, known[0])
        found[name] = scale_of(known[:, None], settings.quantiles, least=1.0 if constant else 1e-6)
    return found


def files_of(run: Run, name: str) -> dict[str, str]:
    """Setting -> hash of the files that a reward source reads, such as those of a classifier."""
    found = fingerprints({"rewards": {name: run.audience.source_specs[name]}}, run.workdir.path)
    return {setting: one["hash"] for setting, one in found.items()}


def run(run: Run) -> dict[str, Any]:
    """Trains, tests and calibrates the reward models, and measures the scale of the other sources; writes
    <workdir>/reward/model.safetensors.
    """
    audience, tree, scales = run.audience, {}, {}
    models: dict[str, dict[str, Any]] = {}
    if audience.learned:
        method = method_of(run)
        state = run.train(method, "reward", method.settings.steps)
        models, tree = method.heldout_accuracy(state.trainable), {**state.trainable}
        scale = method.calibrate(state.trainable, [run.records.ask(request) for request in run.records.requests[0]])
        for k, (name, table) in enumerate(method.train.items()):
            scales[name] = {key: x[k : k + 1] for key, x in scale.items()}
            models[name]["train_pairs"] = len(table)
    if audience.sources:
        scales |= source_scale(run)
        models |= {
            name: {"source": audience.source_specs[name], "files": files_of(run, name)} for name in audience.sources
        }
    for name, scale in scales.items():
        models[name] |= {key: float(x[0]) for key, x in scale.items()}
    tree |= {key: jnp.concatenate([scales[name][key] for name in audience.rewards]) for key in SCALE}
    path = run.workdir.stage("reward") / MODEL
    with disk_errors(path):
        note = {"rewards": list(audience.rewards), "models": models, **run.workspace.provenance}
        if "bank" in tree:
            tree["bank"] = run.workspace.complete(tree["bank"])
        save_tree(path, tree, note)
    return {"models": models}


def load(run: Run) -> Params:
    """The reward models of this run and the scale of all rewards, on the mesh: the `rewarder` of
    `rollout.experience.reward_scores`.

    Raises:
      UserError: the file is missing or damaged, or has other rewards, other sources, another base or other settings.
    """
    other = run.section(RewardSettings).path
    path = model_file(other, MODEL) if other else run.workdir.path / "reward" / MODEL
    tree, note = load_tree(path)
    audience, workspace = run.audience, run.workspace
    rewards = list(audience.rewards)
    if note.get("rewards") != rewards:
        raise UserError(
            f"{path}: holds reward models for {note.get('rewards')}, this run needs {rewards}; name the file of a run "
            "with the same objectives"
        )
    sources = {name: model for name, model in note.get("models", {}).items() if "source" in model}
    found = {name: model["source"] for name, model in sources.items()}
    own = {name: audience.source_specs[name] for name in audience.sources}
    if found != (own := json.loads(json.dumps(own))):  # as the file has them: tuples are lists there
        raise UserError(f"{path}: has the scale of rewards from {found}, this run has {own}; measure it again")
    # Inside a run inputs.json holds the files fixed.
    changed = [name for name, model in sources.items() if other and model.get("files") != files_of(run, name)]
    if changed:
        raise UserError(
            f"{path}: has the scale of the reward {changed[0]!r} from files of other contents; restore them, or "
            "measure the scale again"
        )
    check_provenance(path, note, workspace.provenance)
    like: dict[str, Any] = dict.fromkeys(SCALE, jax.ShapeDtypeStruct((len(rewards),), jnp.float32))
    if K := len(audience.learned):
        heads = jax.eval_shape(lambda: scoring.init_heads(K, workspace.model_config.hidden_size))
        like |= {"bank": workspace.bank_like(K), "heads": heads}
    check_shapes(path, tree, like)
    if "bank" in tree:
        tree["bank"] = workspace.trained(tree["bank"])
    if audience.sources:
        learned = {name: i for i, name in enumerate(audience.learned)}
        tree["models"] = np.array([learned.get(name, -1) for name in rewards], np.int32)
    return run.devices.shard(tree)


STAGE = Stage("reward", run, RewardSettings)
