"""Scoring of given sequences: log-probabilities, values and rewards of prompt + response rows, or of packed ones.

Rows come without slots for user tokens; the policies that have such tokens make the slots here. So a reference without
user tokens sees the plain prompt, and a response is found at the end of a row either way.

Shapes: B rows, P prompt slots (left-padded), N response slots (right-padded), D model width, K adapters, V vocabulary.
Those of packed rows are in `data.packing`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pjrlhf.data.packing import NOWHERE
from pjrlhf.models.adapters import Policies
from pjrlhf.models.decoder import Layout

# Logits that a device holds at once when tokens are scored. Where all are at most four times as many, they are kept for
# the gradient and come in smaller parts, which stay nearer to the processor.
LOGIT_BYTES = 2**28
KEPT = 4


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


@jax.custom_vjp
def _log_softmax_at(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log-probability of `target` [...], entropy [...]) of softmax(logits [..., V]).

    Sums over the vocabulary alone, no gather: where V is split over devices, each adds up its part. For the gradient
    nothing but the logits is kept.
    """
    return _scored(logits, target)[0]


def _scored(logits, target):
    top = logits.max(-1)
    z = logits - top[..., None]
    weight = jnp.exp(z)
    total = weight.sum(-1)
    log_total = jnp.log(total)
    chosen = jnp.where(jnp.arange(logits.shape[-1]) == target[..., None], z, 0.0).sum(-1)
    entropy = log_total - (weight * z).sum(-1) / total
    return (chosen - log_total, entropy), log_total + top


def _scored_forward(logits, target):
    found, normalizer = _scored(logits.value, target.value)
    return found, (logits.value, target.value, normalizer, found[1])


def _scored_backward(saved, gradients):
    logits, target, normalizer, entropy = saved
    of_logp, of_entropy = gradients
    logps = logits - normalizer[..., None]
    probs, total = jnp.exp(logps), 0.0
    if not isinstance(of_logp, SymbolicZero):
        chosen = jnp.arange(logits.shape[-1]) == target[..., None]
        total += of_logp[..., None] * (chosen - probs)
    if not isinstance(of_entropy, SymbolicZero):
        total -= of_entropy[..., None] * probs * (logps + entropy[..., None])
    return total, None


_log_softmax_at.defvjp(_scored_forward, _scored_backward, symbolic_zeros=True)


def _in_parts(score: Callable[..., Any], policies: Policies, states: jax.Array, target: jax.Array) -> Any:
    """`score(states [B, n, D], target [B, n])`, leaves [B, n], for all N tokens, in parts whose logits are at most
    `LOGIT_BYTES` on a device. For the gradient they are made anew, or kept where all are at most `KEPT` times as many.
    """
    (B, N), model = target.shape, policies.model
    shards = 1
    if model.rows is not None:
        shards = math.prod(model.rows.mesh.shape.values())  # rows over data x fsdp, the vocabulary over tensor
    logits = 4 * B * N * model.config.vocab_size / shards / LOGIT_BYTES
    kept = logits <= KEPT
    parts = min(N, math.ceil(logits * (4 if kept else 1)))
    if parts <= 1:
        return score(states, target)
    size = math.ceil(N / parts)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, parts * size - N), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(B, parts, size, *x.shape[2:]).swapaxes(0, 1)

    one = (lambda part: score(*part)) if kept else jax.checkpoint(lambda part: score(*part))
    found = jax.lax.map(one, (split(states), split(target)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, -1)[:, :N], found)


def token_logps(
    policies: Policies, states: jax.Array, response: jax.Array, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of `response` [B, N] and entropies, float32 [B, N] nats, of softmax(logits / temperature).

    Only response positions reach the vocabulary, and a part of them at a time: never all logits [B, N, V].
    """

    def score(states, target):
        return _log_softmax_at(policies.logits(states) / temperature, target)

    return _in_parts(score, policies, states, response)


def _logps(policies: Policies, states: jax.Array, target: jax.Array) -> jax.Array:
    """The same without entropies, which the gradient would pay for, at temperature 1."""
    return _in_parts(lambda *part: _log_softmax_at(policies.logits(part[0]), part[1])[0], policies, states, target)


def sequence_logps(
    policies: Policies, tokens: jax.Array, valid: jax.Array, prompt_slots: int
) -> tuple[jax.Array, jax.Array]:
    """(summed log-probabilities, number of tokens) of the responses of rows [B, P + N], float32 [B], nats.

    Padding, the prompt and user tokens are not scored.
    """
    mask = valid[:, prompt_slots:]
    states = response_states(policies, tokens, valid, prompt_slots)
    logps = _logps(policies, states, tokens[:, prompt_slots:])
    return jnp.where(mask, logps, 0.0).sum(1), mask.sum(1).astype(jnp.float32)


def _packed_states(policies: Policies, rows: Mapping[str, jax.Array], columns: jax.Array) -> jax.Array:
    """Hidden states [Z, S, D] of packed rows at slots `columns` [Z, S] of their parts."""
    layout = Layout(rows["position"], rows["segment"], rows["branch"], rows["owner"])
    hidden, _ = policies(rows["tokens"], rows["segment"] > 0, layout=layout)
    return _at(hidden, columns)


def _at(x: jax.Array, columns: jax.Array) -> jax.Array:
    """[Z, S, ...] of `x` [R, T, ...] at slots `columns` [Z, S] of its parts."""
    columns = columns.reshape(*columns.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x.reshape(len(columns), -1, *x.shape[2:]), columns, axis=1)


def _per_answer(values: jax.Array, answer: jax.Array, count: int) -> jax.Array:
    """Sums [count] of `values` by the number of the answer they belong to; those of no answer are left out."""
    return jnp.zeros(count, values.dtype).at[answer].add(values, mode="drop")


def packed_token_logps(policies: Policies, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities float32 [Z, S], nats, mask bool [Z, S]) of the answers' tokens in packed rows.

    Args:
      rows: as made by `data.packing.pack`; the rows of `mix` and user tokens, where there are several, are those that
        `owner` numbers.
    """
    states = _packed_states(policies, rows, rows["columns"])
    return _logps(policies, states, rows["targets"]), rows["answer"] < NOWHERE


def packed_logps(policies: Policies, rows: Mapping[str, jax.Array], count: int) -> jax.Array:
    """The same summed by answer, float32 [count], in the order of their numbers."""
    return _per_answer(packed_token_logps(policies, rows)[0], rows["answer"], count)


def packed_rewards(
    policies: Policies, heads: dict[str, jax.Array], mix: jax.Array, rows: Mapping[str, jax.Array], count: int
) -> jax.Array:
    """Rewards of the answers in packed rows, float32 [count]: the head at the last token of each. `mix` combines heads,
    one row for all or one per owner.
    """
    states = _packed_states(policies, rows, rows["last"]).astype(jnp.float32)
    kernel, bias = mix @ heads["kernel"], mix @ heads["bias"]
    if len(mix) == 1:
        values = states @ kernel[0] + bias[0]
    else:
        owner = _at(rows["owner"], rows["last"])
        values = jnp.einsum("zmd,zmd->zm", states, kernel[owner]) + bias[owner]
    return _per_answer(values, rows["last_answer"], count)


def wasted_tokens(rows: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(slots of padding, slots) of packed rows, float32."""
    padding = (rows["segment"] == 0).astype(jnp.float32)
    return padding.sum(), jnp.float32(padding.size)


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
