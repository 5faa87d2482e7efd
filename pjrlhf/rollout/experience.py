"""From prompts to experience for K policies at once: sample, score, reward, advantages.

Rows are grouped by policy: B = K * n, rows k n .. (k + 1) n - 1 belong to policy k, so one-hot rows of `mix` drive K
policies through one program and everything that is averaged is averaged per policy. A single policy may as well be made
of several adapters, mixed by a row of `mix` per example.

Shapes: K policies, n rows per policy, P prompt slots, N response slots, Q slots of the reward model's prompt, S
objectives that a response is rewarded for, H heads of the combination (each with its own values), A adapters.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pjrlhf.errors import UserError
from pjrlhf.models.adapters import AdapterConfig, Policies
from pjrlhf.models.decoder import Decoder
from pjrlhf.objectives import policy_gradient as pg
from pjrlhf.objectives.multi_objective import calibrate, standardize
from pjrlhf.objectives.scalarization import CombinationRule, WeightedSum
from pjrlhf.rollout import scoring
from pjrlhf.rollout.sampler import Sampling, generate
from pjrlhf.settings import Settings, setting

Arrays = dict[str, jax.Array]
ESTIMATORS = ("gae", "rloo", "group")
ONE_REWARD = WeightedSum()


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
    model: Decoder,
    adapter: AdapterConfig,
    base: Any,
    rewarder: Any,
    objectives: jax.Array,
    prompt: Arrays,
    response: Arrays,
    scale: str = "std",
) -> jax.Array:
    """Rewards [B, S] of responses by the reward models numbered `objectives` int [G, S].

    Args:
      objectives: responses come in G equal consecutive groups, as the rows of `mix` have them.
      rewarder: {"bank", "heads", "mean", "std", "low", "high" [N]}, as trained by the reward stage.
      prompt: what the reward models read before the response, {"prompt", "valid"} [B, Q], left-padded.
      response: {"tokens", "valid"} [B, N].
      scale: "std", (r - mean) / std; "quantiles", between the low quantile (0) and the high one (1), clipped. Both were
        measured once on samples of the base.
    """
    tokens = scoring.join(prompt["prompt"], response["tokens"])
    valid = scoring.join(prompt["valid"], response["valid"])
    raw = raw_rewards(model, adapter, base, rewarder, objectives, tokens, valid)
    B, G = len(raw), len(objectives)
    rows = jnp.repeat(objectives, B // G, axis=0, total_repeat_length=B)
    if scale == "quantiles":
        return calibrate(raw, rewarder["low"][rows], rewarder["high"][rows])
    return scoring.normalize(raw, {name: rewarder[name][rows] for name in ("mean", "std")})


def raw_rewards(
    model: Decoder,
    adapter: AdapterConfig,
    base: Any,
    rewarder: Any,
    objectives: jax.Array,
    tokens: jax.Array,
    valid: jax.Array,
) -> jax.Array:
    """The same [B, S] in the models' own units, of whole rows [B, T]; `rewarder` needs no scale."""
    (G, S), B = objectives.shape, len(tokens)

    def once_per_objective(x):
        x = x.reshape(G, 1, B // G, x.shape[1])
        return jnp.broadcast_to(x, (G, S, *x.shape[2:])).reshape(-1, x.shape[3])

    mix = jax.nn.one_hot(objectives.reshape(-1), rewarder["heads"]["bias"].shape[0])
    policies = Policies(model, adapter, base, rewarder["bank"], mix)
    raw = scoring.rewards(policies, rewarder["heads"], mix, once_per_objective(tokens), once_per_objective(valid))
    return raw.reshape(G, S, B // G).swapaxes(1, 2).reshape(B, S)


def init_value_heads(policies: int, heads: int, width: int) -> Arrays:
    """Zero value heads: kernel [K, H, D], bias [K, H]."""
    return {"kernel": jnp.zeros((policies, heads, width)), "bias": jnp.zeros((policies, heads))}


def values_of(heads: Arrays, states: jax.Array) -> jax.Array:
    """Float32 values [K, n, N, H] of hidden states [K n, N, D]."""
    K = heads["bias"].shape[0]
    states = states.reshape(K, -1, *states.shape[1:]).astype(jnp.float32)
    return jnp.einsum("kntd,khd->knth", states, heads["kernel"]) + heads["bias"][:, None, None]


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
    goal: Arrays | None = None,
    combination: CombinationRule = ONE_REWARD,
) -> tuple[Arrays, Arrays]:
    """Log-probabilities, values, rewards and advantages of sampled responses.

    Args:
      trainable: {"bank", "heads"}: the policies and their value heads.
      prompt, response: arrays [K n, ...] as sampled.
      scores: normalised rewards [K n, S], one per objective.
      beta: KL coefficient per policy [K].
      goal: {"weights" [K n, S], "mix" [G, A], optional "group" int [K n]}: preference weights, who sampled, and
        which preference it was. By default S = 1, of weight 1, and policy k is adapter k.
      combination: how the objectives become one advantage; static.

    Returns:
      rows: {"tokens", "valid" [K, n, P + N], "response", "mask", "logps", "advantages" [K, n, N], "values", "returns"
      [K, n, N, H], "mix" [K, n, A] where `goal["mix"]` has a row per example};
      statistics: per-policy sums and means [K] for logging and the KL controller, "heads" [K, H] the weights of the
      heads.
    """
    P = prompt["prompt"].shape[1]
    K = beta.shape[0]
    goal = goal or {"weights": jnp.ones_like(scores), "mix": jnp.eye(K)}
    tokens = scoring.join(prompt["prompt"], response["tokens"])
    valid = scoring.join(prompt["valid"], response["valid"])
    mask = response["valid"].astype(jnp.float32)

    policies = Policies(model, adapter, base, trainable["bank"], goal["mix"])
    states = scoring.response_states(policies, tokens, valid, P)
    logps, entropy = scoring.token_logps(policies, states, response["tokens"], sampling.temperature)
    # The reference is the base itself: mix = 0, no second copy of the model.
    reference = Policies(model, adapter, base, None, None)
    reference_states = scoring.response_states(reference, tokens, valid, P)
    reference_logps, _ = scoring.token_logps(reference, reference_states, response["tokens"], sampling.temperature)

    def by_policy(x):
        return x.reshape(K, x.shape[0] // K, *x.shape[1:])

    values = values_of(trainable["heads"], states) * by_policy(mask)[..., None]
    ended = (response["tokens"] == sampling.eos_id) & response["valid"]
    stopped = ended.any(1)
    limited = jnp.clip(scores, -config.score_clip, config.score_clip) if config.score_clip else scores
    kl = pg.kl_estimate(logps, reference_logps, config.kl_kind) * mask
    group = goal.get("group", jnp.zeros(len(scores), jnp.int32))

    def per_policy(score, p, group, stopped, kl, values, mask, beta):
        penalty = config.missing_eos_penalty * ~stopped
        heads = combination.rewards(score, p) - penalty[:, None]
        if config.estimator == "gae":
            rewards = jax.vmap(pg.token_rewards, (1, None, None, None), -1)(heads, kl, mask, beta)
            if config.whiten_rewards:
                rewards = jax.vmap(lambda r: pg.whiten(r, mask, shift_mean=False), -1, -1)(rewards)
            gae = jax.vmap(lambda r, v: pg.gae(r, v, mask, config.gamma, config.lam), (-1, -1), -1)
            advantages, returns = gae(rewards, values)
            if combination.standardizes_heads:
                advantages = jax.vmap(lambda a: pg.whiten(a, mask), -1, -1)(advantages)
        else:
            total = (heads - beta * kl.sum(1)[:, None]).reshape(-1, config.samples_per_prompt, heads.shape[1])
            if config.estimator == "rloo":
                relative = (total - total.mean(1, keepdims=True)) * config.samples_per_prompt
                relative = relative / (config.samples_per_prompt - 1)
            else:
                relative = standardize(total, jnp.ones_like(total, bool), axis=1)
            advantages = relative.reshape(heads.shape)[:, None] * mask[..., None]
            returns = jnp.zeros_like(values)
        mixed, info = combination.advantages(advantages, p, mask, group)
        if config.estimator == "gae":
            mixed = pg.whiten(mixed, mask)
        elif config.estimator == "group" and combination.standardizes_heads:
            # The last step of GDPO: over the answers of the batch.
            each = mixed[:, 0]
            mixed = standardize(each, jnp.ones_like(each, bool), axis=None)[:, None] * mask
        reward = (score * p).sum(1) - penalty - beta * kl.sum(1)
        return mixed, returns, info, reward.mean()

    grouped = [by_policy(x) for x in (limited, goal["weights"], group, stopped, kl)]
    advantages, returns, info, reward = jax.vmap(per_policy)(*grouped, values, by_policy(mask), beta)
    rows = {
        "tokens": by_policy(tokens),
        "valid": by_policy(valid),
        "response": by_policy(response["tokens"]),
        "mask": by_policy(mask),
        "logps": by_policy(logps * mask),
        "values": values,
        "advantages": advantages,
        "returns": returns,
    }
    if len(goal["mix"]) == len(tokens):
        rows["mix"] = by_policy(goal["mix"])
    statistics = {
        "objective/kl": by_policy(kl.sum(1)).mean(1),
        "objective/scores": by_policy((scores * goal["weights"]).sum(1)).mean(1),
        "objective/rlhf_reward": reward,
        "objective/entropy": by_policy((entropy * mask).sum(1)).mean(1),
        "completions/mean_length": by_policy(mask.sum(1)).mean(1),
        "completions/stopped_ratio": by_policy(stopped.astype(jnp.float32)).mean(1),
        "kl_coefficient": beta,
        "heads": info["weights"],
        "objective/gradient_cosine": info["gradient_cosine"],
    }
    return rows, statistics
