"""The adapter bank: K low-rank (LoRA, arXiv 2106.09685) or full-parameter policies over one frozen base.

Every leaf of a bank has K as its leading axis. So ingredient k is `tree_map(lambda x: x[k], bank)`, an optimizer for K
independent policies is `jax.vmap` of one, and a soup is a weighted sum over axis 0.

A row of `mix` selects the policy of an example: zeros select the base, one-hot k ingredient k, anything else a soup.
"""

import copy
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from pjrlhf.errors import UserError
from pjrlhf.models import shared_a
from pjrlhf.models.decoder import Cache, Decoder, Layout
from pjrlhf.models.quantization import kernel_shape, refuse_quantized
from pjrlhf.models.unrolled import SHARED_INPUTS, unroll
from pjrlhf.models.users import reserve
from pjrlhf.settings import Settings, setting
from pjrlhf.types import Array, Params, PRNGKey

# Linear layers that carry adapters: all of a block; "gate" only in gated feed-forward layers.
TARGETS = {block: tuple(itertools.chain(*groups)) for block, groups in SHARED_INPUTS.items()}
# Our names and those of Llama, which users of PEFT know -> our names.
MODULES = {name: name for names in TARGETS.values() for name in names} | {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig(Settings):
    """Size and dtype of the policies of a bank. Rank 0 means full parameters: the bank holds K parameter trees."""

    rank: int = setting(8, "0 trains full parameters", low=0, high=65536)
    alpha: float = setting(16.0, "alpha / rank scales the update", above=0.0, high=1e6)
    dtype: str = setting("float32", "of what is trained", choices=("float32", "bfloat16"))
    target_modules: tuple[str, ...] = setting(
        (), "linear layers with an adapter, by our names or those of Llama; all where empty", choices=tuple(MODULES)
    )
    dropout: float = setting(
        0.0,
        "fraction of an adapter's inputs that training drops; the policy stage, whose ratios compare equal policies, "
        "refuses it",
        low=0.0,
        below=1.0,
    )
    freeze_a: bool = setting(
        False, "all policies share one frozen first factor, and training moves the second alone: soups keep the rank"
    )

    def check(self) -> None:
        if (self.dropout or self.target_modules or self.freeze_a) and not self.rank:
            raise UserError(
                "rank: 0 trains full parameters, which have no dropout, target_modules or freeze_a; make it 1 or more"
            )

    @property
    def targets(self) -> frozenset[str]:
        """Our names of the linear layers with an adapter."""
        return frozenset(MODULES[name] for name in self.target_modules or MODULES)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 1.0


def init_bank(base: Params, adapter: AdapterConfig, count: int, key: PRNGKey) -> Params:
    """A bank of `count` policies, all equal to the base.

    LoRA: `a` [K, L, in, R] ~ N(0, 1/in) and `b` [K, L, R, out] = 0. All K share one draw of `a`, so that averaging the
    factors across ingredients is meaningful (arXiv 2310.11564); with `freeze_a`, `b` alone (see `shared_a`). Full
    parameters: K copies of `base`.

    Raises:
      UserError: full parameters over a quantised base, or no layer to adapt.
    """
    if not adapter.rank:
        refuse_quantized(base)
        dtype = jnp.dtype(adapter.dtype)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)).astype(dtype), base)
    layers = base["layers"]
    shapes = tuple(
        (block, name, 100 * i + j, kernel_shape(layers[block][name]))
        for i, (block, names) in enumerate(TARGETS.items(), 1)
        for j, name in enumerate(names)
        if name in layers[block] and name in adapter.targets
    )
    if not shapes:
        raise UserError(f"adapter.target_modules: the model has no layer {', '.join(adapter.target_modules)}; add some")
    return {"layers": _factors(shapes, adapter, count, key)}


# One program, where each operation on each shape would be one.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _factors(
    shapes: tuple[tuple[str, str, int, tuple[int, ...]], ...], adapter: AdapterConfig, count: int, key: PRNGKey
) -> Params:
    """The factors of `init_bank`, of layers (block, name, number of the draw, shape of the kernel)."""
    dtype = jnp.dtype(adapter.dtype)
    bank: Params = {}
    for block, name, number, (depth, inputs, outputs) in shapes:
        factors = {"b": jnp.zeros((count, depth, adapter.rank, outputs), dtype)}
        if not adapter.freeze_a:
            draw = jax.random.normal(jax.random.fold_in(key, number), (depth, inputs, adapter.rank))
            factors["a"] = jnp.broadcast_to(draw * inputs**-0.5, (count, *draw.shape)).astype(dtype)
        bank.setdefault(block, {})[name] = factors
    return bank


def frozen_factors(base: Params, adapter: AdapterConfig) -> Params:
    """The A that all policies of `base` share with `adapter.freeze_a`: {block: {name: {"a": [L, in, R]}}} of numpy."""

    def factor(block: str, name: str, _: Params) -> Params:
        depth, inputs = kernel_shape(base["layers"][block][name])[:2]
        return {"a": shared_a.draw(f"{block}/{name}", (depth, inputs, adapter.rank), adapter.dtype)}

    bank = jax.eval_shape(lambda base: init_bank(base, adapter, 1, jax.random.key(0)), base)
    return shared_a.each_layer(factor, bank["layers"])


def is_low_rank(bank: Params) -> bool:
    """True for a LoRA bank, False for stacked full parameters."""
    return "embed" not in bank


def bank_size(bank: Params) -> int:
    """K."""
    return jax.tree.leaves(bank)[0].shape[0]


def mixed_params(base: Params | None, bank: Params, mix: Float[Array, "G K"]) -> Params:
    """Full-parameter soups: base + sum_k mix[g, k] (theta_k - base) for every row g of `mix`; leaves [G, ...].

    A one-hot row gives exactly theta_k and a zero row exactly the base. With `base` None, rows of `mix` must sum to 1.
    """
    rest = 1.0 - mix.sum(1)

    def one(theta, origin):
        soup = jnp.tensordot(mix.astype(theta.dtype), theta, axes=1)
        if origin is None:
            return soup
        return soup + rest.reshape(-1, *[1] * origin.ndim).astype(theta.dtype) * origin.astype(theta.dtype)

    if base is None:
        return jax.tree.map(lambda theta: one(theta, None), bank)
    refuse_quantized(base)
    return jax.tree.map(one, bank, base)


def copy_indices(rows: Int[Array, " C"], copies: int) -> Int[Array, " C*{copies}"]:
    """Indices of the cache rows of the examples `rows`; an example has `copies` consecutive cache rows."""
    return (rows[:, None] * copies + jnp.arange(copies)).reshape(-1)


def _apply(model: Decoder, variables: Params, *arguments: Array, **options: Any) -> Any:
    """`model.apply` without mutable collections, whose result is that of the method alone."""
    return model.apply(variables, *arguments, **options)


class Policies:
    """The policies selected by the rows of `mix`: a call gives hidden states, `logits` maps these to the vocabulary.

    Args:
      model, adapter: static description.
      base: parameter tree of the frozen base; may be None for a full-parameter bank whose `mix` rows sum to 1.
      bank: adapter bank, or None for the base alone.
      mix: one row per group, or None for the base alone. The batch consists of G consecutive groups of B / G examples,
      and
        group g uses `mix[g]`; G = B gives every example a row of its own. A full-parameter bank materialises G
        parameter trees: keep G small.
      user_tokens: one set per example, or per owner of packed rows, or None. Rows need positions for them, see
        `reserve`.
      dropout_key: draws what the adapters drop of their inputs, see `AdapterConfig.dropout`; None drops nothing.
      personal: whether the rows of `user_tokens` count; the example of another row has none, and no positions for them.
        None: all count.

    Attributes:
      copies: rows of the cache per example.
      groups: number of groups with parameters of their own, 0 where all examples share theirs.
      scaled_mix: [G, K], `mix` times the scale of the adapters, or None without low-rank adapters.
      variables: of the decoder; leaves of "params" are [groups, ...] where `groups` > 0.
    """

    def __init__(
        self,
        model: Decoder,
        adapter: AdapterConfig,
        base: Params | None,
        bank: Params | None,
        mix: Float[Array, "G K"] | None,
        user_tokens: Float[Array, "O E D"] | None = None,
        dropout_key: PRNGKey | None = None,
        personal: Bool[Array, " O"] | None = None,
    ):
        self.model = model
        self.rngs = {}
        if dropout_key is not None and adapter.dropout:
            self.model, self.rngs = model.clone(dropout=adapter.dropout), {"dropout": dropout_key}
        self.copies = 1
        self.user_tokens, self.personal = user_tokens, personal
        self.groups = 0
        self.scaled_mix = None
        self.variables: Params
        if bank is None or mix is None:
            self.variables = {"params": base}
        elif is_low_rank(bank):
            self.variables = {"params": base, "adapters": bank}
            self.scaled_mix = mix * adapter.scale
        else:
            params = mixed_params(base, bank, mix)
            self.groups = mix.shape[0] if mix.shape[0] > 1 else 0
            self.variables = {"params": params if self.groups else jax.tree.map(lambda x: x[0], params)}

    def unroll(self) -> "Policies":
        """The same policies with the layers of the decoder unrolled, in the layout that `Decoder.decode` names."""
        policies = copy.copy(self)
        transposed = self.model.decode == "transposed"
        policies.model = self.model.clone(scan_layers=False, transposed=transposed)
        # No partition rule fits a fused kernel.
        fused = self.model.batch_sharding is None
        policies.variables = unroll(self.variables, 1 if self.groups else 0, transposed, fused, self.model.dtype)
        return policies

    @property
    def selectable(self) -> bool:
        """Whether `select` is supported: groups need equal numbers of rows, and so do devices."""
        return not self.groups and self.model.batch_sharding is None

    def select(self, rows: Int[Array, " C"], count: int) -> "Policies":
        """The policies of the examples `rows` of a batch of `count`."""
        policies = copy.copy(self)
        if self.scaled_mix is not None:
            policies.scaled_mix = self._mix_per_example(self.scaled_mix, count)[rows]
        if self.user_tokens is not None:
            policies.user_tokens = jnp.asarray(self.user_tokens)[rows]
        if self.personal is not None:
            policies.personal = jnp.asarray(self.personal)[rows]
        return policies

    @staticmethod
    def _mix_per_example(mix: Float[Array, "G K"], count: int) -> Float[Array, "{count} K"]:
        """Rows of `mix` repeated for `count` examples."""
        if count % len(mix):
            raise ValueError(f"{count} examples cannot be split into {len(mix)} equal groups, one per row of mix")
        return jnp.repeat(mix, count // len(mix), axis=0, total_repeat_length=count)

    def _split(self, x: Array, axis: int = 0) -> Array:
        """Splits an axis of B rows into [groups, B / groups]."""
        B = x.shape[axis]
        if B % self.groups:
            raise ValueError(f"{B} examples cannot be split into {self.groups} equal groups, one per row of mix")
        return x.reshape(*x.shape[:axis], self.groups, B // self.groups, *x.shape[axis + 1 :])

    def reserve(
        self, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]
    ) -> tuple[Int[Array, "B M"], Bool[Array, "B M"]]:
        """Inserts positions for the user tokens, as a call expects: M = T + E, or T without any."""
        if self.user_tokens is None:
            return tokens, valid
        return reserve(tokens, valid, self.user_tokens.shape[1], self.model.user_offset)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B M"],
        cache: Cache | None = None,
        offset: Int[Array, ""] | Int[Array, " B"] | int = 0,
        layout: Layout | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states and the cache; arguments as in `Decoder.__call__`.

        With a `layout`, `layout.owner` selects each token's row of `mix` (where it has several) and its user tokens.
        Groups of a full-parameter bank stay groups of rows.

        Raises:
          ValueError: B is not a multiple of G, or full parameters with `personal`.
        """
        B = tokens.shape[0]
        if not self.groups:
            mix = self.scaled_mix
            if mix is not None:
                mix = mix[layout.owner] if layout is not None and len(mix) > 1 else self._mix_per_example(mix, B)
            return _apply(
                self.model,
                self.variables,
                tokens,
                valid,
                mix=mix,
                cache=cache,
                offset=offset,
                user_tokens=self.user_tokens,
                personal=self.personal,
                layout=layout,
                rngs=self.rngs,
            )

        if self.personal is not None:
            raise ValueError("personal: rows without user tokens need a low-rank bank")
        # Groups are mapped over, so sharding constraints on batch rows do not apply inside.
        loop = cache is None and self.model.attention == "blocks"
        # Neither a fused kernel nor the loop over blocks supports vmap over masks.
        fallbacks = {} if loop else {"cudnn": "xla", "splash": "xla", "blocks": "einsum", "auto": "einsum"}
        attention = fallbacks.get(self.model.attention, self.model.attention)
        model = self.model.clone(batch_sharding=None, attention=attention)
        shared = self.user_tokens if layout is not None else None

        def group(variables, tokens, valid, cache, user_tokens, layout):
            user_tokens = user_tokens if shared is None else shared
            return _apply(
                model, variables, tokens, valid, cache=cache, offset=offset, user_tokens=user_tokens, layout=layout
            )

        # Cache leaves are [L, B, ...], or [B, ...] per unrolled layer.
        axis = 1 if model.scan_layers else 0
        cache = jax.tree.map(lambda x: self._split(x, axis), cache)
        user_tokens = self._split(self.user_tokens) if self.user_tokens is not None and shared is None else None
        layout = jax.tree.map(self._split, layout)
        groups = self.variables, self._split(tokens), self._split(valid), cache, user_tokens, layout
        if loop:
            hidden, _ = jax.lax.map(lambda one: group(*one), groups)
        else:
            hidden, cache = jax.vmap(group, in_axes=(0, 0, 0, axis, 0, 0), out_axes=(0, axis))(*groups)
        cache = jax.tree.map(lambda x: x.reshape(*x.shape[:axis], B, *x.shape[axis + 2 :]), cache)
        return hidden.reshape(B, *hidden.shape[2:]), cache

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of hidden states."""
        if not self.groups:
            return _apply(self.model, self.variables, hidden, method="logits")
        model = self.model.clone(batch_sharding=None)
        logits = jax.vmap(lambda variables, h: _apply(model, variables, h, method="logits"))(
            self.variables, self._split(hidden)
        )
        return logits.reshape(hidden.shape[0], *logits.shape[2:])


class Backbone(struct.PyTreeNode):
    """A frozen base with its model and the size of its adapters, as one argument of a jitted function.

    Attributes:
      model, adapter: static.
      base: parameters of the frozen base; empty where full parameters are trained without one.
    """

    model: Decoder = struct.field(pytree_node=False)
    adapter: AdapterConfig = struct.field(pytree_node=False)
    base: Params

    def policies(
        self,
        bank: Params | None = None,
        mix: Float[Array, "G K"] | None = None,
        user_tokens: Float[Array, "O E D"] | None = None,
        dropout_key: PRNGKey | None = None,
        personal: Bool[Array, " O"] | None = None,
    ) -> Policies:
        """The policies that rows of `mix` select from `bank`, see `Policies`; the base itself without a bank."""
        return Policies(self.model, self.adapter, self.base, bank, mix, user_tokens, dropout_key, personal)
