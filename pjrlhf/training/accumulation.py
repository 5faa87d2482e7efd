"""Gradients of a batch in parts, one after the other, which takes the memory of one part."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from pjrlhf.data.packing import PackedRows, align
from pjrlhf.errors import UserError
from pjrlhf.training.metrics import Metrics
from pjrlhf.types import Array, Params, PRNGKey

Row = TypeVar("Row")
B = TypeVar("B")  # a batch: a pytree of arrays

# (parameters, part of a batch, key) -> (mean loss, metrics with "loss" as (sum, count)).
Loss = Callable[[Params, Any, PRNGKey], tuple[Array, Metrics]]


def parts_of(batch: B | tuple[B, ...]) -> tuple[B, ...]:
    """The parts of a batch that `in_parts` made; a whole batch is its only part."""
    return batch if type(batch) is tuple else (batch,)  # pyright: ignore[reportReturnType]


def in_parts(collate: Callable[[Sequence[Row]], B], count: int) -> Callable[[Sequence[Row]], B | tuple[B, ...]]:
    """`collate` for a batch in `count` equal parts of equal shapes; the batch itself where `count` is 1."""
    if count == 1:
        return collate

    def collate_parts(rows: Sequence[Row]) -> tuple[B, ...]:
        size = len(rows) // count
        return tuple(_aligned([collate(rows[i * size : (i + 1) * size]) for i in range(count)]))

    return collate_parts


def _aligned(parts: Sequence[B]) -> list[B]:
    """The same batches, whose packed rows have equal shapes."""
    flat = [jax.tree.flatten(part, is_leaf=lambda x: isinstance(x, PackedRows)) for part in parts]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    whole = [align(column) if isinstance(column[0], PackedRows) else column for column in columns]
    return [jax.tree.unflatten(flat[0][1], leaves) for leaves in zip(*whole, strict=True)]


def check_accumulation(count: int, batch_size: int) -> None:
    """Raises UserError where a batch cannot be split into `count` equal parts."""
    if batch_size % count:
        raise UserError(
            f"accumulation_steps: {count} does not divide batch_size={batch_size}, which counts the rows of all parts; "
            "change one of them"
        )


def gradient_of(loss: Loss, trainable: Params, parts: Sequence[Any], key: PRNGKey) -> tuple[Params, Metrics]:
    """Gradient of the mean loss of a batch, and its metrics.

    The mean is over all that the parts count in their metric "loss", such as tokens: it is not the mean of the parts'
    means, which would weigh the tokens of a part with few of them more.

    Args:
      loss: of a part.
      trainable: what is differentiated.
      parts: pytrees of equal structure and shapes.
      key: part i gets the key itself for one part, and else `fold_in(key, i)`.
    """
    slope = jax.grad(loss, has_aux=True)
    if len(parts) == 1:
        return slope(trainable, parts[0], key)

    def part_of(numbered: tuple[Array, Any]) -> tuple[Params, Array, Metrics]:
        number, part = numbered
        gradient, metrics = slope(trainable, part, jax.random.fold_in(key, number))
        weight = jnp.sum(metrics["loss"][1])
        return jax.tree.map(lambda g: g.astype(jnp.float32) * weight, gradient), weight, metrics

    stacked = jnp.arange(len(parts)), jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    shapes = jax.eval_shape(part_of, jax.tree.map(lambda x: x[0], stacked))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(lambda sums, one: (jax.tree.map(jnp.add, sums, part_of(one)), None), zeros, stacked)
    gradient, weight, metrics = total
    return jax.tree.map(lambda g, x: (g / jnp.maximum(weight, 1)).astype(x.dtype), gradient, trainable), metrics
