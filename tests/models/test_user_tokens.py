"""User tokens in the decoder: one with the embedding of a word acts as that word, in every way of running it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_decoder import (
    ADAPTER,
    CONFIG,
    LENGTHS,
    MODEL,
    VARIANTS,
    B,
    K,
    T,
    assert_close,
    base,
    forward,
    full_bank,
    lora_bank,
    padded,
    texts,
)

from pjrlhf.models.adapters import AdapterConfig, Policies
from pjrlhf.models.decoder import Decoder, init_cache
from pjrlhf.models.users import reserve

SLOTS = 3
WORDS = np.random.default_rng(20).integers(0, CONFIG.vocab_size, (B, SLOTS)).astype(np.int32)
OFFSETS = {1: MODEL, 0: Decoder(CONFIG, user_offset=0)}


def vectors():
    """User tokens [B, SLOTS, D], none of them the embedding of a word."""
    return np.random.default_rng(21).standard_normal((B, SLOTS, CONFIG.hidden_size)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(model, adapter, params, bank, mix, tokens, valid, user_tokens):
    """(logits [B, T + SLOTS, V], validity of their tokens)."""
    policies = Policies(model, adapter, params, bank, mix, user_tokens)
    tokens, valid = policies.reserve(tokens, valid)
    return policies.logits(policies(tokens, valid)[0]), valid


def personal(model, tokens, valid, user_tokens):
    return run(model, ADAPTER, base(), None, None, tokens, valid, user_tokens)


@pytest.mark.parametrize("user_offset", [0, 1])
@pytest.mark.parametrize("left, right", [(0, 4), (2, 0), (2, 4)])
def test_room_is_made_at_the_front_and_nowhere_else(user_offset, left, right):
    tokens, valid = padded(left, right)
    got, got_valid = jax.jit(reserve, static_argnums=(2, 3, 4))(tokens, valid, SLOTS, user_offset, -5)
    got, got_valid = np.asarray(got), np.asarray(got_valid)
    assert got.shape == got_valid.shape == (B, tokens.shape[1] + SLOTS)
    for row, mask, new, new_mask in zip(tokens, valid, got, got_valid, strict=True):
        text = row[mask].tolist()
        assert new[new_mask].tolist() == text[:user_offset] + [-5] * SLOTS + text[user_offset:]
        assert new_mask.tolist().index(True) == mask.tolist().index(True)


@pytest.mark.parametrize("user_offset", [0, 1])
def test_a_user_token_with_the_vector_of_a_word_is_that_word(user_offset):
    tokens, valid = padded(2, 0)
    room, room_valid = reserve(tokens, valid, SLOTS, user_offset)
    slots = np.asarray(reserve(tokens, valid, SLOTS, user_offset, placeholder=-1)[0]) == -1
    spelled = np.array(room)
    spelled[slots] = WORDS.ravel()
    want = forward(MODEL, base(), spelled, room_valid)
    got, _ = personal(OFFSETS[user_offset], tokens, valid, base()["embed"]["embedding"][WORDS])
    np.testing.assert_allclose(got[room_valid], want[room_valid], rtol=1e-5, atol=1e-5)


def test_the_placeholder_is_never_looked_up():
    tokens, valid = texts()

    @jax.jit
    def states(params, placeholder):
        room, room_valid = reserve(tokens, valid, SLOTS, placeholder=placeholder)
        hidden, _ = Policies(MODEL, ADAPTER, params, None, None, vectors())(room, room_valid)
        return jnp.where(room_valid[..., None], hidden, 0.0)

    np.testing.assert_array_equal(states(base(), 0), states(base(), CONFIG.vocab_size - 1))


@pytest.mark.parametrize("user_offset, left, right", [(0, 6, 0), (1, 0, 6), (1, 6, 0)])
def test_padding_side_and_amount_do_not_matter(user_offset, left, right):
    model = OFFSETS[user_offset]
    want, valid = personal(model, *texts(), vectors())
    got, got_valid = personal(model, *padded(left, right), vectors())
    assert_close(got[got_valid], want[valid])


def test_only_the_user_of_a_row_is_seen_and_from_there_on():
    tokens, valid = texts()
    changed = vectors()
    changed[0] += 1.0
    want, room = personal(MODEL, tokens, valid, vectors())
    got, _ = personal(MODEL, tokens, valid, changed)
    np.testing.assert_array_equal(got[1:][room[1:]], want[1:][room[1:]])
    np.testing.assert_array_equal(got[0, 0], want[0, 0])  # BOS comes before
    assert (np.abs(got[0, 1 : LENGTHS[0] + SLOTS] - want[0, 1 : LENGTHS[0] + SLOTS]).max(1) > 1e-3).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["remat full", "remat dots"])
def test_compilation_choices_change_neither_loss_nor_gradient(name):
    tokens, valid = texts()

    def loss_and_gradient(model):
        def loss(user_tokens):
            logits, room = personal(model, tokens, valid, user_tokens)
            return jnp.mean(jnp.where(room[..., None], jnp.tanh(logits), 0.0))

        return jax.jit(jax.value_and_grad(loss))(vectors())

    value, gradient = loss_and_gradient(MODEL)
    assert (np.abs(gradient).max(2) > 0).all()
    assert_close(loss_and_gradient(VARIANTS[name]), (value, gradient), 1e-6)


@pytest.mark.parametrize("kind, prefill", [("lora", 2), pytest.param("full", 6, marks=pytest.mark.slow)])
def test_cached_decoding_equals_the_full_forward(kind, prefill):
    """Left-padded rows; the prefill ends among the user tokens of some rows and after those of others."""
    bank = {"lora": lora_bank(), "full": full_bank()}[kind]
    adapter = {"lora": ADAPTER, "full": AdapterConfig(rank=0)}[kind]
    mix = np.random.default_rng(22).dirichlet(np.ones(K), 2).astype(np.float32)
    want, valid = run(MODEL, adapter, base(), bank, mix, *padded(1, 0), vectors())
    policies = Policies(MODEL, adapter, base(), bank, mix, vectors())
    tokens, valid = np.asarray(policies.reserve(*padded(1, 0))[0]), np.asarray(valid)
    slots = tokens.shape[1]

    @jax.jit
    def step(tokens, valid, cache, offset):
        hidden, cache = policies(tokens, valid, cache, offset)
        return policies.logits(hidden), cache

    cache, got, start = init_cache(CONFIG, B, slots, jnp.float32), [], 0
    while start < slots:
        end = start + (1 if start else prefill)
        seen = np.where(np.arange(slots) < end, valid, False)
        logits, cache = step(tokens[:, start:end], seen, cache, start)
        got.append(logits)
        start = end
    assert_close(np.concatenate(got, 1)[valid], want[valid])


def test_every_example_keeps_its_user_under_grouped_parameters():
    tokens, valid = texts()
    full = AdapterConfig(rank=0)
    mix = np.eye(K, dtype=np.float32)[:2]
    got, room = run(MODEL, full, base(), full_bank(), mix, tokens, valid, vectors())
    for g in range(2):
        rows = slice(g * B // 2, (g + 1) * B // 2)
        want, part = run(MODEL, full, base(), full_bank(), mix[g : g + 1], tokens[rows], valid[rows], vectors()[rows])
        assert_close(got[rows][room[rows]], want[part])


def test_half_precision_activations_take_float32_user_tokens():
    tokens, valid = texts()

    def states(params):
        policies = Policies(Decoder(CONFIG, dtype=jnp.bfloat16), ADAPTER, params, None, None, vectors())
        return policies(*policies.reserve(tokens, valid))[0]

    hidden = jax.eval_shape(states, base())
    assert hidden.dtype == jnp.bfloat16 and hidden.shape == (B, T + SLOTS, CONFIG.hidden_size)
