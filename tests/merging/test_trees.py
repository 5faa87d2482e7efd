import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_trees import assert_same, assert_trees

from pjrlhf.merging import trees

WEIGHTS = (0.5, -1.25, 0.3)


def tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return {"embed": {"embedding": draw(5, 3)}, "layers": {"mlp": {"up": {"kernel": draw(2, 3, 4)}}}, "scale": draw(3)}


@pytest.fixture
def ingredients():
    return [tree(seed) for seed in range(3)]


def test_weighted_sum_is_the_formula(ingredients):
    expected = jax.tree.map(
        lambda *x: sum(w * np.asarray(y, np.float64) for w, y in zip(WEIGHTS, x, strict=True)), *ingredients
    )
    assert_trees(trees.weighted_sum(ingredients, WEIGHTS), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("piece", [4, 7, 100])
def test_sums_in_pieces_are_those_of_the_whole(piece, dtype):
    arrays = [np.asarray(tree(seed, dtype)["layers"]["mlp"]["up"]["kernel"]).ravel() for seed in range(3)]
    pieces = [np.array(x) for x in trees.sum_in_pieces(arrays, WEIGHTS, dtype, piece)]
    assert all(x.size <= piece and x.dtype == dtype for x in pieces)
    want = trees.weighted_sum([{"x": x} for x in arrays], WEIGHTS)["x"]
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(
        np.concatenate(pieces).astype(np.float32), np.asarray(want, np.float32), rtol=tolerance, atol=tolerance
    )
    for k, row in enumerate(np.eye(3)):
        np.testing.assert_array_equal(
            np.concatenate([*map(np.array, trees.sum_in_pieces(arrays, row, dtype))]), arrays[k]
        )


def test_soup_is_the_formula(ingredients):
    base = tree(9)
    expected = jax.tree.map(
        lambda b, *x: b + sum(w * (np.asarray(y, np.float64) - b) for w, y in zip(WEIGHTS, x, strict=True)),
        base,
        *ingredients,
    )
    assert_trees(trees.soup(base, ingredients, WEIGHTS), expected, atol=1e-6)


@pytest.mark.parametrize("k", range(3))
def test_one_hot_is_the_ingredient(ingredients, k):
    row = np.eye(3)[k]
    assert_same(trees.weighted_sum(ingredients, row), ingredients[k])
    assert_same(trees.soup(tree(9), ingredients, row), ingredients[k])


def test_zero_weights_are_the_base(ingredients):
    assert_same(trees.soup(tree(9), ingredients, (0, 0, 0)), tree(9))


def test_order_does_not_matter(ingredients):
    order = (2, 0, 1)
    shuffled = trees.weighted_sum([ingredients[i] for i in order], [WEIGHTS[i] for i in order])
    assert_trees(shuffled, trees.weighted_sum(ingredients, WEIGHTS), atol=1e-6)


def test_linear_in_the_weights(ingredients):
    u, v = np.array(WEIGHTS), np.array((-2.0, 0.1, 4.0))
    parts = [trees.weighted_sum(ingredients, u), trees.weighted_sum(ingredients, v)]
    assert_trees(trees.weighted_sum(ingredients, 3 * u - v), trees.weighted_sum(parts, (3, -1)), atol=1e-5)


def test_opposite_weights_cancel(ingredients):
    base = tree(9)
    there = trees.soup(base, ingredients, WEIGHTS)
    back = trees.soup(base, ingredients, [-w for w in WEIGHTS])
    assert_trees(trees.weighted_sum([there, back], (0.5, 0.5)), base, atol=1e-6)


def test_accumulate_one_at_a_time_equals_the_sum(ingredients):
    total = None
    for ingredient, weight in zip(ingredients, WEIGHTS, strict=True):
        total = trees.accumulate(total, ingredient, weight)
    assert_same(total, trees.weighted_sum(ingredients, WEIGHTS))
    for seed, ingredient in enumerate(ingredients):
        assert_same(ingredient, tree(seed))


def test_accumulate_donates_the_running_sum(ingredients):
    total = trees.accumulate(None, ingredients[0], 1.0)
    trees.accumulate(total, ingredients[1], 1.0)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(total))


def test_the_last_soup_lends_its_memory(ingredients):
    base = tree(9)
    for merge in (trees.weighted_sum, lambda *x, **y: trees.soup(base, *x, **y)):
        last = merge(ingredients, (1, 0, 0))
        places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(last)]
        merged = merge(ingredients, WEIGHTS, out=last)
        assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(merged)] == places
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(last))
        assert_same(merged, merge(ingredients, WEIGHTS))


def test_sixteen_bit_trees_sum_in_float32():
    # 256 + 1 - 256 is 1 in float32 and 0 in bfloat16, whose spacing at 256 is 2.
    values = [{"x": jnp.asarray([v], jnp.bfloat16)} for v in (256.0, 1.0, 256.0)]
    merged = trees.weighted_sum(values, (1, 1, -1))
    assert merged["x"].dtype == jnp.bfloat16 and merged["x"][0] == 1
    assert trees.soup({"x": jnp.zeros(1, jnp.bfloat16)}, values, (1, 1, -1))["x"][0] == 1
    assert trees.accumulate(None, values[0], 1.0)["x"].dtype == jnp.float32


def test_bfloat16_one_hot_is_exact():
    ingredients = [tree(seed, jnp.bfloat16) for seed in range(2)]
    assert_same(trees.weighted_sum(ingredients, (0, 1)), ingredients[1])


def test_dtypes_are_those_of_the_first(ingredients):
    mixed = [tree(0, jnp.bfloat16), ingredients[1]]
    assert {leaf.dtype for leaf in jax.tree.leaves(trees.weighted_sum(mixed, (0.5, 0.5)))} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(trees.weighted_sum(mixed[::-1], (0.5, 0.5)))} == {
        jnp.dtype(np.float32)
    }


def test_weights_are_differentiable(ingredients):
    def first(weights):
        return trees.weighted_sum(ingredients, weights)["scale"][0]

    expected = [ingredient["scale"][0] for ingredient in ingredients]
    np.testing.assert_allclose(jax.grad(first)(jnp.asarray(WEIGHTS)), expected, rtol=1e-6)


def lacking():
    other = tree(1)
    del other["layers"]["mlp"]["up"]
    return other


@pytest.mark.parametrize(
    ("others", "weights", "message"),
    [
        ([tree(1)], (1, 2, 3), "3 weights for 2 ingredients"),
        ([tree(1)], (1,), "1 weight for 2 ingredients"),
        ([tree(1)], (1, float("nan")), "weight 1 is nan"),
        ([tree(1)], (float("inf"), 1), "weight 0 is inf"),
        ([lacking()], (1, 1), "'layers/mlp/up/kernel' is in ingredient 0 but not in ingredient 1"),
        ([{**tree(1), "head": jnp.ones(2)}], (1, 1), "'head' is in ingredient 1 but not in ingredient 0"),
        ([{**tree(1), "scale": jnp.ones(4)}], (1, 1), r"'scale' has shape \(4,\) in ingredient 1 but \(3,\) in"),
        ([{**tree(1), "scale": jnp.ones(3, int)}], (1, 1), "'scale' of ingredient 1 is int32"),
    ],
)
def test_refuses_what_does_not_fit(others, weights, message):
    with pytest.raises(ValueError, match=message):
        trees.weighted_sum([tree(0), *others], weights)


def test_refuses_a_wrong_running_sum_or_base():
    with pytest.raises(ValueError, match=r"\(4,\) in the new ingredient but \(3,\) in the running sum"):
        trees.accumulate(tree(0), {**tree(1), "scale": jnp.ones(4)}, 1.0)
    with pytest.raises(ValueError, match=r"\(3,\) in ingredient 0 but \(4,\) in the base"):
        trees.soup({**tree(1), "scale": jnp.ones(4)}, [tree(0)], (1,))
    with pytest.raises(ValueError, match=r"'scale' has shape \(4,\) in out but \(3,\) in the first tree"):
        trees.weighted_sum([tree(0)], (1,), out={**tree(1), "scale": jnp.ones(4)})
    with pytest.raises(ValueError, match="'embed/embedding' is bfloat16 in out but float32 in the first tree"):
        trees.soup(tree(0), [tree(1)], (1,), out=tree(2, jnp.bfloat16))
    with pytest.raises(ValueError, match="no ingredient"):
        trees.weighted_sum([], [])
