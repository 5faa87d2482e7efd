"""Relatives of the weighted sum: TIES, DARE, SLERP, Model Stock on pytrees, and the coefficients of Bone Soups.

With tau_i = theta_i - base, most are base + scale * sum_i w_i s(tau_i), where s sparsifies an update: task arithmetic
(arXiv 2212.04089), TIES (2306.01708), DARE (2311.03099). Unlike a plain sum they work tensor by tensor. A leaf counts
as one tensor; name leaves that stack one tensor per layer in `stacked`.

All compute in float32 (float64 where the leaves are float64) and cast back. Weights may be negative.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pjrlhf.merging import trees
from pjrlhf.merging.trees import Weights
from pjrlhf.types import Array, PRNGKey, Tree

RESCALES = ("l1", "inverse_density")
# Beyond this cosine of either sign, an arc between two vectors is numerically a line, or its plane is undefined.
STRAIGHT = 0.9995


def task_arithmetic(base: Tree, ingredients: Sequence[Tree], weights: Weights, scale: float = 1.0) -> Tree:
    """base + scale * sum_i weights[i] * tau_i (arXiv 2212.04089, section 2), in the dtypes of `base`.

    It is `trees.soup` with scaled weights: one-hot weights return that ingredient exactly where `scale` is 1.
    Raises ValueError for no ingredient, a wrong number of weights or ones not finite, and trees that do not match.
    """
    _check(base, ingredients, weights)
    return trees.soup(base, ingredients, [scale * weight for weight in weights])


def ties(
    base: Tree,
    ingredients: Sequence[Tree],
    weights: Weights,
    density: float,
    *,
    scale: float = 1.0,
    normalize: bool = True,
    stacked: Sequence[str] = (),
) -> Tree:
    """TIES (arXiv 2306.01708, algorithm 1), in the dtypes of `base`: trim, elect a sign, average what agrees with it.

    Of each tau_i the floor(density * size) largest magnitudes of the tensor stay, at least one, and any equal to the
    least of them. An entry's sign is that of sum_i w_i tau_i (plus where it is 0); terms w_i tau_i of another sign, or
    0, are dropped. `normalize` divides an entry by the sum of the weights left in it, unless they cancel.

    One-hot weights return that ingredient (to rounding) at density 1, and a trimmed one below it; the result is not
    linear in the weights. Raises ValueError as `task_arithmetic` does, and for a density outside (0, 1].
    """
    function = functools.partial(METHODS["ties"], density=density, scale=scale, normalize=normalize)
    return _per_tensor(function, base, ingredients, weights, None, stacked)


def dare(
    base: Tree,
    ingredients: Sequence[Tree],
    weights: Weights,
    density: float,
    key: PRNGKey,
    *,
    scale: float = 1.0,
    rescale: str = "l1",
    sign: bool = False,
    stacked: Sequence[str] = (),
) -> Tree:
    """DARE (arXiv 2311.03099), in the dtypes of `base`: entries of tau_i stay with probability `density`.

    What stays is multiplied by 1 / density as in the paper (`rescale="inverse_density"`: unbiased), or so that the
    tensor keeps its L1 norm ("l1": unless nothing stays). `sign` then drops terms against the elected sign, as `ties`
    does, but does not normalise.

    The draw depends only on `key`, the path of the leaf, the layer and the index of the ingredient. One-hot weights
    return that ingredient (to rounding) only at density 1. Raises ValueError as `ties` does, and for an unknown
    `rescale`.
    """
    name = "dare_ties" if sign else "dare_linear"
    function = functools.partial(METHODS[name], density=density, scale=scale, rescale=rescale)
    return _per_tensor(function, base, ingredients, weights, key, stacked)


def slerp(a: Tree, b: Tree, t: float | Float[Array, ""], *, stacked: Sequence[str] = ()) -> Tree:
    """(sin((1-t) o) a + sin(t o) b) / sin(o) per tensor, o the angle between them, in the dtypes of `a`.

    Vectors keep their lengths. If |cos o| > 0.9995 or a vector is 0, it is the line (1-t) a + t b. t = 0 returns `a`
    and t = 1 returns `b` exactly; other t extrapolate. Raises ValueError for a `t` that is not finite and trees that do
    not match.
    """
    return _per_tensor(lambda _, leaves, row: _arc(*leaves, row[1]), None, [a, b], [1.0 - t, t], None, stacked)


def model_stock(base: Tree, ingredients: Sequence[Tree], *, stacked: Sequence[str] = ()) -> Tree:
    """base + t * mean_i tau_i per tensor, t = N c / (1 + (N - 1) c) (arXiv 2403.19522), in the dtypes of `base`.

    c is the mean cosine of the pairs of tau_i; where it is negative, which the derivation rules out, it counts as 0.
    Equal ingredients return themselves (to rounding). Raises ValueError for fewer than two ingredients and trees that
    do not match.
    """
    return _per_tensor(METHODS["model_stock"], base, ingredients, [1.0] * len(ingredients), None, stacked)


def mixing_matrix(count: int, beta: float) -> np.ndarray:
    """The rewards of Bone Soups' backbones (arXiv 2502.10762), [S, S]: row i weighs the S objectives for backbone i.

    `beta` on the diagonal and (1 - beta) / (S - 1) elsewhere. Raises ValueError for fewer than two objectives.
    """
    if count < 2:
        raise ValueError(f"{count} objective(s) cannot be mixed")
    return np.full((count, count), (1.0 - beta) / (count - 1)) + np.eye(count) * (beta - (1.0 - beta) / (count - 1))


def bone_soup_weights(
    preferences: Sequence[float] | np.ndarray,
    mixing: float | Sequence[Sequence[float]] | np.ndarray,
    extrapolation: float | Sequence[float] | np.ndarray = 0.0,
) -> np.ndarray:
    """The weights [..., S] of S backbones trained on mixed rewards that correspond to `preferences` (arXiv 2502.10762).

    x = sum_j preferences[j] * k_j * x_j, where x_j solves sum_i x_j[i] mixing[i] = one_hot(j) and k_j = 1 / (1 - a_j).
    Give them to `trees.soup` (or as a row of a mix): its weight of the base, 1 - sum(x), is then the paper's
    sum_j preferences[j] (1 - k_j), for rows of `mixing` and preferences that sum to 1. Weights may be negative.

    Args:
      preferences: [..., S].
      mixing: `beta` of `mixing_matrix`, or rows [S, S], one per backbone.
      extrapolation: a < 1, away from the base; one for all objectives or one for each.

    Raises ValueError for shapes that do not fit, a mixing that cannot be inverted, and numbers that are not finite.
    """
    preferences = np.asarray(preferences, np.float64)
    count = preferences.shape[-1]
    matrix = np.asarray(mixing, np.float64)
    if not matrix.ndim:
        matrix = mixing_matrix(count, float(matrix))
    away = np.asarray(extrapolation, np.float64)
    if matrix.shape != (count, count) or away.shape not in ((), (count,)):
        raise ValueError(f"{count} preferences, but a mixing of {matrix.shape} and an extrapolation of {away.shape}")
    if not all(np.isfinite(x).all() for x in (preferences, matrix, away)):
        raise ValueError("preferences, mixing and extrapolation must be finite")
    if np.any(away >= 1):
        raise ValueError(f"extrapolation {extrapolation} is not below 1")
    if np.linalg.cond(matrix) > 1e8:
        raise ValueError("mixing has no inverse: the backbones' rewards do not distinguish the objectives")
    scaled = preferences / (1.0 - away)
    return np.linalg.solve(matrix.T, scaled.reshape(-1, count).T).T.reshape(scaled.shape)


def tensor_key(key: PRNGKey, path: str, layer: int | None = None) -> PRNGKey:
    """The key of one tensor: of the leaf at `path` ("layers/mlp/up/kernel"), and of one layer of a stacked leaf."""
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    return key if layer is None else jax.random.fold_in(key, layer)


def _check(base: Tree | None, ingredients: Sequence[Tree], weights: Weights) -> None:
    if not ingredients:
        raise ValueError("no ingredient to merge")
    trees.check_weights(weights, len(ingredients))
    names = [f"ingredient {i}" for i in range(len(ingredients))]
    known = [] if base is None else [base]
    trees.check_same([*known, *ingredients], ["the base", *names][1 - len(known) :])


def _per_tensor(
    function: Callable[..., Array],
    base: Tree | None,
    ingredients: Sequence[Tree],
    weights: Weights,
    key: PRNGKey | None,
    stacked: Sequence[str],
) -> Tree:
    """Applies a function of METHODS to every tensor: a leaf, or a row of a leaf below one of the names `stacked`."""
    _check(base, ingredients, weights)

    def merge(path: str, layer: int | None, first: Array, *others: Array) -> Array:
        start, leaves = (None, (first, *others)) if base is None else (first, others)
        extra = {} if key is None else {"key": tensor_key(key, path, layer)}
        return function(start, leaves, weights, **extra)

    def leaf(place: tuple[Any, ...], *leaves: Array) -> Array:
        path = jax.tree_util.keystr(place, simple=True, separator="/")
        if path.split("/")[0] not in stacked:
            return merge(path, None, *leaves)
        return jnp.stack([merge(path, i, *(x[i] for x in leaves)) for i in range(len(leaves[0]))])

    return jax.tree.map_with_path(leaf, *([] if base is None else [base]), *ingredients)


def _sum_of_updates(
    base: Array,
    leaves: Sequence[Array],
    weights: Weights,
    *,
    density: float,
    scale: float = 1.0,
    draw: bool = False,
    key: PRNGKey | None = None,
    rescale: str = "l1",
    sign: bool = False,
    normalize: bool = False,
) -> Array:
    """base + scale * sum_i w_i s(tau_i) of one tensor; `s` draws entries with `key`, or keeps the largest."""
    if draw == (key is None):
        raise ValueError("DARE draws entries and needs a key; TIES takes none")
    if not 0 < density <= 1:
        raise ValueError(f"density {density} is not in (0, 1]")
    if rescale not in RESCALES:
        raise ValueError(f"rescale {rescale!r} is unknown; choose one of {', '.join(RESCALES)}")
    numbers = jnp.asarray(weights, trees.wide_dtype(base.dtype))
    masks = None
    if key is not None and density < 1:
        # Outside the jitted function, so that a draw compiles once for a shape.
        masks = [jax.random.bernoulli(jax.random.fold_in(key, i), density, base.shape) for i in range(len(leaves))]
    return _merged(base, tuple(leaves), numbers, masks, scale, density, rescale, sign, normalize)


@functools.partial(jax.jit, static_argnames=("density", "rescale", "sign", "normalize"))
def _merged(
    base: Array,
    leaves: tuple[Array, ...],
    weights: Float[Array, " K"],
    masks: list[Array] | None,
    scale: float | Array,
    density: float,
    rescale: str,
    sign: bool,
    normalize: bool,
) -> Array:
    start = base.astype(weights.dtype)
    terms = []
    for i, leaf in enumerate(leaves):
        update = leaf.astype(start.dtype) - start
        if masks is not None:
            update = _masked(update, masks[i], density, rescale)
        elif density < 1:
            update = _trimmed(update, density)
        terms.append(weights[i] * update)
    total, left = sum(terms), list(weights)
    if sign:
        positive = total >= 0
        agree = [jnp.where(positive, term > 0, term < 0) for term in terms]
        total = sum(jnp.where(a, term, 0) for a, term in zip(agree, terms, strict=True))
        left = [jnp.where(a, weight, 0) for a, weight in zip(agree, weights, strict=True)]
    if normalize:
        divisor = sum(left)
        cancels = jnp.abs(divisor) <= 1e-6 * sum(map(jnp.abs, left))
        total = total / jnp.where(cancels, 1, divisor)
    return (start + scale * total).astype(base.dtype)


def _trimmed(update: Array, density: float) -> Array:
    # The margin is for products such as 0.29 * 100, a little less than 29.
    count = max(1, math.floor(density * update.size + 1e-6))
    magnitude = jnp.abs(update)
    return jnp.where(magnitude >= _largest(magnitude, count), update, 0)


def _largest(magnitude: Array, count: int) -> Array:
    """The `count`-th largest of an array of no negative floats, found bit by bit: large leaves are slow to sort."""
    width = 8 * magnitude.dtype.itemsize
    unsigned = jnp.dtype(f"uint{width}")
    bits = jax.lax.bitcast_convert_type(magnitude, unsigned)  # in the order of the floats

    def settle(i: Array, low: Array) -> Array:
        probe = low | (jnp.asarray(1, unsigned) << (width - 2 - i).astype(unsigned))
        return jnp.where(jnp.sum(bits >= probe) >= count, probe, low)

    found = jax.lax.fori_loop(0, width - 1, settle, jnp.asarray(0, unsigned))
    return jax.lax.bitcast_convert_type(found, magnitude.dtype)


def _masked(update: Array, mask: Array, density: float, rescale: str) -> Array:
    kept = jnp.where(mask, update, 0)
    if rescale == "inverse_density":
        return kept / density
    norm = jnp.sum(jnp.abs(kept))
    return kept * jnp.where(norm > 0, jnp.sum(jnp.abs(update)) / jnp.where(norm > 0, norm, 1), 1)


def _slerp(base: Array | None, leaves: Sequence[Array], weights: Weights) -> Array:
    if len(leaves) != 2:
        raise ValueError(f"slerp goes between two ingredients, not {len(leaves)}")
    if abs(sum(weights)) < 1e-6:
        raise ValueError("the two weights of slerp sum to 0")
    return _arc(*leaves, weights[1] / sum(weights))


@jax.jit
def _arc(a: Array, b: Array, t: float | Array) -> Array:
    wide = trees.wide_dtype(a.dtype)
    x, y, t = a.astype(wide), b.astype(wide), jnp.asarray(t, wide)
    lengths = jnp.linalg.norm(x.ravel()) * jnp.linalg.norm(y.ravel())
    cosine = jnp.sum(x * y) / jnp.where(lengths > 0, lengths, 1)
    angle = jnp.arccos(jnp.clip(cosine, -STRAIGHT, STRAIGHT))
    arc = jnp.stack([jnp.sin((1 - t) * angle), jnp.sin(t * angle)]) / jnp.sin(angle)
    # The ends are on the line as well, where they are exact.
    straight = (lengths == 0) | (jnp.abs(cosine) > STRAIGHT) | (t == 0) | (t == 1)
    part = jnp.where(straight, jnp.stack([1 - t, t]), arc)
    return (part[0] * x + part[1] * y).astype(a.dtype)


def _model_stock(base: Array, leaves: Sequence[Array], weights: Weights = ()) -> Array:
    if len(leaves) < 2:
        raise ValueError("model_stock needs at least two ingredients: it reads their angles")
    return _stocked(base, tuple(leaves))


@jax.jit
def _stocked(base: Array, leaves: tuple[Array, ...]) -> Array:
    start = base.astype(trees.wide_dtype(base.dtype))
    updates = [leaf.astype(start.dtype) - start for leaf in leaves]
    lengths = [jnp.linalg.norm(update.ravel()) for update in updates]
    units = [update / jnp.where(length > 0, length, 1) for update, length in zip(updates, lengths, strict=True)]
    pairs = [jnp.sum(u * v) for u, v in itertools.combinations(units, 2)]
    N, cosine = len(leaves), jnp.clip(sum(pairs) / len(pairs), 0, 1)
    ratio = N * cosine / (1 + (N - 1) * cosine)
    return (start + ratio * (sum(updates) / N)).astype(base.dtype)


def _linear(base: Array | None, leaves: Sequence[Array], weights: Weights, *, scale: float = 1.0) -> Array:
    weights = [scale * weight for weight in weights]
    return trees.weighted_sum(leaves, weights) if base is None else trees.soup(base, leaves, weights)


# name -> function(base, leaves, weights, ...) -> leaf, for one tensor: `leaves` lists the ingredients' versions of it.
# The two DARE methods take `key`, a `tensor_key`. "linear" and "slerp" need no base (None), and slerp ignores it;
# slerp's t is the second weight divided by the sum of both; model_stock ignores the weights.
METHODS: Mapping[str, Callable[..., Array]] = {
    "linear": _linear,
    "task_arithmetic": _linear,
    "ties": functools.partial(_sum_of_updates, sign=True, normalize=True),
    "dare_linear": functools.partial(_sum_of_updates, draw=True),
    "dare_ties": functools.partial(_sum_of_updates, draw=True, sign=True),
    "slerp": _slerp,
    "model_stock": _model_stock,
}
