"""Scoring of given sequences: log-probabilities, values and rewards of prompt + response rows, or of packed rows.

Unpacked rows come without positions for user tokens; policies with user tokens insert them here. So a reference without
user tokens sees the plain prompt, and the response is always the last N positions.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Bool, Float, Int, Shaped

from pjrlhf.data.packing import NOWHERE, PackedRows
from pjrlhf.models.adapters import Policies
from pjrlhf.models.decoder import Layout
from pjrlhf.types import Array, Params, PRNGKey

# The projection to the vocabulary runs in chunks of tokens whose logits take at most `LOGIT_BYTES` per device, and
# recomputes them in the backward pass. If all logits fit in `SAVED_CHUNKS` times as many bytes, they are saved for the
# backward pass instead, and chunks are a quarter as large, which uses the processor's cache better.
LOGIT_BYTES = 2**28
SAVED_CHUNKS = 4
T = TypeVar("T")


def join(prompt: Shaped[Array, "B P"], response: Shaped[Array, "B N"]) -> Shaped[Array, "B P+N"]:
    """Concatenates prompt and response rows."""
    return jnp.concatenate([prompt, response], axis=1)


def response_states(
    policies: Policies, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"], prompt_length: int
) -> Float[Array, "B N D"]:
    """Hidden states that predict the response, N = T - `prompt_length`."""
    N = tokens.shape[1] - prompt_length
    hidden, _ = policies(*policies.reserve(tokens, valid))
    return hidden[:, -N - 1 : -1]


@jax.custom_vjp
def _log_softmax_at(
    logits: Float[Array, "*batch V"], target: Int[Array, "*batch"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """(log-probability of `target`, entropy) of softmax(logits), nats.

    Reduces over the vocabulary without a gather, so that devices sum their shards of V. Saves only the logits and
    results [*batch] for the backward pass.
    """
    return _log_softmax(logits, target)[0]


def _log_softmax(logits, target):
    """((log-probability, entropy), log normaliser), each [*batch]."""
    maximum = logits.max(-1)
    z = logits - maximum[..., None]
    weight = jnp.exp(z)
    total = weight.sum(-1)
    log_total = jnp.log(total)
    chosen = jnp.where(jnp.arange(logits.shape[-1]) == target[..., None], z, 0.0).sum(-1)
    # `where` here and below, because the logit of a token that is ruled out is -inf.
    entropy = log_total - jnp.where(weight > 0, weight * z, 0.0).sum(-1) / total
    return (chosen - log_total, entropy), log_total + maximum


def _forward(logits, target):
    result, normalizer = _log_softmax(logits.value, target.value)
    return result, (logits.value, target.value, normalizer, result[1])


def _backward(residuals, gradients):
    logits, target, normalizer, entropy = residuals
    d_logp, d_entropy = gradients
    logps = logits - normalizer[..., None]
    probs, total = jnp.exp(logps), 0.0
    if not isinstance(d_logp, SymbolicZero):
        chosen = jnp.arange(logits.shape[-1]) == target[..., None]
        total += d_logp[..., None] * (chosen - probs)
    if not isinstance(d_entropy, SymbolicZero):
        total -= d_entropy[..., None] * jnp.where(probs > 0, probs * (logps + entropy[..., None]), 0.0)
    return total, None


_log_softmax_at.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunked(
    score: Callable[[Array, Array], T], policies: Policies, states: Float[Array, "B N D"], target: Int[Array, "B N"]
) -> T:
    """`score(states, target)`, leaves [B, N], applied to chunks of the N tokens, see `LOGIT_BYTES`."""
    (B, N), model = target.shape, policies.model
    shards = 1
    if model.batch_sharding is not None:  # rows are split over data x fsdp, the vocabulary over tensor
        shards = math.prod(model.batch_sharding.mesh.shape.values())
    logits = 4 * B * N * model.config.vocab_size / shards / LOGIT_BYTES
    saved = logits <= SAVED_CHUNKS
    chunks = min(N, math.ceil(logits * (4 if saved else 1)))
    if chunks <= 1:
        return score(states, target)
    size = math.ceil(N / chunks)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, chunks * size - N), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(B, chunks, size, *x.shape[2:]).swapaxes(0, 1)

    one = (lambda chunk: score(*chunk)) if saved else jax.checkpoint(lambda chunk: score(*chunk))
    result = jax.lax.map(one, (split(states), split(target)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, -1)[:, :N], result)


def token_logps(
    policies: Policies,
    states: Float[Array, "B N D"],
    response: Int[Array, "B N"],
    temperature: Float[Array, ""] | float = 1.0,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """(log-probabilities of `response`, entropies) of softmax(logits / temperature), float32, nats.

    `states` are those of `response_states`. Chunked: logits [B, N, V] never exist at once if they are large.
    """

    def score(states, target):
        return _log_softmax_at(policies.logits(states) / temperature, target)

    return _chunked(score, policies, states, response)


def _logps(policies: Policies, states: Float[Array, "B N D"], target: Int[Array, "B N"]) -> Float[Array, "B N"]:
    """Log-probabilities at temperature 1. Without entropies, which would cost time in the backward pass."""
    return _chunked(lambda *chunk: _log_softmax_at(policies.logits(chunk[0]), chunk[1])[0], policies, states, target)


def sequence_logps(
    policies: Policies,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    prompt_length: int,
    scored: Bool[Array, "B N"] | None = None,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(summed log-probabilities in nats, number of tokens) of the responses, float32.

    A row has `prompt_length` prompt positions. Prompt, user tokens and padding are not scored, and of the response only
    what `scored` says, where it is given.
    """
    mask = valid[:, prompt_length:] if scored is None else scored
    states = response_states(policies, tokens, valid, prompt_length)
    logps = _logps(policies, states, tokens[:, prompt_length:])
    return jnp.where(mask, logps, 0.0).sum(1), mask.sum(1).astype(jnp.float32)


def _packed_states(policies: Policies, rows: PackedRows, columns: Int[Array, "Z X"]) -> Float[Array, "Z X D"]:
    """Hidden states of packed rows at positions `columns` of their parts."""
    layout = Layout(rows.position, rows.segment, rows.branch, rows.owner)
    hidden, _ = policies(rows.tokens, rows.segment > 0, layout=layout)
    return _at(hidden, columns)


def _at(x: Shaped[Array, "B T *rest"], columns: Int[Array, "Z X"]) -> Shaped[Array, "Z X *rest"]:
    """Gathers `x` at positions `columns` of its Z parts of B T / Z positions each."""
    columns = columns.reshape(*columns.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x.reshape(len(columns), -1, *x.shape[2:]), columns, axis=1)


def _per_answer(values: Float[Array, "Z X"], answer: Int[Array, "Z X"], count: int) -> Float[Array, " {count}"]:
    """Sums `values` by their index in `answer`; values of no answer are dropped."""
    return jnp.zeros(count, values.dtype).at[answer].add(values, mode="drop")


def packed_token_logps(policies: Policies, rows: PackedRows) -> tuple[Float[Array, "Z X"], Bool[Array, "Z X"]]:
    """(log-probabilities in nats, mask) of the answers' tokens in packed rows.

    `rows.owner` indexes the rows of `mix` (where it has several) and of user tokens.
    """
    states = _packed_states(policies, rows, rows.columns)
    return _logps(policies, states, rows.targets), rows.answer < NOWHERE


def packed_logps(policies: Policies, rows: PackedRows) -> Float[Array, " {rows.answers}"]:
    """Log-probabilities of `packed_token_logps` summed over each answer."""
    return _per_answer(packed_token_logps(policies, rows)[0], rows.answer, rows.answers)


def packed_rewards(
    policies: Policies, heads: Params, mix: Float[Array, "O K"], rows: PackedRows
) -> Float[Array, " {rows.answers}"]:
    """Rewards of the answers in packed rows, float32: the head at each answer's last token.

    `mix` combines the heads, by one row for all owners or one for each.
    """
    states = _packed_states(policies, rows, rows.last).astype(jnp.float32)
    kernel, bias = mix @ heads["kernel"], mix @ heads["bias"]
    if len(mix) == 1:
        values = states @ kernel[0] + bias[0]
    else:
        owner = _at(rows.owner, rows.last)
        values = jnp.einsum("zmd,zmd->zm", states, kernel[owner]) + bias[owner]
    return _per_answer(values, rows.last_answer, rows.answers)


def wasted_tokens(rows: PackedRows) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(padding positions, all positions) of packed rows, float32."""
    padding = (rows.segment == 0).astype(jnp.float32)
    return padding.sum(), jnp.float32(padding.size)


def init_heads(count: int, width: int, key: PRNGKey | None = None) -> dict[str, Array]:
    """K = `count` scalar heads: "kernel" [K, D] and "bias" [K].

    Kernels are zero (value heads), or with a `key` N(0, 1 / (D + 1)) (reward heads, Stiennon et al. 2020).
    """
    kernel = jnp.zeros((count, width)) if key is None else jax.random.normal(key, (count, width)) * (width + 1) ** -0.5
    return {"kernel": kernel, "bias": jnp.zeros(count)}


def apply_heads(heads: Params, states: Float[Array, "B T D"], mix: Float[Array, "G K"]) -> Float[Array, "B T"]:
    """One float32 scalar per position; `mix` combines the heads as it does adapters."""
    rows = jnp.repeat(mix, states.shape[0] // mix.shape[0], axis=0, total_repeat_length=states.shape[0])
    kernel, bias = rows @ heads["kernel"], rows @ heads["bias"]
    return jnp.einsum("btd,bd->bt", states.astype(jnp.float32), kernel) + bias[:, None]


def rewards(
    policies: Policies,
    heads: Params,
    mix: Float[Array, "G K"],
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> Float[Array, " B"]:
    """Reward of each row, float32: the head at its last valid token."""
    tokens, valid = policies.reserve(tokens, valid)
    hidden, _ = policies(tokens, valid)
    last = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    states = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return apply_heads(heads, states, mix)[:, 0]


def normalize(rewards: Float[Array, "*batch K"], statistics: Params) -> Float[Array, "*batch K"]:
    """(reward - mean) / std; `statistics` {"mean" [K], "std" [K]} are those of samples of the base."""
    return (rewards - statistics["mean"]) / statistics["std"]
