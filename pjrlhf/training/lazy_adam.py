"""Lazy Adam for large tables: an update changes, and costs, only the rows of the batch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from pjrlhf.types import Array, Params, Tree


class LazyAdam(NamedTuple):
    """`init(table) -> state` and `update(indices, gradients, state, table) -> (table, state)`.

    A table is any tree with leaves [U + 1, ...].

    Unlike optax, `update` returns the new table, since a dense update is what it avoids. Donate `table` and `state` to
    update them in place. Leaves of `state["rows"]` are [U + 1, ...] like those of the table.
    """

    init: Callable[[Tree], Params]
    update: Callable[[Array, Tree, Params, Tree], tuple[Tree, Params]]


def lazy_adam(learning_rate: optax.ScalarOrSchedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> LazyAdam:
    """Adam (arXiv 1412.6980) with a step count per row.

    A row updated at every step moves as under dense Adam. Other rows stay bit-identical, as do their moments and
    counts, whereas dense Adam would still move them by their momentum.

    `update` takes indices int32 [n] and gradients with leaves [n, ...]. It sums gradients of equal indices and skips
    indices outside the table, such as the padding of `gather_rows`. A schedule counts all updates.
    """

    def init(table: Tree) -> Params:
        count = jnp.zeros(jax.tree.leaves(table)[0].shape[0], jnp.int32)
        moments = {"mu": jax.tree.map(jnp.zeros_like, table), "nu": jax.tree.map(jnp.zeros_like, table)}
        return {"step": jnp.zeros((), jnp.int32), "rows": {"count": count, **moments}}

    def update(indices: Int[Array, " n"], gradients: Tree, state: Params, table: Tree) -> tuple[Tree, Params]:
        n, rows = indices.shape[0], state["rows"]
        no_row = rows["count"].shape[0]
        indices = jnp.where(indices < 0, no_row, jnp.minimum(indices, no_row))
        touched, inverse = jnp.unique(indices, size=n, fill_value=no_row, return_inverse=True)
        gradients = jax.tree.map(lambda g: jax.ops.segment_sum(g, inverse.reshape(n), n), gradients)

        def take(tree):
            return jax.tree.map(lambda x: x.at[touched].get(mode="fill", fill_value=0), tree)

        def put(tree, new):
            return jax.tree.map(lambda x, y: x.at[touched].set(y, mode="drop"), tree, new)

        count = take(rows["count"]) + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, take(rows["mu"]), gradients)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, take(rows["nu"]), gradients)
        rate = learning_rate(state["step"]) if callable(learning_rate) else learning_rate

        def moved(x, m, v):
            steps = count.reshape(-1, *[1] * (x.ndim - 1))
            return x - rate * (m / (1 - b1**steps)) / (jnp.sqrt(v / (1 - b2**steps)) + eps)

        table = put(table, jax.tree.map(moved, take(table), mu, nu))
        rows = {"count": put(rows["count"], count), "mu": put(rows["mu"], mu), "nu": put(rows["nu"], nu)}
        return table, {"step": state["step"] + 1, "rows": rows}

    return LazyAdam(init, update)
