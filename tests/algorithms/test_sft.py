"""Supervised fine-tuning: which tokens the loss sees, and that padding and micro-batches do not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.algorithms.sft import sft_loss
from pjrlhf.data.packing import NOWHERE, PackLayout, pack
from pjrlhf.models.adapters import AdapterConfig, Backbone
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.training.metrics import to_floats

CONFIG = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    tie_embeddings=False,
)
MODEL, NONE = Decoder(CONFIG), AdapterConfig(rank=0)
PROMPT, COMPLETION = 5, 6


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


def examples(count=4, seed=0):
    """Prompts and completions of different lengths."""
    rng = np.random.default_rng(seed)
    sizes = [(rng.integers(1, PROMPT + 1), rng.integers(1, COMPLETION + 1)) for _ in range(count)]
    return [tuple(rng.integers(1, 24, n).tolist() for n in pair) for pair in sizes]


def packed(rows, mode="none", length=PROMPT + COMPLETION, **options):
    prompts, completions = [prompt for prompt, _ in rows], [[completion] for _, completion in rows]
    return pack(prompts, completions, PackLayout(mode=mode, length=length, pad_id=0, **options))


@jax.jit
def loss(params, batch):
    return sft_loss(Backbone(MODEL, NONE, params), None, batch)


@jax.jit
def gradient(params, batch):
    return jax.grad(lambda p: sft_loss(Backbone(MODEL, NONE, p), None, batch)[0])(params)


@jax.jit
def run(params, batch):
    """(hidden states, logits) of rows with one example each."""
    policies = Backbone(MODEL, NONE, params).policies()
    hidden, _ = policies(batch.tokens, batch.segment > 0)
    return hidden, policies.logits(hidden)


def test_the_loss_is_the_mean_over_completion_tokens(params):
    rows = examples()
    logits = np.asarray(run(params, packed(rows))[1], np.float64)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = [
        -logps[i, len(prompt) - 1 + t, token]
        for i, (prompt, completion) in enumerate(rows)
        for t, token in enumerate(completion)
    ]
    value, metrics = loss(params, packed(rows))
    assert float(value) == pytest.approx(np.mean(each), rel=1e-5)
    found = to_floats(metrics)
    assert found["loss"] == pytest.approx(np.mean(each), rel=1e-5) and found["num_tokens"] == len(each)
    padding = 1 - sum(len(prompt) + len(completion) for prompt, completion in rows) / packed(rows).tokens.size
    assert found["wasted_tokens"] == pytest.approx(padding)


def test_only_completion_tokens_are_targets(params):
    """The gradient with respect to the head's column of a token is that of a target only inside completions."""
    rows = examples()
    batch = packed(rows)
    head = gradient(params, batch)["head"]["kernel"]
    # A token that is no target has the gradient of a softmax: its probabilities, so it never pulls the state closer.
    hidden, logits = run(params, batch)
    weight = np.zeros(batch.tokens.shape)
    for i, (prompt, completion) in enumerate(rows):
        weight[i, len(prompt) - 1 : len(prompt) + len(completion) - 1] = 1
    chance = jax.nn.softmax(logits)
    target = jax.nn.one_hot(np.roll(batch.tokens, -1, axis=1), CONFIG.vocab_size)
    expected = jnp.einsum("bt,btd,btv->dv", weight / weight.sum(), hidden, chance - target)
    np.testing.assert_allclose(head, expected, atol=1e-5)


def test_prompt_tokens_are_context(params):
    rows = examples()
    other = [([*prompt[:-1], prompt[-1] % 23 + 1], completion) for prompt, completion in rows]
    assert float(loss(params, packed(other))[0]) != float(loss(params, packed(rows))[0])


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "pack", "length": 24},
        pytest.param({"length": 200}, marks=pytest.mark.slow),
        {"mode": "pack", "multiple": 8},
    ],
)
def test_how_rows_are_packed_does_not_matter(params, options):
    narrow, other = packed(examples()), packed(examples(), **options)
    assert narrow.tokens.shape != other.tokens.shape
    assert float(loss(params, other)[0]) == pytest.approx(float(loss(params, narrow)[0]), rel=1e-6)
    same = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(same, gradient(params, other), gradient(params, narrow))


def test_what_stands_in_the_padding_does_not_matter(params):
    batch = packed(examples())
    noisy = batch.replace(tokens=np.where(batch.segment > 0, batch.tokens, 7))
    assert float(loss(params, noisy)[0]) == float(loss(params, batch)[0])


def test_micro_batches_add_up_to_the_whole(params):
    parts = [examples(seed=seed) for seed in range(3)]
    pairs = [loss(params, packed(part))[1] for part in parts]
    together = to_floats(jax.tree.map(lambda *x: sum(x), *pairs))["loss"]
    whole = packed([row for part in parts for row in part])
    assert together == pytest.approx(float(loss(params, whole)[0]), rel=1e-6)
    means = [to_floats(pair)["loss"] for pair in pairs]
    assert np.mean(means) != pytest.approx(together, rel=1e-4), "the parts have equally many tokens"


def test_a_batch_without_completion_tokens_is_no_nan(params):
    batch = packed(examples())
    batch = batch.replace(answer=np.full_like(batch.answer, NOWHERE))
    assert float(loss(params, batch)[0]) == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient(params, batch)))
