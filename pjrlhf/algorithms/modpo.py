"""Multi-objective DPO (MODPO, arXiv 2310.03708): K policies for K preferences, learned from comparisons without
sampling, all in one program.

A policy learns from the pairs labelled for the objective that weighs most for it; the reward models of the others
enter as margins. With one-hot weights it is DPO (arXiv 2305.18290) on that objective.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float

from pjrlhf.algorithms import answering, banks, reward
from pjrlhf.algorithms.targets import Targets, TargetSettings, targets_of
from pjrlhf.data.batching import soft_labels
from pjrlhf.data.messages import Prompt, text_of
from pjrlhf.data.packing import PackedRows
from pjrlhf.data.preferences import PreferencePrompt
from pjrlhf.data.schema import Example
from pjrlhf.data.token_table import TokenRow, TokenTable
from pjrlhf.errors import UserError
from pjrlhf.feedback.pairs import SPLITS
from pjrlhf.models.adapters import Backbone, init_bank
from pjrlhf.objectives.multi_objective import modpo_loss, weighted_sum
from pjrlhf.objectives.preference import accuracy, implicit_rewards
from pjrlhf.objectives.scalarization import Points, factors, schedules
from pjrlhf.rollout import scoring
from pjrlhf.rollout.reference import SIDES, unique_answers
from pjrlhf.runtime.devices import Devices
from pjrlhf.runtime.heldout_answers import HeldoutAnswers, heldout_requests, once, rows_of
from pjrlhf.runtime.run import Run, Sections, Trainer
from pjrlhf.runtime.streams import Streams
from pjrlhf.runtime.text import Text
from pjrlhf.settings import Settings, setting
from pjrlhf.training.accumulation import check_accumulation, gradient_of, parts_of
from pjrlhf.training.completions import Row
from pjrlhf.training.loop import Method
from pjrlhf.training.metrics import Metrics
from pjrlhf.training.optimizer import OptimizerSettings, check_warmup, make_optimizer, per_ingredient, steps_of
from pjrlhf.training.state import State
from pjrlhf.types import Array, Params, PRNGKey

LOSSES = ("sigmoid", "hinge")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModpoSettings(Settings):
    """K policies by MODPO."""

    preferences: TargetSettings = setting(TargetSettings(), "own or fixed")
    mix: str = setting("own", "an adapter per policy", choices=("own",))
    prompt_format: PreferencePrompt = setting(PreferencePrompt())
    prompt_preference: str = setting("never", "the pairs have plain prompts", choices=("never", "always", "half"))
    reward_weights: Mapping[str, Any] = setting(
        {},
        "{objective: factor of its preference weight, in margins too}: a number, or a schedule by step, "
        '{"start": 1.0, "end": 0.0, "steps": 100} or points [[0, 1.0], [100, 0.0]]',
    )
    steps: int = setting(120, "updates", low=1, high=10**9)
    epochs: float = setting(0.0, "passes over the pairs instead of steps; 0 is steps", low=0.0, high=1e6)
    batch_size: int = setting(8, "pairs per policy and step", low=1, high=2**20)
    accumulation_steps: int = setting(1, "parts of a batch that are computed one after the other", low=1, high=2**20)
    beta: float = setting(0.1, "inverse temperature of the implicit reward", above=0.0, high=1e6)
    loss: str = setting("sigmoid", "of the margins", choices=LOSSES)
    optimizer: OptimizerSettings = setting(OptimizerSettings(learning_rate=3e-3, schedule="linear"))

    @property
    def schedules(self) -> dict[str, Points]:
        """Objective -> the points of its factor in `reward_weights`."""
        return schedules(self.reward_weights, "reward_weights")

    def check(self) -> None:
        _ = self.schedules
        if not self.epochs:
            check_warmup(self.optimizer, self.steps)
        check_accumulation(self.accumulation_steps, self.batch_size)
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


def scores(backbone: Backbone, rewarder: Params, rows: PackedRows) -> Float[Array, "E A S"]:
    """The raw rewards of A answers to each of E prompts by all S reward models, float32."""
    S = rewarder["heads"]["bias"].shape[0]
    everything, copies = jnp.eye(S), rows.repeat(S).by_group(S)
    policies = backbone.policies(rewarder["bank"], everything)
    found = scoring.packed_rewards(policies, rewarder["heads"], everything, copies)
    return jnp.moveaxis(found.reshape(S, rows.owners, -1), 0, -1)


def raw_rewards(
    run: Run, rewarder: Params, rows: Sequence[TokenRow], texts: Sequence[tuple[Prompt, str]]
) -> Float[np.ndarray, "M S"]:
    """Float32 rewards of M answers by all S rewards of the run, in their own units, of reward models those of
    Bradley-Terry; NaN where a source says nothing.

    Args:
      rewarder: as `reward.load` gives it.
      rows: {"prompt", "completion"} of token ids, which reward models read.
      texts: (request, answer), which reward sources read.
    """
    audience = run.audience
    requests, answers = [request for request, _ in texts], [answer for _, answer in texts]
    found = audience.host_rewards(requests, answers, records=run.records.columns_of(requests))
    if audience.learned:
        found[:, [audience.rewards.index(name) for name in audience.learned]] = _learned(run, rewarder, rows)
    return found


def answer_rewards(
    run: Run, rewarder: Params, requests: Sequence[Prompt], texts: Sequence[str], name: str
) -> tuple[Float[np.ndarray, "M S"], Bool[np.ndarray, " M"]]:
    """(`raw_rewards` of M sampled answers, which of them can be scored): not those without text, nor those that the
    tokenizer cannot read. These have NaN. `name` is what messages call the answers.

    Raises:
      UserError: no answer can be scored.
    """
    examples = [
        Example(prompt=run.records.ask(request), completion=text, extra={"number": i}, where=f"{name} answer {i + 1}")
        for i, (request, text) in enumerate(zip(requests, texts, strict=True))
        if text.strip()
    ]
    if not examples:
        raise UserError(f"{name}: all of {len(texts)} answers are empty; train the base longer")
    table = run.text.tokenized(examples, run.text.sampled_lengths, name, "completion")
    numbers = [int(example.extra["number"]) for example in table.examples]
    raw = np.full((len(texts), len(run.audience.rewards)), np.nan, np.float32)
    raw[numbers] = raw_rewards(run, rewarder, list(table), [(requests[i], texts[i]) for i in numbers])
    usable = np.zeros(len(texts), bool)
    usable[numbers] = True
    return raw, usable


def _learned(run: Run, rewarder: Params, rows: Sequence[TokenRow]) -> np.ndarray:
    """Raw rewards float32 [M, S] by the reward models."""
    score = functools.partial(jax.jit(scores), run.workspace.backbone, rewarder)
    return run.answer_scores("rewards of answers", rows, score)


def table_rewards(run: Run, rewarder: Params, table: TokenTable) -> np.ndarray:
    """Raw rewards float32 [M, 2, S] of the chosen and the rejected answers of M pairs. They are equal where a source
    says nothing about one of the two.
    """
    # A pair is labelled once per objective, but each of its answers is scored once.
    answers, numbers = unique_answers(table)
    texts: list[tuple[Prompt, str]] = [("", "")] * len(answers)
    for example, places in zip(table.examples, numbers, strict=True):
        for side, place in zip(SIDES, places, strict=True):
            texts[place] = (example.original, text_of(getattr(example, side)))
    run.audience.announce("rewards of answers", len(answers))
    rewards = raw_rewards(run, rewarder, answers, texts)[numbers]
    return np.where(np.isnan(rewards).any(1, keepdims=True), 0, rewards)


class ModpoBatch(struct.PyTreeNode):
    """n pairs for each of K policies, and S reward models; NumPy arrays on the host.

    Attributes:
      rows: see `reward.by_model`.
      reference: log-probabilities of the chosen and the rejected answers under the reference, nats.
      rewards: of chosen and rejected, by the models of the objectives that the pair is not labelled for.
      weights: of each policy that of the labelled objective first.
      preference: the probability that chosen is better; None where that is certain for all pairs of a run.
    """

    # The order of a program's arguments, on which the rounding of its results depends.
    reference: Float[Array, "K n 2"]
    rewards: Float[Array, "K n 2 S-1"]
    rows: PackedRows
    weights: Float[Array, "K 1 S"]
    preference: Float[Array, "K n"] | None = None


def policies_loss(
    backbone: Backbone, bank: Params, batch: ModpoBatch, beta: float, kind: str, dropout_key: PRNGKey | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """Sum over the K policies of their mean MODPO losses; metrics [K].

    Accuracies and margins are those of the rewards that the policies imply for the labelled objective, (beta log(pi /
    reference) - sum_{i>0} w_i r_i) / w_0: what the labels are about. With one-hot weights they are DPO's.

    `beta` and `kind` are those of `modpo_loss`, `dropout_key` is that of `Policies`.
    """
    weights, reference, rewards = batch.weights, batch.reference, batch.rewards.swapaxes(1, 2)
    K = weights.shape[0]
    policies = backbone.policies(bank, jnp.eye(K), dropout_key=dropout_key)
    logps = scoring.packed_logps(policies, batch.rows).reshape(reference.shape)
    logps, reference = ((x[..., 0], x[..., 1]) for x in (logps, reference))
    rewards = rewards[:, 0], rewards[:, 1]
    labels = batch.preference
    losses = modpo_loss(logps, reference, beta, weights=weights, rewards=rewards, kind=kind, preference=labels)
    chosen, rejected = implicit_rewards(logps, reference, beta)
    margins = chosen - rejected - weighted_sum(rewards[0] - rewards[1], weights[..., 1:])
    margins = margins / weights[..., 0]
    count = jnp.full(K, losses.shape[1], jnp.float32)
    hits, decided = accuracy(margins, 0.0), count
    if labels is not None:  # a tie has no better answer
        hits, decided = jnp.where(labels > 0.5, hits, 0.0), (labels > 0.5).sum(1, jnp.float32)
    metrics = {
        "loss": (losses.sum(1), count),
        "rewards/accuracies": (hits.sum(1), decided),
        "rewards/margins": (margins.sum(1), count),
        "wasted_tokens": scoring.wasted_tokens(batch.rows),
    }
    return losses.mean(1).sum(), metrics


@dataclasses.dataclass(frozen=True)
class ModpoData:
    """What K policies learn from.

    Attributes:
      policies: K names.
      objectives: names of all S rewards of the run, for each policy its label first, the others in order.
      weights: float32 [K, 1, S], theirs in that order.
      table: the M pairs labelled for any of those objectives.
      reference, rewards: float32 [M, 2] and [M, 2, S - 1], see `ModpoBatch`.
    """

    policies: tuple[str, ...]
    objectives: tuple[tuple[str, ...], ...]
    weights: np.ndarray
    table: TokenTable
    reference: np.ndarray
    rewards: np.ndarray

    @property
    def labels(self) -> tuple[str, ...]:
        """The objective that the pairs of each policy are labelled for, the one that weighs most."""
        return tuple(names[0] for names in self.objectives)

    @property
    def tables(self) -> list[list[TokenRow]]:
        """For each policy the rows of `table` with its label."""
        return [[row for row in self.table if row["objective"] == label] for label in self.labels]

    @property
    def samples(self) -> int:
        """How many answers were sampled for the pairs: two for each, however often it is labelled."""
        return 2 * len({SPLITS["pair"](example) for example in self.table.examples})


class Modpo(Method):
    """The method for `training.loop.run`."""

    show = ("loss", "rewards/accuracies")

    def __init__(
        self,
        settings: ModpoSettings,
        data: ModpoData,
        devices: Devices,
        backbone: Backbone,
        text: Text,
        streams: Streams,
        answers: Callable[[], HeldoutAnswers] | None = None,
    ):
        source, self.answers = reward.Grouped(data.tables, streams.seed), once(answers)
        s = settings
        steps = steps_of(s.steps, s.epochs, len(source), s.batch_size, "modpo", s.optimizer)
        self.settings = settings = settings.replace(steps=steps)
        self.data, self.devices, self.backbone = data, devices, backbone
        self.text, self.streams = text, streams
        self.rates = settings.optimizer.rates()
        self.optimizer = per_ingredient(make_optimizer(settings.optimizer, settings.steps))
        self.batches = source.batches(settings, self.collate, "modpo.batch_size")
        self._update = devices.training_step(self._step)
        self.programs, self.ingredients = (self._update,), data.policies

    def collate(self, rows: Sequence[Sequence[TokenRow]]) -> ModpoBatch:
        """n lists of K rows -> a batch."""
        packed, pairs = reward.by_model(self.text, rows)
        index = np.array([pair["index"] for pair in pairs]).reshape(-1, len(rows))
        data = self.data
        arrays: dict[str, Any] = {
            "reference": data.reference[index],
            "rewards": data.rewards[index],
            "weights": data.weights,
            "preference": soft_labels(pairs).reshape(index.shape) if data.table.has_soft_labels else None,
        }
        return ModpoBatch(rows=packed, **arrays)

    def init(self) -> State:
        return self.devices.create(self._initial, self.backbone)

    def _initial(self, backbone: Backbone) -> State:
        bank = init_bank(backbone.base, backbone.adapter, len(self.data.policies), self.streams.key("modpo/adapter"))
        return State.create(self.streams.key("modpo/state"), bank, self.optimizer)

    def _step(self, state: State, backbone: Backbone, *parts: ModpoBatch) -> tuple[State, Metrics]:
        known = self.settings.schedules
        each = [[known.get(name, ((0, 1.0),)) for name in names] for names in self.data.objectives]
        scale = jnp.stack([factors(own, state.step) for own in each])[:, None]  # [K, 1, S]

        def loss(bank: Params, batch: ModpoBatch, key: PRNGKey) -> tuple[Array, Metrics]:
            if known:
                batch = batch.replace(weights=batch.weights * scale)
            return policies_loss(backbone, bank, batch, self.settings.beta, self.settings.loss, key)

        gradient, metrics = gradient_of(loss, state.trainable, parts, state.key)
        shown = {f"rewards/{name}/weight": factors([points], state.step)[0] for name, points in known.items()}
        metrics = {**metrics, **{name: (factor, jnp.ones(())) for name, factor in shown.items()}}
        return state.apply_gradients(gradient, self.optimizer), metrics

    def step(self, state: State, batch: ModpoBatch | tuple[ModpoBatch, ...]) -> tuple[State, Metrics]:
        # The rest of a batch is small: every device has all of it.
        parts = (part.replace(rows=self.devices.place(part.rows)) for part in parts_of(batch))
        return self._update(state, self.backbone, *parts)

    def rows(self, state: State) -> Sequence[Row]:
        return rows_of(self.answers, state.trainable)


# ---- the stage


def check(run: Sections, settings: ModpoSettings) -> Targets:
    """What the policies are trained for.

    Raises:
      UserError: settings that MODPO cannot follow.
    """
    targets, rewards = targets_of(run, settings), run.audience.rewards
    if unknown := [name for name in settings.reward_weights if name not in rewards]:
        raise UserError(f"reward_weights: {unknown[0]!r} is not one of {', '.join(rewards)}; name one of these")
    for names, _ in _weighed(targets):
        if min(factor for _, factor in settings.schedules.get(names[0], ((0, 1.0),))) <= 0:
            raise UserError(
                f"reward_weights.{names[0]}: is 0 at some step, and MODPO divides by the weight of what its pairs are "
                "labelled for; keep it above 0"
            )
    return targets


def _weighed(targets: Targets) -> list[tuple[tuple[str, ...], np.ndarray]]:
    """(objectives, weights) of each policy, see `ModpoData`."""
    rewards, found = targets.audience.rewards, []
    for k in range(len(targets.policies)):
        target, weights = targets.target(0, k), np.zeros(len(rewards), np.float32)
        weights[list(target.objectives)] = target.weights
        label = int(weights.argmax())  # the first of equals
        order = [label, *(i for i in range(len(rewards)) if i != label)]
        found.append((tuple(rewards[i] for i in order), weights[order]))
    return found


def labelled(run: Run, settings: ModpoSettings) -> tuple[Targets, tuple[tuple[str, ...], ...], np.ndarray, TokenTable]:
    """(targets, objectives, weights, table): see `ModpoData`.

    Raises:
      UserError: settings that MODPO cannot follow, or an objective without pairs.
    """
    targets = check(run, settings)
    weighed = _weighed(targets)
    table, pairs = reward.comparisons(run), run.section(reward.RewardSettings)
    if pairs.heldout_data:
        table = table.select(reward.sides(table, pairs, run.streams.seed)[0].tolist())
    found = {example.objective for example in table.examples}
    for policy, (names, _) in zip(targets.policies, weighed, strict=True):
        if names[0] not in found:
            raise UserError(
                f"{table.bad.source_name}: no pair is labelled for {names[0]!r}, which weighs most for policy "
                f"{policy!r}; add comparisons (with comparisons.objectives, or in reward.data), or train for other "
                "preferences"
            )
    labels = {names[0] for names, _ in weighed}
    rows = [i for i, example in enumerate(table.examples) if example.objective in labels]
    weights = np.stack([own for _, own in weighed])[:, None]
    return targets, tuple(names for names, _ in weighed), weights, table.select(rows)


def data_of(
    run: Run,
    settings: ModpoSettings,
    raw: Callable[[TokenTable], np.ndarray],
    reference: Callable[[TokenTable], np.ndarray],
) -> ModpoData:
    """What MODPO learns from, where `raw` and `reference` give the rewards [M, 2, S] and log-probabilities [M, 2] of a
    table; see `labelled` for errors.
    """
    targets, objectives, weights, table = labelled(run, settings)
    longest = max(collections.Counter(example.objective for example in table.examples).values())
    # A warm-up that does not fit is refused before the answers are scored.
    steps_of(settings.steps, settings.epochs, longest, settings.batch_size, "modpo", settings.optimizer)
    of = [run.audience.rewards.index(example.objective) for example in table.examples]
    rewards = np.stack([np.delete(x, i, axis=1) for x, i in zip(raw(table), of, strict=True)])
    return ModpoData(tuple(targets.policies), objectives, weights, table, reference(table), rewards)


def heldout_answers(run: Run, policies: Sequence[str]) -> HeldoutAnswers:
    """What the policies in training answer to held-out requests."""
    prompts = [run.records.ask(request) for request in heldout_requests(run)]
    about = [{"policy": name} for name in policies for _ in prompts]
    mix = np.repeat(np.eye(len(policies), dtype=np.float32), len(prompts), axis=0)
    # A bank of full parameters is merged for a chunk.
    groups = None if run.workspace.adapter.rank else [k for k in range(len(policies)) for _ in prompts]
    keys = functools.partial(run.streams.key, "modpo/completions")
    return HeldoutAnswers(run, keys, prompts * len(policies), about, data=mix, groups=groups)


def method_of(run: Run, settings: ModpoSettings) -> Modpo:
    """The method for the policies of a run."""
    data = data_of(
        run,
        settings,
        raw=lambda table: table_rewards(run, reward.load(run), table),
        reference=lambda table: run.reference(table, run.text.sample_rows),
    )
    answers = functools.partial(heldout_answers, run, data.policies)
    return Modpo(settings, data, run.devices, run.workspace.backbone, run.text, run.streams, answers)


def train(run: Run, settings: ModpoSettings, stage: str) -> dict[str, Any]:
    """Trains the policies; writes <workdir>/<stage>/bank.safetensors and one folder per adapter."""
    method = method_of(run, settings)
    state, names = run.train(method, stage, method.settings.steps), list(method.data.policies)
    base_hash = banks.save(run, stage, names, state.trainable)
    return {"ingredients": names, "samples": method.data.samples, "base": base_hash}


TRAINER = Trainer(lambda run: run.section(ModpoSettings), train, answering.by_targets, check)
