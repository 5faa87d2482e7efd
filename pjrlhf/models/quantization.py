"""Quantisation of a frozen base: the kernels of the linear layers in 8 or 4 bits.

A `Quantization` owns what is stored in place of a kernel [in, out], and the product with it. The names of the arrays of
a layer say which one it is. Embeddings, head, norms, biases and adapters keep their dtype.
"""

import abc
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, cast

import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Float, UInt8

from pjrlhf.errors import UserError
from pjrlhf.models.matmul import matmul_frozen, matmul_transposed
from pjrlhf.types import Array, DType, Params

_NEEDS_FLOATS = (
    "full-parameter training (adapter.rank 0) needs a base in floating point; set adapter.rank above 0, or leave "
    "model.quantize empty"
)
_KERNEL = re.compile(r"layers/(attention|mlp)/\w+/kernel$")
Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
Product = Callable[[Float[Array, "*batch D"]], Float[Array, "*batch F"]]
Floats = Float[Array, "*layers _ _"]


@dataclasses.dataclass(frozen=True)
class Quantization(abc.ABC):
    """How kernels are stored and multiplied.

    Attributes:
      bits: of a number of a kernel, without scales.
      leaves: names of the arrays that take the place of "kernel" in a layer. The last axis of each is that of the
        outputs.
    """

    bits: ClassVar[int]
    leaves: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def quantize(self, kernel: Float[Array, "*layers D F"]) -> dict[str, Array]:
        """`leaves` for a kernel."""

    @abc.abstractmethod
    def shape(self, stored: Mapping[str, Array]) -> tuple[int, ...]:
        """The shape [*layers, D, F] of the kernel that is `stored`."""

    @abc.abstractmethod
    def floats(self, stored: Mapping[str, Array], dtype: DType, transposed: bool = False) -> Floats:
        """The kernel [*layers, D, F] in `dtype`, or [*layers, F, D], but for what `rescale` does to its product.

        Args:
          transposed: `stored` was transposed by `transpose`, and so is the result.
        """

    @abc.abstractmethod
    def transpose(self, name: str, leaf: Array) -> Array:
        """The array `name` of `leaves` in the order in which a decoder with kernels [out, in] reads it."""

    def rescale(self, y: Float[Array, "*batch F"], stored: Mapping[str, Array]) -> Float[Array, "*batch F"]:
        """The product with the kernel from `y`, that with `floats`."""
        return y

    def check(self, path: str, shape: tuple[int, ...]) -> None:  # noqa: B027 - most take every kernel
        """Checks that the kernel of `shape` at `path` can be stored.

        Raises:
          UserError: it cannot.
        """

    def product(self, stored: Mapping[str, Array], dtype: DType, transposed: bool = False) -> Product:
        """x [*batch, D] -> its product with a kernel of one layer, in `dtype`, the dtype of x.

        x gets the gradient of a product with floats, and `stored` gets none. The floats last only as long as the
        product. With `transposed`, they are made at once, for all products.
        """
        if transposed:
            kernel = self.floats(stored, dtype, transposed)
            return lambda x: self.rescale(matmul_transposed(x, kernel), stored)
        return lambda x: self.rescale(matmul_frozen(self.floats, x, stored), stored)


# Appendix E of QLoRA: 7 quantiles of the standard normal distribution below 0, 0, and 8 above it, over the largest.
CODEBOOK = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def _entries(indices: UInt8[Array, "*batch"], table: Float[Array, "16"]) -> Float[Array, "*batch"]:
    """`table[indices]`, selected bit by bit: XLA fuses that, and a gather of single numbers is slow on TPUs."""
    entries: list[Any] = list(table)
    for bit in range(4):
        is_set = (indices >> bit & 1) > 0
        entries = [jnp.where(is_set, *pair[::-1]) for pair in zip(entries[::2], entries[1::2], strict=True)]
    return entries[0]


class Int8(Quantization):
    """8 bits with one scale per output column, vector-wise symmetric absmax (section 2 of arXiv 2208.07339).

    A column w is stored as round(w / s) with s = max |w| / 127: "kernel" int8 [*layers, D, F] and "scale" float32
    [*layers, F]. The error |w - s round(w / s)| is at most s / 2.
    """

    bits, leaves = 8, ("kernel", "scale")
    largest: ClassVar[int] = 127

    def quantize(self, kernel: Float[Array, "*layers D F"]) -> dict[str, Array]:
        kernel = kernel.astype(jnp.float32)
        largest = jnp.max(jnp.abs(kernel), axis=-2)
        scale = jnp.where(largest > 0, largest / self.largest, 1.0)
        rounded = jnp.clip(jnp.round(kernel / scale[..., None, :]), -self.largest, self.largest)
        return {"kernel": rounded.astype(jnp.int8), "scale": scale}

    def shape(self, stored: Mapping[str, Array]) -> tuple[int, ...]:
        return stored["kernel"].shape

    def floats(self, stored: Mapping[str, Array], dtype: DType, transposed: bool = False) -> Floats:
        return stored["kernel"].astype(dtype)

    def transpose(self, name: str, leaf: Array) -> Array:
        return leaf.swapaxes(-1, -2) if name == "kernel" else leaf

    def rescale(self, y: Float[Array, "*batch F"], stored: Mapping[str, Array]) -> Float[Array, "*batch F"]:
        return (y.astype(jnp.float32) * stored["scale"]).astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class NormalFloat4(Quantization):
    """NF4 (QLoRA, arXiv 2305.14314): 4 bits, and one scale per block of inputs of an output column.

    A block w is stored as the indices of the `CODEBOOK` entries nearest to w / s, with s = max |w|. "codes" is uint8
    [*layers, blocks, block / 2, F]: byte j of a block has the index of number j in its low 4 bits, and that of number
    j + block / 2 in the high ones (a `jnp.uint4` takes a byte on some backends). "absmax" is s, float32
    [*layers, blocks, F]; it is not quantised once more. The error is at most 0.152 s, half the widest gap of the
    codebook.

    Attributes:
      block: inputs that share a scale, even.
    """

    block: int = 64
    bits, leaves = 4, ("codes", "absmax")

    def quantize(self, kernel: Float[Array, "*layers D F"]) -> dict[str, Array]:
        *layers, _, outputs = kernel.shape
        blocks = kernel.astype(jnp.float32).reshape(*layers, -1, self.block, outputs)
        absmax = jnp.max(jnp.abs(blocks), axis=-2)
        scaled = blocks / jnp.where(absmax > 0, absmax, 1.0)[..., None, :]
        middles = [(x + y) / 2 for x, y in itertools.pairwise(CODEBOOK)]
        indices = sum(((scaled > x).astype(jnp.uint8) for x in middles), jnp.zeros(scaled.shape, jnp.uint8))
        low, high = jnp.split(indices, 2, axis=-2)
        return {"codes": low | high << 4, "absmax": absmax}

    def shape(self, stored: Mapping[str, Array]) -> tuple[int, ...]:
        *layers, blocks, half, outputs = stored["codes"].shape
        return *layers, 2 * blocks * half, outputs

    def floats(self, stored: Mapping[str, Array], dtype: DType, transposed: bool = False) -> Floats:
        axis, codes = -1 if transposed else -2, stored["codes"]
        # Constants of their own, the entries would leave a loop over layers as sixteen arrays of the size of a kernel.
        absmax, table = jax.lax.optimization_barrier((stored["absmax"], jnp.array(CODEBOOK, jnp.float32)))
        indices = jnp.concatenate([codes & 15, codes >> 4], axis=axis)
        numbers = _entries(indices, table) * jnp.expand_dims(absmax, axis)
        merged = (*numbers.shape[:-2], -1) if transposed else (*numbers.shape[:-3], -1, numbers.shape[-1])
        return numbers.astype(dtype).reshape(merged)

    def transpose(self, name: str, leaf: Array) -> Array:
        return jnp.moveaxis(leaf, -1, {"codes": -3, "absmax": -2}[name])

    def check(self, path: str, shape: tuple[int, ...]) -> None:
        if shape[-2] % self.block:
            raise UserError(
                f"model.quantize=nf4: {path} has {shape[-2]} inputs, which blocks of {self.block} do not divide; use "
                "int8"
            )


QUANTIZATIONS: dict[str, Quantization] = {"int8": Int8(), "nf4": NormalFloat4()}  # values of `model.quantize`


def get_quantization(kind: str) -> Quantization | None:
    """The quantisation that `model.quantize` = `kind` names; None for "".

    Raises:
      UserError: an unknown kind.
    """
    if kind and kind not in QUANTIZATIONS:
        raise UserError(
            f"model.quantize {kind!r}: is unknown; choose one of {', '.join(QUANTIZATIONS)}, or leave it empty"
        )
    return QUANTIZATIONS[kind] if kind else None


def check_quantize(kind: str, rank: int) -> None:
    """Checks `model.quantize` = `kind`.

    Raises:
      UserError: an unknown kind, or one that `adapter.rank` = `rank` does not allow.
    """
    if get_quantization(kind) and not rank:
        raise UserError(f"model.quantize={kind}: {_NEEDS_FLOATS}")


def quantization_of(layer: Mapping[str, Any]) -> Quantization | None:
    """How the kernel of a linear layer is stored, by the names of its arrays; None for floats."""
    return next((one for one in QUANTIZATIONS.values() if {*one.leaves} <= layer.keys()), None)


def kind_of(base: Params) -> str:
    """The name of the quantisation of a base, "" for floats."""
    found = quantization_of(base["layers"]["attention"]["query"])
    return next((kind for kind, one in QUANTIZATIONS.items() if one is found), "")


def kernel_shape(layer: Mapping[str, Array]) -> tuple[int, ...]:
    """The shape [*layers, D, F] of the kernel of a linear layer, however it is stored."""
    found = quantization_of(layer)
    return layer["kernel"].shape if found is None else found.shape(layer)


def check_kernels(quantization: Quantization, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    """Checks the (path, shape) of all leaves of a base, see `Quantization.check`."""
    for path, shape in shapes:
        if _KERNEL.search(path):
            quantization.check(path, shape)


def quantize_leaf(quantization: Quantization, path: str, leaf: Array, place: Place | None = None) -> dict[str, Array]:
    """The leaves by path that replace the leaf at the "/"-joined `path` of a base: what stores a kernel, or itself.

    `place(path, shape)` gives the sharding of a result.
    """
    if not _KERNEL.search(path):
        return {path: leaf}
    layer = path.removesuffix("kernel")
    shardings = None
    if place is not None:
        shapes = jax.eval_shape(quantization.quantize, leaf)
        shardings = {name: place(layer + name, x.shape) for name, x in shapes.items()}
    stored = jax.jit(_quantize, static_argnums=0, out_shardings=shardings)(quantization, leaf)
    return {layer + name: x for name, x in stored.items()}


def _quantize(quantization: Quantization, leaf: Array) -> dict[str, Array]:
    # One function, so that leaves of one shape share a program.
    return quantization.quantize(leaf)


def quantize_params(quantization: Quantization, params: Params) -> Params:
    """The base `params` with the kernels of its layers quantised.

    Raises:
      UserError: a kernel that cannot be.
    """
    leaves = cast(dict[str, Array], flax.traverse_util.flatten_dict(params, sep="/"))
    check_kernels(quantization, ((path, leaf.shape) for path, leaf in leaves.items()))
    flat: Params = {}
    for path, leaf in leaves.items():
        flat |= quantize_leaf(quantization, path, leaf)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def refuse_quantized(base: Params) -> None:
    """Checks that `base` can be trained in full.

    Raises:
      UserError: `base` is quantised.
    """
    if any(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(base)):
        raise UserError(f"model.quantize: {_NEEDS_FLOATS}")
