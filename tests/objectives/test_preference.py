"""The Bradley-Terry loss and accuracy against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.objectives.preference import accuracy, bradley_terry_loss

CHOSEN = np.array([1.0, -2.0, 0.5, 30.0], np.float32)
REJECTED = np.array([0.0, 1.0, 0.5, -90.0], np.float32)
MARGIN = np.array([0.0, 0.5, 1.0, 2.0], np.float32)
WEIGHT = np.array([1.0, 0.0, 2.0, 0.5], np.float32)


def losses(margin):
    gap = np.asarray(CHOSEN, np.float64) - REJECTED - margin
    return np.log1p(np.exp(-gap))


@pytest.mark.parametrize("margin", [0.0, 0.7, MARGIN])
def test_bradley_terry(margin):
    np.testing.assert_allclose(bradley_terry_loss(CHOSEN, REJECTED, margin), losses(margin).mean(), rtol=1e-6)
    want = (losses(margin) * WEIGHT).sum() / WEIGHT.sum()
    np.testing.assert_allclose(bradley_terry_loss(CHOSEN, REJECTED, margin, WEIGHT), want, rtol=1e-6)


def test_equal_rewards_cost_ln_2_and_pull_apart_with_half_the_weight():
    x = jnp.array([3.0, -1.0])
    np.testing.assert_allclose(bradley_terry_loss(x, x), np.log(2), rtol=1e-6)
    chosen, rejected = jax.grad(bradley_terry_loss, argnums=(0, 1))(x, x)
    np.testing.assert_allclose(chosen, [-0.25, -0.25], rtol=1e-6)
    np.testing.assert_allclose(rejected, [0.25, 0.25], rtol=1e-6)


def test_a_pair_of_weight_zero_counts_for_nothing():
    weight = jnp.array([1.0, 0.0])
    chosen, rejected = jnp.array([1.0, 5.0]), jnp.array([0.0, -3.0])
    alone = bradley_terry_loss(chosen[:1], rejected[:1])
    np.testing.assert_allclose(bradley_terry_loss(chosen, rejected, 0.0, weight), alone, rtol=1e-6)
    assert jax.grad(bradley_terry_loss)(chosen, rejected, 0.0, weight)[1] == 0
    assert bradley_terry_loss(chosen, rejected, 0.0, jnp.zeros(2)) == 0


def test_far_apart_rewards_stay_finite():
    far = jnp.array([1e4])
    assert bradley_terry_loss(far, -far) == 0
    np.testing.assert_allclose(bradley_terry_loss(-far, far), 2e4)


def test_accuracy_is_strict_and_nan_is_no_zero():
    chosen = jnp.array([2.0, 1.0, 0.0, jnp.nan, 1.0, jnp.inf])
    rejected = jnp.array([1.0, 1.0, 3.0, 0.0, jnp.nan, jnp.inf])
    np.testing.assert_array_equal(accuracy(chosen, rejected), [1, 0, 0, np.nan, np.nan, np.nan])
    assert np.isnan(accuracy(chosen, rejected).mean())


def test_a_soft_label_is_cross_entropy():
    p = np.array([1.0, 0.5, 0.7, 0.9], np.float32)
    gap = np.asarray(CHOSEN, np.float64) - REJECTED - MARGIN
    want = (p * np.logaddexp(0, -gap) + (1 - p) * np.logaddexp(0, gap)).mean()
    np.testing.assert_allclose(bradley_terry_loss(CHOSEN, REJECTED, MARGIN, preference=p), want, rtol=1e-6)
    # Its least loss is where the model gives the label itself: s(gap) = p.
    gap = jnp.log(0.7 / 0.3)[None]
    slope = jax.grad(lambda x: bradley_terry_loss(x, jnp.zeros(1), preference=jnp.full(1, 0.7)))(gap)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
