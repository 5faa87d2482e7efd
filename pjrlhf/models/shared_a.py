"""One frozen first factor A for all policies (LoRA-FA, arXiv 2308.03303): training moves B alone.

A lies in the base, beside the kernels: {"layers": {"attention": {"query": {"kernel", "a" [L, in, R]}, ...}}}, and a
bank holds {"b" [K, L, R, out]}. So `x A` is computed once for all K policies, and a soup, `x A (sum_k mix_k B_k)`, is
itself an adapter of rank R: averaging both factors is exact.

In files every policy has both factors, as in any bank. Entries of A are N(0, 1/in), as where it is trained, from a
stream that depends on the layer and its shape alone: policies of different runs share it too.
"""

import zlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pjrlhf.types import Params


def draw(path: str, shape: tuple[int, int, int], dtype: str) -> Float[np.ndarray, "L D R"]:
    """A of the linear layer at `path`, such as "attention/query", for shape [L, in, R].

    `RandomState` gives the same numbers in every version of numpy.
    """
    rng = np.random.RandomState(zlib.crc32(path.encode()))
    return (rng.standard_normal(shape) * shape[1] ** -0.5).astype(jnp.dtype(dtype))


def each_layer(change: Callable[[str, str, Params], Params], layers: Params) -> Params:
    """{block: {name: change(block, name, leaves)}} of the linear layers {block: {name: leaves}}."""
    return {
        block: {name: change(block, name, leaves) for name, leaves in tree.items()} for block, tree in layers.items()
    }


def with_a(base: Params, factors: Params) -> Params:
    """`base` with the leaves of `factors`, {block: {name: {"a": [L, in, R]}}}, beside its kernels."""
    changed = {block: base["layers"][block] for block in factors}
    both = each_layer(lambda block, name, leaves: {**leaves, **factors[block].get(name, {})}, changed)
    return {**base, "layers": {**base["layers"], **both}}


def complete(bank: Params, base: Params) -> Params:
    """A bank of pairs {"a" [K, L, in, R], "b"} from one of B alone, with A of the base; others stay."""

    def pair(block: str, name: str, factors: Params) -> Params:
        if "a" in factors:
            return factors
        a = base["layers"][block][name]["a"]
        return {"a": jnp.broadcast_to(a, (len(factors["b"]), *a.shape)), "b": factors["b"]}

    return {"layers": each_layer(pair, bank["layers"])}


def second_factors(bank: Params, base: Params) -> Params:
    """The bank of B alone from one of pairs whose A is that of the base; a bank with any other A as it is, which takes
    the place of that of the base.
    """
    pairs = [
        (factors["a"], base["layers"][block][name].get("a"))
        for block, tree in bank["layers"].items()
        for name, factors in tree.items()
    ]
    if not all(a is not None and bool(jnp.all(own == a)) for own, a in pairs):
        return bank
    return _without_a(bank)


def share(base: Params, bank: Params) -> tuple[Params, Params]:
    """The same policies with A in the base, where all policies of a bank of pairs have one; else both as they are.

    Moving it makes a soup cheaper to compute. Not inside `jax.jit`: it looks at the numbers.
    """
    pairs = [pair for tree in bank["layers"].values() for pair in tree.values()]
    if not all("a" in pair and bool(jnp.all(pair["a"] == pair["a"][:1])) for pair in pairs):
        return base, bank
    first = each_layer(lambda _block, _name, pair: {"a": pair["a"][0]}, bank["layers"])
    return with_a(base, first), _without_a(bank)


def _without_a(bank: Params) -> Params:
    return {"layers": each_layer(lambda _block, _name, factors: {"b": factors["b"]}, bank["layers"])}
