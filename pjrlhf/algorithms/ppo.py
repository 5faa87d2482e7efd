"""Proximal policy optimization (PPO, arXiv 1707.06347) of K policies at once, as pure functions of their experience."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from pjrlhf.models.adapters import Backbone
from pjrlhf.objectives import policy_gradient as pg
from pjrlhf.rollout import scoring
from pjrlhf.rollout.batches import Experience, join_rows, split_rows
from pjrlhf.rollout.experience import values_of
from pjrlhf.settings import Settings, setting
from pjrlhf.training.state import State
from pjrlhf.types import Array, Params, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(Settings):
    """Settings of the PPO update."""

    epochs: int = setting(2, "passes over a batch", low=1, high=1000)
    minibatches: int = setting(2, "parts of every pass", low=1, high=2**20)
    accumulation_steps: int = setting(
        1, "parts of a minibatch that are computed one after the other", low=1, high=2**20
    )
    policies_at_once: int = setting(
        0, "policies whose gradients are taken together, 0: all; fewer take less memory and change no number", low=0
    )
    clip: float = setting(0.2, "range of the ratio around 1", above=0.0, high=1e6)
    value_clip: float = setting(0.2, "range of the values around the old ones", above=0.0, high=1e6)
    vf_coef: float = setting(0.1, "weight of the value loss", low=0.0, high=1e6)
    entropy_coef: float = setting(0.0, "weight of the entropy bonus", low=0.0, high=1e6)


def ppo_loss(
    config: PPOConfig,
    backbone: Backbone,
    trainable: Params,
    experience: Experience,
    share: Float[Array, " K"] | float = 1.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Sum over the K policies of their PPO losses, and metrics [K].

    Each policy's loss is a mean over its own tokens, and no parameter belongs to two policies, so the gradient is
    that of K separate runs. Of several value heads the mean of the losses counts.

    Args:
      trainable: {"bank", "value_heads"}.
      share: factor of each policy's loss and metrics: the fraction of its tokens in a minibatch that `experience` has,
        so that the parts of a minibatch add up to the whole.
    """
    K, mix = len(experience.tokens), experience.mix
    policies = backbone.policies(trainable["bank"], jnp.eye(K) if mix is None else join_rows(mix))
    rows = join_rows((experience.tokens, experience.valid))
    states = scoring.response_states(policies, *rows, experience.prompt_length)
    found = scoring.token_logps(policies, states, join_rows(experience.response), experience.temperature)
    logps, entropy = split_rows(found, K)
    values = values_of(trainable["value_heads"], states)

    def per_policy(logps, entropy, values, old, mask):
        policy_loss, metrics = pg.ppo_policy_loss(logps, old.logps, old.advantages, mask, config.clip)
        per_head = jax.vmap(pg.value_loss, (-1, -1, -1, None, None))
        value_loss, value_clipped = per_head(values, old.values, old.returns, mask, config.value_clip)
        entropy = pg.masked_mean(entropy, mask)
        loss = policy_loss + config.vf_coef * value_loss.mean() - config.entropy_coef * entropy
        metrics |= {
            "loss/policy_avg": policy_loss,
            "loss/value_avg": value_loss.mean(),
            "val/clipfrac_avg": value_clipped.mean(),
            "policy/entropy_avg": entropy,
        }
        return loss, metrics

    losses, metrics = jax.vmap(per_policy)(logps, entropy, values, experience, experience.mask)
    return (losses * share).sum(), jax.tree.map(lambda x: x * share, metrics)


def ppo_gradient(
    config: PPOConfig, backbone: Backbone, trainable: Params, experience: Experience
) -> tuple[Params, dict[str, Array]]:
    """Gradient of `ppo_loss` and its metrics [K]; of `config.policies_at_once` policies at once, one group of policies
    after the other, and of `config.accumulation_steps` parts of the rows, one after the other. Adapters mixed for every
    row belong to all policies, so these cannot be split.
    """

    def gradient(
        trainable: Params, experience: Experience, share: Float[Array, " G"]
    ) -> tuple[Params, dict[str, Array]]:
        return jax.grad(ppo_loss, argnums=2, has_aux=True)(config, backbone, trainable, experience, share)

    def of_groups(experience: Experience, share: Float[Array, " K"]) -> tuple[Params, dict[str, Array]]:
        if together == K:
            return gradient(trainable, experience, share)
        groups = split_rows((trainable, experience, share), K // together)
        return join_rows(jax.lax.map(lambda group: gradient(*group), groups))

    K, count = len(experience.tokens), config.accumulation_steps
    together = config.policies_at_once or K
    if K % together or (together < K and experience.mix is not None):
        raise ValueError(f"gradients of {K} policies cannot be taken of {together} at once")
    if count == 1:
        return of_groups(experience, jnp.ones(K))
    # [parts, K, rows of a part, ...]; every part counts by its tokens, as in the mean over the whole.
    parts = jax.tree.map(lambda x: x.reshape(K, count, -1, *x.shape[2:]).swapaxes(0, 1), experience)
    tokens = jax.vmap(lambda part: part.mask.sum((1, 2)))(parts)
    shares = tokens / jnp.maximum(tokens.sum(0), 1)

    def add(sums: tuple[Params, dict[str, Array]], part: tuple[Experience, Array]) -> tuple[Any, None]:
        return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), sums, of_groups(*part)), None

    shapes = jax.eval_shape(of_groups, jax.tree.map(lambda x: x[0], parts), shares[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    (total, metrics), _ = jax.lax.scan(add, zeros, (parts, shares))
    return jax.tree.map(lambda g, x: g.astype(x.dtype), total, trainable), metrics


def ppo_update(
    config: PPOConfig,
    optimizer: optax.GradientTransformation,
    backbone: Backbone,
    state: State,
    experience: Experience,
    key: PRNGKey,
) -> tuple[State, dict[str, Array]]:
    """`epochs` x `minibatches` PPO steps on one batch of experience; old log-probs and advantages stay fixed.

    Returns:
      the state with new `trainable` and `opt_state`, and metrics [K] averaged over the steps; `policy/first_approxkl`
      is that of the first step, 0 up to rounding because nothing has moved yet.
    """
    n = experience.tokens.shape[1]
    if n % config.minibatches:
        raise ValueError(f"{n} rollouts per policy cannot be split into {config.minibatches} equal minibatches")

    def step(carry, index):
        trainable, opt_state = carry
        part = jax.tree.map(lambda x: x[:, index], experience)
        gradient, metrics = ppo_gradient(config, backbone, trainable, part)
        updates, opt_state = optimizer.update(gradient, opt_state, trainable)
        return (optax.apply_updates(trainable, updates), opt_state), metrics

    keys = jax.random.split(key, config.epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, n))(keys)
    order = order.reshape(config.epochs * config.minibatches, n // config.minibatches)
    (trainable, opt_state), metrics = jax.lax.scan(step, (state.trainable, state.opt_state), order)
    first = metrics["policy/approxkl_avg"][0]
    metrics = jax.tree.map(lambda x: x.mean(0), metrics)
    return state.replace(trainable=trainable, opt_state=opt_state), metrics | {"policy/first_approxkl": first}
