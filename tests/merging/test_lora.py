import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.merging import lora

SHAPES = {"query": (6, 8), "up": (6, 10)}
RANKS, SCALES, WEIGHTS = (2, 3, 5), (2.0, 0.5, 1.7), (0.6, -1.1, 0.9)


def adapter(seed, rank, dtype=np.float32, a_seed=None, names=("query", "up")):
    """Pairs over two layers; `a_seed` draws `a` from its own seed, so that adapters can share it."""
    a_rng = np.random.default_rng(1000 + (seed if a_seed is None else a_seed))
    b_rng = np.random.default_rng(seed)
    return {
        "layers": {
            name: {
                "a": jnp.asarray(a_rng.normal(size=(2, SHAPES[name][0], rank)), dtype),
                "b": jnp.asarray(b_rng.normal(size=(2, rank, SHAPES[name][1])), dtype),
            }
            for name in names
        }
    }


def kernels(dtype=np.float32):
    rng = np.random.default_rng(77)
    layers = {name: {"kernel": jnp.asarray(rng.normal(size=(2, *shape)), dtype)} for name, shape in SHAPES.items()}
    return {"layers": layers, "norm": {"scale": jnp.asarray(rng.normal(size=6), dtype)}}


def dense(adapters, scales, weights):
    """The weighted sum of updates by name, in numpy float64."""
    total = {name: np.zeros((2, *shape)) for name, shape in SHAPES.items()}
    for each, scale, weight in zip(adapters, scales, weights, strict=True):
        for name, pair in each["layers"].items():
            total[name] += weight * scale * (np.asarray(pair["a"], np.float64) @ np.asarray(pair["b"], np.float64))
    return total


def product(joined):
    return {name: np.asarray(lora.delta(pair["a"], pair["b"], 1.0)) for name, pair in joined["layers"].items()}


def assert_updates(actual, expected, atol=1e-5):
    for name in SHAPES:
        np.testing.assert_allclose(actual[name], expected[name], atol=atol, rtol=0)


@pytest.fixture
def adapters():
    return [adapter(seed, rank) for seed, rank in enumerate(RANKS)]


@pytest.fixture
def float64():
    jax.config.update("jax_enable_x64", True)
    yield np.float64
    jax.config.update("jax_enable_x64", False)


def merged_update(adapters, scales, weights):
    base = kernels(adapters[0]["layers"]["query"]["a"].dtype)
    merged = lora.merge_dense(base, adapters, scales, weights)
    np.testing.assert_array_equal(merged["norm"]["scale"], base["norm"]["scale"])
    return {name: np.asarray(merged["layers"][name]["kernel"] - base["layers"][name]["kernel"]) for name in SHAPES}


EXACT = {
    "dense": merged_update,
    "concatenate": lambda adapters, scales, weights: product(lora.concatenate(adapters, scales, weights)),
}
exact = pytest.mark.parametrize("update", EXACT.values(), ids=EXACT.keys())


@exact
def test_any_ranks_scales_and_weights_are_exact(adapters, update):
    assert_updates(update(adapters, SCALES, WEIGHTS), dense(adapters, SCALES, WEIGHTS))


@exact
def test_exact_to_float64(float64, update):
    adapters = [adapter(seed, rank, float64) for seed, rank in enumerate(RANKS)]
    assert_updates(update(adapters, SCALES, WEIGHTS), dense(adapters, SCALES, WEIGHTS), atol=1e-12)


@exact
@pytest.mark.parametrize("k", range(3))
def test_one_hot_is_the_adapter(adapters, update, k):
    expected = dense([adapters[k]], [SCALES[k]], [1.0])
    assert_updates(update(adapters, SCALES, np.eye(3)[k]), expected)


@exact
def test_order_does_not_matter(adapters, update):
    pick = lambda values: [values[i] for i in (2, 0, 1)]  # noqa: E731
    assert_updates(update(pick(adapters), pick(SCALES), pick(WEIGHTS)), update(adapters, SCALES, WEIGHTS))


@exact
def test_linear_in_the_weights(adapters, update):
    u, v = np.array(WEIGHTS), np.array((1.0, 2.0, -0.5))
    first, second = update(adapters, SCALES, u), update(adapters, SCALES, v)
    expected = {name: 2 * first[name] - 3 * second[name] for name in SHAPES}
    assert_updates(update(adapters, SCALES, 2 * u - 3 * v), expected, atol=1e-4)


@exact
def test_opposite_weights_cancel(adapters, update):
    there, back = update(adapters, SCALES, WEIGHTS), update(adapters, SCALES, [-w for w in WEIGHTS])
    assert_updates(there, {name: -x for name, x in back.items()})
    assert min(np.abs(x).max() for x in there.values()) > 1
    twice = update([adapters[0]] * 2, SCALES[:1] * 2, (0.7, -0.7))
    assert_updates(twice, dict.fromkeys(SHAPES, 0), atol=1e-6)


def test_concatenation_adds_ranks(adapters):
    joined = lora.concatenate(adapters, SCALES, WEIGHTS)
    assert joined["layers"]["up"]["a"].shape == (2, 6, 10) and joined["layers"]["up"]["b"].shape == (2, 10, 10)


def test_dense_merge_takes_adapters_of_different_kernels(adapters):
    narrow = adapter(5, 2, names=("query",))
    chosen = [adapters[0], narrow]
    assert_updates(merged_update(chosen, (1.0, 2.0), (0.5, 0.5)), dense(chosen, (1.0, 2.0), (0.5, 0.5)))


def cosine(first, second):
    x, y = (np.concatenate([np.ravel(each[name]) for name in SHAPES]) for each in (first, second))
    return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


def factored(adapters, scales, weights):
    return product(lora.average_factors(adapters, scales, weights))


def test_factor_averaging_is_the_mean_of_updates_where_a_is_shared():
    adapters = [adapter(seed, 3, a_seed=0) for seed in range(3)]
    weights = (0.5, 0.8, -0.3)
    assert_updates(factored(adapters, SCALES, weights), dense(adapters, SCALES, weights))
    assert cosine(factored(adapters, SCALES, weights), dense(adapters, SCALES, weights)) == pytest.approx(1, abs=1e-6)


def test_factor_averaging_shrinks_the_mean_where_a_is_not_shared():
    # Independent factors: the K equal terms of the mean keep 1/K of their size each, and the cross terms are noise.
    adapters = [adapter(seed, 3) for seed in range(3)]
    mean = dense(adapters, (1.0,) * 3, (1 / 3,) * 3)
    assert 0.3 < cosine(factored(adapters, (1.0,) * 3, (1 / 3,) * 3), mean) < 0.8


def test_factor_averaging_is_the_identity_on_one_hot():
    adapters = [adapter(seed, 3) for seed in range(2)]
    assert_updates(factored(adapters, SCALES[:2], (0, 1)), dense(adapters[1:], SCALES[1:2], (1,)))


@pytest.mark.parametrize("merge", [lora.concatenate, lora.average_factors])
def test_bfloat16_goes_round(merge):
    adapters = [adapter(seed, 3, jnp.bfloat16, a_seed=0) for seed in range(2)]
    joined = merge(adapters, (1.0, 1.0), (0, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(joined)} == {jnp.dtype(jnp.bfloat16)}
    assert_updates(product(joined), dense(adapters[1:], (1.0,), (1.0,)))


def test_bfloat16_kernels_add_in_float32():
    # 256 + 1 - 1 is lost in bfloat16, where 256 + 1 rounds to 256 and 256 - 1 to 255.
    base = {"x": {"kernel": jnp.full((1, 1), 256, jnp.bfloat16)}}
    one = {"x": {"a": jnp.ones((1, 1), jnp.bfloat16), "b": jnp.ones((1, 1), jnp.bfloat16)}}
    merged = lora.merge_dense(base, [one, one], (1.0, 1.0), (1.0, -1.0))["x"]["kernel"]
    assert merged.dtype == jnp.bfloat16 and merged[0, 0] == 256


BROKEN = {"layers": {**adapter(1, 3)["layers"], "up": {"a": jnp.ones((2, 6, 3)), "b": jnp.ones((2, 4, 10))}}}
WIDE = {"layers": {**adapter(1, 3)["layers"], "up": {"a": jnp.ones((2, 6, 3)), "b": jnp.ones((2, 3, 11))}}}
HALF = {"layers": {**adapter(1, 3)["layers"], "up": {"a": jnp.ones((2, 6, 3))}}}
STRANGE = {"layers": {**adapter(1, 3)["layers"], "gate": adapter(1, 3)["layers"]["up"]}}
NARROW = adapter(1, 3, names=("query",))


def dense_merge(adapters, scales, weights):
    return lora.merge_dense(kernels(), adapters, scales, weights)


@pytest.mark.parametrize(
    ("merge", "other", "numbers", "message"),
    [
        (dense_merge, adapter(1, 3), ((1, 1), (1, 2, 3)), "3 weights for 2 ingredients"),
        (lora.concatenate, adapter(1, 3), ((1, 1), (1, np.inf)), "weight 1 is inf"),
        (lora.concatenate, adapter(1, 3), ((1,), (1, 1)), "1 scales for 2 adapters"),
        (dense_merge, BROKEN, ((1, 1), (1, 1)), r"'layers/up': a \(2, 6, 3\) and b \(2, 4, 10\) do not multiply"),
        (dense_merge, WIDE, ((1, 1), (1, 1)), r"'layers/up/kernel' has shape \(2, 6, 10\), its update \(2, 6, 11\)"),
        (dense_merge, STRANGE, ((1, 1), (1, 1)), "'layers/gate/kernel', which the base does not have"),
        (dense_merge, HALF, ((1, 1), (1, 1)), "'layers/up/a' is no part of a pair"),
        (lora.concatenate, WIDE, ((1, 1), (1, 1)), r"adapter 1 updates 'layers/up' by \(2, 6, 11\), adapter 0 by"),
        (lora.concatenate, NARROW, ((1, 1), (1, 1)), "adapter 0 updates 'layers/up' but adapter 1 does not"),
        (lora.average_factors, adapter(1, 4), ((1, 1), (1, 1)), r"shape \(2, 6, 4\) in adapter 1 but \(2, 6, 3\)"),
    ],
)
def test_refuses_what_does_not_fit(merge, other, numbers, message):
    with pytest.raises(ValueError, match=message):
        merge([adapter(0, 3), other], *numbers)


@pytest.mark.parametrize("merge", [dense_merge, lora.concatenate, lora.average_factors])
def test_refuses_nothing(merge):
    with pytest.raises(ValueError, match="no adapter"):
        merge([], (), ())
