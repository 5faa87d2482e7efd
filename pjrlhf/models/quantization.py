"""A frozen base in 8 bits: kernels of the linear layers as integers with one scale per output column.

A column w of a kernel is held as the nearest integers to w / s, where s = max |w| / 127 (symmetric, by the largest
absolute value; arXiv 2208.07339, section 2, vector-wise). Layers have kernels {"kernel": int8 [L, in, out], "scale":
float32 [L, out]}; embeddings, head, norms and biases stay as they are. What is trained beside them is not touched.
"""

import re
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from pjrlhf.errors import UserError

Params = Any
KINDS = ("", "int8")
_LARGEST = 127
_NEEDS_FLOATS = (
    "full parameters (adapter.rank 0) are sums with those of the base, which must be floats; set adapter.rank above 0, "
    "or leave model.quantize empty"
)
_KERNEL = re.compile(r"layers/(attention|mlp)/\w+/kernel$")
Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def check_quantize(kind: str, rank: int) -> None:
    """Raises UserError where there is no such `model.quantize`, or it does not go with `adapter.rank`."""
    if kind not in KINDS:
        raise UserError(f"model.quantize {kind!r}: unknown; choose int8, or leave it empty")
    if kind and not rank:
        raise UserError(f"model.quantize={kind}: {_NEEDS_FLOATS}")


def quantize(kernel: jax.Array) -> dict[str, jax.Array]:
    """{"kernel" int8 [..., in, out], "scale" float32 [..., out]} of a kernel: |kernel - its product| <= scale / 2."""
    wide = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-2)
    scale = jnp.where(largest > 0, largest / _LARGEST, 1.0)
    rounded = jnp.clip(jnp.round(wide / scale[..., None, :]), -_LARGEST, _LARGEST)
    return {"kernel": rounded.astype(jnp.int8), "scale": scale}


def quantize_leaf(path: str, leaf: jax.Array, place: Place | None = None) -> dict[str, jax.Array]:
    """What the leaf at the "/"-joined `path` of a base becomes, by path; `place` says where that lives."""
    if not _KERNEL.search(path):
        return {path: leaf}
    scale = path.removesuffix("kernel") + "scale"
    where = None
    if place is not None:
        where = {"kernel": place(path, leaf.shape), "scale": place(scale, (*leaf.shape[:-2], leaf.shape[-1]))}
    made = jax.jit(quantize, out_shardings=where)(leaf)
    return {path: made["kernel"], scale: made["scale"]}


def quantize_params(params: Params) -> Params:
    """The base `params` with the kernels of its layers quantised."""
    flat = {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        flat |= quantize_leaf(path, leaf)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def refuse_quantized(base: Params) -> None:
    """Raises UserError where full parameters, which are sums with those of the base, are asked of a quantised one."""
    if any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(base)):
        raise UserError(f"model.quantize: {_NEEDS_FLOATS}")
