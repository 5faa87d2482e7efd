"""The parts of a step of policies, functions of their arguments: rollout, scores, experience, updates."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pjrlhf.algorithms.policy_metrics import reward_metrics
from pjrlhf.algorithms.policy_settings import PolicySettings, check_together
from pjrlhf.algorithms.ppo import ppo_update
from pjrlhf.algorithms.targets import Targets
from pjrlhf.models.adapters import Backbone
from pjrlhf.objectives import policy_gradient as pg
from pjrlhf.objectives.multi_objective import fill_missing
from pjrlhf.objectives.scalarization import factors as factors_at
from pjrlhf.rollout.batches import Experience, PromptBatch, Rollout, ScoredRollout, join_rows, split_rows
from pjrlhf.rollout.experience import Recipe, experience, reward_scores, sample
from pjrlhf.rollout.sampler import Sampling
from pjrlhf.training.metrics import Metrics, masked
from pjrlhf.training.optimizer import make_optimizer, per_ingredient
from pjrlhf.training.state import State
from pjrlhf.types import Array, Params, PRNGKey, Tree


class Judged(NamedTuple):
    """Responses of a step and what they got.

    Attributes:
      rollout: [B, N].
      scores: rewards as they count for training; NaN for none.
      advantages: means over the tokens.
    """

    rollout: Rollout
    scores: Float[Array, "B S"]
    advantages: Float[Array, " B"]


class PolicyStep:
    """What a step of K policies computes.

    Args:
      sampling: how responses are sampled.

    Raises:
      UserError: settings that do not go together.
    """

    def __init__(self, settings: PolicySettings, targets: Targets, sampling: Sampling):
        self.settings, self.targets = settings, targets
        self.ppo = settings.ppo
        if settings.experience.estimator != "gae":
            self.ppo = dataclasses.replace(self.ppo, vf_coef=0.0)
        self.recipe = Recipe(settings.experience, sampling, settings.rule)
        check_together(settings, targets, sampling.temperature)
        updates = settings.steps * self.ppo.epochs * self.ppo.minibatches
        optimizer = make_optimizer(settings.optimizer, updates)
        # Adapters that one policy mixes are trained together.
        self.optimizer = optimizer if targets.mix == "weights" else per_ingredient(optimizer)

    @property
    def K(self) -> int:
        """Number of policies."""
        return len(self.targets.policies)

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
            weights = scored.targets.weights * self.factors(state.step)[scored.targets.objectives]
            scored = dataclasses.replace(scored, targets=dataclasses.replace(scored.targets, weights=weights))
        found = experience(self.recipe, backbone, state.trainable, scored, state.extra["beta"], mix)
        return jax.lax.stop_gradient(found)

    def update(
        self, backbone: Backbone, state: State, scored: ScoredRollout, key: PRNGKey
    ) -> tuple[State, dict[str, Array], Float[Array, "K n"]]:
        """The state after the updates on scored responses [K, n, ...], metrics [K], and the mean advantages of the
        responses over their tokens.
        """
        beta, step = state.extra["beta"], state.step
        found, statistics = self.experience(backbone, state, scored)
        state, metrics = ppo_update(self.ppo, self.optimizer, backbone, state, found, key)
        kl, settings = statistics["objective/kl"], self.settings.kl
        if settings.target:
            beta = pg.adapt_kl_coefficient(beta, kl, settings.target, found.tokens.shape[1], settings.horizon)
        recent = state.extra["kl"]
        extra = {"beta": beta, "kl": recent.at[step % len(recent)].set(kl)}
        total, count = masked(found.advantages, found.mask, axis=2)
        return state.replace(step=step + 1, extra=extra), statistics | metrics, total / jnp.maximum(count, 1)

    def factors(self, step: Int[Array, ""]) -> Float[Array, " R"]:
        """Of the preference weights of all rewards, see `reward_weights`."""
        schedules = self.settings.schedules
        return factors_at([schedules.get(name, ((0, 1.0),)) for name in self.targets.audience.rewards], step)

    def keys(self, state: State) -> tuple[PRNGKey, PRNGKey]:
        """Of the rollout and of the update of a step."""
        draw, shuffle = jax.random.split(jax.random.fold_in(state.rng, state.step))
        return draw, shuffle

    def sample(
        self, state: State, backbone: Backbone, placed: PromptBatch, part: Int[Array, ""] | None = None
    ) -> Rollout:
        """Responses [K n, N] to a placed batch, or to its part number `part`, with the keys of the step."""
        return self.sample_with(state.trainable["bank"], backbone, placed, self.keys(state)[0], part)

    def sample_with(
        self, bank: Params, backbone: Backbone, placed: PromptBatch, key: PRNGKey, part: Int[Array, ""] | None = None
    ) -> Rollout:
        """The same by the adapters of `bank` with `key`."""
        return join_rows(self.rollout(backbone, bank, split_rows(placed, self.K), key, part))

    def whole(
        self, state: State, backbone: Backbone, rewarder: Params, placed: PromptBatch
    ) -> tuple[State, tuple[Metrics, Judged]]:
        """A step without reward sources."""
        return self.learn(state, backbone, rewarder, placed, self.sample(state, backbone, placed))

    def judge(
        self, backbone: Backbone, rewarder: Params, placed: PromptBatch, rollout: Rollout, host: Any
    ) -> Float[Array, "B S"]:
        """Rewards of responses [K n, N]; NaN for none."""
        batch, rollout = split_rows((placed, rollout), self.K)
        return join_rows(self.scored(backbone, rewarder, batch, rollout, host)[0])

    def joined(self, *parts: Tree) -> Tree:
        """The rows [K n, ...] of a batch from those of its parts."""
        each = [split_rows(part, self.K) for part in parts]
        return join_rows(jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *each))

    def learn(
        self,
        state: State,
        backbone: Backbone,
        rewarder: Params,
        placed: PromptBatch,
        rollout: Rollout,
        host: Float[Array, "B S"] | None = None,
    ) -> tuple[State, tuple[Metrics, Judged]]:
        """The state after the updates on responses [K n, N] to a placed batch, metrics, and what the responses got;
        `host` are the rewards of sources.
        """
        (batch, rollout), shuffle = split_rows((placed, rollout), self.K), self.keys(state)[1]
        found, scored = self.scored(backbone, rewarder, batch, rollout, host)
        by_objective = reward_metrics(self.targets, found, batch.targets.objectives)
        scores = scored.scores
        # The x axis that methods share: answers sampled so far, of all policies.
        step = state.step
        samples = (step + 1.0) * scores.shape[0] * scores.shape[1]
        state, statistics, advantages = self.update(backbone, state, scored, shuffle)
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
            factor = self.factors(step)[self.targets.audience.rewards.index(name)]
            metrics[f"rewards/{name}/weight"] = (factor, jnp.ones(()))
        return state, (metrics, Judged(*join_rows((rollout, found, advantages))))

    def scored(
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
