"""Sums of low-rank updates (LoRA, arXiv 2106.09685): the update of a kernel [..., D, F] is `scale * a @ b`.

An adapter is a nested dict whose innermost dicts are pairs {'a': [..., D, R], 'b': [..., R, F]} with equal leading
axes (layers). `scale` is alpha / rank, or alpha / sqrt(rank) where rank-stabilised, and belongs to one adapter.

`merge_dense` and `concatenate` are exact for any ranks, scales and weights. `average_factors` is not: see there.
"""

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from pjrlhf.merging import trees
from pjrlhf.merging.trees import Weights
from pjrlhf.types import Array, Tree


def delta(
    a: Float[Array, "*layers D R"], b: Float[Array, "*layers R F"], scale: float | Float[Array, ""]
) -> Float[Array, "*layers D F"]:
    """The dense update `scale * a @ b`, at least float32 for any dtype of the factors."""
    wide = trees.wide_dtype(jnp.promote_types(a.dtype, b.dtype))
    return scale * jnp.matmul(a.astype(wide), b.astype(wide), precision=jax.lax.Precision.HIGHEST)


def merge_dense(kernels: Tree, adapters: Sequence[Tree], scales: Weights, weights: Weights) -> Tree:
    """`kernels` + sum_i weights[i] * scales[i] * a_i @ b_i, in the dtypes of `kernels`.

    Args:
      kernels: nested dicts, the whole model or a part of it; a pair at `path` updates the leaf `path/kernel`.
      adapters: any ranks; each may touch its own subset of the kernels.
      scales, weights: one number per adapter.

    Raises ValueError for a wrong number of weights or scales, weights that are not finite, and pairs that fit no
    kernel.
    """
    _check_numbers(adapters, scales, weights)
    updates = {}
    for adapter, scale, weight in zip(adapters, scales, weights, strict=True):
        for path, pair in _pairs(adapter).items():
            updates.setdefault(f"{path}/kernel", []).append((pair, weight * scale))

    def add(path: tuple[Any, ...], kernel: Array) -> Array:
        total = kernel.astype(trees.wide_dtype(kernel.dtype))
        for pair, factor in updates.pop(_name(path), ()):
            update = delta(pair["a"], pair["b"], factor)
            if update.shape != kernel.shape:
                raise ValueError(f"leaf {_name(path)!r} has shape {kernel.shape}, its update {update.shape}")
            total = total + update.astype(total.dtype)
        return total.astype(kernel.dtype)

    merged = jax.tree.map_with_path(add, kernels)
    if updates:
        raise ValueError(f"adapters update {next(iter(updates))!r}, which the base does not have")
    return merged


def concatenate(adapters: Sequence[Tree], scales: Weights, weights: Weights) -> Tree:
    """One adapter of scale 1 with the update sum_i weights[i] * scales[i] * a_i @ b_i, exactly.

    Its rank is sum_i R_i, or that of one where all have the same `a`: then the update is a @ (sum_i weights[i] *
    scales[i] * b_i). Weights and scales are folded into `b`; dtypes are those of the first adapter.
    Raises ValueError for a wrong number of weights or scales, weights that are not finite, and adapters of different
    kernels.
    """
    _check_numbers(adapters, scales, weights)
    flat = [_pairs(adapter) for adapter in adapters]

    def join(path: tuple[Any, ...], first: Mapping[str, Array]) -> dict[str, Array]:
        pairs = [each[_name(path)] for each in flat]
        folded = [_times(pair["b"], w * s) for pair, w, s in zip(pairs, weights, scales, strict=True)]
        if shared:
            return {"a": first["a"], "b": _sum(folded).astype(first["b"].dtype)}
        return {
            "a": jnp.concatenate([pair["a"] for pair in pairs], axis=-1).astype(first["a"].dtype),
            "b": jnp.concatenate(folded, axis=-2).astype(first["b"].dtype),
        }

    _check_alike(flat)
    shared = all(_same([pairs[path]["a"] for pairs in flat]) for path in flat[0])
    return jax.tree.map_with_path(join, adapters[0], is_leaf=_is_pair)


def average_factors(adapters: Sequence[Tree], scales: Weights, weights: Weights) -> Tree:
    """Factor averaging, as the released code of Personalized Soups (arXiv 2310.11564) merges: an adapter of scale 1.

    a = sum_i w_i a_i and b = sum_i w_i scale_i b_i, each on its own. The product of the two sums holds the cross terms
    w_i w_j a_i b_j, so this equals the weighted mean of the updates only if all adapters share `a` and the weights sum
    to 1. Training from one shared draw of `a` stays close to that; for independent draws the mean is rotated and
    smaller. Its purpose is comparison with published soups: use `concatenate` or `merge_dense` otherwise.

    Raises ValueError as `concatenate` does, and where ranks differ.
    """
    _check_numbers(adapters, scales, weights)
    trees.check_same(adapters, [f"adapter {i}" for i in range(len(adapters))])
    flat = [_pairs(adapter) for adapter in adapters]

    def average(path: tuple[Any, ...], first: Mapping[str, Array]) -> dict[str, Array]:
        pairs = [each[_name(path)] for each in flat]
        a = _sum(_times(pair["a"], w) for pair, w in zip(pairs, weights, strict=True))
        b = _sum(_times(pair["b"], w * s) for pair, w, s in zip(pairs, weights, scales, strict=True))
        return {"a": a.astype(first["a"].dtype), "b": b.astype(first["b"].dtype)}

    return jax.tree.map_with_path(average, adapters[0], is_leaf=_is_pair)


def _sum(terms: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, terms)


def _same(factors: Sequence[Array]) -> bool:
    """Whether several arrays hold the same numbers; False inside `jax.jit`, where that is not known."""
    first, *others = factors
    if not others or any(isinstance(x, Tracer) or x.shape != first.shape for x in factors):
        return False
    return all(bool((np.asarray(x) == np.asarray(first)).all()) for x in others)


def _is_pair(node: object) -> bool:
    return isinstance(node, Mapping) and set(node) == {"a", "b"}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _times(x: Float[Array, "..."], factor: float | Array) -> Float[Array, "..."]:
    return x.astype(trees.wide_dtype(x.dtype)) * factor


def _pairs(adapter: Tree) -> dict[str, Mapping[str, Array]]:
    """The pairs of an adapter by their path; ValueError where a pair is incomplete or its factors do not multiply."""
    found = {}
    for path, pair in jax.tree.leaves_with_path(adapter, is_leaf=_is_pair):
        if not _is_pair(pair):
            raise ValueError(f"{_name(path)!r} is no part of a pair of factors 'a' and 'b'")
        a, b = pair["a"].shape, pair["b"].shape
        if a[:-2] != b[:-2] or a[-1] != b[-2]:
            raise ValueError(f"pair {_name(path)!r}: a {a} and b {b} do not multiply")
        found[_name(path)] = pair
    return found


def _check_numbers(adapters: Sequence[Tree], scales: Weights, weights: Weights) -> None:
    if not adapters:
        raise ValueError("no adapter to merge")
    trees.check_weights(weights, len(adapters))
    if len(scales) != len(adapters):
        raise ValueError(f"{len(scales)} scales for {len(adapters)} adapters")


def _check_alike(flat: Sequence[Mapping[str, Any]]) -> None:
    """ValueError where adapters update different kernels or kernels of different shapes."""
    for i, pairs in enumerate(flat):
        for path in [*flat[0], *pairs]:
            if path not in pairs or path not in flat[0]:
                has, lacks = (0, i) if path in flat[0] else (i, 0)
                raise ValueError(f"adapter {has} updates {path!r} but adapter {lacks} does not; merge them densely")
            shapes = [(*x[path]["a"].shape[:-1], x[path]["b"].shape[-1]) for x in (pairs, flat[0])]
            if shapes[0] != shapes[1]:
                raise ValueError(f"adapter {i} updates {path!r} by {shapes[0]}, adapter 0 by {shapes[1]}")
