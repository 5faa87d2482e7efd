"""The settings of policies, and which of them go together."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pjrlhf.algorithms.ppo import PPOConfig
from pjrlhf.algorithms.targets import Targets, TargetSettings, targets_of
from pjrlhf.data.preferences import PreferencePrompt
from pjrlhf.errors import UserError
from pjrlhf.objectives.scalarization import CombinationRule, Points, make_rule, schedules, section
from pjrlhf.rollout.experience import ExperienceConfig
from pjrlhf.runtime.run import Sections
from pjrlhf.settings import Settings, setting
from pjrlhf.training.optimizer import OptimizerSettings, check_warmup


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
        return schedules(self.reward_weights, "reward_weights")

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


def settings_of(run: Sections) -> PolicySettings:
    """The section of the stage; its prompts state preferences as the run says, where it does not say so itself."""
    settings = run.section(PolicySettings)
    return dataclasses.replace(settings, prompt_preference=settings.prompt_preference or run.settings.prompt_preference)
