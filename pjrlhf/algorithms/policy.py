"""K policies by PPO, or a critic-free relative, against rewards of one or several objectives, in one program
(Personalized Soups, arXiv 2310.11564; checklist of Huang et al. 2023).

Soups, MORL, Prompted-MORL, MOC and CLP are settings of it: what the policies are trained for (see `targets`), how their
objectives become one advantage (see `objectives.scalarization`), and what estimates it.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from pjrlhf.algorithms import answering, banks, reward
from pjrlhf.algorithms.ppo import PPOConfig, ppo_update
from pjrlhf.algorithms.targets import PromptRows, Targets, TargetSettings, targets_of
from pjrlhf.data.batching import batches
from pjrlhf.data.preferences import PreferencePrompt
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import Backbone, init_bank
from pjrlhf.objectives import policy_gradient as pg
from pjrlhf.objectives.multi_objective import fill_missing
from pjrlhf.objectives.scalarization import CombinationRule, Points, factors, make_rule, schedule, section
from pjrlhf.parallel.processes import to_host
from pjrlhf.rollout.batches import Experience, PromptBatch, Rollout, ScoredRollout, join_rows, split_rows
from pjrlhf.rollout.experience import ExperienceConfig, Recipe, experience, init_value_heads, reward_scores, sample
from pjrlhf.runtime.audience import HostRewards
from pjrlhf.runtime.devices import Devices
from pjrlhf.runtime.run import Run, Sections, Stage, Trainer
from pjrlhf.runtime.streams import Streams
from pjrlhf.settings import Settings, setting
from pjrlhf.training.completions import Row
from pjrlhf.training.loop import Method
from pjrlhf.training.metrics import Metrics, masked
from pjrlhf.training.optimizer import OptimizerSettings, check_warmup, make_optimizer, per_ingredient
from pjrlhf.training.progress import progress
from pjrlhf.training.state import State
from pjrlhf.types import Array, Params, PRNGKey, Tree

KL_STEPS = 10  # the last steps, over whose mean the KL of a policy is reported


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLSettings(Settings):
    """The coefficient of the KL penalty, fixed or adapted (Ziegler et al. 2019)."""

    coefficient: float = setting(0.1, "at the start", low=0.0, high=1e6)
    target: float = setting(0.0, "KL in nats per answer that the coefficient is adapted to; 0 keeps it fixed", low=0.0)
    horizon: int = setting(10000, "answers over which it adapts", low=1, high=10**9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicySettings(Settings):
    """K policies trained by PPO or a critic-free relative."""

    preferences: TargetSettings = setting(TargetSettings())
    mix: str = setting(
        "own",
        "own: an adapter per policy; weights: an adapter per objective, mixed by the preference weights",
        choices=("own", "weights"),
    )
    prompt_format: PreferencePrompt = setting(PreferencePrompt())
    prompt_preference: str = setting(
        "",
        "as the setting of that name of the run, which holds where this is empty",
        choices=("", "never", "always", "half"),
    )
    scale: str = setting(
        "std", "of rewards: std, quantiles (0 to 1), or raw, as they are", choices=("std", "quantiles", "raw")
    )
    combine: Mapping[str, Any] = setting(
        section(), "how objectives become one advantage: the kind of rule and the settings of all rules"
    )
    reward_weights: Mapping[str, Any] = setting(
        {},
        "{objective: factor of its preference weight}: a number, or a schedule by step, "
        '{"start": 1.0, "end": 0.0, "steps": 100} or points [[0, 1.0], [100, 0.0]]',
    )
    steps: int = setting(60, "rollouts, each followed by an update", low=1, high=10**9)
    rollouts: int = setting(16, "answers per policy and step", low=1, high=2**20)
    reward_parts: int = setting(
        1, "parts of a rollout; reward sources score one part while the next is sampled", low=1, high=2**20
    )
    eval_prompts: int = setting(64, "held-out prompts that policies answer every eval_every steps", low=1, high=2**20)
    top_k: int = setting(0, "0: off; a policy cannot be trained on truncated samples", low=0)
    top_p: float = setting(1.0, "1: off; a policy cannot be trained on truncated samples", above=0.0, high=1.0)
    kl: KLSettings = setting(KLSettings())
    ppo: PPOConfig = setting(PPOConfig())
    experience: ExperienceConfig = setting(ExperienceConfig())
    optimizer: OptimizerSettings = setting(OptimizerSettings(learning_rate=3e-3, schedule="linear", b2=0.99, eps=1e-5))

    @property
    def rule(self) -> CombinationRule:
        """The combination rule that `combine` describes."""
        return make_rule({**section(), **self.combine})

    @property
    def schedules(self) -> dict[str, Points]:
        """Objective -> the points of its factor in `reward_weights`."""
        found = {}
        for name, spec in self.reward_weights.items():
            try:
                found[name] = schedule(spec)
            except UserError as error:
                raise UserError(f"reward_weights.{name}: {error}") from error
        return found

    def check(self) -> None:
        try:
            rule = self.rule
        except ValueError as error:
            raise UserError(f"combine.{error}") from error
        if self.schedules and not rule.weighs_rewards:
            raise UserError(
                f"reward_weights: combine.kind {self.combine.get('kind', 'sum')!r} does not weigh rewards by the "
                "preference weights alone; choose sum, tchebycheff or gdpo, or leave reward_weights out"
            )
        ppo, steps = self.ppo, self.steps
        told = f" (steps={steps} x ppo.epochs={ppo.epochs} x ppo.minibatches={ppo.minibatches})"
        check_warmup(self.optimizer, steps * ppo.epochs * ppo.minibatches, part=told)
        if self.rollouts % self.experience.samples_per_prompt:
            raise UserError(
                f"rollouts: {self.rollouts} is not a multiple of experience.samples_per_prompt="
                f"{self.experience.samples_per_prompt}; make it one"
            )
        if self.rollouts % self.ppo.minibatches:
            raise UserError(
                f"rollouts: {self.rollouts} cannot be split into ppo.minibatches={self.ppo.minibatches} equal parts"
            )
        if (size := self.rollouts // self.ppo.minibatches) % self.ppo.accumulation_steps:
            raise UserError(
                f"ppo.accumulation_steps: {self.ppo.accumulation_steps} does not divide the {size} answers of a "
                "minibatch (rollouts / ppo.minibatches); change one of them"
            )
        if (self.rollouts // self.experience.samples_per_prompt) % self.reward_parts:
            raise UserError(
                f"reward_parts: the prompts of {self.rollouts} rollouts cannot be split into {self.reward_parts} equal "
                "parts; change one of them"
            )
        if self.top_k or self.top_p < 1:
            raise UserError(
                f"{'top_k' if self.top_k else 'top_p'}: truncated sampling would train on other probabilities than it "
                "samples from; set top_k to 0 and top_p to 1"
            )


def check_together(settings: PolicySettings, targets: Targets, temperature: float) -> None:
    """Raises UserError for settings that do not go together."""
    rule, together, K = settings.rule, settings.ppo.policies_at_once, len(targets.policies)
    if temperature <= 0:
        raise UserError("temperature: a policy cannot learn from greedy samples; set it above 0, for example to 1")
    if together and (K % together or targets.mix == "weights"):
        raise UserError(
            f"policy.ppo.policies_at_once={together}: must divide the {K} policies, which must not share "
            "adapters (policy.mix=own); set it to 1, or to 0 for all"
        )
    if rule.needs_calibrated_rewards and settings.scale != "quantiles":
        raise UserError(
            "policy.combine: the rule compares rewards with preference weights, so they must be on one scale; set "
            "policy.scale to quantiles"
        )
    if rule.needs_preference_groups and targets.kind not in ("grid", "fixed"):
        raise UserError("policy.combine: the rule needs a fixed set of preferences; set preferences.kind to grid")
    if settings.reward_parts > 1 and not targets.audience.sources:
        raise UserError(
            f"policy.reward_parts={settings.reward_parts}: all rewards are those of reward models, which score in the "
            "same program; set it to 1"
        )
    rewards = targets.audience.rewards
    if unknown := [name for name in settings.reward_weights if name not in rewards]:
        raise UserError(f"policy.reward_weights: {unknown[0]!r} is not one of {', '.join(rewards)}; name one of these")


def check(run: Sections, settings: PolicySettings) -> None:
    """Raises UserError for settings that policies cannot be trained with."""
    if dropout := run.settings.adapter.dropout:
        raise UserError(
            f"adapter.dropout={dropout}: policies are trained without dropout, because PPO compares the "
            "probabilities of one and the same policy before and after an update; set it to 0"
        )
    check_together(settings, targets_of(run, settings), run.settings.temperature)


class Policy(Method):
    """The method for `training.loop.run`: rollouts, scores and PPO updates of all K policies in one program.

    `rollout`, `score` and `update` are the parts of a step, functions of their arguments.

    Args:
      data: the prompts to train on.
      rewarder: reward models as `reward.load` gives them.
      heldout: the prompts to evaluate on.
    """

    show = ("objective/scores", "objective/kl")
    watch = ("loss/policy_avg", "loss/value_avg", "objective/kl")

    def __init__(
        self,
        settings: PolicySettings,
        data: PromptRows,
        rewarder: Params,
        devices: Devices,
        backbone: Backbone,
        streams: Streams,
        heldout: PromptRows | None = None,
    ):
        self.settings, self.data, self.rewarder, self.heldout = settings, data, rewarder, heldout
        self.devices, self.backbone, self.streams = devices, backbone, streams
        self.targets: Targets = data.targets
        self.ppo = settings.ppo
        if settings.experience.estimator != "gae":
            self.ppo = dataclasses.replace(self.ppo, vf_coef=0.0)
        self.recipe = Recipe(settings.experience, data.text.sampling(), settings.rule)
        check_together(settings, self.targets, self.recipe.sampling.temperature)
        self.rates = settings.optimizer.rates()
        updates = settings.steps * self.ppo.epochs * self.ppo.minibatches
        optimizer = make_optimizer(settings.optimizer, updates)
        # Adapters that one policy mixes are trained together.
        self.optimizer = optimizer if self.targets.mix == "weights" else per_ingredient(optimizer)
        samples = settings.experience.samples_per_prompt
        collate = functools.partial(data.collate, samples=samples)
        size = settings.rollouts // samples
        self.batches = batches(data, size, seed=streams.seed, collate=collate, key="policy.rollouts", rows="prompts")
        if self.targets.audience.sources:
            # The sources read text on the host, between sampling and the update.
            self._draw, self._update = devices.program(self._sample), devices.training_step(self._learn)
            self._join = devices.program(self._joined)
            self.programs = (self._draw, self._update, self._join)
        else:
            self._update = devices.training_step(self._step)
            self.programs = (self._update,)
        # Apart from the programs of a step, whose compilations are counted.
        self._inspect, self._answer = devices.program(self._inspected), devices.program(self._sample)
        self._draw_heldout = devices.program(self._sampled_with)
        self._show: Callable[[Rollout, Any], None] | None = None
        # A policy alone needs no name.
        self.ingredients = () if self.targets.sampled else self.targets.policies

    @property
    def K(self) -> int:
        """Number of policies."""
        return len(self.targets.policies)

    def init(self) -> State:
        return self.devices.create(self._initial, self.backbone)

    def _initial(self, backbone: Backbone) -> State:
        K, width = self.K, backbone.model.config.hidden_size
        names, adapters = self.recipe.rule.names(self.targets.scored), len(self.targets.adapters)
        trainable = {
            "bank": init_bank(backbone.base, backbone.adapter, adapters, self.streams.key("policy/adapter")),
            "value_heads": init_value_heads(K, len(names), width),
        }
        beta = jnp.full((K,), self.settings.kl.coefficient)
        kl = jnp.zeros((min(KL_STEPS, self.settings.steps), K))
        return State.create(self.streams.key("policy/state"), trainable, self.optimizer, beta=beta, kl=kl)

    # ---- a step and its parts

    def place(self, batch: PromptBatch) -> PromptBatch:
        """A batch [K, n, ...] on the devices, which share the rows of all policies: [K n, ...]."""
        return self.devices.place(join_rows(batch))

    def rollout(
        self, backbone: Backbone, bank: Params, batch: PromptBatch, key: PRNGKey, part: Int[Array, ""] | None = None
    ) -> Rollout:
        """Responses [*rows, N] to the prompts [*rows, P] of a batch, or of its part number `part`, which are those that
        they are in the whole batch.
        """
        mix = batch.targets.weights if self.targets.mix == "weights" else jnp.eye(self.K)
        draw = functools.partial(sample, backbone, bank, mix, batch.prompts, self.recipe.sampling, key)
        if part is None:
            return draw()
        n = self.settings.rollouts
        size = n // self.settings.reward_parts
        numbers = jnp.arange(self.K)[:, None] * n + part * size + jnp.arange(size)
        return draw(numbers, self.K * n)

    def ask(
        self, batch: PromptBatch, rollout: Rollout, pool: Executor | None = None, data: PromptRows | None = None
    ) -> Callable[[], HostRewards]:
        """Asks the reward sources of their objectives for the responses [K n, N] to a batch [K, n, ...] of `data`, by
        default the prompts to train on; see `Audience.ask`. The result has rewards float32 [K n, S]; NaN for no reward.
        """
        batch, audience = join_rows(batch), self.targets.audience
        objectives, numbers = np.asarray(batch.targets.objectives), np.asarray(batch.requests)
        texts = self.data.text.decode(batch.prompts, rollout)
        wanted = (objectives[..., None] == np.arange(len(audience.rewards))).any(1)
        data = data or self.data
        requests = [data.requests[i] for i in numbers]
        found = audience.ask(requests, texts, wanted, data.records.columns_of(requests), pool)

        def result() -> HostRewards:
            one = found()
            return dataclasses.replace(one, rewards=np.take_along_axis(one.rewards, objectives, axis=1))

        return result

    def score(
        self,
        backbone: Backbone,
        rewarder: Params,
        batch: PromptBatch,
        rollout: Rollout,
        host: Float[Array, "*rows S"] | None = None,
    ) -> Float[Array, "*rows S"]:
        """Float32 rewards of the responses to a batch; `host` are those of reward sources."""
        fixed = self.targets.objectives
        objectives = batch.targets.objectives if fixed is None else jnp.asarray(fixed)
        return reward_scores(backbone, rewarder, objectives, batch.reward_prompts, rollout, self.settings.scale, host)

    def experience(
        self, backbone: Backbone, state: State, scored: ScoredRollout
    ) -> tuple[Experience, dict[str, Array]]:
        """What the policies train on, of scored responses [K, n, ...], and statistics [K]."""
        mix = scored.targets.weights if self.targets.mix == "weights" else None
        if self.settings.reward_weights:
            weights = scored.targets.weights * self._factors(state.step)[scored.targets.objectives]
            scored = dataclasses.replace(scored, targets=dataclasses.replace(scored.targets, weights=weights))
        found = experience(self.recipe, backbone, state.trainable, scored, state.extra["beta"], mix)
        return jax.lax.stop_gradient(found)

    def update(
        self, backbone: Backbone, state: State, scored: ScoredRollout, key: PRNGKey
    ) -> tuple[State, dict[str, Array]]:
        """The state after the updates on scored responses [K, n, ...], and metrics [K]."""
        beta, step = state.extra["beta"], state.step
        found, statistics = self.experience(backbone, state, scored)
        state, metrics = ppo_update(self.ppo, self.optimizer, backbone, state, found, key)
        kl, settings = statistics["objective/kl"], self.settings.kl
        if settings.target:
            beta = pg.adapt_kl_coefficient(beta, kl, settings.target, found.tokens.shape[1], settings.horizon)
        recent = state.extra["kl"]
        extra = {"beta": beta, "kl": recent.at[step % len(recent)].set(kl)}
        return state.replace(step=step + 1, extra=extra), statistics | metrics

    def _factors(self, step: Int[Array, ""]) -> Float[Array, " R"]:
        """Of the preference weights of all rewards, see `reward_weights`."""
        schedules = self.settings.schedules
        return factors([schedules.get(name, ((0, 1.0),)) for name in self.targets.audience.rewards], step)

    def _step(self, state: State, backbone: Backbone, rewarder: Params, placed: PromptBatch) -> tuple[State, Metrics]:
        return self._learn(state, backbone, rewarder, placed, self._sample(state, backbone, placed))

    def _keys(self, state: State) -> tuple[PRNGKey, PRNGKey]:
        """Of the rollout and of the update of a step."""
        draw, shuffle = jax.random.split(jax.random.fold_in(state.rng, state.step))
        return draw, shuffle

    def _sample(
        self, state: State, backbone: Backbone, placed: PromptBatch, part: Int[Array, ""] | None = None
    ) -> Rollout:
        """Responses [K n, N]."""
        batch = split_rows(placed, self.K)
        return join_rows(self.rollout(backbone, state.trainable["bank"], batch, self._keys(state)[0], part))

    def _joined(self, *parts: Tree) -> Tree:
        """The rows [K n, ...] of a batch from those of its parts."""
        each = [split_rows(part, self.K) for part in parts]
        return join_rows(jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *each))

    def _learn(
        self,
        state: State,
        backbone: Backbone,
        rewarder: Params,
        placed: PromptBatch,
        rollout: Rollout,
        host: Float[Array, "B S"] | None = None,
    ) -> tuple[State, Metrics]:
        (batch, rollout), shuffle = split_rows((placed, rollout), self.K), self._keys(state)[1]
        found, scored = self._scored(backbone, rewarder, batch, rollout, host)
        by_objective = self._by_objective(found, batch.targets.objectives)
        scores = scored.scores
        # The x axis that methods share: answers sampled so far, of all policies.
        step = state.step
        samples = (step + 1.0) * scores.shape[0] * scores.shape[1]
        state, statistics = self.update(backbone, state, scored, shuffle)
        weights = statistics.pop("head_weights")
        if weights.shape[1] > 1:
            names = self.recipe.rule.names(self.targets.scored)
            statistics |= {f"objective/weights/{name}": weights[:, h] for h, name in enumerate(names)}
        else:
            del statistics["objective/gradient_cosine"]
        metrics = {name: (x, jnp.ones_like(x)) for name, x in statistics.items()}
        metrics |= by_objective
        metrics["samples"] = (samples, jnp.ones(()))
        for name in self.settings.reward_weights:
            factor = self._factors(step)[self.targets.audience.rewards.index(name)]
            metrics[f"rewards/{name}/weight"] = (factor, jnp.ones(()))
        return state, metrics

    def _scored(
        self, backbone: Backbone, rewarder: Params, batch: PromptBatch, rollout: Rollout, host: Any
    ) -> tuple[Float[Array, "K n S"], ScoredRollout]:
        """(rewards of responses [K, n, N], NaN for none; the responses with what counts in place of NaN)."""
        if host is None:
            scores = filled = self.score(backbone, rewarder, batch, rollout)
        else:
            scores = self.score(backbone, rewarder, batch, rollout, split_rows(host, self.K))
            samples = self.settings.experience.samples_per_prompt
            fill = functools.partial(fill_missing, count=len(self.targets.audience.rewards), samples=samples)
            filled = jax.vmap(fill)(scores, batch.targets.objectives)
        return scores, ScoredRollout(batch.prompts, rollout, filled, batch.targets)

    def _by_objective(self, scores: Float[Array, "K n S"], objectives: Int[Array, "K n S"]) -> Metrics:
        """Mean and standard deviation of every reward, the share of answers that its source says nothing about, and how
        the rewards of an answer go together, [K] each, of `scores` of these `objectives`; NaN is no reward. Nothing
        where every policy has one objective, of a reward model: its mean is objective/scores.
        """
        audience, S = self.targets.audience, scores.shape[2]
        if S == 1 and not audience.sources:
            return {}
        metrics, known = {}, ~jnp.isnan(scores)
        scores = jnp.where(known, scores, 0.0)
        for i, name in enumerate(audience.rewards):
            if name in audience.sources:
                asked = objectives == i
                metrics[f"rewards/{name}/none"] = ((asked & ~known).sum((1, 2)), asked.sum((1, 2)))
            own = ((objectives == i) & known).astype(jnp.float32)
            count = own.sum((1, 2))
            mean = (scores * own).sum((1, 2)) / jnp.maximum(count, 1)
            squares = jnp.square(scores - mean[:, None, None]) * own
            spread = jnp.sqrt(squares.sum((1, 2)) / jnp.maximum(count, 1))
            seen = (count > 0).astype(jnp.float32)
            metrics |= {f"rewards/{name}/mean": (mean * seen, seen), f"rewards/{name}/std": (spread * seen, seen)}
        if self.targets.objectives is not None and S > 1:
            metrics["rewards/correlation"] = jax.vmap(_correlations)(scores, known)
        return metrics

    def step(self, state: State, batch: PromptBatch) -> tuple[State, Metrics]:
        placed = self.place(batch)
        if not self.targets.audience.sources:
            if self._show:  # the same draws as in the step itself
                self._show(self._answer(state, self.backbone, placed), None)
            return self._update(state, self.backbone, self.rewarder, placed)
        count = self.settings.reward_parts
        if count == 1:
            # In this thread, which functions may need, such as those that set an alarm.
            rollout = jax.block_until_ready(self._draw(state, self.backbone, placed))
            started = time.perf_counter()
            asked = [self.ask(batch, rollout)()]
        else:
            size = self.settings.rollouts // count
            parts = [jax.tree.map(lambda x, i=i: x[:, i * size : (i + 1) * size], batch) for i in range(count)]
            with ThreadPoolExecutor(1) as pool:
                drawn, waiting = [], []
                for i in range(count + 1):
                    if i < count:
                        drawn.append(self._draw(state, self.backbone, self.place(parts[i]), np.int32(i)))
                    if i > 0:  # the next part is being sampled
                        waiting.append(self.ask(parts[i - 1], drawn[i - 1], pool))
                started = time.perf_counter()
                asked = [result() for result in waiting]
            rollout = self._join(*drawn)
        seconds = {"rewards/seconds": time.perf_counter() - started}
        for name in self.targets.audience.sources:
            seconds[f"rewards/{name}/seconds"] = sum(one.seconds.get(name, 0.0) for one in asked)
        host = [split_rows(one.rewards, self.K) for one in asked]
        rewards = join_rows(np.concatenate(host, axis=1))
        if self._show:
            self._show(rollout, self.devices.place(rewards))
        state, metrics = self.learn(state, placed, rollout, rewards)
        timed: dict[str, Any] = {name: (np.float32(x), np.float32(1)) for name, x in seconds.items()}
        return state, {**metrics, **timed}

    def learn(
        self, state: State, placed: PromptBatch, rollout: Rollout, host: Float[np.ndarray, "B S"]
    ) -> tuple[State, Metrics]:
        """The rest of a step with reward sources: (state, metrics) after the update on responses [K n, N]."""
        return self._update(state, self.backbone, self.rewarder, placed, rollout, self.devices.place(host))

    # ---- what was sampled, and held-out prompts

    def step_with_rows(self, state: State, batch: PromptBatch) -> tuple[State, Metrics, Sequence[Row]]:
        rows: list[Row] = []

        def show(rollout: Rollout, host: Any) -> None:
            placed = self.place(batch)
            found = self._inspect(state, self.backbone, self.rewarder, placed, rollout, host)
            rows.extend(self._rows(join_rows(batch), rollout, *to_host(found)))

        self._show = show
        try:
            return *self.step(state, batch), rows
        finally:
            self._show = None

    def _sampled_with(self, bank: Params, backbone: Backbone, placed: PromptBatch, key: PRNGKey) -> Rollout:
        """Responses [K n, N]."""
        return join_rows(self.rollout(backbone, bank, split_rows(placed, self.K), key))

    def _inspected(
        self, state: State, backbone: Backbone, rewarder: Params, placed: PromptBatch, rollout: Rollout, host: Any
    ) -> tuple[Float[Array, "B S"], Float[Array, " B"]]:
        """(rewards, NaN for none; mean advantage over its tokens) of responses [K n, N]."""
        batch, rollout = split_rows((placed, rollout), self.K)
        scores, scored = self._scored(backbone, rewarder, batch, rollout, host)
        found, _ = self.experience(backbone, state, scored)
        total, count = masked(found.advantages, found.mask, axis=2)
        return join_rows((scores, total / jnp.maximum(count, 1)))

    def _rows(
        self,
        batch: PromptBatch,
        rollout: Rollout,
        scores: Float[np.ndarray, "B S"],
        advantages: Float[np.ndarray, " B"],
    ) -> Iterator[Row]:
        """A table of responses [K n, N]; prompts are as the policies read them."""
        names, tokenizer = self.targets.audience.rewards, self.data.text.workspace.tokenizer
        answers = self.data.text.decode(batch.prompts, rollout)
        tokens, valid = np.asarray(batch.prompts.tokens), np.asarray(batch.prompts.valid)
        prompts = (ids[kept] for ids, kept in zip(tokens, valid, strict=True))
        numbers, weights = np.asarray(batch.targets.objectives), np.asarray(batch.targets.weights)
        asked = sorted({int(i) for i in numbers.ravel()})
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            values = dict(zip(numbers[i].tolist(), scores[i].tolist(), strict=True))
            yield {
                "policy": self.targets.policies[i * self.K // len(answers)],
                "prompt": tokenizer.backend.decode(prompt.tolist()),
                "completion": answer,
                "weights": ", ".join(f"{names[j]} {w:.3g}" for j, w in zip(numbers[i], weights[i], strict=True)),
                **{f"rewards/{names[j]}": _number(values.get(j)) for j in asked},
                "advantage": _number(advantages[i].item()),
            }

    def evaluate(self, state: State) -> dict[str, float]:
        """Mean rewards of answers to held-out prompts by the current policies, over all and of each, and their length.

        Every evaluation draws with the same keys.
        """
        if not self.heldout:
            return {}
        rows = [self.heldout[i] for i in range(min(self.settings.eval_prompts, len(self.heldout)))]
        samples = self.settings.experience.samples_per_prompt
        size = self.settings.rollouts // samples
        found, key = [], self.streams.key("policy/eval")
        with progress("policy: held-out prompts", -(-len(rows) // size)) as bar:
            for number, start in enumerate(range(0, len(rows), size)):
                part = rows[start : start + size]
                # Full batches, as in training; what fills the last one does not count.
                batch = self.heldout.collate((part * size)[:size], samples)
                placed = self.place(batch)
                bank, draw = state.trainable["bank"], jax.random.fold_in(key, number)
                rollout = self._draw_heldout(bank, self.backbone, placed, draw)
                host = None
                if self.targets.audience.sources:
                    host = self.devices.place(self.ask(batch, rollout, data=self.heldout)().rewards)
                scores = self._inspect(state, self.backbone, self.rewarder, placed, rollout, host)[0]
                kept = len(part) * samples
                scores, lengths = split_rows(to_host((scores, rollout.valid.sum(1))), self.K)
                found.append((scores[:, :kept], np.asarray(batch.targets.objectives)[:, :kept], lengths[:, :kept]))
                bar.update(number + 1, {})
        scores, objectives, lengths = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        values = {"length": float(lengths.mean())}
        for i, name in enumerate(self.targets.audience.rewards):
            own = np.where(objectives == i, scores, np.nan)
            known = {policy: x[~np.isnan(x)] for policy, x in zip(self.targets.policies, own, strict=True)}
            known = {policy: x for policy, x in known.items() if len(x)}
            if known:
                values[f"rewards/{name}"] = float(np.concatenate(list(known.values())).mean())
            if len(known) > 1 and self.ingredients:
                values |= {f"rewards/{name}/{policy}": float(x.mean()) for policy, x in known.items()}
        return values

    def last_kl(self, state: State) -> dict[str, float]:
        """Policy -> mean KL to the base over its last `KL_STEPS` steps, in nats per answer."""
        means = to_host(state.extra["kl"]).mean(0)
        return dict(zip(self.targets.policies, means.tolist(), strict=True))


def _correlations(scores: Float[Array, "n S"], known: Bool[Array, "n S"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of the correlations of two rewards, over the answers for which both are known; number of pairs of rewards
    that have two such answers). A constant reward has correlation 0.
    """
    m = known.astype(jnp.float32)
    centred = jnp.where(known, scores - (scores * m).sum(0) / jnp.maximum(m.sum(0), 1), 0.0)
    count = m.T @ m
    # Entry [s, t] is of reward s over the answers for which t is known too.
    total, squares = centred.T @ m / jnp.maximum(count, 1), jnp.square(centred).T @ m
    covariance = centred.T @ centred - count * total * total.T
    spread = jnp.sqrt(jnp.maximum(squares - count * jnp.square(total), 0.0))
    found = covariance / jnp.maximum(spread * spread.T, 1e-12)
    counted = jnp.triu(count >= 2, 1)
    return jnp.where(counted, found, 0.0).sum(), counted.sum().astype(jnp.float32)


def _number(x: float | None) -> float | None:
    return None if x is None or math.isnan(x) else x


# ---- the stage


def settings_of(run: Sections) -> PolicySettings:
    """The section of the stage; its prompts state preferences as the run says, where it does not say so itself."""
    settings = run.section(PolicySettings)
    return dataclasses.replace(settings, prompt_preference=settings.prompt_preference or run.settings.prompt_preference)


def method_of(run: Run, settings: PolicySettings | None = None, rewarder: Params | None = None) -> Policy:
    """The method for policies of a run, by default those of its stage, trained on its reward models."""
    settings = settings or settings_of(run)
    targets = targets_of(run, settings)
    prompts = settings.steps * settings.rollouts // settings.experience.samples_per_prompt
    data = PromptRows(targets, run.records, run.text, prompts)
    heldout = PromptRows(targets, run.records, run.text, part=1) if run.settings.eval_every else None
    rewarder = rewarder or reward.load(run)
    return Policy(settings, data, rewarder, run.devices, run.workspace.backbone, run.streams, heldout)


def run(run: Run) -> dict[str, Any]:
    """Trains the policies; writes <workdir>/policy/bank.safetensors and one folder per adapter (PEFT, or a full
    model).
    """
    return train(run, settings_of(run), "policy")


def train(run: Run, settings: PolicySettings, stage: str) -> dict[str, Any]:
    """The same by the section `settings`, into <workdir>/<stage>."""
    method = method_of(run, settings)
    state, names = run.train(method, stage, settings.steps), list(method.targets.adapters)
    base_hash = banks.save(run, stage, names, state.trainable["bank"])
    return {
        "ingredients": names,
        "rollouts_per_policy": settings.steps * settings.rollouts,
        "samples": settings.steps * settings.rollouts * method.K,
        "base": base_hash,
        "kl": method.last_kl(state),
    }


TRAINER = Trainer(settings_of, train, answering.by_targets, check)
STAGE = Stage("policy", run, PolicySettings)
