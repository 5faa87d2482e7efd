"""What lies outside a mask changes neither a value nor a gradient, even where it is NaN or infinite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.objectives import multi_objective as mo
from pjrlhf.objectives import policy_gradient as pg
from pjrlhf.objectives import preference
from pjrlhf.objectives.scalarization import RULES, make_rule
from pjrlhf.training.metrics import masked

B, T, H = 5, 6, 3
MASK = (np.arange(T) < np.array([[T], [0], [1], [4], [2]])).astype(np.float32)
WEIGHT = jnp.asarray(MASK[:, 0] * np.arange(1, B + 1, dtype=np.float32))
RUBBISH = (np.nan, np.inf, -np.inf)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


TOKENS, OTHER, THIRD = (draw(seed, B, T) for seed in range(3))
ROWS, MORE = draw(3, B), draw(4, B)
HEADS, P = draw(5, B, T, H), jax.nn.softmax(draw(6, B, H))
GROUP = np.arange(B, dtype=np.int32) % 2

# Functions of (array, mask) with arrays [B, T], and of (array, weight) with arrays [B].
PER_TOKEN = {
    "masked_mean": pg.masked_mean,
    "whiten": pg.whiten,
    "whiten, mean kept": lambda x, mask: pg.whiten(x, mask, shift_mean=False),
    "token_rewards": lambda kl, mask: pg.token_rewards(ROWS, kl, mask, 0.1),
    "gae of rewards": lambda x, mask: pg.gae(x, pg.zero_outside(OTHER, mask), mask),
    "gae of values": lambda x, mask: pg.gae(OTHER, x, mask),
    "ppo_policy_loss of logps": lambda x, mask: pg.ppo_policy_loss(x, OTHER, THIRD, mask),
    "ppo_policy_loss of old_logps": lambda x, mask: pg.ppo_policy_loss(OTHER, x, THIRD, mask),
    "ppo_policy_loss of advantages": lambda x, mask: pg.ppo_policy_loss(OTHER, THIRD, x, mask),
    "value_loss of values": lambda x, mask: pg.value_loss(x, OTHER, THIRD, mask),
    "value_loss of old_values": lambda x, mask: pg.value_loss(OTHER, x, THIRD, mask),
    "value_loss of returns": lambda x, mask: pg.value_loss(OTHER, THIRD, x, mask),
    "metrics.masked": masked,
    "standardize": lambda x, mask: mo.standardize(x, mask, axis=None),
}
PER_ROW = {
    "bradley_terry_loss of chosen": lambda x, weight: preference.bradley_terry_loss(x, MORE, 0.1, weight),
    "bradley_terry_loss of rejected": lambda x, weight: preference.bradley_terry_loss(MORE, x, 0.1, weight),
    "mixture": lambda x, weight: preference.mixture(x, jnp.asarray(GROUP > 0), 0.3, weight),
    "metrics.masked": masked,
}


def check(function, x, mask, rubbish):
    """Same values, and same gradients, as with zeros outside the mask."""

    def total(x):
        return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(function(x, mask)))

    clean, dirty = (jnp.asarray(np.where(mask > 0, x, fill)) for fill in (0.0, rubbish))
    jax.tree.map(np.testing.assert_array_equal, function(dirty, mask), function(clean, mask))
    assert np.isfinite(total(dirty))
    np.testing.assert_array_equal(jax.grad(total)(dirty), jax.grad(total)(clean))


@pytest.mark.parametrize("rubbish", RUBBISH)
@pytest.mark.parametrize("name", PER_TOKEN)
def test_tokens_outside_the_mask_do_not_matter(name, rubbish):
    check(PER_TOKEN[name], TOKENS, MASK, rubbish)


@pytest.mark.parametrize("rubbish", RUBBISH)
@pytest.mark.parametrize("name", PER_ROW)
def test_rows_of_weight_zero_do_not_matter(name, rubbish):
    check(PER_ROW[name], ROWS, WEIGHT, rubbish)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_mean_without_share_in_the_mixture_does_not_matter(alpha):
    generic = jnp.asarray(GROUP > 0)
    left_out = generic if alpha == 1 else ~generic
    dirty = jnp.where(left_out, jnp.inf, ROWS)
    assert np.isfinite(preference.mixture(dirty, generic, alpha)[0])


def test_an_empty_row_takes_no_score():
    score = jnp.asarray(np.where(MASK.any(1), ROWS, np.nan))
    assert np.isfinite(pg.token_rewards(score, TOKENS, MASK, 0.1)).all()


@pytest.mark.parametrize("rubbish", RUBBISH)
@pytest.mark.parametrize("name", [name for name, _ in RULES.items()])
def test_combination_rules_read_no_advantage_outside_the_mask(name, rubbish):
    variants = {"min_norm": {"heads": "per_preference"}, "tchebycheff": {"across": "min_norm"}}
    for changes in ({}, variants.get(name, {})):
        rule = make_rule({"kind": name, **changes})
        count = len(rule.names(("one", "two", "three")))
        clean, dirty = (np.where(MASK[..., None] > 0, HEADS[..., :count], fill) for fill in (0.0, rubbish))
        got, want = (rule.advantages(jnp.asarray(x), P, jnp.asarray(MASK), GROUP) for x in (dirty, clean))
        jax.tree.map(np.testing.assert_array_equal, got, want)
        assert np.isfinite(got[0]).all()


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_an_objective_of_weight_zero_adds_nothing(rubbish):
    scores = jnp.asarray([[1.0, rubbish, 2.0]])
    assert mo.weighted_sum(scores, jnp.asarray([0.25, 0.0, 0.5])) == 1.25
