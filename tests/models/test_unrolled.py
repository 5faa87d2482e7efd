"""Unrolled layers with fused kernels compute what the scan over layers computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.models.adapters import AdapterConfig, Policies, init_bank
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.models.unrolled import unroll

LLAMA = {"norm": "rms", "gated": True}
# Biases, norms of queries and keys, no gate: everything else that stands between the matmuls of a block.
OTHER = {"norm": "layer", "gated": False, "biases": ("query", "key", "value", "up"), "qk_norm": "head"}
K, B, T = 2, 3, 5


def numbers(tree, seed=0):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(rng.normal(size=x.shape) * x.shape[-1] ** -0.5, x.dtype) for x in leaves])


def setting(switches, rank):
    config = ModelConfig(
        vocab_size=11,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        **switches,
    )
    model = Decoder(config)
    adapter = AdapterConfig(rank=rank, alpha=2.0 * max(rank, 1))
    params = numbers(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    bank = numbers(jax.eval_shape(lambda: init_bank(params, adapter, K, jax.random.key(0))), 1)
    return model, adapter, params, bank


@pytest.mark.parametrize(
    "switches, decode, rank",
    [
        (LLAMA, "unrolled", 1),
        pytest.param(LLAMA, "transposed", 2, marks=pytest.mark.slow),
        pytest.param(OTHER, "transposed", 1, marks=pytest.mark.slow),
        pytest.param(OTHER, "unrolled", 2, marks=pytest.mark.slow),
        (OTHER, "transposed", 0),
    ],
)
def test_unrolled_and_fused_layers_equal_the_scan(switches, decode, rank):
    """Adapters of rank 1 are fused (6 columns to 64); those of attention's inputs with rank 2 are too wide."""
    model, adapter, params, bank = setting(switches, rank)
    mix = np.random.default_rng(2).normal(size=(B, K)).astype(np.float32)
    if not rank:
        mix = mix[:1]
    tokens, valid = np.arange(B * T).reshape(B, T) % 11, np.ones((B, T), bool)

    @functools.partial(jax.jit, static_argnums=1)
    def hidden(bank, whole):
        policies = Policies(model.clone(decode=decode), adapter, params, bank, mix)
        return (policies if whole else policies.unroll())(tokens, valid)[0]

    np.testing.assert_allclose(hidden(bank, False), hidden(bank, True), rtol=1e-4, atol=1e-5)
    assert np.abs(hidden(bank, True) - hidden(None, True)).max() > 0.1


@pytest.mark.slow
def test_which_kernels_are_fused():
    _, _, params, bank = setting(LLAMA, 1)
    found = unroll({"params": params, "adapters": bank}, fused=True, dtype=jnp.bfloat16)
    layer, low = found["params"]["layers_1"], found["adapters"]["layers_1"]
    assert layer["attention"]["query_key_value"]["kernel"].shape == (64, 32 + 16 + 16 + 3 * K)
    assert layer["mlp"]["gate_up"]["kernel"].shape == (64, 2 * 96 + 2 * K)
    assert layer["mlp"]["gate_up"]["kernel"].dtype == jnp.bfloat16
    assert low["mlp"]["gate_up"]["b"].shape == (K, 2, 2 * 96)
    assert {*layer["attention"]} == {"query_key_value", "output"}
    wide = unroll({"params": params, "adapters": setting(LLAMA, 2)[3]}, fused=True)
    assert {*wide["params"]["layers_0"]["attention"]} == {"query", "key", "value", "output"}
    assert "gate_up" in wide["params"]["layers_0"]["mlp"]
