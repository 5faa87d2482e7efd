"""A tiny decoder, banks of noisy policies on it and prompts, for tests of sampling, scoring and policy training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.models.adapters import AdapterConfig, Backbone, init_bank
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.rollout.batches import Prompts

CONFIG = ModelConfig(
    vocab_size=24, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)
MODEL = Decoder(CONFIG)
ADAPTERS = {"lora": AdapterConfig(rank=2, alpha=4.0), "full": AdapterConfig(rank=0)}
# Of adapters: one at once, the other where there is time.
KINDS = ["lora", pytest.param("full", marks=pytest.mark.slow)]
PAD, EOS = 0, 1


def constant(make):
    """Makes it once for each arguments; arrays and no tracers even when first called inside `jax.jit`."""

    @functools.cache
    def once(*arguments):
        with jax.ensure_compile_time_eval():
            return make(*arguments)

    return once


def noise(tree, seed, scale):
    """`tree` plus noise on every leaf; by NumPy, as `jnp` would compile programs for every shape."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    moved = [np.asarray(x) + scale * rng.standard_normal(x.shape).astype(x.dtype) for x in leaves]
    return jax.device_put(treedef.unflatten(moved))


@constant
def base():
    return noise(init_params(MODEL, jax.random.key(0)), 1, 0.2)


def backbone(kind):
    """The base with the shape of its adapters."""
    return Backbone(MODEL, ADAPTERS[kind], base())


@constant
def fresh_bank(kind, count):
    """Policies equal to the base."""
    return init_bank(base(), ADAPTERS[kind], count, jax.random.key(1))


@constant
def bank(kind, count):
    """Policies that differ from the base and from each other."""
    return noise(fresh_bank(kind, count), 2, 0.2)


def heads(count, seed=3):
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.standard_normal((count, CONFIG.hidden_size)), jnp.float32),
        "bias": jnp.asarray(rng.standard_normal(count), jnp.float32),
    }


def value_heads(count, each=1):
    """Of `count` policies, `each` of them."""
    return jax.tree.map(lambda x: x.reshape(count, each, *x.shape[1:]), heads(count * each))


def prompts(rows, slots, seed=4, shortest=1):
    """Prompts [rows, slots], left-padded, of random lengths and free of PAD and EOS."""
    rng = np.random.default_rng(seed)
    valid = np.arange(slots)[::-1] < rng.integers(shortest, slots + 1, rows)[:, None]
    tokens = rng.integers(2, CONFIG.vocab_size, (rows, slots))
    return Prompts(jnp.asarray(np.where(valid, tokens, PAD), jnp.int32), jnp.asarray(valid))


def wider(prompt, more, fill=PAD):
    """The same prompts with `more` slots of padding before them, filled with the token `fill`."""
    pad = ((0, 0), (more, 0))
    tokens = jnp.where(prompt.valid, prompt.tokens, fill)
    return Prompts(jnp.pad(tokens, pad, constant_values=fill), jnp.pad(prompt.valid, pad))


def close(got, want, tolerance=1e-5):
    """Equal trees, up to `tolerance` absolutely and relatively."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), got, want)
