"""The compiled programs of the engine: reading prompts in chunks, and drawing tokens in slots.

A slot is a row of a batch of fixed size that holds one answer at a time. Token i of a slot, user tokens included, lies
at position i of the slot's row of the cache, whatever the other slots hold.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int, UInt32

from pjrlhf.models.adapters import Backbone
from pjrlhf.models.decoder import Cache, Decoder, init_cache
from pjrlhf.rollout.noise import likeliest, noise_of_keys
from pjrlhf.rollout.sampler import truncate_rows
from pjrlhf.serving.penalties import Penalties, above_min_p, penalized
from pjrlhf.types import Array, Params

COPIED = 128  # positions of a prompt that are copied into a slot at once
TOP = 20  # alternatives whose log-probs are returned, at most


class Wanted(struct.PyTreeNode):
    """How the answer of every slot is drawn.

    Attributes:
      limit: tokens to draw at most.
      temperature: 0 is greedy.
      top_k, top_p: truncation of the distribution; 0 and 1 turn it off.
      seed, sample: of the draws. Token i of an answer is drawn with the key that these two and i give.
      alternatives: whether the log-probs of the most likely tokens are returned.
      penalties: of tokens.
      mix: of the policy, or None without a bank.
      user_tokens: that the prompt starts with, or None.
      personal: whether a row has user tokens; None where no row has any.
    """

    limit: Int[Array, " B"]
    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    seed: UInt32[Array, " B"]
    sample: Int[Array, " B"]
    alternatives: Bool[Array, " B"]
    penalties: Penalties
    mix: Float[Array, "B K"] | None
    user_tokens: Float[Array, "B E D"] | None
    personal: Bool[Array, " B"] | None


class Slots(struct.PyTreeNode):
    """The state of B slots.

    Attributes:
      cache: keys and values of the tokens read so far.
      hidden: hidden state of the last of them; the next token is drawn from it.
      length: number of tokens read.
      drawn: number of tokens drawn.
      counts: how often each token was drawn.
      active: whether the answer goes on.
      wanted: how it is drawn.
    """

    cache: Cache
    hidden: Float[Array, "B D"]
    length: Int[Array, " B"]
    drawn: Int[Array, " B"]
    counts: Int[Array, "B V"]
    active: Bool[Array, " B"]
    wanted: Wanted


class Drawn(struct.PyTreeNode):
    """What N steps drew in B slots; entries of slots that drew nothing are unspecified.

    Attributes:
      tokens: drawn.
      emitted: whether a slot drew a token in this step.
      logps: of the tokens under the model, at temperature 1, in nats.
      top_ids, top_logps: of the most likely tokens, zeros unless a slot asks for them.
    """

    tokens: Int[Array, "N B"]
    emitted: Bool[Array, "N B"]
    logps: Float[Array, "N B"]
    top_ids: Int[Array, "N B _"]
    top_logps: Float[Array, "N B _"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def make_slots(model: Decoder, count: int, length: int, wanted: Wanted) -> Slots:
    """`count` empty slots of `length` positions."""
    config = model.config
    zeros = jnp.zeros((count,), jnp.int32)
    hidden = jnp.zeros((count, config.hidden_size), model.dtype)
    counts = jnp.zeros((count, config.vocab_size), jnp.int32)
    active = jnp.zeros((count,), bool)
    return constrain(model, Slots(make_cache(model, count, length), hidden, zeros, zeros, counts, active, wanted))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def make_cache(model: Decoder, count: int, length: int) -> Cache:
    """An empty cache in the layout of the model's layers."""
    cache = init_cache(model.config, count, length, model.dtype)
    if not model.scan_layers:
        cache = [jax.tree.map(lambda x, i=i: x[i], cache) for i in range(model.config.num_layers)]
    return constrain(model, cache)


def row_axis(leaf: Array) -> int:
    """The axis of rows of a leaf of `Slots`: those of a stacked cache have the layers first."""
    return 1 if leaf.ndim == 5 else 0


def constrain(model: Decoder, tree: Any) -> Any:
    """`tree` with its rows split over the devices of the model, where there are several."""
    if model.batch_sharding is None:
        return tree
    mesh, rows = model.batch_sharding.mesh, model.batch_sharding.spec[0]

    def one(x):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*[None] * row_axis(x), rows)))

    return jax.tree.map(one, tree)


@functools.partial(jax.jit, donate_argnums=2)
def prefill(
    backbone: Backbone,
    bank: Params | None,
    cache: Cache,
    tokens: Int[Array, "B T"],
    offset: Int[Array, " B"],
    count: Int[Array, " B"],
    mix: Float[Array, "B K"] | None,
    user_tokens: Float[Array, "B E D"] | None,
    personal: Bool[Array, " B"] | None,
) -> tuple[Cache, Float[Array, "B T D"], Float[Array, "B D"]]:
    """Reads the next chunk of every prompt: `count` of its T tokens, at positions from `offset` on.

    A row without a prompt has the length of the cache as its offset, and 0 tokens.

    Returns:
      The cache, the hidden states of the chunk, and that of its last token.
    """
    # A row without a prompt may attend to its first position, and makes nobody read further.
    valid = jnp.arange(jax.tree.leaves(cache)[0].shape[-2]) < jnp.where(count > 0, offset + count, 1)[:, None]
    hidden, filled = backbone.policies(bank, mix, user_tokens, personal=personal)(tokens, valid, cache, offset)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return constrain(backbone.model, filled), hidden, last


@jax.jit
def score(
    backbone: Backbone, hidden: Float[Array, "B T D"], following: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Int[Array, "B T _"], Float[Array, "B T _"]]:
    """Log-probs of the `following` tokens, and ids and log-probs of the most likely ones."""
    logps = jax.nn.log_softmax(backbone.policies().logits(hidden))
    top_logps, top_ids = jax.lax.top_k(logps, min(TOP, logps.shape[-1]))
    return jnp.take_along_axis(logps, following[..., None], axis=-1)[..., 0], top_ids, top_logps


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert(
    model: Decoder,
    slots: Slots,
    cache: Cache,
    last: Float[Array, "B D"],
    row: Int[Array, ""],
    slot: Int[Array, ""],
    length: Int[Array, ""],
    wanted: Wanted,
) -> Slots:
    """Starts an answer in a slot, from the prompt in a row of the prefill.

    Args:
      length: tokens of the prompt.
      wanted: of this answer, leaves [1, ...].
    """

    def put(old, new):
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, 0)

    size = min(COPIED, jax.tree.leaves(cache)[0].shape[-2])

    def copy(i: Array, filled: Cache) -> Cache:
        def one(old, new):
            axis = row_axis(old)
            places, sizes = [0] * old.ndim, list(old.shape)
            places[axis], places[-2] = row, i * size
            sizes[axis], sizes[-2] = 1, size
            part = jax.lax.dynamic_slice(new, places, sizes)
            places[axis] = slot
            return jax.lax.dynamic_update_slice(old, part, places)

        return jax.tree.map(one, filled, cache)

    filled = jax.lax.fori_loop(0, -(-length // size), copy, slots.cache)
    none, counts = jnp.zeros((1,), jnp.int32), jnp.zeros_like(slots.counts[:1])
    hidden = jax.lax.dynamic_slice_in_dim(last, row, 1, 0)
    rest = hidden, length[None], none, counts, jnp.ones((1,), bool), wanted
    old = slots.hidden, slots.length, slots.drawn, slots.counts, slots.active, slots.wanted
    return constrain(model, Slots(filled, *jax.tree.map(put, old, rest)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode(
    most: int,
    backbone: Backbone,
    bank: Params | None,
    slots: Slots,
    stopped: Bool[Array, " B"],
    ends: Int[Array, " _"],
    steps: Int[Array, ""] | int,
) -> tuple[Slots, Drawn]:
    """Draws up to `steps` tokens in every active slot.

    Args:
      most: N, the length of the results; `steps` is at most N.
      stopped: slots whose answers are over, by a decision of the host.
      ends: tokens that end an answer.
    """
    wanted = slots.wanted
    policies = backbone.policies(bank, wanted.mix, wanted.user_tokens, personal=wanted.personal)
    length = jax.tree.leaves(slots.cache)[0].shape[-2]

    def step(slots: Slots) -> tuple[Slots, Drawn]:
        logits = policies.logits(slots.hidden[:, None])[:, 0]
        drawn = draw(logits, slots)
        token = drawn.tokens
        active = slots.active & ~(token[:, None] == ends).any(1) & (slots.drawn + 1 < slots.wanted.limit)
        # A row that is over writes beyond the cache, which drops it: its slot may hold another prompt already.
        offset = jnp.where(active, slots.length, length)
        valid = jnp.arange(length) <= jnp.where(active, slots.length, 0)[:, None]
        hidden, cache = policies(token[:, None], valid, slots.cache, offset)
        count = slots.active.astype(jnp.int32)
        new = slots.replace(
            cache=cache,
            hidden=hidden[:, 0],
            length=slots.length + active,
            drawn=slots.drawn + count,
            counts=slots.counts.at[jnp.arange(len(token)), token].add(count),
            active=active,
        )
        return constrain(backbone.model, new), drawn

    def body(state: tuple[Array, Slots, Drawn]) -> tuple[Array, Slots, Drawn]:
        i, slots, found = state
        slots, drawn = step(slots)
        return i + 1, slots, jax.tree.map(lambda all, new: all.at[i].set(new), found, drawn)

    slots = slots.replace(active=slots.active & ~stopped)
    none = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), jax.eval_shape(lambda: step(slots)[1]))
    start = jnp.zeros((), jnp.int32), slots, none
    # Where all answers are over, the next dispatch comes at once.
    _, slots, drawn = jax.lax.while_loop(lambda state: (state[0] < steps) & state[1].active.any(), body, start)
    return slots, drawn


def draw(logits: Float[Array, "B V"], slots: Slots) -> Drawn:
    """The next token of every slot. A row of the result depends on the same row of the arguments alone."""
    wanted, active = slots.wanted, slots.active
    bent = penalized(logits, wanted.penalties, slots.counts, active)
    warm, cut = wanted.temperature > 0, (wanted.top_k > 0) | (wanted.top_p < 1.0)

    def sampled() -> Int[Array, " B"]:
        scaled = bent / jnp.where(warm, wanted.temperature, 1.0)[:, None]
        scaled = jax.lax.cond(
            (active & warm & (wanted.penalties.min_p > 0)).any(),
            lambda x: above_min_p(x, wanted.penalties.min_p),
            lambda x: x,
            scaled,
        )
        scaled = jax.lax.cond(
            (active & warm & cut).any(), lambda x: truncate_rows(x, wanted.top_k, wanted.top_p), lambda x: x, scaled
        )

        def key(seed, sample, i):
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), i)

        keys = jax.vmap(key)(wanted.seed, wanted.sample, slots.drawn)
        return likeliest(scaled + noise_of_keys(keys, logits.shape[-1]))

    greedy = likeliest(bent)
    token = jax.lax.cond((active & warm).any(), lambda: jnp.where(warm, sampled(), greedy), lambda: greedy)
    logps = jax.nn.log_softmax(logits)
    shape = len(token), min(TOP, logits.shape[-1])
    top_logps, top_ids = jax.lax.cond(
        (active & wanted.alternatives).any(),
        lambda: tuple(jax.lax.top_k(logps, shape[1])),
        lambda: (jnp.zeros(shape, logps.dtype), jnp.zeros(shape, jnp.int32)),
    )
    chosen = jnp.take_along_axis(logps, token[:, None], axis=-1)[:, 0]
    return Drawn(token, active, chosen, top_ids, top_logps)


@functools.partial(jax.jit, static_argnums=3)
def read_chunk(cache: Cache, row: Int[Array, ""], start: Int[Array, ""], size: int) -> Cache:
    """Keys and values of `size` tokens of a row, leaves [..., 1, Hkv, size, Dh]."""

    def one(x):
        x = jax.lax.dynamic_slice_in_dim(x, row, 1, row_axis(x))
        return jax.lax.dynamic_slice_in_dim(x, start, size, x.ndim - 2)

    return jax.tree.map(one, cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def write_chunk(model: Decoder, cache: Cache, chunk: Cache, row: Int[Array, ""], start: Int[Array, ""]) -> Cache:
    """The cache with a chunk of `read_chunk` at `start` of a row."""

    def one(x, new):
        places = [0] * x.ndim
        places[row_axis(x)], places[-2] = row, start
        return jax.lax.dynamic_update_slice(x, new, places)

    return constrain(model, jax.tree.map(one, cache, chunk))
