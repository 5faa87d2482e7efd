"""Scoring of given sequences: log-probabilities, values and rewards of prompt + response rows.

Rows come without slots for user tokens; the policies that have such tokens make the slots here. So a reference without
user tokens sees the plain prompt, and a response is found at the end of a row either way.

Shapes: B rows, P prompt slots (left-padded), N response slots (right-padded), D model width, K adapters.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pjrlhf.models.adapters import Policies


def join(prompt: jax.Array, response: jax.Array) -> jax.Array:
    """[B, P] and [B, N] to [B, P + N]."""
    return jnp.concatenate([prompt, response], axis=1)


def response_states(policies: Policies, tokens: jax.Array, valid: jax.Array, prompt_slots: int) -> jax.Array:
    """Hidden states that predict the response: [B, N, D] of rows [B, P + N]; entry t has seen everything before
    token t.
    """
    N = tokens.shape[1] - prompt_slots
    hidden, _ = policies(*policies.reserve(tokens, valid))
    return hidden[:, -N - 1 : -1]


def token_logps(
    policies: Policies, states: jax.Array, response: jax.Array, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of `response` [B, N] and entropies, float32 [B, N] nats, of softmax(logits / temperature).

    Only response positions reach the vocabulary, so logits are [B, N, V] and never [B, P + N, V].
    """
    logps = jax.nn.log_softmax(policies.logits(states) / temperature)
    chosen = jnp.take_along_axis(logps, response[..., None], axis=-1)[..., 0]
    return chosen, -(jnp.exp(logps) * logps).sum(-1)


def sequence_logps(
    policies: Policies, tokens: jax.Array, valid: jax.Array, prompt_slots: int
) -> tuple[jax.Array, jax.Array]:
    """(summed log-probabilities, number of tokens) of the responses of rows [B, P + N], float32 [B], nats.

    Padding, the prompt and user tokens are not scored.
    """
    mask = valid[:, prompt_slots:]
    states = response_states(policies, tokens, valid, prompt_slots)
    logps, _ = token_logps(policies, states, tokens[:, prompt_slots:])
    return jnp.where(mask, logps, 0.0).sum(1), mask.sum(1).astype(jnp.float32)


def init_heads(count: int, width: int, key: jax.Array | None = None) -> dict[str, jax.Array]:
    """`count` scalar heads: kernel [K, D], bias [K]. Zero (value heads), or N(0, 1 / (D + 1)) from `key` (reward
    heads).

    The spread is that of Stiennon et al. 2020.
    """
    kernel = jnp.zeros((count, width)) if key is None else jax.random.normal(key, (count, width)) * (width + 1) ** -0.5
    return {"kernel": kernel, "bias": jnp.zeros(count)}


def apply_heads(heads: dict[str, jax.Array], states: jax.Array, mix: jax.Array) -> jax.Array:
    """Scalar per position, float32 [B, T]: the heads combined by `mix` [G, K] as the adapters are."""
    rows = jnp.repeat(mix, states.shape[0] // mix.shape[0], axis=0, total_repeat_length=states.shape[0])
    kernel, bias = rows @ heads["kernel"], rows @ heads["bias"]
    return jnp.einsum("btd,bd->bt", states.astype(jnp.float32), kernel) + bias[:, None]


def rewards(
    policies: Policies, heads: dict[str, jax.Array], mix: jax.Array, tokens: jax.Array, valid: jax.Array
) -> jax.Array:
    """Reward of each row, float32 [B]: the head at the last valid token of the whole row, found from `valid`."""
    tokens, valid = policies.reserve(tokens, valid)
    hidden, _ = policies(tokens, valid)
    last = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    states = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return apply_heads(heads, states, mix)[:, 0]


def normalize(rewards: jax.Array, statistics: Any) -> jax.Array:
    """(reward - mean) / std with `statistics` {"mean" [K], "std" [K]} measured once on samples of the base; rewards
    [..., K].
    """
    return (rewards - statistics["mean"]) / statistics["std"]
