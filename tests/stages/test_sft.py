"""Supervised fine-tuning: which tokens the loss sees, and that padding and micro-batches do not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.models.adapters import AdapterConfig, Policies
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.stages.sft import sft_loss
from pjrlhf.training.metrics import reduce, to_floats

CONFIG = ModelConfig(
    vocab_size=24, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8
)
MODEL, NONE = Decoder(CONFIG), AdapterConfig(rank=0)
PROMPT, COMPLETION = 5, 6


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


def make_batch(rows=4, prompt=PROMPT, completion=COMPLETION, seed=0):
    """`rows` of different lengths, prompts padded left to `prompt` and completions right to `completion`."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((rows, prompt + completion), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for i in range(rows):
        before, after = rng.integers(1, PROMPT + 1), rng.integers(1, COMPLETION + 1)
        place = slice(prompt - before, prompt + after)
        tokens[i, place], valid[i, place] = rng.integers(1, 24, before + after), True
    return {"tokens": tokens, "valid": valid, "loss_mask": valid & (np.arange(prompt + completion) >= prompt)}


def loss(params, batch, prompt=PROMPT):
    return sft_loss(MODEL, NONE, prompt, params, None, batch)


def test_the_loss_is_the_mean_over_completion_tokens(params):
    batch = make_batch()
    policies = Policies(MODEL, NONE, params, None, None)
    logits = np.asarray(policies.logits(policies(batch["tokens"], batch["valid"])[0]), np.float64)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = [-logps[i, t - 1, batch["tokens"][i, t]] for i, t in zip(*np.nonzero(batch["loss_mask"]), strict=True)]
    value, metrics = loss(params, batch)
    assert float(value) == pytest.approx(np.mean(each), rel=1e-5)
    assert to_floats(metrics) == pytest.approx({"loss": np.mean(each), "num_tokens": len(each)}, rel=1e-5)


def test_only_completion_tokens_are_targets(params):
    """The gradient with respect to the head's column of a token is that of a target only inside completions."""
    batch = make_batch()
    head = jax.grad(lambda p: loss(p, batch)[0])(params)["head"]["kernel"]
    # A token that is no target has the gradient of a softmax: its probabilities, so it never pulls the state closer.
    policies = Policies(MODEL, NONE, params, None, None)
    hidden = policies(batch["tokens"], batch["valid"])[0]
    weight = np.zeros((4, PROMPT + COMPLETION))
    weight[:, :-1] = batch["loss_mask"][:, 1:] / batch["loss_mask"].sum()
    chance = jax.nn.softmax(policies.logits(hidden))
    target = jax.nn.one_hot(np.roll(batch["tokens"], -1, axis=1), CONFIG.vocab_size)
    expected = jnp.einsum("bt,btd,btv->dv", weight, hidden, chance - target)
    np.testing.assert_allclose(head, expected, atol=1e-5)


def test_prompt_tokens_are_context_but_never_targets(params):
    batch = make_batch()
    other = {**batch, "loss_mask": batch["valid"]}  # a mask that (wrongly) covers the prompt
    assert float(loss(params, other)[0]) == float(loss(params, batch)[0])
    changed = batch["tokens"].copy()
    changed[:, PROMPT - 1] = changed[:, PROMPT - 1] % 23 + 1
    assert float(loss(params, {**batch, "tokens": changed})[0]) != float(loss(params, batch)[0])


@pytest.mark.parametrize(("prompt", "completion"), [(9, 6), (5, 11), (8, 8)])
def test_padding_does_not_matter(params, prompt, completion):
    narrow, wide = make_batch(), make_batch(prompt=prompt, completion=completion)
    expected, gradient = jax.value_and_grad(lambda p: loss(p, narrow)[0])(params)
    value, wider = jax.value_and_grad(lambda p: loss(p, wide, prompt)[0])(params)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), wider, gradient)


def test_what_stands_in_the_padding_does_not_matter(params):
    batch = make_batch()
    noisy = {**batch, "tokens": np.where(batch["valid"], batch["tokens"], 7)}
    assert float(loss(params, noisy)[0]) == float(loss(params, batch)[0])


def test_micro_batches_add_up_to_the_whole(params):
    batch = make_batch(rows=6)
    parts = jax.tree.map(lambda x: x.reshape(3, 2, -1), batch)
    stacked = jax.lax.map(lambda part: loss(params, part)[1]["loss"], parts)
    total, count = reduce({"loss": stacked})["loss"]
    assert float(total / count) == pytest.approx(float(loss(params, batch)[0]), rel=1e-6)
    means = [float(loss(params, jax.tree.map(lambda x, i=i: x[i], parts))[0]) for i in range(3)]
    assert np.mean(means) != pytest.approx(float(total / count), rel=1e-4), "the parts have equally many tokens"


def test_a_batch_without_completion_tokens_is_no_nan(params):
    batch = make_batch()
    value, gradient = jax.value_and_grad(lambda p: loss(p, {**batch, "loss_mask": np.zeros_like(batch["valid"])})[0])(
        params
    )
    assert float(value) == 0
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))
