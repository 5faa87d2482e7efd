"""Multi-objective maths against loops in numpy, other optimisers, bounds, and the functions of one objective."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pjrlhf.objectives import multi_objective as mo
from pjrlhf.objectives import policy_gradient as pg
from pjrlhf.objectives import preference

B, T, N, G, K, V = 7, 6, 3, 5, 3, 11
WEIGHTS = np.array([0.5, 0.2, 0.3], np.float32)


def draw(seed, *shape, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def simplex(seed, *shape):
    return np.random.default_rng(seed).dirichlet(np.ones(shape[-1]), shape[:-1]).astype(np.float32)


def masks(seed, rows=B, columns=T):
    """Rows full, empty, with a single one, and of random lengths."""
    lengths = np.random.default_rng(seed).integers(0, columns + 1, rows)
    lengths[:3] = columns, 0, 1
    return (np.arange(columns) < lengths[:, None]).astype(np.float32)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


# ---- combination rules


def score(values):
    """Standard scores of a list in float64."""
    values = np.asarray(values, np.float64)
    return (values - values.mean()) / np.sqrt(values.var() + 1e-8) if len(values) else values


def score_loop(x, mask, axis):
    """Standard scores along the last axis (-1) or of everything (None)."""
    out = np.zeros(mask.shape)
    rows = [np.nonzero(mask)] if axis is None else [(b, np.flatnonzero(mask[b])) for b in range(len(mask))]
    for row in rows:
        out[row] = score(x[row])
    return out


@pytest.mark.parametrize("weights", [WEIGHTS, simplex(1, B, N), simplex(2, B, T, N)], ids=["one", "rows", "tokens"])
def test_weighted_sum_is_the_loop(weights):
    x = draw(0, B, T, N)
    rows = weights if weights.ndim != 2 else weights[:, None]
    want = [
        [sum(x[b, t, i] * np.broadcast_to(rows, x.shape)[b, t, i] for i in range(N)) for t in range(T)]
        for b in range(B)
    ]
    close(mo.weighted_sum(x, rows), want)


@pytest.mark.parametrize("axis", [-1, None])
@pytest.mark.parametrize("seed", [0, 1])
def test_standardize_is_the_loop(axis, seed):
    x, mask = draw(seed, B, G, scale=5) + 3, masks(seed, B, G) > 0
    close(mo.standardize(x, mask, axis), score_loop(x, mask, axis), 1e-4)
    ones = np.ones((B, G), bool)
    close(mo.standardize(x, ones, axis), score_loop(x, ones, axis), 1e-4)


@pytest.mark.parametrize("axis", [-1, None])
def test_samples_left_out_change_nothing(axis):
    x, mask = draw(2, B, G), masks(3, B, G) > 0
    want = np.asarray(mo.standardize(x, mask, axis))
    assert not want[~mask].any()
    for garbage in (np.nan, np.inf, 1e9):
        np.testing.assert_array_equal(mo.standardize(np.where(mask, x, garbage), mask, axis), want)


def test_the_scale_of_a_reward_matters_before_it_is_standardized_alone():
    """A reward times 1000 decides the standardized sum (GRPO); standardized alone, it is one of two (GDPO)."""
    rewards, half, ones = draw(4, B, G, 2), np.array([0.5, 0.5], np.float32), np.ones((B, G), bool)
    large = rewards * np.array([1, 1000], np.float32)
    close(mo.standardize(mo.weighted_sum(large, half), ones, -1), mo.standardize(rewards[..., 1], ones, -1), 1e-2)
    close(*(mo.weighted_sum(mo.standardize(x, ones[..., None], 1), half) for x in (large, rewards)), 1e-4)


@pytest.mark.parametrize("axis", [-1, None])
@pytest.mark.parametrize("value", [0.0, 0.1, 12345.678])
def test_equal_rewards_and_lone_samples_give_no_advantage(axis, value):
    close(mo.standardize(np.full((B, 7), value, np.float32), np.ones((B, 7), bool), axis), 0, 1e-4)
    close(mo.standardize(draw(0, 1, 1) + value, np.ones((1, 1), bool), axis), 0)
    assert not np.asarray(mo.standardize(draw(0, B, G), np.zeros((B, G), bool), axis)).any()


@pytest.mark.parametrize("objective", range(N))
def test_one_hot_weights_pick_an_objective(objective):
    x, one_hot = draw(5, B, G, N), np.eye(N, dtype=np.float32)[objective]
    np.testing.assert_array_equal(mo.weighted_sum(x, one_hot), x[..., objective])
    close(mo.tchebycheff(x, one_hot, np.full(N, 10.0)), x[..., objective] - 10)


def test_with_one_objective_every_rule_is_the_plain_advantage():
    x, one = draw(6, B, G, 1), np.ones(1, np.float32)
    plain = x[..., 0]
    np.testing.assert_array_equal(mo.weighted_sum(x, one), plain)
    np.testing.assert_array_equal(mo.tchebycheff(x, one, 0 * one), plain)
    close(mo.tchebycheff(x, one, 0 * one, smoothing=0.3), plain)
    np.testing.assert_array_equal(mo.pama(x, noon=False), plain)
    np.testing.assert_array_equal(mo.pama(x), np.maximum(plain, 0))
    mixed = mo.weighted_sum(x, mo.min_norm_weights(mo.gram_matrix(x)))
    np.testing.assert_array_equal(mixed, plain)


def test_tchebycheff_is_the_loop_and_its_smooth_form_bounds_it():
    rewards, weights, ideal = draw(7, B, N), simplex(8, B, N), draw(9, N) + 3
    want = [-max(float(weights[b, i]) * (float(ideal[i]) - float(rewards[b, i])) for i in range(N)) for b in range(B)]
    got = np.asarray(mo.tchebycheff(rewards, weights, ideal))
    close(got, want)
    for smoothing in (1e-3, 0.1, 2.0):
        smooth = np.asarray(mo.tchebycheff(rewards, weights, ideal, smoothing))
        assert (smooth <= got + 1e-5).all() and (smooth >= got - smoothing * np.log(N) - 1e-5).all()


def test_tchebycheff_finds_what_no_weighted_sum_does():
    """On a front that bends inwards, r = (x, (1 - x)^2 ...): the middle wins under equal weights only here."""
    x = np.linspace(0, 1, 101)
    front = np.stack([x**2, (1 - x) ** 2], -1)
    half = np.array([0.5, 0.5])
    assert np.argmax(mo.tchebycheff(front, half, np.ones(2))) == 50
    assert all(np.argmax(mo.weighted_sum(front, np.array([w, 1 - w]))) in (0, 100) for w in np.linspace(0, 1, 21))


@pytest.mark.parametrize("noon", [False, True])
def test_pama_is_the_least_of_all_mixtures_of_each_token(noon):
    a = draw(10, B, T, N)
    got = np.asarray(mo.pama(a, noon=noon))
    used = np.maximum(a, 0) if noon else a
    signs = np.sign(used)
    want = np.where((signs > 0).all(-1), used.min(-1), np.where((signs < 0).all(-1), used.max(-1), 0))
    np.testing.assert_array_equal(got, want)
    mixtures = used @ simplex(11, 200, N).T
    assert (np.abs(got)[..., None] <= np.abs(mixtures) + 1e-6).all()
    assert (want > 0).any() and (noon or (want < 0).any())


# ---- MOC: surrogate gradients and their Gram matrix


def ratios(seed):
    return np.exp(draw(seed, B, T, scale=0.4))


def test_surrogate_gradients_are_those_of_the_ppo_loss():
    """Of every objective by itself, in the log-probs, undoing the mean; ratios lie on both sides of the range."""
    advantages, ratio, mask = draw(12, B, T, K), ratios(13), masks(14)
    old = draw(15, B, T) - 2

    def loss(logps, k):
        return pg.ppo_policy_loss(logps, old, advantages[..., k], mask, 0.2)[0] * mask.sum()

    want = np.stack([-jax.grad(loss)(old + np.log(ratio), k) for k in range(K)], -1)
    got = np.asarray(mo.surrogate_gradients(advantages, ratio, mask, 0.2))
    close(got, want, 1e-4)
    cut = (got == 0) & (mask[..., None] > 0)
    assert cut.any() and not cut.all()


def test_surrogate_gradients_are_the_loop():
    advantages, ratio, mask, clip = draw(12, B, T, K), ratios(13), masks(14), 0.3
    want = np.zeros((B, T, K))
    for b, t, k in itertools.product(range(B), range(T), range(K)):
        a, r = float(advantages[b, t, k]), float(ratio[b, t])
        flat = (a > 0 and r > 1 + clip) or (a < 0 and r < 1 - clip)
        want[b, t, k] = 0 if flat or not mask[b, t] else r * a
    close(mo.surrogate_gradients(advantages, ratio, mask, clip), want)
    close(mo.surrogate_gradients(advantages, np.ones((B, T)), mask), advantages * mask[..., None])


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e30])
def test_padding_is_no_part_of_gradients_and_weights(garbage):
    advantages, ratio, mask = draw(12, B, T, K), ratios(13), masks(14)
    want = mo.surrogate_gradients(advantages, ratio, mask)
    got = mo.surrogate_gradients(
        np.where(mask[..., None], advantages, garbage), np.where(mask, ratio, garbage), mask > 0
    )
    np.testing.assert_array_equal(got, want)
    wider = [
        np.pad(x, [(0, 2), (0, 3)] + [(0, 0)] * (x.ndim - 2), constant_values=garbage) for x in (advantages, ratio)
    ]
    padded = mo.surrogate_gradients(*wider, np.pad(mask, [(0, 2), (0, 3)]))
    weights = [mo.min_norm_weights(mo.gram_matrix(g)) for g in (want, padded)]
    close(*weights)


@pytest.mark.parametrize("normalize", ["none", "gradient"])
def test_gram_matrix_is_the_loop(normalize):
    g = draw(16, B, T, K) * [1, 10, 0.1]
    vectors = [g[..., k].ravel().astype(np.float64) for k in range(K)]
    if normalize == "gradient":
        vectors = [v / np.linalg.norm(v) for v in vectors]
    close(mo.gram_matrix(g, normalize), [[u @ v for v in vectors] for u in vectors], 1e-4)


def test_an_objective_without_gradient_stays_zero_and_takes_the_weight():
    g = draw(16, B, T, K) * [1, 0, 2]
    for normalize in ("none", "gradient"):
        gram = np.asarray(mo.gram_matrix(g, normalize))
        assert np.isfinite(gram).all() and not gram[1].any()
        close(solve(gram), [0, 1, 0])


def test_the_bound_of_the_surrogate():
    """||sum c_k grad L_k||^2 <= ||sum c_k g_k||^2 ||J||^2, with every term from the model itself."""
    tokens, old, mask = np.random.default_rng(0).integers(0, V, (B, T)), draw(17, B, T, scale=0.1) - 2.3, masks(18)
    features, advantages = draw(19, B, T, 4), draw(20, B, T, K)

    def logps(table):
        return jnp.take_along_axis(jax.nn.log_softmax(features @ table), tokens[..., None], -1)[..., 0]

    def surrogate(table, k):
        ratio = jnp.exp(logps(table) - old)
        a = advantages[..., k]
        return (jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a) * mask).sum()

    table = draw(21, 4, V, scale=0.3)
    jacobian = np.asarray(jax.jacobian(logps)(table)).reshape(B * T, -1) * mask.reshape(-1, 1)
    g = np.asarray(mo.surrogate_gradients(advantages, np.exp(logps(table) - old), mask)).reshape(-1, K)
    gradients = np.stack([np.asarray(jax.grad(surrogate)(table, k)).ravel() for k in range(K)], -1)
    close(gradients, jacobian.T @ g, 1e-3)
    norm = np.linalg.norm(jacobian, 2)
    for c in (*simplex(22, 20, K), np.asarray(mo.min_norm_weights(mo.gram_matrix(g)))):
        assert np.square(gradients @ c).sum() <= np.square(g @ c).sum() * norm**2 * (1 + 1e-5)


# ---- MOC: min-norm weights

solve = jax.jit(mo.min_norm_weights)
solve_many = jax.jit(jax.vmap(mo.min_norm_weights))


def norm2(c, gram):
    c, gram = np.asarray(c, np.float64), np.asarray(gram, np.float64)
    return np.einsum("...k,...kl,...l->...", c, gram, c)


def grams(kind, k, count=12):
    """[count, k, k] float32 Gram matrices of one kind."""
    rng = np.random.default_rng([k, len(kind)])
    vectors = rng.standard_normal((count, k, 40))
    shared = rng.standard_normal((count, 1, 40))
    if kind == "aligned":
        vectors = shared + 0.3 * vectors
    elif kind == "opposed":
        vectors = vectors + shared * np.sign(rng.standard_normal((count, k, 1)))
    elif kind == "scales":
        vectors = (shared + vectors) * np.logspace(0, -3, k)[:, None]
    elif kind == "ill-conditioned":
        vectors = np.linalg.qr(rng.standard_normal((count, k, k)))[0] * np.logspace(0, -3, k)
    elif kind == "singular":
        vectors = vectors[..., :2]
    elif kind == "duplicates":
        vectors = vectors[:, np.arange(k) // 2]
    return np.einsum("nkd,nld->nkl", vectors, vectors).astype(np.float32)


KINDS = ["random", "aligned", "opposed", "scales", "ill-conditioned", "singular", "duplicates"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 3])
def test_min_norm_weights_beat_the_grid(k, kind):
    gram = grams(kind, k, 6)
    steps = np.array([c for c in itertools.product(range(101), repeat=k - 1) if sum(c) <= 100]) / 100
    grid = np.concatenate([steps, 1 - steps.sum(-1, keepdims=True)], -1)
    got = np.asarray(solve_many(gram))
    for c, m in zip(got, gram, strict=True):
        on_grid = norm2(grid, m)
        assert norm2(c, m) <= on_grid.min() + 1e-5 * np.diag(m).max()
        if kind in ("random", "aligned", "opposed"):
            close(c, grid[on_grid.argmin()], 0.03)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", range(2, 9))
def test_min_norm_weights_are_optimal(k, kind):
    """No worse than SLSQP in float64, and near the optimum by the duality gap, which needs no other optimiser."""
    for c, m in zip(np.asarray(solve_many(grams(kind, k))), grams(kind, k).astype(np.float64), strict=True):
        assert (c >= 0).all() and abs(c.sum() - 1) < 1e-6
        scale = np.diag(m).max()
        other = scipy.optimize.minimize(
            lambda x, m=m, scale=scale: x @ m @ x / scale,
            np.full(k, 1 / k),
            jac=lambda x, m=m, scale=scale: 2 * m @ x / scale,
            bounds=[(0, 1)] * k,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        best = max(other.fun, 0) * scale
        assert norm2(c, m) <= (1 + 1e-5) * best + 1e-6 * scale
        assert norm2(c, m) - (m @ c).min() <= 5e-6 * scale


def test_no_objective_is_hurt_along_the_mixture():
    """<g_k, sum_l c_l g_l> >= ||sum_l c_l g_l||^2 for every k: the mark of the least norm."""
    g = draw(23, 40, 5) + draw(24, 40, 1)
    c = np.asarray(solve(mo.gram_matrix(g)))
    mixture = g @ c
    assert (g.T @ mixture >= (1 - 1e-4) * mixture @ mixture).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("k", [2, 5])
def test_min_norm_weights_do_not_depend_on_the_scale(k, scale):
    m = grams("random", k, 1)[0]
    close(solve((m * scale).astype(np.float32)), solve(m), 1e-4)


def test_min_norm_weights_at_the_edges():
    for k in (1, 2, 5):
        close(solve(jnp.zeros((k, k))), np.full(k, 1 / k))
        assert np.isnan(solve(jnp.full((k, k), jnp.nan))).all()
        assert solve(jnp.eye(k)).dtype == jnp.float32
    np.testing.assert_array_equal(solve(jnp.array([[7.0]])), [1])
    close(solve(jnp.ones((2, 2))), [0.5, 0.5])
    close(solve(jnp.array([[1.0, 1.0], [1.0, 4.0]])), [1, 0])  # <g_1, g_2> = ||g_1||^2
    close(solve(jnp.array([[4.0, -2.0], [-2.0, 1.0]])), [1 / 3, 2 / 3])  # g_1 = -2 g_2
    close(solve(jnp.diag(jnp.array([1.0, 2.0, 4.0]))), np.array([4, 2, 1]) / 7)


def test_weights_and_gradients_are_constants_to_the_gradient():
    def total(x):
        g = mo.surrogate_gradients(x, jnp.exp(x[..., 0]), jnp.ones((B, T)))
        c = mo.min_norm_weights(mo.gram_matrix(x))
        return (c * draw(0, K)).sum() + g.sum() + mo.weighted_sum(x, c).sum()

    x = draw(25, B, T, K)
    want = np.broadcast_to(mo.min_norm_weights(mo.gram_matrix(x)), x.shape)
    close(jax.grad(total)(x), want)


@pytest.mark.parametrize("normalize", ["none", "gradient"])
@pytest.mark.parametrize("k", [2, 4])
def test_weights_are_those_of_the_whole_batch_on_any_number_of_devices(k, normalize):
    """Each eighth of the batch has objectives of other sizes, so no part of it has the Gram matrix of the whole."""
    advantages = draw(26, 16, T, k) * np.repeat(np.random.default_rng(0).uniform(0.1, 3, (8, 1, k)), 2, axis=0)
    ratio, mask = np.exp(draw(27, 16, T, scale=0.3)), masks(28, 16)

    @jax.jit
    def weights(advantages, ratio, mask):
        gram = mo.gram_matrix(mo.surrogate_gradients(advantages, ratio, mask), normalize)
        return gram, mo.min_norm_weights(gram)

    results = []
    for devices in (1, 8):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        placed = jax.device_put((advantages, ratio, mask), NamedSharding(mesh, PartitionSpec("data")))
        gram, c = weights(*placed)
        assert len(placed[0].sharding.device_set) == devices and c.sharding.is_fully_replicated
        results.append((np.asarray(gram), np.asarray(c)))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1], 1e-4)
    part = mo.gram_matrix(mo.surrogate_gradients(advantages[:2], ratio[:2], mask[:2]), normalize)
    assert np.abs(part - results[0][0]).max() > 1e-2


# ---- MOC: control


def test_missing_rewards_are_filled_with_the_mean_of_what_is_known():
    nan = np.nan
    rewards = np.array([[1, nan], [3, 5], [nan, 7], [nan, nan]], np.float32)
    same = np.tile(np.array([[0, 1]], np.int32), (4, 1))
    close(mo.fill_missing(rewards, same, 2), [[1, 6], [3, 5], [2, 7], [2, 6]])
    # Two answers to each prompt: the second prompt has no reward of objective 0.
    close(mo.fill_missing(rewards, same, 2, samples=2), [[1, 5], [3, 5], [2, 7], [2, 7]])
    # Each row has objectives of its own.
    mixed = np.array([[0, 1], [1, 0], [1, 2], [2, 0]], np.int32)
    close(mo.fill_missing(rewards, mixed, 3), [[1, 3], [3, 5], [3, 7], [7, 3]])
    close(mo.fill_missing(np.full((2, 1), nan, np.float32), np.zeros((2, 1), np.int32), 1), [[0], [0]])


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_filling_changes_no_mean_and_no_known_reward(samples):
    rng = np.random.default_rng(0)
    rewards = rng.standard_normal((8, 3)).astype(np.float32)
    hidden = rng.random((8, 3)) < 0.3
    objectives = np.tile(np.arange(3, dtype=np.int32), (8, 1))
    found = np.asarray(mo.fill_missing(np.where(hidden, np.nan, rewards), objectives, 3, samples))
    close(found[~hidden], rewards[~hidden])
    groups, known = found.reshape(-1, samples, 3), np.where(hidden, np.nan, rewards).reshape(-1, samples, 3)
    some = (~np.isnan(known)).any(1)
    close(groups.mean(1)[some], np.nanmean(np.where(some[:, None], known, 0), axis=1)[some])
    close(mo.fill_missing(rewards, objectives, 3, samples), rewards)


def test_calibrate_is_the_loop():
    rewards, low, high = draw(29, B, N, scale=3), np.array([-1.0, 0.0, -2.0]), np.array([1.0, 4.0, -1.0])
    want = [[min(max((float(rewards[b, i]) - low[i]) / (high[i] - low[i]), 0), 1) for i in range(N)] for b in range(B)]
    close(mo.calibrate(rewards, low, high), want)
    close(mo.calibrate(np.stack([low, high, (low + high) / 2]), low, high), [[0] * N, [1] * N, [0.5] * N])


def test_target_maps():
    p = np.array([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], np.float32)
    np.testing.assert_array_equal(mo.target_map(p), p)
    close(mo.target_map(p, "l2"), p / np.linalg.norm(p, axis=-1, keepdims=True))
    close(mo.target_map(p, "max"), [[1, 2 / 3, 0], [1, 0, 0], [1, 1, 1]])


@pytest.mark.parametrize("target", ["identity", "l2", "max"])
@pytest.mark.parametrize("sided", ["two", "hinge"])
def test_control_reward_is_the_loop(target, sided):
    rewards, p = np.random.default_rng(30).uniform(0, 1, (B, N)).astype(np.float32), simplex(31, B, N)
    aims = np.asarray(mo.target_map(p, target))
    want = np.zeros(B)
    for b, i in itertools.product(range(B), range(N)):
        short = float(aims[b, i]) - float(rewards[b, i])
        want[b] -= (max(short, 0) if sided == "hinge" else short) ** 2 / N
    close(mo.control_reward(rewards, p, target, sided), want)
    close(mo.control_reward(rewards, p[0], target, sided)[0], want[0])
    assert not np.asarray(mo.control_reward(aims, p, target, sided)).any()  # the best there is
    beyond = np.asarray(mo.control_reward(aims + 0.1, p, target, sided))
    close(beyond, 0 if sided == "hinge" else -0.01)


def test_heads_of_moc():
    rewards, p = np.random.default_rng(32).uniform(0, 1, (B, N)).astype(np.float32), simplex(33, B, N)
    control = np.asarray(mo.control_reward(rewards, p, "l2", "hinge"))
    got = mo.moc_heads(rewards, p, target="l2", sided="hinge")
    close(got, np.stack([(rewards * p).sum(-1), control], -1))
    got = mo.moc_heads(rewards, p, "per_reward+control", "l2", "hinge")
    close(got, np.concatenate([rewards, control[:, None]], -1))
    shared = mo.moc_heads(rewards[0], p, "per_reward+control")  # one answer, many preferences
    assert shared.shape == (B, N + 1)
    close(shared[:, -1], mo.control_reward(rewards[0], p))


def test_a_policy_of_two_actions_follows_its_preference():
    """The pieces together: exact PPO-less ascent on MOC's mixture raises the reward that p asks for."""
    rewards = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)  # of the actions, calibrated

    def train(p):
        heads = mo.moc_heads(rewards, p, target="max")  # [actions, K]
        logits = jnp.zeros(2)
        for _ in range(100):
            policy = jax.nn.softmax(logits)
            advantages = heads - policy @ heads
            g = mo.surrogate_gradients((advantages * policy[:, None])[None], np.ones((1, 2)), np.ones((1, 2)))
            logits += mo.weighted_sum(g, solve(mo.gram_matrix(g)))[0]
        return jax.nn.softmax(logits)

    first, second = train(np.array([0.8, 0.2])), train(np.array([0.2, 0.8]))
    assert first[0] > 0.9 and second[1] > 0.9
    close(first, second[::-1], 1e-3)


# ---- permutations


def test_the_order_of_objectives_does_not_matter():
    x, weights, ideal, order = draw(34, B, G, N), WEIGHTS, draw(35, N) + 3, np.array([2, 0, 1])
    moved = x[..., order]
    for rule in (mo.weighted_sum, mo.control_reward):
        close(rule(moved, weights[order]), rule(x, weights), 1e-4)
    for smoothing in (0.0, 0.2):
        close(
            mo.tchebycheff(moved, weights[order], ideal[order], smoothing), mo.tchebycheff(x, weights, ideal, smoothing)
        )
    for noon in (False, True):
        np.testing.assert_array_equal(mo.pama(moved, noon), mo.pama(x, noon))
    for kind in ("identity", "l2", "max"):
        close(mo.target_map(weights[order], kind), mo.target_map(weights, kind)[order])
    for normalize in ("none", "gradient"):
        close(mo.gram_matrix(moved, normalize), mo.gram_matrix(x, normalize)[np.ix_(order, order)])
    for k in range(2, 9):
        m, shuffle = grams("random", k), np.random.default_rng(k).permutation(k)
        close(solve_many(m[:, shuffle][:, :, shuffle]), np.asarray(solve_many(m))[:, shuffle], 1e-4)


# ---- MODPO

PAIRS = [np.stack([draw(seed, B, scale=4) - 20 for seed in seeds]) for seeds in ((36, 37), (38, 39))]


def modpo(weights, kind="sigmoid", gaps=None, beta=0.1):
    chosen = draw(40, B, N - 1) if gaps is None else gaps
    rejected = draw(41, B, N - 1) if gaps is None else 0 * gaps
    return mo.modpo_loss(*PAIRS, beta, weights=weights, rewards=(chosen, rejected), kind=kind)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
@pytest.mark.parametrize("weights", [WEIGHTS, np.array([0.1, 0.9, -0.5], np.float32), simplex(42, B, N) + 0.05])
def test_modpo_is_the_loop(weights, kind):
    chosen, rejected, rows = draw(40, B, N - 1), draw(41, B, N - 1), np.broadcast_to(weights, (B, N)).astype(np.float64)
    want = []
    for b in range(B):
        w, l, ref_w, ref_l = (float(x[b]) for pair in PAIRS for x in pair)
        margin = sum(rows[b, i + 1] * (float(chosen[b, i]) - float(rejected[b, i])) for i in range(N - 1))
        h = (0.1 * ((w - ref_w) - (l - ref_l)) - margin) / rows[b, 0]
        want.append(np.log1p(np.exp(-h)) if kind == "sigmoid" else max(0, 1 - h))
    close(modpo(weights, kind), want, 1e-4)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
def test_modpo_with_soft_labels_is_the_expected_loss_of_both_orders(kind):
    rewards, p = (draw(40, B, N - 1), draw(41, B, N - 1)), np.linspace(0.5, 1, B, dtype=np.float32)
    settings = {"beta": 0.1, "weights": WEIGHTS, "kind": kind}
    certain = mo.modpo_loss(*PAIRS, rewards=rewards, **settings)
    exchanged = mo.modpo_loss(*(pair[::-1] for pair in PAIRS), rewards=rewards[::-1], **settings)
    found = mo.modpo_loss(*PAIRS, rewards=rewards, preference=p, **settings)
    close(found, p * np.asarray(certain) + (1 - p) * np.asarray(exchanged), 1e-5)


def test_modpo_of_one_objective_is_dpo():
    w, l = PAIRS[0] - PAIRS[1]
    for kind in ("sigmoid", "hinge"):
        want = preference.PAIRWISE[kind](w, l, 0.1)
        np.testing.assert_array_equal(modpo(np.array([1.0, 0.0, 0.0], np.float32), kind), want)
        alone = modpo(np.ones(1, np.float32), kind, gaps=np.zeros((B, 0), np.float32))
        np.testing.assert_array_equal(alone, want)


def test_modpo_is_at_rest_where_the_policy_fits_the_sum_of_rewards():
    """Labels from Bradley-Terry on r_0: the loss in expectation is least at beta log-ratio gap = sum_i w_i gap_i."""
    gaps, weights, beta = np.array([1.3, -0.7, 0.4]), np.array([0.5, 0.3, 0.2]), 0.2
    p = 1 / (1 + np.exp(-gaps[0]))

    def expected(x):
        def loss(sign):
            rewards = sign * gaps[1:], 0 * gaps[1:]
            logps = jnp.array([sign * x, 0.0])
            return mo.modpo_loss(logps, 0 * logps, beta, weights=weights, rewards=rewards)

        return p * loss(1.0) + (1 - p) * loss(-1.0)

    best = (weights * gaps).sum() / beta
    assert abs(jax.grad(expected)(best)) < 1e-6
    assert jax.grad(expected)(best - 1) < -1e-3 and jax.grad(expected)(best + 1) > 1e-3


# ---- MOD

POLICIES = np.asarray(jax.nn.log_softmax(draw(43, B, K, V, scale=1.5)))
RULES = {
    "reverse_kl": ("reverse_kl", lambda p, w: np.prod(p**w, 0)),
    "forward_kl": ("forward_kl", lambda p, w: 1 / (w / p).sum(0)),
    "half": (0.5, lambda p, w: (w * p**-0.5).sum(0) ** -2),
    "mixture": (-1.0, lambda p, w: (w * p).sum(0)),
}


def combine(rule, logps, weights):
    return mo.combine_logps(logps, weights, RULES[rule][0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weights", [WEIGHTS, simplex(44, B, K)], ids=["one", "rows"])
def test_mod_is_the_formula(rule, weights):
    got = np.asarray(combine(rule, POLICIES, weights))
    close(np.exp(got).sum(-1), 1)
    for b, w in enumerate(np.broadcast_to(weights, (B, K)).astype(np.float64)):
        want = RULES[rule][1](np.exp(POLICIES[b].astype(np.float64)), w[:, None])
        close(np.exp(got[b]), want / want.sum(), 1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", range(K))
def test_mod_with_one_hot_weights_is_that_policy(rule, k):
    one_hot = np.eye(K, dtype=np.float32)[k]
    close(combine(rule, POLICIES, one_hot), POLICIES[:, k], 1e-4)
    for garbage in (-np.inf, np.nan):
        logps = np.where(one_hot[:, None] > 0, POLICIES, garbage)
        close(combine(rule, logps, one_hot), POLICIES[:, k], 1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_mod_of_equal_policies_is_that_policy_and_order_does_not_matter(rule):
    equal = np.repeat(POLICIES[:, :1], K, axis=1)
    close(combine(rule, equal, WEIGHTS), POLICIES[:, 0], 1e-4)
    order = np.array([2, 0, 1])
    close(combine(rule, POLICIES[:, order], WEIGHTS[order]), combine(rule, POLICIES, WEIGHTS), 1e-4)


def test_a_token_that_one_policy_rules_out():
    """All but the plain mixture then rule it out too, and nothing becomes NaN."""
    logps = POLICIES.copy()
    logps[:, 1, 4] = -np.inf
    for rule in RULES:
        got = np.asarray(combine(rule, logps, WEIGHTS))
        assert not np.isnan(got).any() and (
            np.isfinite(got[:, 4]).all() if rule == "mixture" else (got[:, 4] == -np.inf).all()
        )


def test_the_family_of_alpha():
    for alpha, divergence in ((0, "reverse_kl"), (1, "forward_kl")):
        named = mo.combine_logps(POLICIES, WEIGHTS, divergence)
        np.testing.assert_array_equal(mo.combine_logps(POLICIES, WEIGHTS, alpha), named)
    close(mo.combine_logps(POLICIES, WEIGHTS, 1e-3), mo.combine_logps(POLICIES, WEIGHTS), 2e-2)


def test_reverse_kl_is_the_best_answer_to_the_weighted_rewards():
    """Each policy is optimal for its reward r_k = log pi_k / ref (beta 1): the mixture is optimal for sum_k w_k r_k."""
    reference = np.asarray(jax.nn.log_softmax(draw(45, B, V)))
    reward = np.einsum("k,bkv->bv", WEIGHTS, POLICIES - reference[:, None])

    def value(logq):
        return (np.exp(logq) * (reward - (logq - reference))).sum(-1)

    best = np.asarray(mo.combine_logps(POLICIES, WEIGHTS))
    for seed in range(20):
        other = np.asarray(jax.nn.log_softmax(best + draw(seed, B, V, scale=0.2)))
        assert (value(best) > value(other)).all()


def test_negative_weights_extrapolate_away_from_a_policy():
    weights = np.array([1.5, -0.5, 0.0], np.float32)
    want = 1.5 * POLICIES[:, 0] - 0.5 * POLICIES[:, 1]
    close(mo.combine_logps(POLICIES, weights), jax.nn.log_softmax(want), 1e-4)


# ---- all of them


def test_every_function_is_the_same_under_jit_and_float32():
    x, mask, p = draw(46, B, G, N), masks(47, B, G), simplex(48, N)
    pairs = {"weights": WEIGHTS, "rewards": (x[:, 0, 1:], x[:, 1, 1:])}
    calls = [
        (mo.weighted_sum, (x, p)),
        (functools.partial(mo.standardize, axis=-1), (x[..., 0], mask)),
        (functools.partial(mo.standardize, axis=None), (x[..., 0], mask)),
        (mo.tchebycheff, (x, p, np.full(N, 3.0))),
        (functools.partial(mo.tchebycheff, smoothing=0.1), (x, p, np.full(N, 3.0))),
        (mo.pama, (x,)),
        (mo.surrogate_gradients, (x, np.exp(x[..., 0]), mask)),
        (functools.partial(mo.gram_matrix, normalize="gradient"), (x,)),
        (mo.min_norm_weights, (grams("random", 4, 1)[0],)),
        (mo.calibrate, (x, -np.ones(N), np.ones(N))),
        (functools.partial(mo.target_map, kind="l2"), (p,)),
        (mo.control_reward, (x, p)),
        (mo.moc_heads, (x, p)),
        (functools.partial(mo.modpo_loss, beta=0.1), PAIRS),
        (functools.partial(mo.combine_logps, divergence="forward_kl"), (POLICIES, p)),
    ]
    for function, arguments in calls:
        named = pairs if function is calls[13][0] else {}
        got = jax.jit(function)(*arguments, **named)
        close(got, function(*arguments, **named), 1e-4)
        assert got.dtype == jnp.float32
        halves = [jnp.asarray(a, jnp.bfloat16) for a in arguments]
        if not named:
            assert function(*halves).dtype == jnp.float32


X, ONES = np.zeros((2, 4, N), np.float32), np.ones(N, np.float32)
ERRORS = [
    (lambda: mo.weighted_sum(X, np.ones(2)), r"weights of shape \(2,\) do not fit \(2, 4, 3\); give one per"),
    (lambda: mo.weighted_sum(X, np.array(1.0)), r"weights of shape \(\) do not fit"),
    (lambda: mo.tchebycheff(X, ONES, ONES, -1.0), "smoothing=-1.0 is negative; make it 0"),
    (lambda: mo.gram_matrix(X, "loss"), "'loss' is unknown; choose one of none, gradient"),
    (lambda: mo.min_norm_weights(jnp.ones((2, 3))), r"gram has shape \(2, 3\); give one"),
    (lambda: mo.calibrate(X, ONES, ONES), "is not above low .*; leave out rewards that are constant"),
    (lambda: mo.target_map(ONES, "l1"), "'l1' is unknown; choose one of identity, l2, max"),
    (lambda: mo.control_reward(X, ONES, "l1"), "'l1' is unknown; choose one of identity, l2, max"),
    (lambda: mo.control_reward(X, ONES, sided="one"), "'one' is unknown; choose one of two, hinge"),
    (lambda: mo.moc_heads(X, ONES, "both"), "'both' are unknown; choose one of reward_sum.control, per_reward.control"),
    (lambda: modpo(ONES, "ipo"), "'ipo' is unknown; choose one of sigmoid, hinge"),
    (lambda: modpo(np.array([0.0, 0.5, 0.5])), "start with one that is not positive; label pairs"),
    (lambda: modpo(np.ones(2)), r"weights of shape \(1,\) do not fit \(7, 2\)"),
    (
        lambda: mo.combine_logps(POLICIES, ONES, "jsd"),
        "'jsd' is unknown; choose reverse_kl, forward_kl or",
    ),
    (lambda: mo.combine_logps(POLICIES, ONES, np.nan), "divergence nan is unknown"),
    (lambda: mo.combine_logps(POLICIES, -ONES, "forward_kl"), "only reverse_kl takes such weights"),
    (lambda: mo.combine_logps(POLICIES, np.ones(2)), r"weights of shape \(2,\) do not fit"),
]


@pytest.mark.parametrize("call, message", ERRORS)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
