"""Sampling on eight devices: the samples of one device, without communicating weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.meshes import MESHES
from support.small_policies import ADAPTERS, EOS, PAD, close, noise, prompts

from pjrlhf.models.adapters import Policies, init_bank
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.parallel.mesh import batch_sharding, make_mesh, shard_batch, shard_params
from pjrlhf.parallel.roofline import collective_bytes
from pjrlhf.rollout.decoding import PolicyEnsemble
from pjrlhf.rollout.sampler import Sampling, generate

B, P, K = 8, 5, 2
# So wide that communicating sums of B rows takes fewer bytes than communicating kernels.
MODEL = Decoder(
    ModelConfig(
        vocab_size=24, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
    )
)
SOUPS = np.random.default_rng(0).dirichlet(np.ones(K), B).astype(np.float32)
FIRST = "soups", "2x2x2", "scan"  # at once; the others where there is time
KINDS = ("base", "soups", "full parameters", "combined", "user tokens")
# The decode mode of TPUs on every mesh, the others on the mesh with all axes.
CASES = [
    pytest.param(kind, mesh, decode, marks=() if (kind, mesh, decode) == FIRST else pytest.mark.slow)
    for kind in KINDS
    for mesh in MESHES
    for decode in (("scan", "unrolled", "transposed") if mesh == "2x2x2" else ("scan",))
]


def policies_of(kind, model, base, bank):
    lora = ADAPTERS["lora"]
    if kind == "base":
        return Policies(model, lora, base, None, None)
    if kind == "full parameters":
        return Policies(model, ADAPTERS["full"], base, bank, jnp.eye(K))
    if kind == "combined":
        return PolicyEnsemble(model, lora, base, bank, jnp.asarray(SOUPS))
    users = jnp.asarray(np.random.default_rng(1).standard_normal((B, 2, 64)), jnp.float32)
    return Policies(model, lora, base, bank, jnp.asarray(SOUPS), users if kind == "user tokens" else None)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def draw(kind, model, count, base, bank, prompt):
    sampling = Sampling(max_new_tokens=count, eos_ids=(EOS,), pad_id=PAD)
    return generate(policies_of(kind, model, base, bank), sampling, prompt, jax.random.key(3))


@functools.cache
def arrays(kind):
    """base, bank and prompts."""
    base = noise(init_params(MODEL, jax.random.key(0)), 1, 0.1)
    adapter = ADAPTERS["full" if kind == "full parameters" else "lora"]
    return base, noise(init_bank(base, adapter, K, jax.random.key(1)), 2, 0.1), prompts(B, P)


@functools.cache
def of_one_device(kind):
    return jax.device_get(draw(kind, MODEL, 6, *arrays(kind)))


def placed(kind, sizes):
    """The model and its arrays on a mesh."""
    mesh = make_mesh(sizes)
    base, bank, prompt = arrays(kind)
    model = MODEL.clone(batch_sharding=batch_sharding(mesh))
    return model, shard_params(mesh, base), shard_params(mesh, bank), shard_batch(mesh, prompt)


@pytest.mark.parametrize(("kind", "mesh", "decode"), CASES)
def test_devices_sample_what_one_does(kind, mesh, decode):
    model, *rest = placed(kind, MESHES[mesh])
    got, want = jax.device_get(draw(kind, model.clone(decode=decode), 6, *rest)), of_one_device(kind)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    close(got.logps, want.logps)
    assert len({*want.tokens.flat}) > 6


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        pytest.param(kind, mesh, marks=() if (kind, mesh) == ("soups", "8x1") else pytest.mark.slow)
        for kind in ("base", "soups", "combined", "user tokens")
        for mesh in ("8x1", "4x2", "2x2x2")
    ],
)
def test_a_token_does_not_send_the_weights(kind, mesh):
    """The prefill, with more tokens per row, gathers them."""
    model, base, *rest = placed(kind, MESHES[mesh])

    def sent(count):
        return sum(collective_bytes(draw.lower(kind, model, count, base, *rest).compile().as_text()).values())

    once, more = sent(1), sent(5)
    sizes = MESHES[mesh]
    weights = sum(x.nbytes for x in jax.tree.leaves(base["layers"])) / sizes.get("tensor", 1)
    assert 0 < (more - once) / 4 < weights / 3
    assert once > weights * (1 - 1 / sizes["fsdp"])
