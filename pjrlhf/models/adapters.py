"""The adapter bank: K low-rank (LoRA, arXiv 2106.09685) or full-parameter policies over one frozen base.

Every leaf of a bank has the leading axis K, whatever it holds, so ingredient k is `tree_map(lambda x: x[k], bank)`, an optimizer
for K independent policies is `jax.vmap` of one, and a soup is a weighted sum over axis 0.

`mix` rows say which policy an example sees: zeros are the base, one-hot k is ingredient k, anything else is a soup.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pjrlhf.models.decoder import Cache, Decoder

Params = Any
# Projections that carry adapters: every linear layer of the block.
TARGETS = {"attention": ("query", "key", "value", "output"), "mlp": ("gate", "up", "down")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """`rank` 0 means full parameters: the bank then holds K complete parameter trees. `alpha / rank` scales the update."""

    rank: int = 8
    alpha: float = 16.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 1.0


def init_bank(base: Params, adapter: AdapterConfig, count: int, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """A bank of `count` policies, all equal to the base.

    LoRA: `a` [K, L, in, R] ~ N(0, 1/in), the same for all K (one shared key, which is what makes averaging factors across
    ingredients meaningful, arXiv 2310.11564), and `b` [K, L, R, out] zero. Full parameters: K copies of `base`.
    """
    if not adapter.rank:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)).astype(dtype), base)
    bank: dict[str, dict[str, Any]] = {}
    for block, names in TARGETS.items():
        bank[block] = {}
        for i, name in enumerate(names):
            depth, inputs, outputs = base["layers"][block][name]["kernel"].shape
            draw = jax.random.normal(jax.random.fold_in(key, 100 * len(bank) + i), (depth, inputs, adapter.rank))
            bank[block][name] = {
                "a": jnp.broadcast_to(draw * inputs**-0.5, (count, *draw.shape)).astype(dtype),
                "b": jnp.zeros((count, depth, adapter.rank, outputs), dtype),
            }
    return {"layers": bank}


def is_low_rank(bank: Params) -> bool:
    """True for a LoRA bank, False for stacked full parameters."""
    return "embed" not in bank


def bank_size(bank: Params) -> int:
    """K."""
    return jax.tree.leaves(bank)[0].shape[0]


def mixed_params(base: Params | None, bank: Params, mix: jax.Array) -> Params:
    """Full-parameter soups: base + sum_k mix[g, k] (theta_k - base) for every row of `mix` [G, K]; leaves [G, ...].

    With `base` None the rows of `mix` must sum to 1. A one-hot row returns theta_k exactly, a zero row the base exactly.
    """
    rest = 1.0 - mix.sum(1)

    def one(theta, origin):
        soup = jnp.tensordot(mix.astype(theta.dtype), theta, axes=1)
        if origin is None:
            return soup
        return soup + rest.reshape(-1, *[1] * origin.ndim).astype(theta.dtype) * origin.astype(theta.dtype)

    if base is None:
        return jax.tree.map(lambda theta: one(theta, None), bank)
    return jax.tree.map(one, bank, base)


def bind(
    model: Decoder, adapter: AdapterConfig, base: Params | None, bank: Params | None, mix: jax.Array | None
) -> Callable[..., tuple[jax.Array, Cache | None]]:
    """The policies named by `mix` as one function `(tokens, valid, cache=None, offset=0) -> (hidden, cache)`.

    Args:
      model, adapter: static description.
      base: parameter tree of the frozen base; may be None for a full-parameter bank whose `mix` rows sum to 1.
      bank: adapter bank, or None for the base alone.
      mix: float [G, K], or None for the base alone; examples come in G equal consecutive groups of B / G, and group g uses
        `mix[g]`. G = B gives every example its own row. A full-parameter bank materialises G parameter trees: keep G small.

    The returned function takes what `Decoder.__call__` takes and raises ValueError where B is no multiple of G.
    """
    if bank is None or mix is None:
        return lambda tokens, valid, cache=None, offset=0: model.apply(
            {"params": base}, tokens, valid, cache=cache, offset=offset
        )
    G = mix.shape[0]
    low_rank = is_low_rank(bank)
    params = None if low_rank else mixed_params(base, bank, mix)

    def run(tokens, valid, cache=None, offset=0):
        B = tokens.shape[0]
        if B % G:
            raise ValueError(f"{B} examples cannot be split into {G} equal groups, one per row of mix")
        if low_rank:
            rows = jnp.repeat(mix * adapter.scale, B // G, axis=0, total_repeat_length=B)
            variables = {"params": base, "adapters": bank}
            return model.apply(variables, tokens, valid, mix=rows, cache=cache, offset=offset)

        def group(params, tokens, valid, cache):
            return model.apply({"params": params}, tokens, valid, cache=cache, offset=offset)

        # Cache leaves are [L, B, ...]: their batch axis is 1.
        if cache is not None:
            cache = jax.tree.map(lambda x: x.reshape(x.shape[0], G, B // G, *x.shape[2:]), cache)
        hidden, cache = jax.vmap(group, in_axes=(0, 0, 0, 1), out_axes=(0, 1))(
            params, tokens.reshape(G, B // G, -1), valid.reshape(G, B // G, -1), cache
        )
        if cache is not None:
            cache = jax.tree.map(lambda x: x.reshape(x.shape[0], B, *x.shape[3:]), cache)
        return hidden.reshape(B, *hidden.shape[2:]), cache

    return run
