"""Lazy Adam: dense Adam for rows of the batch, no change for others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pjrlhf.models.users import UserModel, gather_rows
from pjrlhf.training.lazy_adam import lazy_adam

ROWS = 9


def table():
    rng = np.random.default_rng(0)
    return {
        "offset": jnp.asarray(rng.standard_normal((ROWS, 2, 3)), jnp.float32),
        "weights": jnp.asarray(rng.standard_normal((ROWS, 4)), jnp.float32),
    }


def draw(step, n):
    rng = np.random.default_rng(step + 1)
    return jax.tree.map(lambda x: rng.standard_normal((n, *x.shape[1:])).astype(np.float32), table())


def dense(gradients, indices):
    """Gradients [n, ...] scattered into the whole table."""
    return jax.tree.map(lambda x, g: jnp.zeros_like(x).at[indices].add(g), table(), gradients)


@pytest.mark.parametrize("rate", [0.1, optax.linear_schedule(0.1, 0.0, 10)], ids=["constant", "schedule"])
def test_rows_touched_at_every_step_move_as_under_dense_adam(rate):
    settings = {"b1": 0.8, "b2": 0.95, "eps": 1e-3}
    lazy, adam = lazy_adam(rate, **settings), optax.adam(rate, **settings)
    update = jax.jit(lazy.update)
    indices = jnp.array([7, 2, 5])
    got, want = table(), table()
    state, reference = lazy.init(got), adam.init(want)
    for step in range(5):
        gradients = draw(step, 3)
        got, state = update(indices, gradients, state, got)
        updates, reference = adam.update(dense(gradients, indices), reference, want)
        want = optax.apply_updates(want, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)
    assert not np.allclose(got["weights"][2], table()["weights"][2])


@pytest.mark.slow
def test_untouched_rows_keep_every_bit_of_values_and_moments():
    lazy = lazy_adam(0.1)
    update = jax.jit(lazy.update)
    values = table()
    values, state = update(jnp.arange(ROWS), draw(0, ROWS), lazy.init(values), values)
    after, later = update(jnp.array([3, ROWS, 3, -1]), draw(1, 4), state, values)
    untouched = np.arange(ROWS) != 3

    def check(x, y):
        np.testing.assert_array_equal(x[untouched], y[untouched])
        assert (x[3] != y[3]).any()

    jax.tree.map(check, {"table": values, **state["rows"]}, {"table": after, **later["rows"]})
    assert later["rows"]["count"].tolist() == [1, 1, 1, 2, 1, 1, 1, 1, 1]


def test_a_row_after_a_pause_goes_on_where_it_was():
    """Steps on other rows leave no trace: bias correction counts a row's own steps."""
    lazy = lazy_adam(0.1)
    update = jax.jit(lazy.update)
    with_pause, without = table(), table()
    a, b = lazy.init(with_pause), lazy.init(without)
    for step in range(3):
        with_pause, a = update(jnp.array([4]), draw(step, 1), a, with_pause)
        with_pause, a = update(jnp.array([6]), draw(step + 9, 1), a, with_pause)
        without, b = update(jnp.array([4]), draw(step, 1), b, without)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[4], y[4]), with_pause, without)


def test_gradients_of_equal_indices_are_added():
    lazy = lazy_adam(0.1)
    update = jax.jit(lazy.update)
    gradients = draw(0, 4)
    twice, _ = update(jnp.array([5, 1, 5, ROWS]), gradients, lazy.init(table()), table())
    summed = jax.tree.map(lambda g: np.stack([g[0] + g[2], g[1]]), gradients)
    once, _ = update(jnp.array([5, 1]), summed, lazy.init(table()), table())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), twice, once)


def compiled_step(kind, users):
    """One training step on a batch of eight users of a table of `users`, compiled with its state donated."""
    model = UserModel(kind=kind, num_users=users, tokens=4, width=16, clusters=4, start="normal")
    optimizer = lazy_adam(0.1)

    def step(table, state, shared, batch):
        small, local, indices = gather_rows({"shared": shared, "table": table}, batch)
        gradient = jax.grad(lambda p: (model.apply(p, local)[0] ** 2).sum())(small)
        return optimizer.update(indices, gradient["table"], state, table)

    params = jax.eval_shape(functools.partial(model.init, jax.random.key(0)))
    state = jax.eval_shape(optimizer.init, params["table"])
    batch = jax.ShapeDtypeStruct((8,), jnp.int32)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params["table"], state, params["shared"], batch).compile()


@pytest.mark.parametrize("kind", ["individualized", "cluster"])
def test_the_cost_of_a_step_does_not_grow_with_the_number_of_users(kind):
    few, many = compiled_step(kind, 100), compiled_step(kind, 10_000)
    assert few.cost_analysis()["flops"] == many.cost_analysis()["flops"]
    few, many = few.memory_analysis(), many.memory_analysis()
    # No dense temporaries, and in-place updates: only the tables grow with the number of users.
    assert many.temp_size_in_bytes == few.temp_size_in_bytes
    assert many.output_size_in_bytes - many.alias_size_in_bytes == few.output_size_in_bytes - few.alias_size_in_bytes
    assert many.alias_size_in_bytes > 50 * few.alias_size_in_bytes
