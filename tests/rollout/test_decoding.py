"""MOD: sampling from combined policies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_policies import ADAPTERS, CONFIG, EOS, MODEL, PAD, bank, base, prompts

from pjrlhf.models.adapters import Policies
from pjrlhf.objectives.multi_objective import combine_logps
from pjrlhf.rollout.decoding import PolicyEnsemble
from pjrlhf.rollout.sampler import Sampling, generate

K, B, P, N = 3, 4, 5, 6
GREEDY = Sampling(max_new_tokens=N, eos_ids=(EOS,), pad_id=PAD, temperature=0.0)


@functools.partial(jax.jit, static_argnums=0)
def combined(divergence, weights, prompt):
    policies = PolicyEnsemble(
        MODEL.clone(decode="transposed"), ADAPTERS["lora"], base(), bank("lora", K), weights, divergence
    )
    return generate(policies, GREEDY, prompt, jax.random.key(0))


@pytest.mark.parametrize(
    "divergence", ["reverse_kl", *(pytest.param(x, marks=pytest.mark.slow) for x in ("forward_kl", -1.0))]
)
def test_one_hot_weights_decode_that_policy(divergence):
    prompt, weights = prompts(B, P), jnp.eye(K)[jnp.array([0, 1, 2, 1])]
    alone = jax.jit(
        lambda mix: generate(
            Policies(MODEL, ADAPTERS["lora"], base(), bank("lora", K), mix),
            GREEDY,
            prompt,
            jax.random.key(0),
        )
    )(weights)
    got = combined(divergence, weights, prompt)
    np.testing.assert_array_equal(got.tokens, alone.tokens)
    assert len({tuple(row) for row in np.asarray(alone.tokens).tolist()}) > 1


def test_tokens_are_the_likeliest_of_the_combination():
    """Every token against full forward passes of the individual policies."""
    prompt, weights = prompts(B, P), jnp.array([[0.5, 0.3, 0.2], [1.4, -0.4, 0.0], [0.0, 0.5, 0.5], [0.2, 0.2, 0.6]])
    got = jax.device_get(combined("reverse_kl", weights, prompt))
    tokens = jnp.concatenate([prompt.tokens, got.tokens], 1)
    valid = jnp.concatenate([prompt.valid, got.valid], 1)

    @jax.jit
    def alone(mix):
        one = Policies(MODEL, ADAPTERS["lora"], base(), bank("lora", K), mix)
        return jax.nn.log_softmax(one.logits(one(tokens, valid)[0][:, P - 1 : -1]))

    logps = [alone(jnp.eye(K)[k : k + 1]) for k in range(K)]
    mixed = combine_logps(jnp.stack(logps, 2), weights[:, None])
    want = np.where(got.valid, np.asarray(mixed).argmax(-1), PAD)
    np.testing.assert_array_equal(got.tokens, want)
    assert mixed.shape == (B, N, CONFIG.vocab_size)
