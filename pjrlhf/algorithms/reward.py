"""Reward models: one Bradley-Terry adapter with a scalar head per preference, all K trained in one program on the
frozen base.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf.data.batching import batches, split_by
from pjrlhf.data.tokenization import TokenTable
from pjrlhf.errors import UserError
from pjrlhf.feedback.comparisons import FILE
from pjrlhf.models.adapters import AdapterConfig, Policies, init_bank
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.objectives.preference import accuracy, bradley_terry_loss
from pjrlhf.parallel.processes import to_host
from pjrlhf.paths import local
from pjrlhf.rollout import scoring
from pjrlhf.rollout.experience import raw_rewards, sample
from pjrlhf.rollout.reference import SIDES
from pjrlhf.runtime.records import SourceSpec
from pjrlhf.runtime.run import Run, Stage
from pjrlhf.settings import Settings, setting
from pjrlhf.training.loop import Method
from pjrlhf.training.metrics import Metrics
from pjrlhf.training.optimizer import OptimizerSettings, check_warmup, make_optimizer, per_ingredient
from pjrlhf.training.state import State
from pjrlhf.training.workdir import disk_errors

MODEL = "model.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings(Settings):
    """Reward models, one per objective."""

    data: str | SourceSpec = setting(
        "comparisons",
        "the pairs of the stage comparisons, or a source of preference records with `objective`",
        choices=("comparisons",),
    )
    path: str = setting("", "reward models of another run to use instead of training them")
    steps: int = setting(160, "updates", low=1, high=10**9)
    batch_size: int = setting(8, "pairs per objective and step", low=1, high=2**20)
    heldout_fraction: float = setting(0.2, "fraction of the prompts", above=0.0, below=1.0)
    calibration_samples: int = setting(256, "answers of the base that the scale is measured on", low=1, high=10**7)
    quantiles: tuple[float, ...] = setting(
        (0.02, 0.98), "rewards of the base that the scale quantiles puts at 0 and 1", low=0.0, high=1.0
    )
    optimizer: OptimizerSettings = setting(OptimizerSettings(learning_rate=5e-3, schedule="cosine"))

    def check(self) -> None:
        check_quantiles(self.quantiles)
        check_warmup(self.optimizer, self.steps)


def check_quantiles(quantiles: Sequence[float]) -> None:
    """Raises UserError unless these are two rising quantiles."""
    if len(quantiles) != 2 or quantiles[0] >= quantiles[1]:
        raise UserError(f"quantiles: {tuple(quantiles)} is not a low and a high quantile; give two that rise")


class Grouped(Sequence):
    """Row i holds one row of every table, so that a batch has equally many rows of each objective.

    Its length is that of the longest table; shorter ones are gone through again, each time in another order.
    """

    def __init__(self, tables: Sequence[Sequence[Any]], seed: int):
        self.tables = tables
        self.seed = seed

    def __len__(self) -> int:
        return max(len(table) for table in self.tables)

    def __getitem__(self, i: int) -> list[Any]:
        return [table[self._place(len(table), i)] for table in self.tables]

    def _place(self, size: int, i: int) -> int:
        return int(_order(size, self.seed, i // size)[i % size])


@functools.lru_cache(maxsize=256)
def _order(size: int, seed: int, turn: int) -> np.ndarray:
    return np.random.default_rng((seed, turn)).permutation(size)


def by_model(run: Run, rows: Sequence[Sequence[Any]]) -> tuple[Any, list[Any]]:
    """n lists of K pairs -> (packed rows, see `data.packing.pack`, and the K n pairs in their order). Pair k n + i
    belongs to model k, which is the owner of its tokens; its answers are 2 (k n + i), chosen, and the one after.
    """
    n, K = len(rows), len(rows[0])
    pairs = [each[k] for k in range(K) for each in rows]
    packed = run.text.pack(
        [pair["prompt"] for pair in pairs], [[pair[side] for side in SIDES] for pair in pairs], groups=K
    )
    return packed | {"owner": packed["owner"] // n}, pairs


def pair_rewards(
    model: Decoder, adapter: AdapterConfig, trainable: Any, base: Any, batch: Any
) -> tuple[jax.Array, jax.Array]:
    """Raw rewards (chosen, rejected), each [K, n].

    Args:
      trainable: {"bank", "heads"} of K reward models.
      batch: {"rows", "margin" [K n]}, see `Reward.collate`.
    """
    K = trainable["heads"]["bias"].shape[0]
    mix, count = jnp.eye(K), 2 * len(batch["margin"])
    policies = Policies(model, adapter, base, trainable["bank"], mix)
    rewards = scoring.packed_rewards(policies, trainable["heads"], mix, batch["rows"], count).reshape(K, -1, 2)
    return rewards[..., 0], rewards[..., 1]


def reward_loss(
    model: Decoder, adapter: AdapterConfig, trainable: Any, base: Any, batch: Any
) -> tuple[jax.Array, Metrics]:
    """Sum over the K models of their mean Bradley-Terry losses, with margins where the records have them; metrics
    [K].
    """
    chosen, rejected = pair_rewards(model, adapter, trainable, base, batch)
    losses = jax.vmap(bradley_terry_loss)(chosen, rejected, batch["margin"].reshape(chosen.shape))
    count = jnp.full(losses.shape, chosen.shape[1], jnp.float32)
    metrics = {
        "loss": (losses * count, count),
        "rewards/accuracies": (accuracy(chosen, rejected).sum(1), count),
        "rewards/margins": ((chosen - rejected).sum(1), count),
        "rewards/chosen": (chosen.sum(1), count),
        "rewards/rejected": (rejected.sum(1), count),
        "wasted_tokens": scoring.wasted_tokens(batch["rows"]),
    }
    return losses.sum(), metrics


def comparisons(run: Run) -> TokenTable:
    """The pairs that reward models learn from: those of the stage comparisons, or of `reward.data`."""
    spec, lengths = run.section(RewardSettings).data, run.text.lengths
    if spec == "comparisons":
        spec = {"kind": "jsonl", "path": str(run.workdir.path / "comparisons" / FILE)}
        lengths = run.text.sampled_lengths
    examples, name = run.records.comparisons(spec)
    return run.text.tokenized(examples, lengths, name)


class Reward(Method):
    """Trains the reward models."""

    show = ("loss", "rewards/accuracies")

    def __init__(self, run: Run):
        self.run, config = run, run.section(RewardSettings)
        self.optimizer = per_ingredient(make_optimizer(config.optimizer, config.steps))
        self.train, self.heldout = self._tables()
        source = Grouped(self.train, run.settings.seed)
        self.batches = batches(source, config.batch_size, seed=run.settings.seed, collate=self.collate)
        self._update = run.devices.training_step(self._step)
        self.programs, self.ingredients = (self._update,), run.audience.rewards

    def _tables(self) -> tuple[list[TokenTable], list[TokenTable]]:
        """Per objective: training and held-out rows, split by prompt."""
        run = self.run
        table = comparisons(run)
        known = run.audience.rewards
        for example in table.examples:
            if example.objective not in known:
                raise UserError(
                    f"{example.where}: objective {example.objective!r} is not one of {', '.join(known)}; "
                    "mend the record or add it to --config.objectives"
                )
        keys = [json.dumps(example.prompt) for example in table.examples]
        sides = split_by(keys, run.section(RewardSettings).heldout_fraction, run.settings.seed)
        tables = []
        for side, name in zip(sides, ("training", "held-out"), strict=True):
            of = {
                objective: [i for i in side if table.examples[i].objective == objective]
                for objective in run.audience.rewards
            }
            empty = [objective for objective, rows in of.items() if not rows]
            if empty:
                raise UserError(
                    f"{table.bad.source_name}: no {name} pair for objective {empty[0]!r}; add comparisons, or leave it "
                    "out of --config.objectives"
                )
            tables.append([table.select(rows) for rows in of.values()])
        return tables[0], tables[1]

    def collate(self, rows: Sequence[Sequence[Any]]) -> Any:
        """n lists of K pairs -> {"rows", "margin" float32 [K n]}, see `by_model`."""
        packed, pairs = by_model(self.run, rows)
        return {"rows": packed, "margin": np.array([pair["margin"] or 0.0 for pair in pairs], np.float32)}

    def init(self) -> State:
        return self.run.devices.create(self._initial, self.run.workspace.base)

    def _initial(self, base: Any) -> State:
        run, K = self.run, len(self.run.audience.rewards)
        trainable = {
            "bank": init_bank(base, run.workspace.adapter, K, run.streams.key("reward/adapter")),
            "heads": scoring.init_heads(K, run.workspace.model_config.hidden_size, run.streams.key("reward/head")),
        }
        return State.create(run.streams.key("reward/state"), trainable, self.optimizer)

    def _step(self, state: State, base: Any, batch: Any) -> tuple[State, Metrics]:
        loss = functools.partial(reward_loss, self.run.workspace.model, self.run.workspace.adapter)
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.trainable, base, batch)
        return state.apply_gradients(gradient, self.optimizer), metrics

    def step(self, state: State, batch: Any) -> tuple[State, Metrics]:
        return self._update(state, self.run.workspace.base, self._placed(batch))

    def _placed(self, batch: Any) -> Any:
        return batch | {"rows": self.run.devices.place(batch["rows"])}  # few margins: every device has them all

    def evaluate(self, state: State) -> dict[str, float]:
        """Held-out accuracy per objective."""
        return {f"accuracy/{name}": found["accuracy"] for name, found in self.heldout_accuracy(state.trainable).items()}

    def heldout_accuracy(self, trainable: Any) -> dict[str, dict[str, float]]:
        """Held-out accuracy and number of pairs per objective."""
        run, n = self.run, self.run.section(RewardSettings).batch_size
        score = jax.jit(functools.partial(pair_rewards, run.workspace.model, run.workspace.adapter))
        longest = max(len(table) for table in self.heldout)
        hits: list[list[float]] = [[] for _ in self.heldout]
        for start in range(0, longest, n):
            rows = [[table[i % len(table)] for table in self.heldout] for i in range(start, start + n)]
            chosen, rejected = score(trainable, run.workspace.base, self._placed(self.collate(rows)))
            better = to_host(accuracy(chosen, rejected))
            for k, table in enumerate(self.heldout):
                hits[k] += better[k, : max(0, len(table) - start)].tolist()
        found = {name: (np.mean(h), len(h)) for name, h in zip(run.audience.rewards, hits, strict=True)}
        bad = [name for name, (share, _) in found.items() if not np.isfinite(share)]
        if bad:
            raise UserError(f"reward: the model of {bad[0]!r} gives NaN on held-out pairs; lower its learning rate")
        return {name: {"accuracy": float(share), "pairs": count} for name, (share, count) in found.items()}

    def calibrate(self, trainable: Any) -> dict[str, jax.Array]:
        """The scale of raw rewards on samples of the base for training prompts, measured once: "mean", "std", and
        "low", "high", the quantiles `reward.quantiles`, [K] each.
        """
        run, rows = self.run, self.run.text.sample_rows
        K = len(run.audience.rewards)
        draw = jax.jit(sample, static_argnums=(0, 1, 2))

        @jax.jit
        def score(trainable, base, prompt, response):
            tokens = scoring.join(prompt["prompt"], response["tokens"])
            valid = scoring.join(prompt["valid"], response["valid"])
            return raw_rewards(
                run.workspace.model, run.workspace.adapter, base, trainable, jnp.arange(K)[None], tokens, valid
            )

        found = []
        requests = run.records.requests[0]
        for i in range(max(1, run.section(RewardSettings).calibration_samples // rows)):
            chosen = [requests[(i * rows + j) % len(requests)] for j in range(rows)]
            prompt = run.devices.place(run.text.encode([run.records.ask(request) for request in chosen]))
            key = run.streams.key("reward/calibration", i)
            out = draw(
                run.workspace.model,
                run.workspace.adapter,
                run.text.sampling(),
                run.workspace.base,
                None,
                None,
                prompt,
                key,
            )
            found.append(to_host(score(trainable, run.workspace.base, prompt, out)))
        raw = np.concatenate(found)
        low, high = np.quantile(raw, run.section(RewardSettings).quantiles, axis=0)
        scale = {"mean": raw.mean(0), "std": np.maximum(raw.std(0), 1e-6)}
        scale |= {"low": low, "high": np.maximum(high, low + 1e-6)}
        return {name: jnp.asarray(x, jnp.float32) for name, x in scale.items()}


def run(run: Run) -> dict[str, Any]:
    """Trains, tests and calibrates the reward models; writes <workdir>/reward/model.safetensors."""
    config = run.section(RewardSettings)
    method = Reward(run)
    state = run.train(method, "reward", config.steps)
    models = method.heldout_accuracy(state.trainable)
    scale = method.calibrate(state.trainable)
    for k, name in enumerate(run.audience.rewards):
        models[name] |= {key: float(x[k]) for key, x in scale.items()} | {"train_pairs": len(method.train[k])}
    tree = {**state.trainable, **scale}
    path = run.workdir.stage("reward") / MODEL
    with disk_errors(path):
        save_tree(path, tree, {"rewards": list(run.audience.rewards), "models": models})
    return {"models": models}


def load(run: Run) -> Any:
    """The reward models of this run, one per reward, and their scale, on the mesh: {"bank", "heads", "mean", "std",
    "low", "high"}.
    """
    path = (
        local(run.section(RewardSettings).path)
        if run.section(RewardSettings).path
        else run.workdir.path / "reward" / MODEL
    )
    tree, note = load_tree(path)
    if note.get("rewards") != list(run.audience.rewards):
        raise UserError(
            f"{path}: holds reward models for {note.get('rewards')}, this run needs {list(run.audience.rewards)}"
        )
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)):
        raise UserError(f"{path}: holds numbers that are not finite; train the reward models again")
    if missing := {"low", "high"} - tree.keys():
        raise UserError(f"{path}: holds no {min(missing)!r} of the rewards' scale; train the reward models again")
    return run.devices.shard(tree)


STAGE = Stage("reward", run, RewardSettings)
