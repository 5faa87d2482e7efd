"""Scores depend on the text only, not on padding, other rows or devices."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_policies import ADAPTERS, CONFIG, MODEL, PAD, backbone, bank, base, close, heads, prompts, wider

from pjrlhf.models.adapters import Policies
from pjrlhf.parallel.mesh import make_mesh, shard_batch, shard_params
from pjrlhf.rollout import scoring
from pjrlhf.rollout.batches import Rollout
from pjrlhf.rollout.experience import reward_scores

B, P, N, K = 8, 5, 4, 3
LORA = ADAPTERS["lora"]
MIX = np.concatenate([np.eye(K), np.random.default_rng(0).dirichlet(np.ones(K), B - K)]).astype(np.float32)
TEMPERATURE = 0.8


def responses(seed=5):
    """Responses [B, N], right-padded, at least one token each."""
    rng = np.random.default_rng(seed)
    valid = np.arange(N) < rng.integers(1, N + 1, B)[:, None]
    tokens = np.where(valid, rng.integers(1, CONFIG.vocab_size, (B, N)), PAD)
    return Rollout(tokens, valid, np.zeros((B, N), np.float32))


def narrower(response, more, fill=PAD):
    """The same responses with more padding on the right."""
    pad = ((0, 0), (0, more))
    tokens = np.where(response.valid, response.tokens, fill)
    return Rollout(np.pad(tokens, pad, constant_values=fill), np.pad(response.valid, pad), np.pad(response.logps, pad))


def rewarder(count=K):
    return {"bank": bank("lora", count), "heads": heads(count), "mean": jnp.arange(count) * 0.1, "std": jnp.ones(count)}


@functools.partial(jax.jit, static_argnums=0)
def _score(P, base, rewarder, mix, prompt, response):
    policies = Policies(MODEL, LORA, base, rewarder["bank"], mix)
    tokens = scoring.join(prompt.tokens, response.tokens)
    valid = scoring.join(prompt.valid, response.valid)
    states = scoring.response_states(policies, tokens, valid, P)
    logps, entropy = scoring.token_logps(policies, states, response.tokens, TEMPERATURE)
    rewards = scoring.rewards(policies, rewarder["heads"], mix, tokens, valid)
    everywhere = policies.logits(policies(tokens, valid)[0])
    return {"logps": logps, "entropy": entropy, "rewards": rewards, "logits": everywhere, "states": states}


def score(prompt, response, mix=MIX):
    """Results on the valid tokens, zero elsewhere."""
    out = jax.device_get(_score(prompt.tokens.shape[1], base(), rewarder(), mix, prompt, response))
    mask = response.valid[:, :N]
    return {name: np.where(mask, out[name][:, :N], 0) for name in ("logps", "entropy")} | {"rewards": out["rewards"]}


def test_log_probabilities_and_entropy_are_those_of_the_logits_one_token_before():
    prompt, response = prompts(B, P), responses()
    out = jax.device_get(_score(P, base(), rewarder(), MIX, prompt, response))
    logps = jax.nn.log_softmax(out["logits"] / TEMPERATURE)
    got = score(prompt, response)
    for b, t in np.argwhere(response.valid):
        before = logps[b, P + t - 1]
        close(got["logps"][b, t], before[response.tokens[b, t]])
        close(got["entropy"][b, t], -np.sum(np.exp(before) * before))
    assert out["states"].shape == (B, N, CONFIG.hidden_size)


@pytest.mark.parametrize("left, right, fill", [(4, 3, 7), (0, 0, 9)])
def test_padding_changes_nothing(left, right, fill):
    prompt, response = prompts(B, P), responses()
    want = score(prompt, response)
    close(score(wider(prompt, left, fill), narrower(response, right, fill)), want)


def test_order_of_the_batch_changes_nothing():
    prompt, response = prompts(B, P), responses()
    order = np.random.default_rng(6).permutation(B)
    prompt_, response_ = jax.tree.map(lambda x: np.asarray(x)[order], (prompt, response))
    want = jax.tree.map(lambda x: x[order], score(prompt, response))
    close(score(prompt_, response_, MIX[order]), want)


def test_eight_devices_change_nothing():
    mesh = make_mesh({"data": -1})
    assert mesh.size == 8
    prompt, response = prompts(B, P), responses()
    want = jax.device_get(_score(P, base(), rewarder(), MIX, prompt, response))
    rows = shard_batch(mesh, (jnp.asarray(MIX), prompt, jax.tree.map(jnp.asarray, response)))
    got = _score(P, *shard_params(mesh, (base(), rewarder())), *rows)
    assert len(got["logps"].addressable_shards) == 8 and got["logps"].addressable_shards[0].data.shape == (1, N)
    close(jax.device_get(got), want)


def test_the_reward_is_read_at_the_last_valid_token():
    """For texts that end at the last position, before it, or (without a response) with the prompt."""
    prompt, response = prompts(B, P), responses()
    response.valid[0] = False
    tokens = np.concatenate([prompt.tokens, response.tokens], 1)
    valid = np.concatenate([prompt.valid, response.valid], 1)
    policies = Policies(MODEL, LORA, base(), bank("lora", K), MIX)
    hidden = np.asarray(policies(tokens, valid)[0])
    kernel, bias = (MIX @ np.asarray(heads(K)[name]) for name in ("kernel", "bias"))
    want = [hidden[b, np.flatnonzero(valid[b])[-1]] @ kernel[b] + bias[b] for b in range(B)]
    close(score(prompt, response)["rewards"], np.array(want))


def test_the_reward_changes_with_the_response_alone():
    prompt, response = prompts(B, P), responses()
    want = score(prompt, response)["rewards"]
    first = np.where(np.arange(N) == 0, (response.tokens + 1) % CONFIG.vocab_size, response.tokens)
    got = score(prompt, response.replace(tokens=first))["rewards"]
    assert (np.abs(got - want) > 1e-3).all()


def test_a_response_token_changes_no_state_up_to_its_own():
    prompt, response = prompts(B, P), responses()
    full = response.replace(valid=np.ones((B, N), bool))
    changed = full.replace(tokens=np.where(np.arange(N) == 2, 5, full.tokens % 4 + 10))
    full = full.replace(tokens=np.where(np.arange(N) == 2, 6, changed.tokens))
    one, two = (jax.device_get(_score(P, base(), rewarder(), MIX, prompt, r))["states"] for r in (full, changed))
    np.testing.assert_array_equal(one[:, :3], two[:, :3])
    assert (np.abs(one[:, 3] - two[:, 3]).max(-1) > 1e-3).all()


class Flat(Policies):
    """Policies with constant logits."""

    def __init__(self, logits):
        self.given = jnp.asarray(logits, jnp.float32)
        self.model = types.SimpleNamespace(batch_sharding=None, config=types.SimpleNamespace(vocab_size=len(logits)))

    def logits(self, states):
        return jnp.broadcast_to(self.given, (*states.shape[:2], len(self.given)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_closed_forms_of_entropy(temperature):
    states, response = jnp.zeros((2, 3, 4)), jnp.array([[0, 1, 2], [2, 1, 0]])
    logps, entropy = scoring.token_logps(Flat([3.0, 3.0, 3.0, 3.0]), states, response, temperature)
    close(logps, np.full((2, 3), -np.log(4)))
    close(entropy, np.full((2, 3), np.log(4)))
    odds = np.array([0.0, np.log(2), np.log(4)])
    p = np.exp(odds / temperature) / np.exp(odds / temperature).sum()
    logps, entropy = scoring.token_logps(Flat(odds), states, response, temperature)
    close(logps, np.log(p)[response])
    close(entropy, np.full((2, 3), -(p * np.log(p)).sum()))


# ---- heads


def test_heads_are_combined_by_mix():
    states = np.random.default_rng(7).standard_normal((6, 2, CONFIG.hidden_size)).astype(np.float32)
    three, mix = heads(K), np.array([[0, 1, 0], [0.5, 0.2, 0.3], [0, 0, 0]], np.float32)
    kernel, bias = np.asarray(three["kernel"]), np.asarray(three["bias"])
    got = scoring.apply_heads(three, states, mix)
    close(got[:2], states[:2] @ kernel[1] + bias[1])  # two rows for each row of mix
    close(got[2:4], states[2:4] @ (mix[1] @ kernel) + mix[1] @ bias)
    assert not np.asarray(got[4:]).any()
    half = scoring.apply_heads(three, states.astype(jnp.bfloat16), mix)
    assert half.dtype == jnp.float32


def test_new_heads():
    zero = scoring.init_heads(K, 5)
    assert zero["kernel"].shape == (K, 5) and zero["bias"].shape == (K,)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(zero))
    drawn = np.asarray(scoring.init_heads(50, 99, jax.random.key(0))["kernel"])
    np.testing.assert_allclose(drawn.std(), 0.1, rtol=0.05)
    assert abs(drawn.mean()) < 0.01


# ---- normalised rewards


def test_reward_models_in_one_batch_score_as_each_alone():
    prompt, response = prompts(B, P), responses()
    judges = rewarder() | {"mean": jnp.array([0.3, -1.0, 2.0]), "std": jnp.array([0.5, 2.0, 4.0])}
    together = jax.tree.map(lambda x: np.tile(x, (K, 1)), (prompt, response))
    run = jax.jit(reward_scores)
    got = np.asarray(run(backbone("lora"), judges, np.arange(K)[:, None], *together)).reshape(K, B)
    vector = np.asarray(run(backbone("lora"), judges, np.arange(K)[None], prompt, response))
    close(vector, got.T)
    for k in range(K):
        one_hot = np.repeat(np.eye(K, dtype=np.float32)[k : k + 1], B, axis=0)
        raw = score(prompt, response, one_hot)["rewards"]
        close(got[k], (raw - judges["mean"][k]) / judges["std"][k])
    assert np.abs(got - got.mean(0)).max() > 0.1


def test_normalising_by_measured_statistics_gives_mean_0_and_spread_1():
    raw = np.random.default_rng(8).normal([3.0, -1.0], [2.0, 0.5], (500, 2)).astype(np.float32)
    got = np.asarray(scoring.normalize(raw, {"mean": raw.mean(0), "std": raw.std(0)}))
    close(got.mean(0), np.zeros(2), 1e-4)
    close(got.std(0), np.ones(2), 1e-4)
