"""Parameters of a decoder for sampling: layers apart, and what reads the same input in one product."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# Per block of a layer, linear layers of one input.
TOGETHER = {"attention": (("query", "key", "value"), ("output",)), "mlp": (("gate", "up"), ("down",))}


def apart(
    variables: Any, leading: int = 0, turned: bool = False, joined: bool = False, dtype: Any = jnp.float32
) -> Any:
    """{"params"} and perhaps {"adapters"} of a decoder with `scan_layers` as one without takes them: layer i of
    "layers" becomes "layers_i".

    Args:
      variables: leaves of params have `leading` axes before that of layers.
      turned: kernels become [out, in].
      joined: kernels that read the same input become one, "gate" [in, out] and "up" "gate_up" [in, 2 out]. So do
        adapters, R of all together, "a" [K, in, R] as K R further columns of the kernel and "b" [K, R, 2 out], so that
        [y, low] = x [W, A] and y + low B: four products for a layer and four small ones, in place of seven and
        fourteen. Kernels are cast to `dtype`, in which they are multiplied.
    """
    found = {}
    for name, axis in (("params", leading), ("adapters", 1)):
        if name in variables:
            tree = dict(variables[name])
            stacked = tree.pop("layers")
            for i in range(jax.tree.leaves(stacked)[0].shape[axis]):
                tree[f"layers_{i}"] = jax.tree.map(
                    lambda x, i=i, axis=axis: jax.lax.index_in_dim(x, i, axis, keepdims=False), stacked
                )
            found[name] = tree
    if joined:
        bank = found.get("adapters", {})
        for name in [name for name in found["params"] if name.startswith("layers_")]:
            found["params"][name], low = _joined(found["params"][name], bank.get(name, {}), dtype)
            if bank:
                bank[name] = low
    if turned:
        found["params"] = jax.tree_util.tree_map_with_path(
            lambda path, x: x.swapaxes(-1, -2) if path[-1].key == "kernel" else x, found["params"]
        )
    return found


def _joined(params: Any, bank: Any, dtype: Any) -> tuple[Any, Any]:
    """A layer and its part of the bank."""
    params, low = dict(params), {}
    for block, groups in TOGETHER.items():
        tree, factors = dict(params[block]), bank.get(block, {})
        low[block] = {}
        for names in groups:
            names = [name for name in names if name in tree]
            pairs = {name: factors[name] for name in names if name in factors}
            first = tree[names[0]]["kernel"]
            columns = sum(pair["a"].shape[0] * pair["a"].shape[2] for pair in pairs.values())
            quantized = jnp.issubdtype(first.dtype, jnp.integer)
            if columns > first.shape[-2] // 8 or (pairs and quantized):
                # Each pair has columns of its own in "b": of so many most would be zeros. Integers take no floats.
                low[block].update(pairs)
                continue
            taken, together = [tree.pop(name) for name in names], "_".join(names)
            whole = {key: jnp.concatenate([one[key] for one in taken], axis=-1) for key in taken[0]}
            if not quantized:
                whole["kernel"] = whole["kernel"].astype(dtype)
            if pairs:
                a = jnp.concatenate([pair["a"] for pair in pairs.values()], axis=-1).swapaxes(0, 1)
                columns = a.reshape(len(a), -1).astype(dtype)
                whole["kernel"] = jnp.concatenate([whole["kernel"], columns], axis=-1)
                widths = {name: one["kernel"].shape[-1] for name, one in zip(names, taken, strict=True)}
                low[block][together] = {"b": _diagonal({name: pair["b"] for name, pair in pairs.items()}, widths)}
            tree[together] = whole
        params[block] = tree
    return params, low


def _diagonal(factors: Mapping[str, jax.Array], widths: Mapping[str, int]) -> jax.Array:
    """[K, R, out] of all together, each in its own columns."""
    before, rows, total = 0, [], sum(widths.values())
    for name, width in widths.items():
        if name in factors:
            rows.append(jnp.pad(factors[name], [(0, 0), (0, 0), (before, total - before - width)]))
        before += width
    return jnp.concatenate(rows, axis=1)
