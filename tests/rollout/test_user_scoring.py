"""Sampling and scoring with user tokens affect personal policies only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.models.adapters import AdapterConfig, Policies, init_bank
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.models.users import UserModel
from pjrlhf.objectives.preference import mixture, pairwise_loss
from pjrlhf.rollout.batches import Prompts
from pjrlhf.rollout.sampler import Sampling, generate
from pjrlhf.rollout.scoring import init_heads, rewards, sequence_logps

CONFIG = ModelConfig(
    vocab_size=20, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)
MODEL = Decoder(CONFIG)
ADAPTER = AdapterConfig(rank=2)
B, P, N, SLOTS, U = 4, 5, 6, 3, 5
BOS, EOS = 1, 2


@functools.cache
def base():
    with jax.ensure_compile_time_eval():  # the first call may come from within jit
        params = init_params(MODEL, jax.random.key(0))
        return {**params, "embed": {"embedding": 3 * params["embed"]["embedding"]}}


def rows(prompt_lengths=(5, 1, 3, 4), response_lengths=(6, 4, 1, 3), left=0, right=0, inserted=None):
    """Tokens, valid [B, left + P + N + right] of the same texts, and where the responses start.

    `inserted` [B, I] are words inserted after BOS, which make prompts I positions longer.
    """
    rng = np.random.default_rng(1)
    extra = 0 if inserted is None else inserted.shape[1]
    tokens = np.full((B, left + P + extra + N + right), 7, np.int32)
    valid = np.zeros(tokens.shape, bool)
    start = left + P + extra
    for b, (p, n) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        prompt = [BOS, *rng.integers(3, 20, p - 1)]
        if extra:
            prompt[1:1] = inserted[b]
        tokens[b, start - p - extra : start] = prompt
        tokens[b, start : start + n] = rng.integers(3, 20, n)
        valid[b, start - p - extra : start + n] = True
    return tokens, valid, start


@functools.partial(jax.jit, static_argnums=3)
def score(tokens, valid, user_tokens, start):
    return sequence_logps(Policies(MODEL, ADAPTER, base(), None, None, user_tokens), tokens, valid, start)


@jax.jit
def full_logits(tokens, valid, user_tokens):
    policies = Policies(MODEL, ADAPTER, base(), None, None, user_tokens)
    return policies.logits(policies(*policies.reserve(tokens, valid))[0])


def user_model(kind="individualized", **settings):
    return UserModel(kind=kind, num_users=U, tokens=SLOTS, width=16, clusters=3, **settings)


def user_params(kind="individualized", **settings):
    return user_model(kind, **settings).init(jax.random.key(2), base()["embed"]["embedding"])


def words():
    return np.random.default_rng(3).integers(3, 20, (B, SLOTS)).astype(np.int32)


VECTORS = np.random.default_rng(4).standard_normal((B, SLOTS, 16)).astype(np.float32)


def test_the_response_is_scored_and_nothing_else():
    """User tokens with embeddings of words act as these words in the prompt, which are not scored either."""
    tokens, valid, start = rows(inserted=words())
    logits = np.asarray(full_logits(tokens, valid, None), np.float64)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = np.zeros(B)
    for b in range(B):
        want[b] = sum(logps[b, t - 1, tokens[b, t]] for t in range(start, tokens.shape[1]) if valid[b, t])
    tokens, valid, start = rows()
    got, count = score(tokens, valid, base()["embed"]["embedding"][words()], start)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_array_equal(count, [6, 4, 1, 3])


@pytest.mark.parametrize("left, right", [(0, 3), (2, 0), (4, 1)])
def test_padding_does_not_matter(left, right):
    tokens, valid, start = rows()
    want = score(tokens, valid, VECTORS, start)
    tokens, valid, start = rows(left=left, right=right)
    np.testing.assert_allclose(score(tokens, valid, VECTORS, start), want, rtol=1e-5)


PAIRS = rows(prompt_lengths=(4, 2, 4, 2))  # chosen 0 and 1, rejected 2 and 3


@functools.partial(jax.value_and_grad, has_aux=True)
def pdpo(params, users):
    """The P-DPO loss as a stage builds it, for two pairs: (loss, reference log-probs)."""
    tokens, valid, start = PAIRS
    both = jnp.concatenate([users, jnp.zeros_like(users)])
    user_tokens, _ = user_model().apply(params, both)
    copies = [jnp.concatenate([x[i : i + 2]] * 2) for i in (0, 2) for x in (tokens, valid)]
    bank = init_bank(base(), ADAPTER, 1, jax.random.key(5))
    policies = Policies(MODEL, ADAPTER, base(), bank, jnp.ones((1, 1)), user_tokens)
    reference = Policies(MODEL, ADAPTER, base(), None, None)
    logps = [sequence_logps(policies, *copies[i : i + 2], start)[0] for i in (0, 2)]
    fixed = [jax.lax.stop_gradient(sequence_logps(reference, *copies[i : i + 2], start)[0]) for i in (0, 2)]
    losses = pairwise_loss("sigmoid", logps, fixed, 0.5)
    total, count = mixture(losses, jnp.arange(4) >= 2, 0.5)
    return total / count, fixed


@functools.cache
def pdpo_step():
    return jax.jit(pdpo)


def test_the_reference_never_sees_a_user():
    params = user_params(zero_offset=False)
    (one, fixed), _ = pdpo_step()(params, jnp.array([1, 2]))
    (two, same), _ = pdpo_step()(params, jnp.array([4, 5]))
    assert abs(one - two) > 1e-4
    plain, _ = score(*PAIRS[:2], None, PAIRS[2])
    for x, y, part in zip(fixed, same, (plain[:2], plain[2:]), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_allclose(x, np.tile(part, 2), rtol=1e-6)


def test_only_users_of_the_batch_are_moved():
    _, gradient = pdpo_step()(user_params(zero_offset=False), jnp.array([3, 1]))
    size = np.abs(gradient["table"]["offset"]).max((1, 2))
    np.testing.assert_array_equal(size > 0, [False, True, False, True, False, False])
    assert np.abs(gradient["shared"]["generic"]).max() > 0


@pytest.mark.parametrize("kind", ["individualized", "cluster"])
def test_strangers_score_as_the_generic_user_and_so_does_everybody_at_the_start(kind):
    model, (tokens, valid, start) = user_model(kind), rows()

    def scored(params, users):
        return np.asarray(score(tokens, valid, model.apply(params, jnp.array(users))[0], start)[0])

    fresh, trained = user_params(kind), user_params(kind, zero_offset=False)
    np.testing.assert_array_equal(scored(fresh, [1, 2, 3, 5]), scored(fresh, [0] * 4))
    np.testing.assert_array_equal(scored(trained, [U + 1, -1, 99, 0]), scored(trained, [0] * 4))
    assert (np.abs(scored(trained, [1, 2, 3, 5]) - scored(trained, [0] * 4)) > 1e-4).all()


def test_greedy_sampling_follows_the_full_forward():
    tokens, valid, start = rows()
    prompt, prompt_valid = tokens[:, :start], valid[:, :start]
    sampling = Sampling(max_new_tokens=N, eos_ids=(EOS,), pad_id=0, temperature=0.0)

    @jax.jit
    def sample(user_tokens):
        policies = Policies(MODEL, ADAPTER, base(), None, None, user_tokens)
        return generate(policies, sampling, Prompts(prompt, prompt_valid), jax.random.key(0))

    got = jax.device_get(sample(VECTORS))
    both = [np.concatenate(pair, 1) for pair in ((prompt, got.tokens), (prompt_valid, got.valid))]
    likeliest = full_logits(*both, VECTORS).argmax(-1)[:, -N - 1 : -1]
    np.testing.assert_array_equal(got.tokens[got.valid], likeliest[got.valid])
    assert got.valid.sum() > N and (sample(VECTORS[::-1]).tokens != got.tokens).any()
    # Samples are scored with their sampling log-probs.
    np.testing.assert_allclose(got.logps.sum(1), score(*both, VECTORS, start)[0], rtol=1e-5)


def test_rewards_are_read_off_the_last_token_of_the_personal_row():
    heads, mix = init_heads(1, 16, jax.random.key(7)), jnp.ones((1, 1))

    @jax.jit
    def reward(user_tokens, tokens, valid):
        policies = Policies(MODEL, ADAPTER, base(), None, None, user_tokens)
        return rewards(policies, heads, mix, tokens, valid)

    want = reward(None, *rows(inserted=words())[:2])
    got = reward(base()["embed"]["embedding"][words()], *rows()[:2])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert not np.allclose(reward(None, *rows()[:2]), want, atol=1e-3)
