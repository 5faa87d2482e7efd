"""Weighted sums of parameter pytrees (rewarded soups, arXiv 2306.04488, eq. 1; task arithmetic, arXiv 2212.04089).

Sums are taken in float32 (float64 where the leaves are float64) and cast back. Weights may be negative and need not sum
to 1.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from pjrlhf.types import Array, DType, Tree

# One number per ingredient.
Weights = Sequence[float] | Sequence[float | Float[Array, ""]] | Float[Array, " K"]


def check_weights(weights: Weights, count: int) -> None:
    """Raises ValueError unless there are `count` weights and all are finite.

    The values of weights traced by `jax.jit` or `jax.grad` cannot be seen and are not checked.
    """
    if len(weights) != count:
        raise ValueError(f"{_counted(len(weights), 'weight')} for {_counted(count, 'ingredient')}")
    for i, weight in enumerate(weights):
        if not isinstance(weight, Tracer) and not math.isfinite(weight):
            raise ValueError(f"weight {i} is {weight}; weights must be finite")


def check_same(trees: Sequence[Tree], names: Sequence[str] | None = None, dtypes: bool = False) -> None:
    """Raises ValueError, naming the leaf, for a tree that differs from the first in structure or shape (with `dtypes`,
    also in dtypes), or holds non-floats.
    """
    names = names or [f"ingredient {i}" for i in range(len(trees))]
    flat = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in trees
    ]
    for name, leaves in zip(names, flat, strict=True):
        for path in [*flat[0], *leaves]:
            if path not in leaves or path not in flat[0]:
                has, lacks = (names[0], name) if path in flat[0] else (name, names[0])
                raise ValueError(f"leaf {path!r} is in {has} but not in {lacks}")
            if leaves[path].shape != flat[0][path].shape:
                raise ValueError(
                    f"leaf {path!r} has shape {leaves[path].shape} in {name} but {flat[0][path].shape} in {names[0]}"
                )
            if dtypes and leaves[path].dtype != flat[0][path].dtype:
                raise ValueError(
                    f"leaf {path!r} is {leaves[path].dtype} in {name} but {flat[0][path].dtype} in {names[0]}"
                )
            if not jnp.issubdtype(leaves[path].dtype, jnp.floating):
                raise ValueError(f"leaf {path!r} of {name} is {leaves[path].dtype}; only floats are merged")


def accumulate(total: Tree | None, tree: Tree, weight: float | Float[Array, ""]) -> Tree:
    """`total + weight * tree`, for one ingredient at a time; None starts the sum.

    The result is float32 (or float64); `total` is donated, so at most one ingredient and one running sum are alive.
    """
    if total is None:
        return _scaled(tree, weight)
    check_same([total, tree], ["the running sum", "the new ingredient"])
    return _added(total, tree, weight)


def weighted_sum(trees: Sequence[Tree], weights: Weights, out: Tree | None = None) -> Tree:
    """sum_i weights[i] * trees[i], in the dtypes of the first tree.

    `out`, a tree like the result, is donated: the sum reuses its memory, for example that of the last soup.

    Raises ValueError for no tree, a wrong number of weights, weights that are not finite, and trees that do not match.
    """
    if not trees:
        raise ValueError("no ingredient to sum")
    check_weights(weights, len(trees))
    check_same(trees)
    _check_out(out, trees[0])
    return _summed(tuple(trees), tuple(weights), out)


def sum_in_pieces(
    arrays: Sequence[np.ndarray], weights: Weights, dtype: DType, piece: int = 2**18
) -> Iterator[np.ndarray]:
    """`weighted_sum` of flat arrays that need not fit into memory, in parts of `piece` numbers, in `dtype`."""
    check_weights(weights, len(arrays))
    wide = functools.reduce(jnp.promote_types, (x.dtype for x in arrays), np.float32)
    total, term = np.empty((2, piece), wide)
    for start in range(0, len(arrays[0]), piece):
        parts = [x[start : start + piece] for x in arrays]
        n = len(parts[0])
        np.multiply(parts[0], weights[0], out=total[:n], dtype=wide)
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total[:n] += np.multiply(part, weight, out=term[:n], dtype=wide)
        with np.errstate(over="ignore"):  # infinity where `dtype` is too narrow
            narrow = total[:n].astype(dtype, copy=False)
        yield narrow


def soup(
    base: Tree,
    trees: Sequence[Tree],
    weights: Weights,
    out: Tree | None = None,
) -> Tree:
    """base + sum_i weights[i] * (trees[i] - base), in the dtypes of `base`.

    Computed as (1 - sum_i w_i) base + sum_i w_i tree_i: one-hot weights return that tree exactly, zeros the base.
    `out` as for `weighted_sum`, which says what is raised.
    """
    check_weights(weights, len(trees))
    check_same([base, *trees], ["the base", *(f"ingredient {i}" for i in range(len(trees)))])
    _check_out(out, base)
    return _summed((base, *trees), (1.0 - sum(weights), *weights), out)


def wide_dtype(dtype: DType) -> DType:
    """The dtype of sums: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _check_out(out: Tree | None, like: Tree) -> None:
    if out is not None:
        check_same([like, out], ["the first tree", "out"], dtypes=True)


def _times(x: Float[Array, "..."], weight: float | Array) -> Float[Array, "..."]:
    wide = wide_dtype(x.dtype)
    return x.astype(wide) * jnp.asarray(weight).astype(wide)


@functools.partial(jax.jit, donate_argnums=2, keep_unused=True)
def _summed(trees: tuple[Tree, ...], weights: tuple[float | Array, ...], out: Tree | None) -> Tree:
    """In one pass, which reads every ingredient once and writes only the sum, into the memory of `out`."""

    def one(*leaves: Array) -> Array:
        terms = [_times(x, weight) for x, weight in zip(leaves, weights, strict=True)]
        return functools.reduce(lambda total, term: total + term.astype(total.dtype), terms).astype(leaves[0].dtype)

    return jax.tree.map(one, *trees)


@jax.jit
def _scaled(tree: Tree, weight: float | Array) -> Tree:
    return jax.tree.map(lambda x: _times(x, weight), tree)


@functools.partial(jax.jit, donate_argnums=0)
def _added(total: Tree, tree: Tree, weight: float | Array) -> Tree:
    return jax.tree.map(lambda x, y: x + _times(y, weight).astype(x.dtype), total, tree)
