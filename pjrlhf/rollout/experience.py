"""From prompts to PPO experience for K policies at once: sample, score, reward, advantages.

Rows are grouped by ingredient: B = K * n, rows k n .. (k + 1) n - 1 belong to policy k, so one-hot rows of `mix`
drive K policies through one program and everything that is averaged is averaged per ingredient.

Shapes: K policies, n rows per policy, P prompt slots, N response slots, Q slots of the reward model's prompt.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pjrlhf.models.adapters import AdapterConfig, Policies
from pjrlhf.models.decoder import Decoder
from pjrlhf.objectives import policy_gradient as pg
from pjrlhf.rollout import scoring
from pjrlhf.rollout.sampler import Sampling, generate

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperienceConfig:
    """Settings of the reward and advantage computation.

    `missing_eos` is taken from the score of a response cut off before EOS; `score_clip` bounds normalised scores (0:
    off).
    """

    gamma: float = 1.0
    lam: float = 0.95
    kl_kind: str = "k1"
    missing_eos: float = 1.0
    score_clip: float = 5.0
    whiten_rewards: bool = False


def sample(
    model: Decoder,
    adapter: AdapterConfig,
    sampling: Sampling,
    base: Any,
    bank: Any,
    mix: jax.Array,
    prompt: Arrays,
    key,
) -> Arrays:
    """Responses of the policies in `mix` [G, K] to `prompt` {"prompt", "valid"} [B, P]; jit with the first three
    static.
    """
    policies = Policies(model, adapter, base, bank, mix)
    return generate(policies, sampling, prompt["prompt"], prompt["valid"], key)


def reward_scores(
    model: Decoder, adapter: AdapterConfig, base: Any, rewarder: Any, mix: jax.Array, prompt: Arrays, response: Arrays
) -> jax.Array:
    """Normalised rewards [B] of responses by the reward models in `mix` [G, K].

    Args:
      rewarder: {"bank", "heads", "mean" [K], "std" [K]}, as trained by the reward stage.
      prompt: what the reward model reads before the response, {"prompt", "valid"} [B, Q], left-padded.
      response: {"tokens", "valid"} [B, N].
    """
    tokens = scoring.join(prompt["prompt"], response["tokens"])
    valid = scoring.join(prompt["valid"], response["valid"])
    policies = Policies(model, adapter, base, rewarder["bank"], mix)
    raw = scoring.rewards(policies, rewarder["heads"], mix, tokens, valid)
    rows = jnp.repeat(mix, raw.shape[0] // mix.shape[0], axis=0, total_repeat_length=raw.shape[0])
    return scoring.normalize(raw, {"mean": rows @ rewarder["mean"], "std": rows @ rewarder["std"]})


def experience(
    model: Decoder,
    adapter: AdapterConfig,
    config: ExperienceConfig,
    sampling: Sampling,
    base: Any,
    trainable: Any,
    prompt: Arrays,
    response: Arrays,
    scores: jax.Array,
    beta: jax.Array,
) -> tuple[Arrays, Arrays]:
    """Log-probabilities, values, rewards and advantages of sampled responses.

    Args:
      trainable: {"bank", "heads"}: the policies and their value heads.
      prompt, response: arrays [K n, ...] as sampled.
      scores: normalised rewards [K n].
      beta: KL coefficient per policy [K].

    Returns:
      rows: {"tokens", "valid" [K, n, P + N], "response", "mask", "logps", "values", "advantages", "returns" [K, n, N]};
      statistics: per-policy sums and means [K] for logging and the KL controller.
    """
    P = prompt["prompt"].shape[1]
    K = beta.shape[0]
    tokens = scoring.join(prompt["prompt"], response["tokens"])
    valid = scoring.join(prompt["valid"], response["valid"])
    mask = response["valid"].astype(jnp.float32)
    mix = jnp.eye(K)

    policies = Policies(model, adapter, base, trainable["bank"], mix)
    states = scoring.response_states(policies, tokens, valid, P)
    logps, entropy = scoring.token_logps(policies, states, response["tokens"], sampling.temperature)
    values = scoring.apply_heads(trainable["heads"], states, mix) * mask
    # The reference is the base itself: mix = 0, no second copy of the model.
    reference = Policies(model, adapter, base, None, None)
    reference_states = scoring.response_states(reference, tokens, valid, P)
    reference_logps, _ = scoring.token_logps(reference, reference_states, response["tokens"], sampling.temperature)

    def by_policy(x):
        return x.reshape(K, x.shape[0] // K, *x.shape[1:])

    ended = (response["tokens"] == sampling.eos_id) & response["valid"]
    stopped = ended.any(1)
    penalised = jnp.clip(scores, -config.score_clip, config.score_clip) if config.score_clip else scores
    penalised = penalised - config.missing_eos * ~stopped
    kl = pg.kl_estimate(logps, reference_logps, config.kl_kind) * mask

    def per_policy(score, kl, values, mask, beta):
        rewards = pg.token_rewards(score, kl, mask, beta)
        if config.whiten_rewards:
            rewards = pg.whiten(rewards, mask, shift_mean=False)
        advantages, returns = pg.gae(rewards, values, mask, config.gamma, config.lam)
        return rewards, pg.whiten(advantages, mask), returns

    grouped = [by_policy(x) for x in (penalised, kl, values, mask)]
    rewards, advantages, returns = jax.vmap(per_policy)(*grouped, beta)
    rows = {
        "tokens": by_policy(tokens),
        "valid": by_policy(valid),
        "response": by_policy(response["tokens"]),
        "mask": by_policy(mask),
        "logps": by_policy(logps * mask),
        "values": by_policy(values),
        "advantages": advantages,
        "returns": returns,
    }
    statistics = {
        "objective/kl": by_policy(kl.sum(1)).mean(1),
        "objective/scores": by_policy(scores).mean(1),
        "objective/rlhf_reward": rewards.sum(2).mean(1),
        "objective/entropy": by_policy((entropy * mask).sum(1)).mean(1),
        "completions/mean_length": by_policy(mask.sum(1)).mean(1),
        "completions/stopped_ratio": by_policy(stopped.astype(jnp.float32)).mean(1),
        "kl_coefficient": beta,
    }
    return rows, statistics
