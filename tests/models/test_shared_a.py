"""One frozen first factor for all policies: the same numbers as a bank whose policies each have a copy of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_policies import MODEL, base, close, noise, prompts

from pjrlhf.merging import lora
from pjrlhf.models import shared_a
from pjrlhf.models.adapters import AdapterConfig, Backbone, frozen_factors, init_bank
from pjrlhf.models.quantization import Int8, quantize_params
from pjrlhf.rollout.sampler import Sampling, generate

B, T, K = 4, 6, 3
MIX = np.random.default_rng(0).dirichlet(np.ones(K), B).astype(np.float32)
ADAPTER = AdapterConfig(rank=2, alpha=4.0, freeze_a=True)
EACH = AdapterConfig(rank=2, alpha=4.0)


def whole_base(adapter=ADAPTER, quantized=False):
    plain = quantize_params(Int8(), base()) if quantized else base()
    return shared_a.with_a(plain, frozen_factors(base(), adapter))


def second(adapter=ADAPTER):
    return noise(init_bank(base(), adapter, K, jax.random.key(0)), 3, 0.2)


def hidden(adapter, base, bank, mix=MIX):
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 24, (B, T)))
    return jax.jit(lambda bank: Backbone(MODEL, adapter, base).policies(bank, mix)(tokens, jnp.ones((B, T), bool))[0])(
        bank
    )


@pytest.mark.parametrize(
    ("names", "quantized", "decodes"),
    [
        ((), False, ["transposed"]),
        pytest.param(("q_proj", "down_proj"), False, ["scan", "unrolled", "transposed"], marks=pytest.mark.slow),
        pytest.param((), True, ["scan", "unrolled"], marks=pytest.mark.slow),
    ],
)
def test_policies_are_those_with_a_copy_of_the_factor_each(names, quantized, decodes):
    adapter = AdapterConfig(rank=2, alpha=4.0, target_modules=names, freeze_a=True)
    one, bank = whole_base(adapter, quantized), second(adapter)
    pairs = shared_a.complete(bank, one)
    for mix in (MIX, MIX[:1]):
        close(hidden(adapter, one, bank, mix), hidden(EACH, one, pairs, mix), 1e-5)
    # Sampling, which fuses layers and transposes kernels.
    prompt, greedy = prompts(B, 5), Sampling(max_new_tokens=4, eos_ids=(-1,), pad_id=0, temperature=0.0)
    for decode in decodes:
        model = MODEL.clone(decode=decode)

        def sample(how, bank, model=model):
            policies = Backbone(model, how, one).policies(bank, MIX)
            return generate(policies, greedy, prompt, jax.random.key(0))

        found = [jax.jit(sample, static_argnums=0)(*each) for each in ((adapter, bank), (EACH, pairs))]
        np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
        close(found[0].logps, found[1].logps, 1e-5)


def test_gradients_of_the_second_factors_are_those_with_a_copy_each():
    one, bank = whole_base(), second()

    def loss(adapter, bank):
        return jnp.sum(jnp.sin(hidden(adapter, one, bank)))

    found = jax.grad(lambda bank: loss(ADAPTER, bank))(bank)
    wanted = jax.grad(lambda bank: loss(EACH, shared_a.complete(bank, one)))(bank)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, wanted)


def test_a_soup_is_an_adapter_of_the_same_rank():
    """sum_k w_k A B_k = A (sum_k w_k B_k): a bank of one with the averaged factors is the soup, exactly."""
    one, bank, weights = whole_base(), second(), np.array([0.7, -0.4, 0.9], np.float32)
    soup = jax.tree.map(lambda b: jnp.tensordot(weights, b, 1)[None], bank)
    close(hidden(ADAPTER, one, bank, weights[None]), hidden(ADAPTER, one, soup, np.ones((1, 1), np.float32)), 1e-5)
    pairs = shared_a.complete(bank, one)["layers"]
    each = [jax.tree.map(lambda x, k=k: x[k], pairs) for k in range(K)]
    numbers = weights.tolist()
    joined = lora.concatenate(each, [2.0] * K, numbers)
    assert joined["attention"]["query"]["a"].shape[-1] == 2
    exact, shares = lora.merge_dense(base()["layers"], each, [2.0] * K, numbers), (weights / weights.sum()).tolist()
    for adapter, factor in ((joined, 1.0), (lora.average_factors(each, [2.0] * K, shares), sum(numbers))):
        merged = lora.merge_dense(base()["layers"], [adapter], [1.0], [factor])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), merged, exact)


def test_the_factor_depends_on_the_layer_alone_and_has_the_variance_of_a_trained_one():
    found = shared_a.draw("mlp/up", (3, 256, 16), "float32")
    assert np.array_equal(found, shared_a.draw("mlp/up", (3, 256, 16), "float32"))
    assert not np.array_equal(found, shared_a.draw("mlp/gate", (3, 256, 16), "float32"))
    assert abs(found.std() * 16 - 1) < 0.02 and abs(found.mean()) < 0.002
    # Runs of other versions have the same.
    np.testing.assert_allclose(found[0, 0, :3], (0.114628, -0.058348, -0.065721), atol=1e-6)


def test_banks_of_files_have_both_factors_and_another_first_factor_is_kept():
    one, bank = whole_base(), second()
    pairs = shared_a.complete(bank, one)
    jax.tree.map(np.testing.assert_array_equal, shared_a.second_factors(pairs, one), bank)
    other = noise(pairs, 4, 0.1)  # of a run that trains A: it takes the place of the frozen one
    assert shared_a.second_factors(other, one) is other
    jax.tree.map(np.testing.assert_array_equal, shared_a.complete(other, one), other)
    close(hidden(ADAPTER, one, other), hidden(EACH, base(), other), 1e-6)


def test_a_bank_whose_policies_have_one_factor_is_served_with_it_in_the_base():
    pairs = shared_a.complete(second(), whole_base())
    together, bank = shared_a.share(base(), pairs)
    jax.tree.map(np.testing.assert_array_equal, (together, bank), (whole_base(), second()))
    trained = noise(pairs, 4, 0.1)
    assert shared_a.share(base(), trained)[1] is trained
