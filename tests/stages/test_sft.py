"""Supervised fine-tuning: which tokens the loss sees, and that padding and micro-batches do not matter."""

import functools

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


@functools.partial(jax.jit, static_argnames="prompt")
def loss(params, batch, prompt=PROMPT):
    return sft_loss(MODEL, NONE, prompt, params, None, batch)


@functools.partial(jax.jit, static_argnames="prompt")
def gradient(params, batch, prompt=PROMPT):
    return jax.grad(lambda p: sft_loss(MODEL, NONE, prompt, p, None, batch)[0])(params)


@jax.jit
def run(params, batch):
    """(hidden states, logits)."""
    policies = Policies(MODEL, NONE, params, None, None)
    hidden, _ = policies(batch["tokens"], batch["valid"])
    return hidden, policies.logits(hidden)


def test_the_loss_is_the_mean_over_completion_tokens(params):
    batch = make_batch()
    logits = np.asarray(run(params, batch)[1], np.float64)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = [-logps[i, t - 1, batch["tokens"][i, t]] for i, t in zip(*np.nonzero(batch["loss_mask"]), strict=True)]
    value, metrics = loss(params, batch)
    assert float(value) == pytest.approx(np.mean(each), rel=1e-5)
    assert to_floats(metrics) == pytest.approx({"loss": np.mean(each), "num_tokens": len(each)}, rel=1e-5)


def test_only_completion_tokens_are_targets(params):
    """The gradient with respect to the head's column of a token is that of a target only inside completions."""
    batch = make_batch()
    head = gradient(params, batch)["head"]["kernel"]
    # A token that is no target has the gradient of a softmax: its probabilities, so it never pulls the state closer.
    hidden, logits = run(params, batch)
    weight = np.zeros((4, PROMPT + COMPLETION))
    weight[:, :-1] = batch["loss_mask"][:, 1:] / batch["loss_mask"].sum()
    chance = jax.nn.softmax(logits)
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


def test_padding_does_not_matter(params):
    narrow, wide = make_batch(), make_batch(prompt=9, completion=11)
    assert float(loss(params, wide, 9)[0]) == pytest.approx(float(loss(params, narrow)[0]), rel=1e-6)
    same = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(same, gradient(params, wide, 9), gradient(params, narrow))


def test_what_stands_in_the_padding_does_not_matter(params):
    batch = make_batch()
    noisy = {**batch, "tokens": np.where(batch["valid"], batch["tokens"], 7)}
    assert float(loss(params, noisy)[0]) == float(loss(params, batch)[0])


def test_micro_batches_add_up_to_the_whole(params):
    parts = [make_batch(seed=seed) for seed in range(3)]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    pairs = [loss(params, part)[1] for part in parts]
    together = to_floats(reduce(jax.tree.map(lambda *x: jnp.stack(x), *pairs)))["loss"]
    assert together == pytest.approx(float(loss(params, whole)[0]), rel=1e-6)
    means = [to_floats(pair)["loss"] for pair in pairs]
    assert np.mean(means) != pytest.approx(together, rel=1e-4), "the parts have equally many tokens"


def test_a_batch_without_completion_tokens_is_no_nan(params):
    batch = make_batch()
    batch["loss_mask"] = np.zeros_like(batch["valid"])
    assert float(loss(params, batch)[0]) == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient(params, batch)))
