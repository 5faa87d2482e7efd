"""One optimizer of K policies equals K optimizers; schedules equal closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pjrlhf.errors import UserError
from pjrlhf.settings import parse
from pjrlhf.training.optimizer import OptimizerSettings, make_optimizer, make_schedule, per_ingredient

K = 3
SETTINGS = OptimizerSettings(
    learning_rate=0.05, schedule="cosine", warmup_steps=2, weight_decay=0.1, max_grad_norm=0.5, eps_root=1e-8
)


@jax.jit
def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "layer": {"kernel": jax.random.normal(keys[0], (K, 4, 2)), "scale": jax.random.normal(keys[1], (K, 3, 4))},
        "head": {"kernel": jax.random.normal(keys[2], (K, 4)), "bias": jnp.arange(K) + 1.0},
    }


@jax.jit
def grads(step):
    """Ingredient k's gradient is of order 10**(k - 2), so that some are clipped."""
    sizes = 10.0 ** (jnp.arange(K) - 2)
    key = jax.random.fold_in(jax.random.key(1), step)
    return jax.tree.map(
        lambda x: jax.random.normal(jax.random.fold_in(key, x.size), x.shape) * sizes.reshape(-1, *[1] * (x.ndim - 1)),
        params(),
    )


def row(tree, k):
    return jax.tree.map(lambda x: x[k], tree)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-8), a, b)


def test_adafactor_is_that_of_optax_and_remembers_a_row_and_a_column():
    large = {"kernel": jax.random.normal(jax.random.key(0), (2, 128, 256))}
    gradient = jax.tree.map(jnp.sin, large)
    settings = OptimizerSettings(name="adafactor", learning_rate=0.1, max_grad_norm=0)
    ours = make_optimizer(settings, 10)
    theirs = optax.adafactor(0.1, multiply_by_parameter_scale=False)
    state, other = ours.init(large), theirs.init(large)
    for _ in range(3):
        found, state = jax.jit(ours.update)(gradient, state, large)
        wanted, other = jax.jit(theirs.update)(gradient, other, large)
        close(found, wanted)
    assert sum(x.size for x in jax.tree.leaves(state)) < large["kernel"].size / 50
    decayed = make_optimizer(settings.replace(weight_decay=0.5), 10)
    moved, _ = decayed.update(gradient, decayed.init(large), large)
    plain, _ = ours.update(gradient, ours.init(large), large)
    close(moved, jax.tree.map(lambda x, p: x - 0.1 * 0.5 * p, plain, large))


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_one_optimizer_of_k_equals_k_optimizers(name):
    one = make_optimizer(SETTINGS.replace(name=name), 10)
    many = per_ingredient(one)
    together, state = params(), many.init(params())
    apart = [row(params(), k) for k in range(K)]
    states = [one.init(p) for p in apart]
    update_one, update_many = jax.jit(one.update), jax.jit(many.update)
    for step in range(4):
        updates, state = update_many(grads(step), state, together)
        together = optax.apply_updates(together, updates)
        for k in range(K):
            updates, states[k] = update_one(row(grads(step), k), states[k], apart[k])
            apart[k] = optax.apply_updates(apart[k], updates)
    norms = jax.vmap(optax.global_norm)(grads(0))
    assert norms[0] < 0.5 < norms[-1]
    for k in range(K):
        close(row(together, k), apart[k])
        close(row(state, k), states[k])


def test_an_inactive_ingredient_stands_still_whatever_its_gradient():
    many = per_ingredient(make_optimizer(SETTINGS, 10))
    start = params()
    update = jax.jit(many.update)
    _, state = update(grads(0), many.init(start), start)
    poisoned = jax.tree.map(lambda x: x.at[1].set(jnp.nan), grads(1))
    updates, after = update(poisoned, state, start, active=jnp.array([True, False, True]))
    moved = optax.apply_updates(start, updates)
    for old, new in ((start, moved), (state, after)):
        jax.tree.map(np.testing.assert_array_equal, row(old, 1), row(new, 1))
    expected, full = update(grads(1), state, start)
    for k in (0, 2):
        close(row(updates, k), row(expected, k))
        close(row(after, k), row(full, k))


def test_weight_decay_spares_scale_and_bias():
    optimizer = make_optimizer(OptimizerSettings(learning_rate=0.5, weight_decay=0.1, name="sgd"), 10)
    zero = jax.tree.map(jnp.zeros_like, params())
    updates, _ = optimizer.update(zero, optimizer.init(params()), params())
    for block, name, factor in (
        ("layer", "kernel", -0.05),
        ("head", "kernel", -0.05),
        ("layer", "scale", 0),
        ("head", "bias", 0),
    ):
        np.testing.assert_allclose(updates[block][name], factor * params()[block][name], rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "last"), [("constant", 1.0), ("linear", 1 / 8), ("cosine", (1 + np.cos(np.pi * 7 / 8)) / 2)]
)
def test_schedules(schedule, last):
    rate = make_schedule(OptimizerSettings(learning_rate=2.0, schedule=schedule, warmup_steps=4), 12)
    values = [float(rate(step)) for step in range(12)]
    np.testing.assert_allclose(values[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    np.testing.assert_allclose(values[-1], 2 * last, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup": 3}, r"optimizer.warmup: no such setting; did you mean optimizer.warmup_steps\?"),
        ({"learning_rate": None}, "optimizer.learning_rate: None is not a number; choose a number at least 0"),
        ({"learning_rate": float("nan")}, "optimizer.learning_rate: nan is not finite; choose a number at least 0"),
        ({"b1": -0.1}, "optimizer.b1: -0.1 is out of range; choose a number at least 0 and below 1"),
        ({"name": "lion"}, "optimizer.name: 'lion' is unknown; choose one of adamw, sgd"),
        ({"schedule": "step"}, "optimizer.schedule: 'step' is unknown; choose one of constant, linear, cosine"),
        ({"warmup_steps": 10}, "optimizer.warmup_steps: 10 leaves none of the 10 updates"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(parse(OptimizerSettings, change, "optimizer"), 10)
