"""From prompts to experience for K policies at once: sample, score, reward, advantages.

One-hot rows of `mix` drive K policies through one program, and everything that is averaged is averaged per policy. A
single policy may also consist of several adapters, mixed by a row of `mix` for every example. `rollout.batches` says
what the shapes mean.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pjrlhf.errors import UserError
from pjrlhf.models.adapters import Backbone
from pjrlhf.objectives import policy_gradient as pg
from pjrlhf.objectives.multi_objective import calibrate, standardize, weighted_sum
from pjrlhf.objectives.scalarization import CombinationRule
from pjrlhf.rollout import scoring
from pjrlhf.rollout.batches import Experience, Prompts, Rollout, ScoredRollout, join_rows, split_rows
from pjrlhf.rollout.sampler import Sampling, generate
from pjrlhf.settings import Settings, setting
from pjrlhf.types import Array, Params, PRNGKey

ESTIMATORS = ("gae", "rloo", "group")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperienceConfig(Settings):
    """Settings of the reward and advantage computation.

    `missing_eos_penalty` is taken from the score of a response cut off before EOS; `score_clip` bounds normalised
    scores (0: off). `estimator` is "gae", with values, or without any "rloo" (REINFORCE with the mean of the other
    answers as baseline, arXiv 2402.14740) or "group" (standardised among the answers, GRPO, arXiv 2402.03300), both
    over the `samples_per_prompt` consecutive answers to one prompt.

    Raises UserError for an unknown estimator, or one without answers to compare.
    """

    estimator: str = setting(
        "gae",
        "gae with values; without a critic rloo or group, with samples_per_prompt of 2 or more",
        choices=ESTIMATORS,
    )
    samples_per_prompt: int = setting(1, "answers to one prompt", low=1, high=2**16)
    gamma: float = setting(1.0, "discount", low=0.0, high=1.0)
    lam: float = setting(0.95, "lambda of GAE", low=0.0, high=1.0)
    kl_kind: str = setting("k1", "estimator of the KL", choices=("k1", "k2", "k3"))
    missing_eos_penalty: float = setting(1.0, "taken from the score of an answer cut off before EOS", low=0.0, high=1e6)
    score_clip: float = setting(5.0, "bound of normalised scores; 0: off", low=0.0, high=1e6)
    whiten_rewards: bool = setting(False, "gae: divide the rewards of a batch by their standard deviation")

    def check(self) -> None:
        if self.estimator != "gae" and self.samples_per_prompt < 2:
            raise UserError(
                f"estimator {self.estimator!r}: compares answers to one prompt; set samples_per_prompt to 2"
            )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How rollouts become experience; static in a program.

    Attributes:
      config: rewards and advantages.
      sampling: how the responses were sampled.
      rule: how the rewards of several objectives become one advantage.
    """

    config: ExperienceConfig
    sampling: Sampling
    rule: CombinationRule


def sample(
    backbone: Backbone,
    bank: Params | None,
    mix: Float[Array, "*groups A"] | None,
    prompts: Prompts,
    sampling: Sampling,
    key: PRNGKey,
    numbers: Int[Array, "*rows"] | None = None,
    total: int = 0,
) -> Rollout:
    """Responses [*rows, N] to prompts [*rows, P]; `sampling` is static in a program.

    Args:
      bank: adapters; None for the base.
      mix: weights of the adapters, [G, A] for G equal consecutive groups of rows or [*rows, A] for every row; None for
        the base.
      numbers, total: of the rows in a larger batch, see `rollout.sampler.generate`.
    """
    *rows, _ = prompts.tokens.shape
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), prompts)
    mix = None if mix is None else mix.reshape(-1, mix.shape[-1])
    numbers = None if numbers is None else numbers.reshape(-1)
    rollout = generate(backbone.policies(bank, mix), sampling, flat, key, numbers, total)
    return jax.tree.map(lambda x: x.reshape(*rows, x.shape[-1]), rollout)


def reward_scores(
    backbone: Backbone,
    rewarder: Params,
    objectives: Int[Array, "*groups S"],
    prompts: Prompts,
    rollout: Rollout,
    scale: str = "std",
    host: Float[Array, "*rows S"] | None = None,
) -> Float[Array, "*rows S"]:
    """Float32 rewards of responses [*rows, N] for the objectives numbered `objectives`.

    Args:
      rewarder: what the reward stage leaves: "mean", "std", "low", "high" [K] of the K rewards; "bank" and "heads" of
        the reward models among them, if any; and where some rewards have none, "models", int32 [K], the number of the
        model of each reward, or -1.
      objectives: [G, S] for G equal consecutive groups of rows, or [*rows, S] for every row.
      prompts: what the reward models read before the response, [*rows, Q].
      scale: "std", (r - mean) / std; "quantiles", between the low quantile (0) and the high one (1), clipped. Both were
        measured once on samples of the base. "raw", r itself.
      host: raw rewards, which count where an objective has no reward model; NaN for no reward.
    """
    *rows, _ = rollout.tokens.shape
    pairs = (prompts.tokens, rollout.tokens), (prompts.valid, rollout.valid)
    tokens, valid = (scoring.join(*(x.reshape(-1, x.shape[-1]) for x in pair)) for pair in pairs)
    objectives = objectives.reshape(-1, objectives.shape[-1])
    raw = raw_rewards(backbone, rewarder, objectives, tokens, valid, host)
    B, G = len(raw), len(objectives)
    numbers = jnp.repeat(objectives, B // G, axis=0, total_repeat_length=B)
    if scale == "raw":
        scores = raw
    elif scale == "quantiles":
        scores = calibrate(raw, rewarder["low"][numbers], rewarder["high"][numbers])
    else:
        scores = scoring.normalize(raw, {name: rewarder[name][numbers] for name in ("mean", "std")})
    return scores.reshape(*rows, -1)


def raw_rewards(
    backbone: Backbone,
    rewarder: Params,
    objectives: Int[Array, "G S"],
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    host: Float[Array, "*rows S"] | None = None,
) -> Float[Array, "B S"]:
    """Float32 rewards of whole rows in their own units, of reward models those of Bradley-Terry; `rewarder` needs no
    scale.

    `objectives` are those of G equal consecutive groups of rows. For `rewarder` and `host` see `reward_scores`.
    """
    (G, S), B = objectives.shape, len(tokens)
    if host is not None:
        host = host.reshape(B, S)
        if "bank" not in rewarder:
            return host
        objectives = rewarder["models"][objectives]
        learned = {name: rewarder[name] for name in ("bank", "heads")}
        raw = raw_rewards(backbone, learned, objectives, tokens, valid)
        has_model = jnp.repeat(objectives >= 0, B // G, axis=0, total_repeat_length=B)
        return jnp.where(has_model, raw, host)

    def once_per_objective(x):
        x = x.reshape(G, 1, B // G, x.shape[1])
        return jnp.broadcast_to(x, (G, S, *x.shape[2:])).reshape(-1, x.shape[3])

    mix = jax.nn.one_hot(objectives.reshape(-1), rewarder["heads"]["bias"].shape[0])
    policies = backbone.policies(rewarder["bank"], mix)
    raw = scoring.rewards(policies, rewarder["heads"], mix, once_per_objective(tokens), once_per_objective(valid))
    return raw.reshape(G, S, B // G).swapaxes(1, 2).reshape(B, S)


def init_value_heads(policies: int, heads: int, width: int) -> Params:
    """Zero value heads: kernel [K, H, D], bias [K, H]."""
    return {"kernel": jnp.zeros((policies, heads, width)), "bias": jnp.zeros((policies, heads))}


def values_of(heads: Params, states: Float[Array, "B N D"]) -> Float[Array, "K n N H"]:
    """Float32 values of the hidden states of all policies, B = K n."""
    states = split_rows(states, heads["bias"].shape[0]).astype(jnp.float32)
    return jnp.einsum("kntd,khd->knth", states, heads["kernel"]) + heads["bias"][:, None, None]


def experience(
    recipe: Recipe,
    backbone: Backbone,
    trainable: Params,
    scored: ScoredRollout,
    beta: Float[Array, " K"],
    mix: Float[Array, "K n A"] | None = None,
) -> tuple[Experience, dict[str, Array]]:
    """Log-probabilities, values, rewards and advantages of sampled responses.

    Args:
      trainable: {"bank", "value_heads"}: the adapters, and the value heads of K policies.
      scored: responses of the policies, with their rewards.
      beta: KL coefficient per policy.
      mix: weights of the adapters that gave each response; None where policy k is adapter k.

    Returns:
      the experience, and statistics per policy [K] for logging and the KL controller; "head_weights" is [K, H].
    """
    config, sampling, rule = recipe.config, recipe.sampling, recipe.rule
    K, _, P = scored.prompts.tokens.shape
    response, p, scores = scored.rollout, scored.targets.weights, scored.scores
    tokens = jnp.concatenate([scored.prompts.tokens, response.tokens], axis=2)
    valid = jnp.concatenate([scored.prompts.valid, response.valid], axis=2)
    mask = response.valid.astype(jnp.float32)

    def token_logps(bank: Params | None, mix: Array | None) -> tuple[Array, Array, Array]:
        """Hidden states [K n, N, D]; log-probabilities and entropies [K, n, N]."""
        policies = backbone.policies(bank, mix)
        states = scoring.response_states(policies, join_rows(tokens), join_rows(valid), P)
        found = scoring.token_logps(policies, states, join_rows(response.tokens), sampling.temperature)
        return states, *split_rows(found, K)

    states, logps, entropy = token_logps(trainable["bank"], jnp.eye(K) if mix is None else join_rows(mix))
    # The reference is the base itself: no bank, and no second copy of the model.
    _, reference_logps, _ = token_logps(None, None)
    values = pg.zero_outside(values_of(trainable["value_heads"], states), mask[..., None])
    stopped = (sampling.ends(response.tokens) & response.valid).any(2)
    limited = jnp.clip(scores, -config.score_clip, config.score_clip) if config.score_clip else scores
    kl = pg.zero_outside(pg.kl_estimate(logps, reference_logps, config.kl_kind), mask)

    def per_policy(score, p, group, stopped, kl, values, mask, beta):
        penalty = config.missing_eos_penalty * ~stopped
        heads = rule.rewards(score, p) - penalty[:, None]
        if config.estimator == "gae":
            rewards = jax.vmap(pg.token_rewards, (1, None, None, None), -1)(heads, kl, mask, beta)
            if config.whiten_rewards:
                rewards = jax.vmap(lambda r: pg.whiten(r, mask, shift_mean=False), -1, -1)(rewards)
            gae = jax.vmap(lambda r, v: pg.gae(r, v, mask, config.gamma, config.lam), (-1, -1), -1)
            advantages, returns = gae(rewards, values)
            if rule.standardizes_heads:
                advantages = jax.vmap(lambda a: pg.whiten(a, mask), -1, -1)(advantages)
        else:
            total = (heads - beta * kl.sum(1)[:, None]).reshape(-1, config.samples_per_prompt, heads.shape[1])
            if config.estimator == "rloo":
                relative = (total - total.mean(1, keepdims=True)) * config.samples_per_prompt
                relative = relative / (config.samples_per_prompt - 1)
            else:
                relative = standardize(total, jnp.ones_like(total, bool), axis=1)
            advantages = pg.zero_outside(
                jnp.broadcast_to(relative.reshape(heads.shape)[:, None], values.shape), mask[..., None]
            )
            returns = jnp.zeros_like(values)
        mixed, info = rule.advantages(advantages, p, mask, group)
        if config.estimator == "gae":
            mixed = pg.whiten(mixed, mask)
        elif config.estimator == "group" and rule.standardizes_heads:
            # The last step of GDPO: over the answers of the batch.
            each = mixed[:, 0]
            each = standardize(each, jnp.ones_like(each, bool), axis=None)
            mixed = pg.zero_outside(jnp.broadcast_to(each[:, None], mask.shape), mask)
        reward = weighted_sum(score, p) - penalty - beta * kl.sum(1)
        return mixed, returns, info, reward.mean()

    advantages, returns, info, reward = jax.vmap(per_policy)(
        limited, p, scored.targets.group, stopped, kl, values, mask, beta
    )
    found = Experience(
        tokens, valid, pg.zero_outside(logps, mask), advantages, values, returns, mix, sampling.temperature
    )
    statistics = {
        "objective/kl": kl.sum(2).mean(1),
        "objective/scores": weighted_sum(scores, p).mean(1),
        "objective/rlhf_reward": reward,
        "objective/entropy": pg.zero_outside(entropy, mask).sum(2).mean(1),
        "completions/mean_length": mask.sum(2).mean(1),
        "completions/stopped_ratio": stopped.astype(jnp.float32).mean(1),
        "kl_coefficient": beta,
        "head_weights": info["weights"],
        "objective/gradient_cosine": info["gradient_cosine"],
    }
    return found, statistics
