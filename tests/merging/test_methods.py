import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_trees import assert_same, assert_trees

from pjrlhf.merging import methods, trees

WEIGHTS = (0.5, -1.25, 0.3)
KEY = jax.random.key(5)
# Every method as a function of (base, ingredients, weights).
MERGES = {
    "task_arithmetic": methods.task_arithmetic,
    "ties": functools.partial(methods.ties, density=0.4),
    "dare_linear": functools.partial(methods.dare, density=0.6, key=KEY),
    "dare_ties": functools.partial(methods.dare, density=0.6, key=KEY, sign=True),
    "model_stock": lambda base, ingredients, weights: methods.model_stock(base, ingredients),
}


def tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return {"embed": {"embedding": draw(5, 3)}, "layers": {"up": {"kernel": draw(2, 3, 4)}}, "scale": draw(3)}


@pytest.fixture
def base():
    return tree(9)


@pytest.fixture
def ingredients():
    return [tree(seed) for seed in range(3)]


def in_numpy(function, base, *ingredients):
    """Applies function(base [n], updates [K, n]) -> [n] to each leaf, flat and in float64."""

    def leaf(start, *leaves):
        start, *leaves = (np.asarray(x, np.float64).ravel() for x in (start, *leaves))
        return function(start, np.stack(leaves) - start)

    flat = jax.tree.map(leaf, base, *ingredients)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), flat, base)


def trimmed(updates, density):
    out = np.zeros_like(updates)
    for row, update in zip(out, updates, strict=True):
        keep = sorted(range(len(update)), key=lambda n: -abs(update[n]))[: max(1, math.floor(density * len(update)))]
        row[keep] = update[keep]
    return out


def elected(updates, weights, normalize):
    """Entry by entry, the sum (or mean) of the terms of the elected sign."""
    total = np.zeros(updates.shape[1])
    for n in range(updates.shape[1]):
        terms = [w * tau for w, tau in zip(weights, updates[:, n], strict=True)]
        sign = 1 if sum(terms) >= 0 else -1
        agree = [i for i, term in enumerate(terms) if term * sign > 0]
        total[n] = sum(terms[i] for i in agree)
        if normalize:
            total[n] /= sum(weights[i] for i in agree) or 1
    return total


def test_task_arithmetic_is_the_formula(base, ingredients):
    expected = in_numpy(lambda start, taus: start - 0.7 * np.dot(WEIGHTS, taus), base, *ingredients)
    assert_trees(methods.task_arithmetic(base, ingredients, WEIGHTS, -0.7), expected, atol=1e-5)


@pytest.mark.parametrize("weights", [WEIGHTS, (0.2, 0.5, 0.3), (0, 0, 0)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
def test_ties_is_the_formula(base, ingredients, density, weights, normalize):
    def formula(start, taus):
        return start + 0.7 * elected(trimmed(taus, density), weights, normalize)

    actual = methods.ties(base, ingredients, weights, density, scale=0.7, normalize=normalize)
    # Weights left in an entry may nearly cancel, which magnifies rounding.
    assert_trees(actual, in_numpy(formula, base, *ingredients), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("size", "density", "left"), [(3, 0.1, 1), (10, 0.29, 2), (100, 0.29, 29), (10, 1.0, 10)])
def test_ties_keeps_a_fraction_and_at_least_one(size, density, left):
    update = np.random.default_rng(size).normal(size=size).astype(np.float32)
    merged = methods.ties({"x": jnp.zeros(size)}, [{"x": jnp.asarray(update)}], [2.0], density)["x"]
    largest = np.argsort(-np.abs(update))[:left]
    np.testing.assert_array_equal(merged, np.where(np.isin(np.arange(size), largest), update, 0))


def test_ties_keeps_all_that_equal_the_least_kept():
    zero, update = {"x": jnp.zeros(5)}, {"x": jnp.asarray([1.0, -3.0, 1.0, 0.0, -1.0])}
    np.testing.assert_array_equal(methods.ties(zero, [update], [1], 0.4)["x"], [1, -3, 1, 0, -1])
    np.testing.assert_array_equal(methods.ties(zero, [update], [1], 0.2)["x"], [0, -3, 0, 0, 0])


def test_the_largest_are_found_without_a_sort():
    x = np.abs(np.random.default_rng(0).normal(size=1000)).astype(np.float32) ** 20
    x[:3] = 0, 1e-42, 3e38
    for count in (1, 2, 500, 999, 1000):
        assert methods._largest(jnp.asarray(x), count) == np.sort(x)[-count]


def test_ties_divides_by_no_sum_that_cancels():
    zero, weights = {"x": jnp.zeros(1)}, (0.1, 0.6, -0.7)
    assert 0 < abs(sum(np.float32(weights))) < 1e-6
    # All three terms are positive and stay.
    signs = [{"x": jnp.asarray([x])} for x in (1.0, 1.0, -1.0)]
    np.testing.assert_allclose(methods.ties(zero, signs, weights, 1.0)["x"], [1.4], rtol=1e-6)


def test_ties_elects_plus_where_terms_cancel():
    pair = [{"x": jnp.asarray([-2.0, 3.0])}, {"x": jnp.asarray([2.0, -3.0])}]
    np.testing.assert_array_equal(methods.ties({"x": jnp.zeros(2)}, pair, (0.5, 0.5), 1.0)["x"], [2, 3])


def drawn(base, ingredient, density):
    """Which entries of an ingredient DARE keeps as the only one: {path: bool}."""
    merged = methods.dare(base, [ingredient], [1.0], density, KEY)
    return jax.tree.map(lambda x, start: np.asarray(x != start), merged, base)


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("rescale", ["l1", "inverse_density"])
def test_dare_is_the_formula(base, ingredients, rescale, sign):
    def leaf(path, start, *leaves):
        key = methods.tensor_key(KEY, jax.tree_util.keystr(path, simple=True, separator="/"))
        start, *leaves = (np.asarray(x, np.float64) for x in (start, *leaves))
        terms = []
        for i, theta in enumerate(leaves):
            mask = np.asarray(jax.random.bernoulli(jax.random.fold_in(key, i), 0.6, start.shape))
            tau = theta - start
            factor = 1 / 0.6 if rescale == "inverse_density" else np.abs(tau).sum() / np.abs(tau[mask]).sum()
            terms.append(factor * mask * tau)
        flat = np.stack(terms).reshape(len(terms), -1)
        total = elected(flat, WEIGHTS, normalize=False) if sign else np.dot(WEIGHTS, flat)
        return start + 0.7 * total.reshape(start.shape)

    expected = jax.tree.map_with_path(leaf, base, *ingredients)
    actual = methods.dare(base, ingredients, WEIGHTS, 0.6, KEY, scale=0.7, rescale=rescale, sign=sign)
    assert_trees(actual, expected, atol=1e-5)


def test_dare_is_unbiased_with_inverse_density():
    base, ingredients = {"x": jnp.zeros((4, 3))}, [{"x": tree(seed)["embed"]["embedding"][:4]} for seed in range(2)]
    keys = jax.random.split(KEY, 4000)
    one = lambda key: methods.dare(base, ingredients, (0.7, -0.4), 0.25, key, rescale="inverse_density")  # noqa: E731
    mean = jax.vmap(one)(keys)["x"].mean(0)
    # An entry's standard error is sqrt(sum_i (w_i tau_i)^2 * 3 / 4000) < 0.06.
    np.testing.assert_allclose(mean, methods.task_arithmetic(base, ingredients, (0.7, -0.4))["x"], atol=0.2)
    assert np.abs(mean - methods.task_arithmetic(base, ingredients, (0.7, -0.4))["x"]).mean() < 0.025


def test_dare_keeps_the_l1_norm_and_the_fraction():
    base = {"x": jnp.zeros((300, 200))}
    ingredient = {"x": jax.random.normal(jax.random.key(1), (300, 200))}
    merged = methods.dare(base, [ingredient], [1.0], 0.3, KEY)["x"]
    np.testing.assert_allclose(jnp.abs(merged).sum(), jnp.abs(ingredient["x"]).sum(), rtol=1e-5)
    assert abs(float((merged != 0).mean()) - 0.3) < 0.01


def test_dare_draws_by_key_path_and_place_alone(base, ingredients):
    masks = drawn(base, ingredients[0], 0.5)
    # Neither other leaves nor what else is merged moves a draw.
    alone = {"scale": base["scale"]}
    np.testing.assert_array_equal(drawn(alone, {"scale": ingredients[0]["scale"]}, 0.5)["scale"], masks["scale"])
    renamed = {"a": base["scale"], **base}
    other = drawn(renamed, {"a": ingredients[0]["scale"], **ingredients[0]}, 0.5)
    assert_same({name: other[name] for name in base}, masks)
    # Equal tensors at two paths, in two places or in two layers are drawn apart.
    big = {"a": jnp.zeros((2, 99)), "b": jnp.zeros((2, 99))}
    ones = jax.tree.map(jnp.ones_like, big)
    kept = methods.dare(big, [ones], [1.0], 0.5, KEY, stacked=("a", "b"))
    second = methods.dare(big, [big, ones], [0.0, 1.0], 0.5, KEY, stacked=("a", "b"))
    draws = [*kept["a"], *kept["b"], *second["a"]]
    assert len({np.asarray(x > 0).tobytes() for x in draws}) == len(draws)
    assert_same(kept, methods.dare(big, [ones], [1.0], 0.5, KEY, stacked=("a", "b")))
    assert not np.array_equal(kept["a"], methods.dare(big, [ones], [1.0], 0.5, jax.random.key(6))["a"])


@pytest.mark.parametrize("rescale", methods.RESCALES)
def test_dare_where_nothing_stays_is_the_base(rescale):
    base, ingredient = {"x": jnp.full(3, 2.0)}, {"x": jnp.full(3, 5.0)}
    assert_same(methods.dare(base, [ingredient], [1.0], 1e-9, KEY, rescale=rescale), base)
    assert_same(methods.dare(base, [base], [1.0], 0.5, KEY, rescale=rescale), base)


def test_density_1_keeps_everything(base, ingredients):
    arithmetic = methods.task_arithmetic(base, ingredients, WEIGHTS)
    for rescale in methods.RESCALES:
        assert_trees(methods.dare(base, ingredients, WEIGHTS, 1.0, KEY, rescale=rescale), arithmetic, atol=1e-6)
    unnormalised = methods.ties(base, ingredients, WEIGHTS, 1.0, normalize=False)
    assert_trees(methods.dare(base, ingredients, WEIGHTS, 1.0, KEY, sign=True), unnormalised, atol=1e-6)
    # Updates that agree in sign everywhere: TIES is their weighted mean.
    upward = [jax.tree.map(lambda x, y: x + jnp.abs(y), base, ingredient) for ingredient in ingredients]
    mean = trees.weighted_sum(upward, (0.2, 0.5, 0.3))
    assert_trees(methods.ties(base, upward, (2, 5, 3), 1.0), mean, atol=1e-6)


def vector(*values):
    return {"x": jnp.asarray(values, jnp.float32)}


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.4, -0.2])
def test_slerp_is_the_formula(ingredients, t):
    def leaf(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        dot = sum(x * y for x, y in zip(a.ravel(), b.ravel(), strict=True))
        angle = np.arccos(dot / np.sqrt((a**2).sum() * (b**2).sum()))
        return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)

    a, b, _ = ingredients
    assert_trees(methods.slerp(a, b, t), jax.tree.map(leaf, a, b), atol=1e-5)
    assert_trees(methods.slerp(b, a, 1 - t), methods.slerp(a, b, t), atol=1e-5)


def test_slerp_ends_on_its_ingredients(ingredients):
    a, b, _ = ingredients
    assert_same(methods.slerp(a, b, 0.0), a)
    assert_same(methods.slerp(a, b, 1.0), b)
    assert_trees(methods.slerp(a, a, 0.37), a, atol=1e-6)


def test_slerp_keeps_the_length_where_a_line_does_not():
    merged = methods.slerp(vector(3, 0), vector(0, 3), 0.5)["x"]
    np.testing.assert_allclose(merged, np.full(2, 3 / np.sqrt(2)), rtol=1e-6)


@pytest.mark.parametrize(
    ("a", "b"),
    [((1, 2), (-1, -2)), ((1, 2), (-2, -4)), ((0, 0), (1, 2)), ((1, 2), (0, 0)), ((0, 0), (0, 0)), ((1, 0), (1, 1e-3))],
)
def test_slerp_goes_straight_where_there_is_no_arc(a, b):
    expected = 0.75 * np.asarray(a) + 0.25 * np.asarray(b)
    np.testing.assert_allclose(methods.slerp(vector(*a), vector(*b), 0.25)["x"], expected, atol=1e-7)


def test_slerp_can_be_traced(ingredients):
    a, b, _ = ingredients
    assert_trees(jax.jit(methods.slerp)(a, b, 0.3), methods.slerp(a, b, 0.3), atol=1e-6)
    assert np.isfinite(jax.grad(lambda t: methods.slerp(a, b, t)["scale"].sum())(0.3))


@pytest.mark.parametrize("count", [2, 3])
def test_model_stock_is_the_formula(base, count):
    # A step all share makes the cosines positive, as those of fine-tuned models are.
    step = tree(20)
    ingredients = [jax.tree.map(lambda b, s, x: b + 2 * s + x, base, step, tree(seed)) for seed in range(count)]

    def formula(start, taus):
        cosines = []
        for i in range(count):
            for j in range(i):
                lengths = np.sqrt((taus[i] ** 2).sum() * (taus[j] ** 2).sum())
                cosines.append((taus[i] * taus[j]).sum() / lengths)
        c = np.mean(cosines)
        assert 0.05 < c < 1
        t = count * c / (1 + (count - 1) * c)
        return t * (start + taus.mean(0)) + (1 - t) * start

    assert_trees(methods.model_stock(base, ingredients), in_numpy(formula, base, *ingredients), atol=1e-5)


def test_model_stock_of_one_model_is_that_model(base, ingredients):
    assert_trees(methods.model_stock(base, [ingredients[0]] * 3), ingredients[0], atol=1e-5)
    assert_same(methods.model_stock(base, [base, base]), base)


@pytest.mark.parametrize("taus", [((1, 0), (0, 3)), ((1, 2), (-1, -2)), ((1, 2), (-3, 1)), ((1, 2), (0, 0))], ids=str)
def test_model_stock_of_updates_that_share_nothing_is_the_base(taus):
    base = vector(4, 5)
    ingredients = [vector(*(x + y for x, y in zip((4, 5), tau, strict=True))) for tau in taus]
    assert_trees(methods.model_stock(base, ingredients), base, atol=1e-6)


@pytest.mark.parametrize("k", range(3))
def test_one_hot_is_the_ingredient(base, ingredients, k):
    row = np.eye(3)[k]
    assert_same(methods.task_arithmetic(base, ingredients, row), ingredients[k])
    assert_trees(methods.ties(base, ingredients, row, 1.0), ingredients[k], atol=1e-6)
    assert_trees(methods.dare(base, ingredients, row, 1.0, KEY), ingredients[k], atol=1e-6)
    # Thinned out, an ingredient is not itself any more.
    assert not np.allclose(methods.ties(base, ingredients, row, 0.5)["scale"], ingredients[k]["scale"])


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "model_stock"])
def test_order_does_not_matter(base, ingredients, name):
    order = (2, 0, 1)
    shuffled = MERGES[name](base, [ingredients[i] for i in order], [WEIGHTS[i] for i in order])
    assert_trees(shuffled, MERGES[name](base, ingredients, WEIGHTS), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["task_arithmetic", "dare_linear"])
def test_linear_in_the_weights(base, ingredients, name):
    merge, u, v = MERGES[name], np.array(WEIGHTS), np.array((-2.0, 0.1, 4.0))
    parts = [merge(base, ingredients, row) for row in (u, v)]
    assert_trees(merge(base, ingredients, 3 * u - v), trees.soup(base, parts, (3, -1)), atol=2e-5)
    assert_trees(trees.weighted_sum([merge(base, ingredients, u), merge(base, ingredients, -u)], (0.5, 0.5)), base,
                 atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("name", ["ties", "dare_linear", "dare_ties"])
def test_zero_weights_are_the_base(base, ingredients, name):
    assert_same(MERGES[name](base, ingredients, (0, 0, 0)), base)


@pytest.mark.parametrize("name", [name for name in MERGES if name != "task_arithmetic"])
def test_a_stack_of_layers_is_merged_layer_by_layer(base, ingredients, name):
    stacked = MERGES[name]
    if name == "model_stock":
        stacked = lambda base, ingredients, weights, **options: methods.model_stock(base, ingredients, **options)  # noqa: E731
    merged = stacked(base, ingredients, WEIGHTS, stacked=("layers",))
    whole = MERGES[name](base, ingredients, WEIGHTS)
    assert_same({**merged, "layers": 0}, {**whole, "layers": 0})
    assert not np.allclose(merged["layers"]["up"]["kernel"], whole["layers"]["up"]["kernel"])
    settings = {"ties": {"density": 0.4}, "dare_linear": {"density": 0.6}, "dare_ties": {"density": 0.6}}.get(name, {})
    for i in range(2):
        start, *leaves = (x["layers"]["up"]["kernel"][i] for x in (base, *ingredients))
        key = {"key": methods.tensor_key(KEY, "layers/up/kernel", i)} if name.startswith("dare") else {}
        one = methods.METHODS[name](start, leaves, WEIGHTS, **settings, **key)
        np.testing.assert_array_equal(merged["layers"]["up"]["kernel"][i], one)


def test_slerp_turns_each_layer_of_a_stack(ingredients):
    a, b, _ = ingredients
    merged = methods.slerp(a, b, 0.3, stacked=("layers",))["layers"]["up"]["kernel"]
    for i in range(2):
        rows = [{"x": x["layers"]["up"]["kernel"][i]} for x in (a, b)]
        np.testing.assert_array_equal(merged[i], methods.slerp(*rows, 0.3)["x"])
        np.testing.assert_array_equal(merged[i], methods.METHODS["slerp"](None, [r["x"] for r in rows], (1.4, 0.6)))


def test_the_table_holds_the_sums(base, ingredients):
    start, *leaves = (x["scale"] for x in (base, *ingredients))
    for name in ("linear", "task_arithmetic"):
        expected = trees.soup(base, ingredients, WEIGHTS)["scale"]
        np.testing.assert_array_equal(methods.METHODS[name](start, leaves, WEIGHTS), expected)
    expected = trees.weighted_sum(ingredients, WEIGHTS)["scale"]
    np.testing.assert_array_equal(methods.METHODS["linear"](None, leaves, WEIGHTS), expected)


@pytest.mark.parametrize("name", [*MERGES, "slerp"])
def test_sixteen_bit_trees_merge_in_float32(name):
    base, *ingredients = (tree(seed, jnp.bfloat16) for seed in (9, 0, 1, 2))
    if name == "slerp":
        merge = lambda _, ingredients, weights: methods.slerp(*ingredients[:2], 0.3)  # noqa: E731
    else:
        merge = MERGES[name]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), [base, *ingredients])
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), merge(wide[0], wide[1:], WEIGHTS))
    merged = merge(base, ingredients, WEIGHTS)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    assert_same(merged, expected)


def test_inputs_are_left_alone(base, ingredients):
    for merge in MERGES.values():
        merge(base, ingredients, WEIGHTS)
    for seed, known in enumerate(ingredients):
        assert_same(known, tree(seed))


@pytest.mark.parametrize("name", [name for name in MERGES if name != "model_stock"])
@pytest.mark.parametrize(
    ("weights", "message"),
    [((1, 2), "2 weights for 3 ingredients"), ((1, float("nan"), 0), "weight 1 is nan")],
)
def test_refuses_weights_that_do_not_fit(base, ingredients, name, weights, message):
    with pytest.raises(ValueError, match=message):
        MERGES[name](base, ingredients, weights)


@pytest.mark.parametrize("name", MERGES)
def test_refuses_trees_that_do_not_fit(base, ingredients, name):
    with pytest.raises(ValueError, match="no ingredient to merge"):
        MERGES[name](base, [], ())
    odd = {**ingredients[1], "scale": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"'scale' has shape \(4,\) in ingredient 1 but \(3,\) in the base"):
        MERGES[name](base, [ingredients[0], odd, ingredients[2]], WEIGHTS)


def test_refuses_settings_that_do_not_fit(base, ingredients):
    for density in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"density .* is not in \(0, 1\]"):
            methods.ties(base, ingredients, WEIGHTS, density)
    with pytest.raises(ValueError, match="rescale 'l2' is unknown; choose one of l1, inverse_density"):
        methods.dare(base, ingredients, WEIGHTS, 0.5, KEY, rescale="l2")
    with pytest.raises(ValueError, match="needs a key"):
        methods.METHODS["dare_linear"](base["scale"], [ingredients[0]["scale"]], [1.0], density=0.5)
    with pytest.raises(ValueError, match="at least two ingredients"):
        methods.model_stock(base, ingredients[:1])
    with pytest.raises(ValueError, match="between two ingredients, not 3"):
        methods.METHODS["slerp"](None, [x["scale"] for x in ingredients], WEIGHTS)
    with pytest.raises(ValueError, match="sum to 0"):
        methods.METHODS["slerp"](None, [x["scale"] for x in ingredients[:2]], (0.5, -0.5))
    with pytest.raises(ValueError, match="weight 0 is nan"):
        methods.slerp(*ingredients[:2], float("nan"))
    with pytest.raises(ValueError, match="'scale' is in ingredient 0 but not in ingredient 1"):
        methods.slerp({"scale": jnp.ones(3)}, {"other": jnp.ones(3)}, 0.5)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("beta", [0.6, 0.8, 1.0])
def test_bone_soup_recovers_the_preference_weighted_soup(count, beta):
    """Backbones whose updates are linear in their mixed rewards are mixtures of one expert per objective."""
    rng = np.random.default_rng(count)
    base, experts = tree(9), [tree(seed) for seed in range(count)]
    mixing = methods.mixing_matrix(count, beta)
    np.testing.assert_allclose(mixing.sum(1), 1)
    np.testing.assert_allclose(np.diag(mixing), beta)
    backbones = [trees.soup(base, experts, row) for row in mixing]
    preferences = rng.dirichlet(np.ones(count))
    weights = methods.bone_soup_weights(preferences, beta)
    np.testing.assert_allclose(weights.sum(), 1)
    assert_trees(trees.soup(base, backbones, weights), trees.soup(base, experts, preferences), atol=1e-4)
    # Extrapolated, each expert's update is longer by 1 / (1 - a).
    away = rng.uniform(0, 0.5, count)
    further = trees.soup(base, backbones, methods.bone_soup_weights(preferences, beta, away))
    assert_trees(further, trees.soup(base, experts, preferences / (1 - away)), atol=1e-4)


def test_bone_soup_takes_any_mixing_matrix():
    mixing = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
    preferences = np.array([[0.2, 0.3, 0.5], [1, 0, 0]])
    weights = methods.bone_soup_weights(preferences, mixing)
    assert weights.shape == (2, 3) and weights.min() < 0
    np.testing.assert_allclose(weights @ mixing, preferences, atol=1e-12)
    np.testing.assert_allclose(methods.bone_soup_weights(preferences[1], mixing), weights[1])


def test_bone_soup_by_hand():
    # Two backbones of rewards (0.6, 0.4) and (0.4, 0.6): x1 = (3, -2), x2 = (-2, 3); k = 1 / (1 - 0.2) = 1.25 and 2.
    weights = methods.bone_soup_weights((0.25, 0.75), 0.6, (0.2, 0.5))
    expected = 0.25 * 1.25 * np.array([3, -2]) + 0.75 * 2 * np.array([-2, 3])
    np.testing.assert_allclose(weights, expected)
    np.testing.assert_allclose(1 - weights.sum(), 0.25 * (1 - 1.25) + 0.75 * (1 - 2))
    np.testing.assert_allclose(methods.bone_soup_weights((0.25, 0.75), 1.0), (0.25, 0.75))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0.5, 0.5), 0.5), "mixing has no inverse"),
        (((0.2, 0.3, 0.5), np.eye(2)), r"3 preferences, but a mixing of \(2, 2\)"),
        (((0.5, 0.5), 0.6, (0.1, 0.1, 0.1)), r"an extrapolation of \(3,\)"),
        (((0.5, 0.5), 0.6, 1.0), "extrapolation 1.0 is not below 1"),
        (((0.5, float("nan")), 0.6), "must be finite"),
        (((1.0,), 0.6), "cannot be mixed"),
    ],
)
def test_bone_soup_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        methods.bone_soup_weights(*arguments)
