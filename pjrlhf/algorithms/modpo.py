"""Multi-objective DPO (MODPO, arXiv 2310.03708): K policies for K preferences, learned from comparisons without
sampling, all in one program.

A policy learns from the pairs labelled for the objective that weighs most for it; the reward models of the others
enter as margins. With one-hot weights it is DPO (arXiv 2305.18290) on that objective.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf.algorithms import policy, reward
from pjrlhf.algorithms.targets import Targets, TargetSettings
from pjrlhf.data.batching import batches, collate_completion
from pjrlhf.data.preferences import PreferencePrompt
from pjrlhf.data.tokenization import TokenTable
from pjrlhf.errors import UserError
from pjrlhf.feedback.pairs import SPLITS
from pjrlhf.models.adapters import AdapterConfig, Policies, init_bank
from pjrlhf.models.decoder import Decoder
from pjrlhf.objectives.multi_objective import modpo_loss, weighted_sum
from pjrlhf.objectives.preference import accuracy, implicit_rewards
from pjrlhf.parallel.processes import to_host
from pjrlhf.rollout import experience, scoring
from pjrlhf.rollout.reference import SIDES
from pjrlhf.runtime.run import Run, Trainer
from pjrlhf.settings import Settings, setting
from pjrlhf.training.loop import Method
from pjrlhf.training.metrics import Metrics
from pjrlhf.training.optimizer import OptimizerSettings, check_warmup, make_optimizer, per_ingredient
from pjrlhf.training.state import State
from pjrlhf.training.workdir import disk_errors

LOSSES = ("sigmoid", "hinge")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModpoSettings(Settings):
    """K policies by MODPO."""

    preferences: TargetSettings = setting(TargetSettings(), "own or fixed")
    mix: str = setting("own", "an adapter per policy", choices=("own",))
    prompt_format: PreferencePrompt = setting(PreferencePrompt())
    prompt_preference: str = setting("never", "the pairs have plain prompts", choices=("never", "always", "half"))
    steps: int = setting(120, "updates", low=1, high=10**9)
    batch_size: int = setting(8, "pairs per policy and step", low=1, high=2**20)
    beta: float = setting(0.1, "inverse temperature of the implicit reward", above=0.0, high=1e6)
    loss: str = setting("sigmoid", "of the margins", choices=LOSSES)
    optimizer: OptimizerSettings = setting(OptimizerSettings(learning_rate=3e-3, schedule="linear"))

    def check(self) -> None:
        check_warmup(self.optimizer, self.steps)
        if self.preferences.kind not in ("own", "fixed"):
            raise UserError(
                f"preferences.kind: {self.preferences.kind!r} draws preferences, and MODPO trains one policy per "
                "preference; choose own or fixed"
            )
        if self.prompt_preference != "never":
            raise UserError(
                f"prompt_preference: {self.prompt_preference!r}, but MODPO learns from pairs whose prompts state no "
                "preference; set it to never"
            )


def scores(run: Run, rewarder: Any, base: Any, tokens: jax.Array, valid: jax.Array) -> jax.Array:
    """The rewards [B, R] of rows [B, T], as `raw_rewards` gives them."""
    everything = jnp.arange(len(run.audience.rewards))[None]
    return experience.raw_rewards(run.workspace.model, run.workspace.adapter, base, rewarder, everything, tokens, valid)


def raw_rewards(run: Run, rewarder: Any, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Rewards float32 [M, R] by all R reward models of the run, in their own units, those of Bradley-Terry.

    Args:
      rewarder: as `reward.load` gives it.
      rows: M pairs of token ids, prompt and answer; `run.text.sample_rows` of them are scored at once.
    """
    score, size, found = jax.jit(functools.partial(scores, run)), run.text.sample_rows, []
    for start in range(0, len(rows), size):
        part = list(rows[start : start + size])
        # The last chunk is filled up so that one program serves all.
        filled = part + [part[0]] * (size - len(part))
        batch = collate_completion(
            [{"prompt": prompt, "completion": answer} for prompt, answer in filled],
            prompt_length=run.text.prompt_lengths,
            completion_length=run.text.completion_lengths,
            pad_id=run.workspace.tokenizer.pad_id,
        )
        placed = run.devices.place({name: batch[name] for name in ("tokens", "valid")})
        raw = score(rewarder, run.workspace.base, **placed)
        found.append(to_host(raw)[: len(part)])
    return np.concatenate(found)


def table_rewards(run: Run, rewarder: Any, table: TokenTable) -> np.ndarray:
    """Raw rewards float32 [M, 2, R] of the chosen and the rejected answers of M pairs."""
    # A pair is labelled once per objective, but each of its answers is scored once.
    numbers: dict[tuple[bytes, bytes], int] = {}
    place = [
        [numbers.setdefault((prompt.tobytes(), table.tokens[side][i].tobytes()), len(numbers)) for side in SIDES]
        for i, prompt in enumerate(table.tokens["prompt"])
    ]
    rows = [(np.frombuffer(prompt, np.int32), np.frombuffer(answer, np.int32)) for prompt, answer in numbers]
    return raw_rewards(run, rewarder, rows)[np.array(place)]


def policies_loss(
    model: Decoder, adapter: AdapterConfig, beta: float, kind: str, bank: Any, base: Any, batch: Any
) -> tuple[jax.Array, Metrics]:
    """Sum over the K policies of their mean MODPO losses; metrics [K].

    Accuracies and margins are those of the rewards that the policies imply for the labelled objective, (beta log(pi /
    reference) - sum_{i>0} w_i r_i) / w_0: what the labels are about. With one-hot weights they are DPO's.

    Args:
      beta, kind: see `modpo_loss`.
      batch: {"rows": see `reward.by_model`; float32 "reference" [K, n, 2], log-probs of the reference; "rewards" [K, n,
        2, R - 1] of the objectives the pair is not labelled for; "weights" [K, 1, R], that of the labelled one first}.
    """
    weights, reference, rewards = batch["weights"], batch["reference"], batch["rewards"].swapaxes(1, 2)
    K = weights.shape[0]
    policies = Policies(model, adapter, base, bank, jnp.eye(K))
    logps = scoring.packed_logps(policies, batch["rows"], reference.size).reshape(reference.shape)
    logps, reference = ((x[..., 0], x[..., 1]) for x in (logps, reference))
    rewards = rewards[:, 0], rewards[:, 1]
    losses = modpo_loss(logps, reference, beta, weights=weights, rewards=rewards, kind=kind)
    chosen, rejected = implicit_rewards(logps, reference, beta)
    margins = chosen - rejected - weighted_sum(rewards[0] - rewards[1], weights[..., 1:])
    margins = margins / weights[..., 0]
    count = jnp.full(K, losses.shape[1], jnp.float32)
    metrics = {
        "loss": (losses.sum(1), count),
        "rewards/accuracies": (accuracy(margins, 0.0).sum(1), count),
        "rewards/margins": (margins.sum(1), count),
        "wasted_tokens": scoring.wasted_tokens(batch["rows"]),
    }
    return losses.mean(1).sum(), metrics


class Modpo(Method):
    """The method for `training.loop.run`.

    Attributes:
      weights: float32 [K, 1, R] over the reward models of the run, for each policy that of its labelled objective
        first, the others in order.
      table: the pairs labelled for any of those objectives.
      reference, rewards: of each of its M rows, [M, 2] and [M, 2, R - 1], see `policies_loss`.
      tables: for each policy its rows of `table`.

    Raises:
      UserError: settings that MODPO cannot follow, or an objective without pairs.
    """

    show = ("loss", "rewards/accuracies")

    def __init__(self, run: Run, settings: ModpoSettings):
        self.run, self.settings, self.goals = run, settings, Targets(run, settings)
        K = len(self.goals.policies)
        weights = np.zeros((K, len(run.audience.rewards)), np.float32)
        for k in range(K):
            goal = self.goals.goal(0, k)
            weights[k, list(goal.objectives)] = goal.weights
        labels = weights.argmax(1)  # the first of equals
        self.weights = np.array([[w[i], *np.delete(w, i)] for w, i in zip(weights, labels, strict=True)])[:, None]
        self.table = self._pairs([run.audience.rewards[i] for i in labels])
        of = [run.audience.rewards.index(example.objective) for example in self.table.examples]
        raw = self._raw(self.table)
        self.rewards = np.stack([np.delete(x, i, axis=1) for x, i in zip(raw, of, strict=True)])
        self.reference = self._reference(self.table)
        self.optimizer = per_ingredient(make_optimizer(settings.optimizer, settings.steps))
        self.tables = [[row for row, i in zip(self.table, of, strict=True) if i == label] for label in labels]
        source = reward.Grouped(self.tables, run.settings.seed)
        self.batches = batches(source, settings.batch_size, seed=run.settings.seed, collate=self.collate)
        self._update = run.devices.training_step(self._step)
        self.programs, self.ingredients = (self._update,), self.goals.policies

    def _pairs(self, labels: Sequence[str]) -> TokenTable:
        """The comparisons of the run labelled for any of `labels`, one per policy."""
        table = reward.comparisons(self.run)
        found = {example.objective for example in table.examples}
        for name, label in zip(self.goals.policies, labels, strict=True):
            if label not in found:
                raise UserError(
                    f"{table.bad.source_name}: no pair is labelled for {label!r}, which weighs most for policy "
                    f"{name!r}; add comparisons, or train for other preferences"
                )
        return table.select([i for i, example in enumerate(table.examples) if example.objective in labels])

    def _raw(self, table: TokenTable) -> np.ndarray:
        return table_rewards(self.run, reward.load(self.run), table)

    def _reference(self, table: TokenTable) -> np.ndarray:
        return self.run.reference(table, self.run.text.sample_rows)

    @property
    def samples(self) -> int:
        """How many answers were sampled for the pairs: two for each, however often it is labelled."""
        return 2 * len({SPLITS["pair"](example) for example in self.table.examples})

    def collate(self, rows: Sequence[Sequence[Any]]) -> Any:
        """n lists of K rows -> a batch as `policies_loss` takes it, but for the weights."""
        packed, pairs = reward.by_model(self.run, rows)
        index = np.array([pair["index"] for pair in pairs]).reshape(-1, len(rows))
        return {"rows": packed, "reference": self.reference[index], "rewards": self.rewards[index]}

    def init(self) -> State:
        return self.run.devices.create(self._initial, self.run.workspace.base)

    def _initial(self, base: Any) -> State:
        run = self.run
        bank = init_bank(base, run.workspace.adapter, len(self.goals.adapters), run.streams.key("modpo/adapter"))
        return State.create(run.streams.key("modpo/state"), bank, self.optimizer)

    def _step(self, state: State, base: Any, batch: Any) -> tuple[State, Metrics]:
        run, settings = self.run, self.settings
        loss = functools.partial(
            policies_loss, run.workspace.model, run.workspace.adapter, settings.beta, settings.loss
        )
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.trainable, base, batch)
        return state.apply_gradients(gradient, self.optimizer), metrics

    def step(self, state: State, batch: Any) -> tuple[State, Metrics]:
        batch = batch | {"rows": self.run.devices.place(batch["rows"]), "weights": self.weights}
        return self._update(state, self.run.workspace.base, batch)


def train(run: Run, settings: ModpoSettings, stage: str) -> dict[str, Any]:
    """Trains the policies by the section `settings`, see `config.neighbours`; writes <workdir>/<stage>/bank.safetensors
    and one folder per adapter.
    """
    method = Modpo(run, settings)
    state = run.train(method, stage, settings.steps)
    with disk_errors(run.workdir.path / stage):
        base_hash = policy.save(run, stage, method.goals.adapters, state.trainable)
    return {"ingredients": list(method.goals.adapters), "samples": method.samples, "base": base_hash}


TRAINER = Trainer(lambda run: run.section(ModpoSettings), train)
