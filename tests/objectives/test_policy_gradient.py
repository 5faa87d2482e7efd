"""Policy-gradient maths against loops in numpy, closed forms and expectations over a small categorical."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.objectives import policy_gradient as pg

B, T = 7, 6


def draw(seed, shape=(B, T), scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def masks(seed):
    """[B, T] with every kind of row: full, empty, a single token, and random lengths."""
    lengths = np.random.default_rng(seed).integers(0, T + 1, B)
    lengths[:3] = T, 0, 1
    return (np.arange(T) < lengths[:, None]).astype(np.float32)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


# ---- advantages


def gae_loop(rewards, values, mask, gamma, lam):
    """The definition: A_t = sum_l (gamma lam)^l delta_{t + l}, a double loop in float64."""
    advantages = np.zeros(mask.shape)
    for b in range(len(mask)):
        n = int(mask[b].sum())
        for t in range(n):
            for l in range(n - t):
                after = values[b, t + l + 1] if t + l + 1 < n else 0.0
                delta = float(rewards[b, t + l]) + gamma * float(after) - float(values[b, t + l])
                advantages[b, t] += (gamma * lam) ** l * delta
    return advantages, (advantages + values) * mask


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.8, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("seed", [0, 1])
def test_gae_is_the_double_loop(seed, gamma, lam):
    rewards, values, mask = draw(seed), draw(seed + 10), masks(seed)
    got = pg.gae(rewards, values, mask, gamma, lam)
    for x, y in zip(got, gae_loop(rewards, values, mask, gamma, lam), strict=True):
        close(x, y)
    assert not got[0][1].any()  # the empty row


def test_gae_of_single_tokens_is_reward_minus_value():
    rewards, values, ones = draw(0, (B, 1)), draw(1, (B, 1)), np.ones((B, 1), np.float32)
    advantages, returns = pg.gae(rewards, values, ones, 0.9, 0.5)
    close(advantages, rewards - values)
    close(returns, rewards)


def test_gae_with_lambda_one_gives_the_reward_to_go():
    rewards, values, mask = draw(2), draw(3), masks(4)
    _, returns = pg.gae(rewards, values, mask, 1.0, 1.0)
    close(returns, np.cumsum((rewards * mask)[:, ::-1], 1)[:, ::-1] * mask)


def test_gae_ignores_what_lies_behind_the_last_token():
    rewards, values, mask = draw(5), draw(6), masks(7)
    want = pg.gae(rewards, values, mask)
    got = pg.gae(np.where(mask, rewards, 99.0), np.where(mask, values, -99.0), mask)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


def test_gae_takes_a_boolean_mask():
    rewards, values, mask = draw(5), draw(6), masks(7)
    for x, y in zip(pg.gae(rewards, values, mask > 0), pg.gae(rewards, values, mask), strict=True):
        np.testing.assert_array_equal(x, y)


# ---- means


def test_masked_mean_and_whiten():
    x, mask = draw(8, scale=3.0) + 2, masks(9)
    inside = x[mask > 0]
    close(pg.masked_mean(x, mask), inside.mean())
    white = np.asarray(pg.whiten(x, mask))
    close(white[mask > 0], (inside - inside.mean()) / inside.std())
    assert not white[mask == 0].any()
    close(pg.whiten(x, mask, shift_mean=False)[mask > 0], (inside - inside.mean()) / inside.std() + inside.mean())


def test_an_empty_mask_gives_zeros_and_equal_values_no_nan():
    x, empty = draw(10), np.zeros((B, T), np.float32)
    assert pg.masked_mean(x, empty) == 0
    assert not np.asarray(pg.whiten(x, empty)).any()
    assert not np.asarray(pg.whiten(np.full((B, T), 3.0, np.float32), masks(1))).any()


# ---- KL


def test_kl_estimates_over_an_enumerable_categorical():
    """Expectations are exact sums over the ten outcomes."""
    logits, others = draw(11, (10,), 1.5), draw(12, (10,), 1.5)
    logp, logq = jax.nn.log_softmax(logits), jax.nn.log_softmax(others)
    p, kl = np.exp(logp), float((np.exp(logp) * (logp - logq)).sum())
    k1, k2, k3 = (np.asarray(pg.kl_estimate(logp, logq, kind)) for kind in ("k1", "k2", "k3"))
    assert kl > 0.5
    close((p * k1).sum(), kl)
    close((p * k3).sum(), kl)
    close(k2, 0.5 * np.square(logp - logq))
    assert (k1 < 0).any() and (k3 >= 0).all()


def test_k3_has_less_variance_than_k1_where_the_two_are_near():
    logp = jax.nn.log_softmax(draw(11, (10,)))
    logq = jax.nn.log_softmax(logp + draw(12, (10,), 0.1))
    variances = {}
    for kind in ("k1", "k3"):
        estimate, p = np.asarray(pg.kl_estimate(logp, logq, kind)), np.exp(logp)
        variances[kind] = (p * np.square(estimate - (p * estimate).sum())).sum()
    assert variances["k3"] < 0.05 * variances["k1"]


def test_kl_estimates_are_zero_at_equality():
    for kind in ("k1", "k2", "k3"):
        assert not np.asarray(pg.kl_estimate(draw(1), draw(1), kind)).any()


def test_unknown_kl_estimate_is_refused():
    with pytest.raises(ValueError, match=r"'k4'.*k1, k2, k3"):
        pg.kl_estimate(draw(1), draw(1), "k4")


# ---- where the score goes


def test_the_score_sits_on_the_last_real_token():
    """Rows: ended by EOS, cut off at the last slot, one token, empty. Ids play no part, so pad may equal EOS."""
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    kl, score, beta = draw(13, (4, 4)), np.array([10.0, 20.0, 30.0, 40.0], np.float32), 0.3
    want = -beta * kl * mask
    want[0, 2] += 10
    want[1, 3] += 20
    want[2, 0] += 30
    close(pg.token_rewards(score, kl, mask, beta), want)
    close(pg.token_rewards(score, kl, mask > 0, beta), want)
    np.testing.assert_array_equal(pg.last_token(mask > 0), [[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])


def test_rewards_of_a_row_sum_to_score_minus_kl():
    mask = masks(14)
    kl, score = draw(15), draw(16, (B,))
    got = np.asarray(pg.token_rewards(score, kl, mask, 0.2)).sum(1)
    close(got, score * mask.any(1) - 0.2 * (kl * mask).sum(1))


# ---- the KL controller


def test_the_controller_rests_at_its_target_and_moves_the_right_way():
    beta = jnp.array([0.1, 0.1, 0.1, 0.1])
    got = pg.adapt_kl_coefficient(beta, jnp.array([6.0, 6.6, 100.0, 0.0]), 6.0, 64, 640.0)
    # The share of the horizon is 0.1; errors are cut at 20 percent either way.
    close(got, 0.1 * np.array([1.0, 1 + 0.1 * 0.1, 1 + 0.2 * 0.1, 1 - 0.2 * 0.1]))


# ---- losses


def policy_loss_loop(logps, old, advantages, mask, clip):
    total = clipped_count = kl = ratios = 0.0
    for b, t in np.argwhere(mask):
        log_ratio = float(np.clip(logps[b, t] - old[b, t], -20, 20))
        ratio, advantage = np.exp(log_ratio), float(advantages[b, t])
        free, limited = ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage
        total -= min(free, limited)
        clipped_count += limited < free
        kl += 0.5 * log_ratio**2
        ratios += ratio
    return np.array([total, kl, clipped_count, ratios]) / max(mask.sum(), 1)


@pytest.mark.parametrize("clip", [0.1, 0.4])
def test_policy_loss_is_the_loop(clip):
    logps, old, advantages, mask = draw(17) - 2, draw(18) - 2, draw(19), masks(20)
    loss, metrics = pg.ppo_policy_loss(logps, old, advantages, mask, clip)
    want = policy_loss_loop(logps, old, advantages, mask, clip)
    got = [loss, metrics["policy/approxkl_avg"], metrics["policy/clipfrac_avg"], metrics["val/ratio"]]
    close(got, want, 1e-4)
    assert 0 < want[2] < 1


@pytest.mark.parametrize(
    "ratio, advantage, want, slope",
    [
        (1.5, 2.0, -1.2 * 2, 0.0),  # gained enough: flat
        (0.5, 2.0, -0.5 * 2, -0.5 * 2),  # lost a good token: pulled back
        (0.5, -2.0, 0.8 * 2, 0.0),  # avoided enough: flat
        (1.5, -2.0, 1.5 * 2, 1.5 * 2),  # gained a bad token: pushed down
        (1.1, 2.0, -1.1 * 2, -1.1 * 2),
        (1.1, -2.0, 1.1 * 2, 1.1 * 2),
    ],
)
def test_clipping_by_the_sign_of_the_advantage(ratio, advantage, want, slope):
    one = jnp.ones((1, 1))

    def loss(logp):
        return pg.ppo_policy_loss(logp * one, -1.0 * one, advantage * one, one, 0.2)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.log(ratio) - 1.0)
    close(value, want)
    close(gradient, slope)


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    """d loss / d logits = -mean A grad log pi, by autodiff of the plain REINFORCE objective."""
    logits, advantages, mask = draw(21, (B, T, 5)), draw(22), masks(23)
    tokens = np.random.default_rng(24).integers(0, 5, (B, T))

    def logps(logits):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]

    old = logps(logits)
    _, metrics = pg.ppo_policy_loss(old, old, advantages, mask)
    got = jax.grad(lambda x: pg.ppo_policy_loss(logps(x), old, advantages, mask)[0])(logits)
    want = jax.grad(lambda x: -(logps(x) * advantages * mask).sum() / mask.sum())(logits)
    close(got, want)
    assert np.abs(want).max() > 1e-3
    assert (metrics["val/ratio"], metrics["policy/approxkl_avg"], metrics["policy/clipfrac_avg"]) == (1, 0, 0)


def test_a_huge_ratio_stays_finite():
    ones = np.ones((1, 1), np.float32)
    loss, metrics = pg.ppo_policy_loss(500 * ones, -500 * ones, -ones, ones)
    assert np.isfinite(loss) and np.isfinite(metrics["val/ratio"])


def test_value_loss_is_the_loop():
    values, old, returns, mask = draw(25), draw(26), draw(27), masks(28)
    total = clipped = 0.0
    for b, t in np.argwhere(mask):
        near = old[b, t] + np.clip(values[b, t] - old[b, t], -0.3, 0.3)
        free, limited = (values[b, t] - returns[b, t]) ** 2, (near - returns[b, t]) ** 2
        total += 0.5 * max(free, limited)
        clipped += limited > free
    loss, share = pg.value_loss(values, old, returns, mask, 0.3)
    close(loss, total / mask.sum())
    close(share, clipped / mask.sum())
    assert 0 < clipped < mask.sum()


def test_values_within_the_range_are_not_counted_as_clipped():
    """Whatever the rounding of their distance to the old ones."""
    shape = (200, T)
    old, ones = draw(33, shape, 3.0), np.ones(shape, np.float32)
    values = old + np.clip(draw(34, shape, 0.1), -0.29, 0.29)
    loss, share = pg.value_loss(values, old, draw(35, shape), ones, 0.3)
    assert share == 0
    close(loss, 0.5 * np.square(values - draw(35, shape)).mean())


def test_losses_ignore_what_is_masked():
    logps, old, advantages, mask = draw(29), draw(30), draw(31), masks(32)
    hidden = [np.where(mask, x, 7.0) for x in (logps, old, advantages)]
    close(pg.ppo_policy_loss(*hidden, mask)[0], pg.ppo_policy_loss(logps, old, advantages, mask)[0])
    close(pg.value_loss(*hidden, mask)[0], pg.value_loss(logps, old, advantages, mask)[0])
