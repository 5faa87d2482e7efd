"""Decoder parameters for sampling: layers unrolled, and linear layers that share an input fused into one matmul."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from pjrlhf.models.quantization import kernel_shape, quantization_of
from pjrlhf.types import Array, DType, Params

# Per block of a layer: groups of linear layers that read the same input.
SHARED_INPUTS = {"attention": (("query", "key", "value"), ("output",)), "mlp": (("gate", "up"), ("down",))}


def unroll(
    variables: Params, leading: int = 0, transposed: bool = False, fused: bool = False, dtype: DType = jnp.float32
) -> Params:
    """Variables of a decoder with `scan_layers` -> those of the same decoder without: slice i of "layers" becomes
    "layers_i".

    Args:
      variables: {"params"} and optionally {"adapters"}.
      leading: number of axes before the layer axis in the leaves of "params".
      transposed: store kernels as [out, in].
      fused: concatenate kernels that read the same input along their outputs: "gate" and "up" [in, out] become
        "gate_up" [in, 2 out]. LoRA factors "a" [K, in, R] of these layers are appended as K R further kernel columns
        (R where all policies share one "a" [in, R]),
        and their factors "b" become one block-diagonal "b" [K, 2 R, 2 out], so that [y, low] = x [W, A] and the
        output is y + low B: four matmuls of a layer plus four small ones, instead of seven plus fourteen. Fused
        kernels are cast to `dtype`, the dtype of the matmul.
    """
    unrolled: Params = {}
    for name, axis in (("params", leading), ("adapters", 1)):
        if name in variables:
            tree = dict(variables[name])
            stacked = tree.pop("layers")
            for i in range(jax.tree.leaves(stacked)[0].shape[axis]):
                tree[f"layers_{i}"] = jax.tree.map(
                    lambda x, i=i, axis=axis: jax.lax.index_in_dim(x, i, axis, keepdims=False), stacked
                )
            unrolled[name] = tree
    if fused:
        bank = unrolled.get("adapters", {})
        for name in [name for name in unrolled["params"] if name.startswith("layers_")]:
            unrolled["params"][name], adapters = _fuse(unrolled["params"][name], bank.get(name, {}), dtype)
            if bank:
                bank[name] = adapters
    if transposed:
        unrolled["params"] = _transpose(unrolled["params"])
    return unrolled


def _transpose(params: Params) -> Params:
    """The same parameters with kernels [out, in]."""
    quantization = quantization_of(params)

    def one(name, x):
        if isinstance(x, Mapping):
            return _transpose(dict(x))
        if quantization is not None and name in quantization.leaves:
            return quantization.transpose(name, x)
        return x.swapaxes(-1, -2) if name == "kernel" else x

    return {name: one(name, x) for name, x in params.items()}


def _fuse(params: Params, bank: Params, dtype: DType) -> tuple[Params, Params]:
    """(parameters, adapters) of one layer with the groups of `SHARED_INPUTS` fused where that pays."""
    params, adapters = dict(params), dict[str, Any]()
    for block, groups in SHARED_INPUTS.items():
        tree, factors = dict(params[block]), bank.get(block, {})
        adapters[block] = {}
        for names in groups:
            names = [name for name in names if name in tree]
            pairs = {name: factors[name] for name in names if name in factors}
            first = tree[names[0]]
            firsts = [pair["a"] if "a" in pair else tree[name]["a"][None] for name, pair in pairs.items()]
            columns = sum(pair["b"].shape[0] * pair["b"].shape[1] for pair in pairs.values())
            quantized = quantization_of(first) is not None
            if columns > kernel_shape(first)[-2] // 8 or (pairs and quantized):
                # Fusing does not pay where adapters are wide, because most of the block-diagonal "b" is zeros, and it
                # cannot append float columns to a quantised kernel.
                adapters[block].update(pairs)
                continue
            parts, fused_name = [tree.pop(name) for name in names], "_".join(names)
            keys = [key for key in parts[0] if key != "a"]
            whole = {key: jnp.concatenate([part[key] for part in parts], axis=-1) for key in keys}
            if not quantized:
                whole["kernel"] = whole["kernel"].astype(dtype)
            if pairs:
                a = jnp.concatenate(firsts, axis=-1).swapaxes(0, 1)
                columns = a.reshape(len(a), -1).astype(dtype)
                whole["kernel"] = jnp.concatenate([whole["kernel"], columns], axis=-1)
                widths = {name: part["kernel"].shape[-1] for name, part in zip(names, parts, strict=True)}
                b = _block_diagonal({name: pair["b"] for name, pair in pairs.items()}, widths)
                adapters[block][fused_name] = {"b": b}
            tree[fused_name] = whole
        params[block] = tree
    return params, adapters


def _block_diagonal(factors: Mapping[str, Float[Array, "K R _"]], widths: Mapping[str, int]) -> Float[Array, "K _ F"]:
    """One "b" [K, sum of R, sum of widths] from `factors` [K, R, width], each in the columns of its own layer."""
    before, rows, total = 0, [], sum(widths.values())
    for name, width in widths.items():
        if name in factors:
            rows.append(jnp.pad(factors[name], [(0, 0), (0, 0), (before, total - before - width)]))
        before += width
    return jnp.concatenate(rows, axis=1)
