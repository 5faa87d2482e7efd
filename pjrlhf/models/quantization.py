"""Int8 weight quantisation of a frozen base: kernels of the linear layers with one scale per output column.

A column w of a kernel is stored as round(w / s) with s = max |w| / 127 (symmetric absmax, vector-wise; section 2 of
arXiv 2208.07339). A quantised layer has {"kernel": int8 [L, in, out], "scale": float32 [L, out]}. Embeddings, head,
norms, biases and adapters keep their dtype.
"""

import re
from collections.abc import Callable
from typing import cast

import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Float

from pjrlhf.errors import UserError
from pjrlhf.types import Array, Params

KINDS = ("", "int8")
_LARGEST = 127
_NEEDS_FLOATS = (
    "full-parameter training (adapter.rank 0) needs a base in floating point; set adapter.rank above 0, or leave "
    "model.quantize empty"
)
_KERNEL = re.compile(r"layers/(attention|mlp)/\w+/kernel$")
Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def check_quantize(kind: str, rank: int) -> None:
    """Checks `model.quantize` = `kind`.

    Raises:
      UserError: an unknown kind, or one that `adapter.rank` = `rank` does not allow.
    """
    if kind not in KINDS:
        raise UserError(f"model.quantize {kind!r}: unknown; choose int8, or leave it empty")
    if kind and not rank:
        raise UserError(f"model.quantize={kind}: {_NEEDS_FLOATS}")


def quantize(kernel: Float[Array, "*layers D F"]) -> dict[str, Array]:
    """Quantises a kernel to {"kernel": int8 [*layers, D, F], "scale": float32 [*layers, F]}.

    The error |kernel - quantised * scale| is at most scale / 2.
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=-2)
    scale = jnp.where(largest > 0, largest / _LARGEST, 1.0)
    rounded = jnp.clip(jnp.round(kernel / scale[..., None, :]), -_LARGEST, _LARGEST)
    return {"kernel": rounded.astype(jnp.int8), "scale": scale}


def quantize_leaf(path: str, leaf: Array, place: Place | None = None) -> dict[str, Array]:
    """The leaves by path that replace the leaf at the "/"-joined `path` of a base: kernel and scale, or itself.

    `place(path, shape)` gives the sharding of a result.
    """
    if not _KERNEL.search(path):
        return {path: leaf}
    scale = path.removesuffix("kernel") + "scale"
    shardings = None
    if place is not None:
        shardings = {"kernel": place(path, leaf.shape), "scale": place(scale, (*leaf.shape[:-2], leaf.shape[-1]))}
    quantized = jax.jit(quantize, out_shardings=shardings)(leaf)
    return {path: quantized["kernel"], scale: quantized["scale"]}


def quantize_params(params: Params) -> Params:
    """The base `params` with the kernels of its layers quantised to int8."""
    flat: Params = {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        flat |= quantize_leaf(path, cast(Array, leaf))
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def refuse_quantized(base: Params) -> None:
    """Checks that `base` can be trained in full.

    Raises:
      UserError: `base` is quantised.
    """
    if any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(base)):
        raise UserError(f"model.quantize: {_NEEDS_FLOATS}")
