"""Which layers carry adapters, and what training drops of their inputs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_policies import MODEL, base, close, noise, prompts

from pjrlhf.errors import UserError
from pjrlhf.models.adapters import AdapterConfig, Backbone, init_bank
from pjrlhf.models.decoder import Linear
from pjrlhf.models.peft import load_peft, save_peft
from pjrlhf.rollout.sampler import Sampling, generate

B, T, K = 4, 6, 2
MIX = np.random.default_rng(0).dirichlet(np.ones(K), B).astype(np.float32)


def bank_of(adapter, count=K):
    return noise(init_bank(base(), adapter, count, jax.random.key(0)), 3, 0.2)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(adapter, bank, key, tokens):
    policies = Backbone(MODEL, adapter, base()).policies(bank, MIX, dropout_key=key)
    return policies(tokens, jnp.ones((B, T), bool))[0]


def hidden(adapter, bank, key=None, seed=0):
    return np.asarray(_hidden(adapter, bank, key, np.random.default_rng(seed).integers(2, 24, (B, T))))


# ---- target_modules


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        pytest.param(("q_proj", "v_proj"), {"attention": {"query", "value"}}, marks=pytest.mark.slow),
        pytest.param(("down",), {"mlp": {"down"}}, marks=pytest.mark.slow),
        (("query", "gate_proj"), {"attention": {"query"}, "mlp": {"gate"}}),
        ((), {"attention": {"query", "key", "value", "output"}, "mlp": {"gate", "up", "down"}}),
    ],
)
def test_only_target_modules_have_adapters(names, layers, tmp_path):
    adapter = AdapterConfig(rank=2, alpha=4.0, target_modules=names)
    bank = bank_of(adapter)
    assert {block: set(factors) for block, factors in bank["layers"].items()} == layers
    # The other layers are those of the base: a bank of all layers whose other factors are zero is the same policy.
    whole = AdapterConfig(rank=2, alpha=4.0)
    zeros = jax.tree.map(jnp.zeros_like, init_bank(base(), whole, K, jax.random.key(0)))
    for block, factors in bank["layers"].items():
        zeros["layers"][block] |= factors
    close(hidden(adapter, bank), hidden(whole, zeros), 1e-5)
    # Sampling, which fuses layers, and PEFT's layout follow.
    prompt, greedy = prompts(B, 5), Sampling(max_new_tokens=4, eos_ids=(-1,), pad_id=0, temperature=0.0)
    model = MODEL.clone(decode="transposed")

    def sample(adapter, bank):
        policies = Backbone(model, adapter, base()).policies(bank, MIX)
        return generate(policies, greedy, prompt, jax.random.key(0)).tokens

    some, every = (jax.jit(sample, static_argnums=0)(*pair) for pair in ((adapter, bank), (whole, zeros)))
    np.testing.assert_array_equal(some, every)
    one = jax.tree.map(lambda x: np.asarray(x[0]), bank)
    save_peft(tmp_path / "lora", one, 2, 4.0, "base")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == sum(map(len, layers.values()))
    jax.tree.map(np.testing.assert_array_equal, load_peft(tmp_path / "lora")[0], one)


def test_equal_layers_start_equal_whatever_the_targets():
    every, some = (init_bank(base(), AdapterConfig(target_modules=t), K, jax.random.key(0)) for t in ((), ("up_proj",)))
    np.testing.assert_array_equal(some["layers"]["mlp"]["up"]["a"], every["layers"]["mlp"]["up"]["a"])


def test_target_modules_that_cannot_be():
    with pytest.raises(UserError, match=r"target_modules: 'lm_head' is unknown; .*query, .*q_proj"):
        AdapterConfig(target_modules=("lm_head",))
    with pytest.raises(
        UserError, match="rank: 0 trains full parameters, which have no dropout, target_modules or freeze_a"
    ):
        AdapterConfig(rank=0, target_modules=("query",))
    without_gate = {"layers": {block: dict(layers) for block, layers in base()["layers"].items()}}
    del without_gate["layers"]["mlp"]["gate"]
    with pytest.raises(UserError, match="the model has no layer gate"):
        init_bank(without_gate, AdapterConfig(target_modules=("gate",)), K, jax.random.key(0))


# ---- dropout


DROPPING = AdapterConfig(rank=2, alpha=4.0, dropout=0.3)


def test_dropout_needs_a_key_and_leaves_the_base_alone():
    bank, plain = bank_of(DROPPING), AdapterConfig(rank=2, alpha=4.0)
    np.testing.assert_array_equal(hidden(DROPPING, bank), hidden(plain, bank))
    key = jax.random.key(1)
    np.testing.assert_array_equal(hidden(plain, bank, key), hidden(plain, bank))
    fresh = init_bank(base(), DROPPING, K, jax.random.key(0))  # B is zero, so nothing of the adapters is seen
    np.testing.assert_array_equal(hidden(DROPPING, fresh, key), hidden(DROPPING, fresh))
    np.testing.assert_array_equal(hidden(DROPPING, bank, key), hidden(DROPPING, bank, key))
    others = [hidden(DROPPING, bank, jax.random.key(seed)) for seed in (1, 2)]
    assert np.abs(others[0] - others[1]).max() > 1e-2


def test_dropout_is_unbiased_and_its_rate_is_the_setting():
    """In a linear layer the mean over draws is the output without dropout, and the variance that of the rate."""
    layer, x = Linear(3, jnp.float32, jnp.float32, dropout=0.3), jnp.ones((1, 2, 50))
    a, b = jnp.ones((1, 50, 1)) / 50, jnp.ones((1, 1, 3))
    variables = {"params": {"kernel": jnp.zeros((50, 3))}, "adapters": {"a": a, "b": b}}
    draws = jax.vmap(lambda key: layer.apply(variables, x, jnp.ones((1, 1)), rngs={"dropout": key}))(
        jax.random.split(jax.random.key(0), 4000)
    )
    assert draws.mean() == pytest.approx(1.0, abs=0.005)
    assert draws.var(0).mean() == pytest.approx(0.3 / 0.7 / 50, rel=0.1)
