"""Sampling with a key/value cache: one prefill, and a decode loop that compacts the batch as rows finish."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pjrlhf.errors import UserError
from pjrlhf.models.adapters import Policies, copy_indices
from pjrlhf.models.decoder import init_cache
from pjrlhf.rollout.batches import Prompts, Rollout
from pjrlhf.rollout.decoding import PolicyEnsemble
from pjrlhf.rollout.noise import likeliest, row_noise
from pjrlhf.types import Array, PRNGKey

# Smallest batch to compact to: with fewer rows, a matmul is bound by reading its kernel and gets no faster.
MIN_COMPACT_ROWS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of sampling.

    Attributes:
      max_new_tokens: N.
      eos_ids: the tokens that end a response, at least one; they may be traced.
      pad_id: fills rows after the end; may be traced.
      temperature: 0 is greedy.
      top_k, top_p: truncation of the distribution, 0 and 1 turn it off. For serving and evaluation only: training
        scores samples under the full distribution, so truncated samples would give wrong ratios.

    Raises:
      UserError: a value out of range.
    """

    max_new_tokens: int
    eos_ids: tuple[int | Int[Array, ""], ...]
    pad_id: int | Int[Array, ""]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.eos_ids:
            raise UserError("eos_ids: is empty, so responses cannot end; give at least one token id")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: below 1; an answer has at least one token")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature}: choose 0 for greedy decoding, or a number above")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: below 0; choose 0 to turn it off")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: not in (0, 1]; choose 1 to turn it off")

    def ends(self, tokens: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Whether each token ends a response."""
        return functools.reduce(jnp.logical_or, (tokens == i for i in self.eos_ids))

    @property
    def truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0


def truncate(logits: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """Sets logits outside the truncated distribution to -inf.

    Keeps the `top_k` most likely tokens, then the smallest set with probability >= `top_p` (arXiv 1904.09751). Ties
    with the last token kept are kept.
    """
    if top_k > 0:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1.0:
        ordered = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token is kept if the mass before it is below top_p, so at least one is.
        keep = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        threshold = jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits


def truncate_rows(
    logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """`truncate` with a `top_k` and a `top_p` for every row, which may be traced."""
    ordered = -jnp.sort(-logits, axis=-1)
    last = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1]) - 1
    kth = jnp.take_along_axis(ordered, last[:, None], axis=-1)
    ordered = jnp.where(ordered < kth, -jnp.inf, ordered)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    keep = (jnp.cumsum(probabilities, axis=-1) - probabilities < top_p[:, None]) | (top_p[:, None] >= 1.0)
    threshold = jnp.maximum(kth, jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True))
    return jnp.where(logits < threshold, -jnp.inf, logits)


def generate(
    policies: Policies | PolicyEnsemble,
    sampling: Sampling,
    prompts: Prompts,
    key: PRNGKey,
    numbers: Int[Array, " B"] | None = None,
    total: int = 0,
) -> Rollout:
    """Samples one continuation [B, N] of every prompt [B, P]; call it inside `jax.jit`.

    Args:
      policies: of a batch of B rows.
      sampling: static settings.
      key: of the samples.
      numbers: of the rows in a batch of `total` rows with this key, whose samples they get; all of them where None.

    Raises:
      UserError: the model has learned positions, and fewer than prompts, user tokens and answers take.
    """
    prompt, prompt_valid = policies.reserve(prompts.tokens, prompts.valid)
    B, P = prompt.shape
    N = sampling.max_new_tokens
    config = policies.model.config
    if config.positions == "learned" and config.max_length < P + N:
        raise UserError(
            f"prompts of {P} tokens, user tokens included, and answers of {N} do not fit the {config.max_length} "
            "positions of the model; shorten the prompts or the answers"
        )
    cache_valid = jnp.concatenate([prompt_valid, jnp.zeros((B, N), bool)], axis=1)
    # Prefill attends to P positions only; the decode loop pays for all P + N.
    cache = init_cache(config, B * policies.copies, P, policies.model.dtype)
    hidden, cache = policies(prompt, prompt_valid, cache, 0)
    cache = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, N), (0, 0)]), cache)
    decoder = policies
    if policies.model.decode != "scan":
        decoder = policies.unroll()
        cache = [jax.tree.map(lambda x, i=i: x[i], cache) for i in range(config.num_layers)]

    def draw(decoder, hidden, key, rows):
        logits = decoder.logits(hidden[:, -1:])[:, 0]
        if sampling.temperature == 0:
            token = likeliest(logits)
        else:
            logits = logits / sampling.temperature
            # The noise of a row of the whole batch, so that compacting it does not change a sample.
            own = jnp.arange(B) if numbers is None else numbers
            own = own if rows is None else own[rows]
            noise = row_noise(key, own, total or B, logits.shape[-1])
            token = likeliest(truncate(logits, sampling.top_k, sampling.top_p) + noise)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
        return token, logp

    def record(decoder, i, hidden, state, rows=None):
        """Draws token i and adds it to the state."""
        cache_valid, done, tokens, valid, logps = state
        token, logp = draw(decoder, hidden, jax.random.fold_in(key, i), rows)
        token = jnp.where(done, sampling.pad_id, token)
        tokens = tokens.at[:, i].set(token)
        valid = valid.at[:, i].set(~done)
        logps = logps.at[:, i].set(jnp.where(done, 0.0, logp))
        cache_valid = jax.lax.dynamic_update_slice_in_dim(cache_valid, ~done[:, None], P + i, 1)
        return cache_valid, done | sampling.ends(token), tokens, valid, logps

    def finish(decoder, carry, rows):
        """(tokens, valid, logps) of `rows`, int32 [R], None for all.

        Decodes until a quarter of the rows are unfinished, then compacts the batch to these and recurses. Compacting by
        halves would save a little more time, but compiles the decoder more often.
        """
        R = B if rows is None else len(rows)
        left = R // 4 if decoder.selectable and R // 4 >= MIN_COMPACT_ROWS else 0

        def step(carry):
            i, cache, state = carry
            token = jax.lax.dynamic_slice_in_dim(state[2], i - 1, 1, 1)
            hidden, cache = decoder(token, state[0], cache, P + i - 1)
            return i + 1, cache, record(decoder, i, hidden, state, rows)

        def more(carry):
            return (carry[0] < N) & ((~carry[2][1]).sum() > left)

        i, cache, state = jax.lax.while_loop(more, step, carry)
        if not left:
            return state[2:]
        order = jnp.argsort(state[1], stable=True)[:left]  # unfinished rows come first
        copies = copy_indices(order, policies.copies)
        axis = 1 if policies.model.decode == "scan" else 0
        cache = jax.tree.map(lambda x: jnp.take(x, copies, axis=axis), cache)
        carry = i, cache, jax.tree.map(lambda x: x[order], state)
        ended = finish(decoder.select(order, R), carry, order if rows is None else rows[order])
        return jax.tree.map(lambda whole, part: whole.at[order].set(part), state[2:], ended)

    start = (
        cache_valid,
        jnp.zeros((B,), bool),
        jnp.full((B, N), sampling.pad_id, jnp.int32),
        jnp.zeros((B, N), bool),
        jnp.zeros((B, N), jnp.float32),
    )
    # Token 0 comes from the prefill, and the last token needs no forward pass.
    carry = jnp.int32(1), cache, record(decoder, 0, hidden[:, -1:], start)
    tokens, valid, logps = finish(decoder, carry, None)
    return Rollout(tokens, valid, logps)
