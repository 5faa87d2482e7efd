"""Compilation, padding, caching, mixing and sharding do not change what the decoder computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support.tiny_decoder import (
    ADAPTER,
    CONFIG,
    MODEL,
    VARIANTS,
    B,
    K,
    T,
    assert_close,
    base,
    forward,
    full_bank,
    lora_bank,
    padded,
    texts,
)

from pjrlhf.models.adapters import TARGETS, AdapterConfig, Policies, init_bank
from pjrlhf.models.config import RopeScaling
from pjrlhf.models.decoder import Decoder, init_cache, init_params, rope_frequencies


@functools.partial(jax.jit, static_argnums=(0, 1))
def policy(model, adapter, params, bank, mix, tokens, valid):
    policies = Policies(model, adapter, params, bank, mix)
    return policies.logits(policies(tokens, valid)[0])


@functools.cache
def loss_and_gradient(model):
    tokens, valid = texts()

    @jax.jit
    def run(params):
        def loss(params):
            logits = forward(model, params, tokens, valid)
            return jnp.mean(jnp.where(valid[..., None], jnp.tanh(logits), 0.0))

        return jax.value_and_grad(loss)(params)

    return run(base())


def merged(weights):
    """Base plus the weighted dense updates of the LoRA bank, in float64 numpy."""
    params = jax.tree.map(np.asarray, base())
    bank = jax.tree.map(lambda x: np.asarray(x, np.float64), lora_bank())
    layers = {name: dict(block) for name, block in params["layers"].items()}
    for block, names in TARGETS.items():
        for name in names:
            pair = bank["layers"][block][name]
            update = sum(w * pair["a"][k] @ pair["b"][k] for k, w in enumerate(weights))
            kernel = params["layers"][block][name]["kernel"] + ADAPTER.alpha / ADAPTER.rank * update
            layers[block][name] = {"kernel": kernel.astype(np.float32)}
    return {**params, "layers": layers}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "remat full" else ()) for name in VARIANTS]
)
def test_compilation_choices_change_neither_loss_nor_gradient(name):
    assert_close(loss_and_gradient(VARIANTS[name]), loss_and_gradient(MODEL))


def test_all_variants_create_the_same_parameters():
    wanted = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    for model in VARIANTS.values():
        assert jax.eval_shape(lambda m=model: init_params(m, jax.random.key(0))) == wanted


@pytest.mark.parametrize("kind", ["base", "lora", "full"])
def test_unrolled_layers_equal_the_scan(kind):
    adapter = AdapterConfig(rank=0) if kind == "full" else ADAPTER
    bank = {"base": None, "lora": lora_bank(), "full": full_bank()}[kind]
    mix = np.eye(K, dtype=np.float32)[:2]
    tokens, valid = texts()

    @functools.partial(jax.jit, static_argnames="together")
    def hidden(params, bank, together):
        policies = Policies(MODEL, adapter, params, bank, mix)
        return (policies if together else policies.unroll())(tokens, valid)[0]

    assert_close(hidden(base(), bank, together=False), hidden(base(), bank, together=True))


@pytest.mark.parametrize("left, right", [(0, 6), (1, 0), (6, 0)])
def test_padding_side_and_amount_do_not_matter(left, right):
    tokens, valid = texts()
    want = forward(MODEL, base(), tokens, valid)[valid]
    tokens, valid = padded(left, right)
    assert_close(forward(MODEL, base(), tokens, valid)[valid], want)


def test_a_token_sees_no_later_token():
    tokens, valid = texts()
    changed = np.where(np.arange(T) < 6, tokens, 3)
    want = forward(MODEL, base(), tokens, valid)
    got = forward(MODEL, base(), changed, valid)
    np.testing.assert_array_equal(got[:, :6], want[:, :6])
    assert not np.allclose(got[0, 6:], want[0, 6:])


def test_rows_do_not_see_each_other():
    tokens, valid = texts()
    order = np.random.default_rng(5).permutation(B)
    mix = np.random.default_rng(6).standard_normal((B, K)).astype(np.float32)
    want = policy(MODEL, ADAPTER, base(), lora_bank(), mix, tokens, valid)
    got = policy(MODEL, ADAPTER, base(), lora_bank(), mix[order], tokens[order], valid[order])
    assert_close(got, want[order])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_cached_decoding_equals_the_full_forward(kind):
    """Left-padded rows: prefill of six tokens, then one by one; two cache positions stay unused."""
    slots = T + 3
    tokens, valid = padded(1, 0)
    bank = {"lora": lora_bank(), "full": full_bank()}[kind]
    groups = 2 if kind == "full" else B
    mix = np.random.default_rng(7).dirichlet(np.ones(K), groups).astype(np.float32)

    @jax.jit
    def step(tokens, valid, cache, offset):
        policies = Policies(MODEL, ADAPTER, base(), bank, mix)
        hidden, cache = policies(tokens, valid, cache, offset)
        return policies.logits(hidden), cache

    want = policy(MODEL, ADAPTER, base(), bank, mix, tokens, valid)
    cache, got = init_cache(CONFIG, B, slots, jnp.float32), []
    start = 0
    for size in (6, 1, 1, 1, 1, 1):
        end = start + size
        seen = np.pad(valid[:, :end], ((0, 0), (0, slots - end)))
        logits, cache = step(tokens[:, start:end], seen, cache, start)
        got.append(logits)
        start = end
    assert start == tokens.shape[1]
    assert_close(np.concatenate(got, 1)[valid], want[valid])


@pytest.mark.parametrize("windows", [(), (3, 0)])
def test_rows_may_write_to_the_cache_at_places_of_their_own(windows):
    """Each row is ahead of the one before; what lies beyond the cache is dropped."""
    model = MODEL.clone(config=dataclasses.replace(CONFIG, windows=windows))
    tokens, _ = texts()
    mix = np.random.default_rng(7).dirichlet(np.ones(K), B).astype(np.float32)
    count, slots = tokens.shape[1], tokens.shape[1] + 2
    want = policy(model, ADAPTER, base(), lora_bank(), mix, tokens, np.ones(tokens.shape, bool))

    @jax.jit
    def step(tokens, cache, offset):
        valid = jnp.arange(slots) < (offset + tokens.shape[1])[:, None]
        policies = Policies(model, ADAPTER, base(), lora_bank(), mix)
        hidden, cache = policies(tokens, valid, cache, offset)
        return policies.logits(hidden), cache

    cache, rows = init_cache(CONFIG, B, slots, jnp.float32), np.arange(B)
    done, starts = np.zeros(B, int), 1 + rows % 3
    while (done < count).any():
        # A row that starts later, or is done, writes beyond the cache.
        size = 2
        write = (starts <= 0) & (done < count)
        offset = np.where(write, done, slots)
        columns = np.minimum(done[:, None] + np.arange(size), count - 1)
        logits, cache = step(jnp.asarray(tokens[rows[:, None], columns]), cache, jnp.asarray(offset, jnp.int32))
        for row in rows[write]:
            new = min(size, count - done[row])
            assert_close(logits[row, :new], want[row, done[row] : done[row] + new])
            done[row] += new
        starts = starts - 1


def test_mix_zero_is_the_base_bit_for_bit():
    tokens, valid = texts()
    want = forward(MODEL, base(), tokens, valid)
    for adapter, bank in ((ADAPTER, lora_bank()), (AdapterConfig(rank=0), full_bank())):
        got = policy(MODEL, adapter, base(), bank, np.zeros((1, K), np.float32), tokens, valid)
        np.testing.assert_array_equal(got, want)


def test_a_fresh_bank_is_the_base_bit_for_bit():
    tokens, valid = texts()
    bank = init_bank(base(), ADAPTER, K, jax.random.key(1))
    got = policy(MODEL, ADAPTER, base(), bank, np.eye(K, dtype=np.float32)[np.arange(B) % K], tokens, valid)
    np.testing.assert_array_equal(got, forward(MODEL, base(), tokens, valid))


def test_one_hot_rows_are_the_base_plus_their_update():
    tokens, valid = texts()
    rows = np.arange(B) % K
    got = policy(MODEL, ADAPTER, base(), lora_bank(), np.eye(K, dtype=np.float32)[rows], tokens, valid)
    for k in range(K):
        want = forward(MODEL, merged(np.eye(K)[k]), tokens, valid)
        assert_close(got[rows == k], want[rows == k])
        assert np.abs(want - forward(MODEL, base(), tokens, valid)).max() > 0.1


@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (1.5, -0.7, 0.0)])
def test_a_soup_by_mix_is_the_merged_model(weights):
    tokens, valid = texts()
    got = policy(MODEL, ADAPTER, base(), lora_bank(), np.array([weights], np.float32), tokens, valid)
    assert_close(got, forward(MODEL, merged(weights), tokens, valid))


def test_full_parameter_soups_are_weighted_sums_per_group():
    tokens, valid = texts()
    full = AdapterConfig(rank=0)
    mix = np.array([[0, 1, 0], [0.2, 0.5, 0.3], [0.5, -0.2, 0.3], [0, 0, 0]], np.float32)
    got = policy(MODEL, full, base(), full_bank(), mix, tokens, valid)
    for g, weights in enumerate(mix):
        soup = jax.tree.map(
            lambda origin, theta, w=weights: origin * (1 - w.sum()) + np.tensordot(w, theta, 1), base(), full_bank()
        )
        rows = slice(g * B // len(mix), (g + 1) * B // len(mix))
        assert_close(got[rows], forward(MODEL, soup, tokens, valid)[rows])
    # Rows of `mix` that sum to 1 need no base.
    assert_close(policy(MODEL, full, None, full_bank(), mix[:2], tokens, valid)[: B // 4], got[: B // 4])


def test_batch_sharded_over_eight_devices():
    assert jax.device_count() == 8
    mesh = Mesh(np.array(jax.devices()), ("data",))
    tokens, valid = texts()
    mix = np.random.default_rng(8).dirichlet(np.ones(K), B).astype(np.float32)
    want = policy(MODEL, ADAPTER, base(), lora_bank(), mix, tokens, valid)
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    params, bank = jax.device_put((base(), lora_bank()), whole)
    got = policy(MODEL, ADAPTER, params, bank, *jax.device_put((mix, tokens, valid), rows))
    assert got.sharding.is_equivalent_to(rows, got.ndim)
    assert_close(got, want)


def test_tied_head_is_the_embedding():
    model = Decoder(CONFIG.replace(tie_embeddings=True))
    tokens, valid = texts()
    params = {k: v for k, v in base().items() if k != "head"}
    untied = {**params, "head": {"kernel": params["embed"]["embedding"].T}}
    assert_close(forward(model, params, tokens, valid), forward(MODEL, untied, tokens, valid))


def test_rope_scaling_keeps_short_and_divides_long_wavelengths():
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
    plain = np.asarray(rope_frequencies(16, 10_000.0, None))
    scaled = np.asarray(rope_frequencies(16, 10_000.0, scaling))
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 64 / 4, wavelength > 64
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    assert short.any() and long.any() and between.any()
    assert np.all((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8))


def test_mistakes_are_named():
    tokens, valid = texts()
    with pytest.raises(ValueError, match="remat='some'"):
        init_params(Decoder(CONFIG, remat="some"), jax.random.key(0))
    with pytest.raises(ValueError, match="8 examples cannot be split into 3"):
        policy(MODEL, ADAPTER, base(), lora_bank(), np.eye(K, dtype=np.float32), tokens, valid)
    with pytest.raises(ValueError, match="head_dim=5 is odd"):
        CONFIG.replace(head_dim=5)
    with pytest.raises(ValueError, match="num_heads=4 is not a multiple of num_kv_heads=3"):
        CONFIG.replace(num_kv_heads=3)
