"""The adapter bank: K low-rank (LoRA, arXiv 2106.09685) or full-parameter policies over one frozen base.

Every leaf of a bank has the leading axis K, whatever it holds, so ingredient k is `tree_map(lambda x: x[k], bank)`,
an optimizer for K independent policies is `jax.vmap` of one, and a soup is a weighted sum over axis 0.

`mix` rows say which policy an example sees: zeros are the base, one-hot k is ingredient k, anything else is a soup.
"""

import copy
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from pjrlhf.errors import UserError
from pjrlhf.models.decoder import Cache, Decoder, Layout
from pjrlhf.models.quantization import refuse_quantized
from pjrlhf.models.unrolled import TOGETHER, apart
from pjrlhf.models.users import reserve

Params = Any
# Projections that carry adapters: every linear layer of the block; "gate" only where the feed-forward has one.
TARGETS = {block: tuple(itertools.chain(*groups)) for block, groups in TOGETHER.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """`rank` 0 means full parameters: the bank then holds K complete parameter trees. `alpha / rank` scales the
    update; `dtype` is that of the trained parameters and so of what an optimizer remembers of them.
    """

    rank: int = 8
    alpha: float = 16.0
    dtype: str = "float32"

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"adapter.dtype {self.dtype!r}: unknown; choose float32 or bfloat16")

    @classmethod
    def of(cls, section: Any) -> "AdapterConfig":
        """From a section of a config."""
        return cls(rank=section.rank, alpha=float(section.alpha), dtype=section.get("dtype", "float32"))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 1.0


def init_bank(base: Params, adapter: AdapterConfig, count: int, key: jax.Array) -> Params:
    """A bank of `count` policies, all equal to the base.

    LoRA: `a` [K, L, in, R] ~ N(0, 1/in), the same for all K (one shared key, which is what makes averaging factors
    across ingredients meaningful, arXiv 2310.11564), and `b` [K, L, R, out] zero. Full parameters: K copies of `base`.
    """
    dtype = jnp.dtype(adapter.dtype)
    if not adapter.rank:
        refuse_quantized(base)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)).astype(dtype), base)
    bank: dict[str, dict[str, Any]] = {}
    for block, names in TARGETS.items():
        bank[block] = {}
        for i, name in enumerate(names):
            if name not in base["layers"][block]:
                continue
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

    With `base` None the rows of `mix` must sum to 1. A one-hot row returns theta_k exactly, a zero row the base
    exactly.
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


def rows_of_copies(rows: jax.Array, copies: int) -> jax.Array:
    """Where the copies of the examples `rows`, int32 [R], are in a batch with so many of each, int32 [R copies]."""
    return (rows[:, None] * copies + jnp.arange(copies)).reshape(-1)


class Policies:
    """The policies named by the rows of `mix`, ready to run: hidden states by a call, logits by `logits`.

    Args:
      model, adapter: static description.
      base: parameter tree of the frozen base; may be None for a full-parameter bank whose `mix` rows sum to 1.
      bank: adapter bank, or None for the base alone.
      mix: float [G, K], or None for the base alone; examples come in G equal consecutive groups of B / G, and group
      g uses
        `mix[g]`. G = B gives every example its own row. A full-parameter bank materialises G parameter trees: keep G
        small.
      user_tokens: float [B, U, D], one set per example, or None. Rows must have room for them: see `reserve`.
    """

    def __init__(
        self,
        model: Decoder,
        adapter: AdapterConfig,
        base: Params | None,
        bank: Params | None,
        mix: jax.Array | None,
        user_tokens: jax.Array | None = None,
    ):
        self.model = model
        self.copies = 1  # rows of the cache per example
        self.user_tokens = user_tokens
        self.groups = 0  # groups of examples with parameters of their own
        self.rows = None
        if bank is None or mix is None:
            self.variables = {"params": base}
        elif is_low_rank(bank):
            self.variables = {"params": base, "adapters": bank}
            self.rows = mix * adapter.scale
        else:
            params = mixed_params(base, bank, mix)
            self.groups = mix.shape[0] if mix.shape[0] > 1 else 0
            self.variables = {"params": params if self.groups else jax.tree.map(lambda x: x[0], params)}

    def apart(self) -> "Policies":
        """The same with the layers of the decoder apart, as `Decoder.decode` has them."""
        found = copy.copy(self)
        turned = self.model.decode == "turned"
        found.model = self.model.clone(scan_layers=False, turned=turned)
        # Joined kernels have no one rule by which devices could share them.
        joined = self.model.rows is None
        found.variables = apart(self.variables, 1 if self.groups else 0, turned, joined, self.model.dtype)
        return found

    @property
    def separable(self) -> bool:
        """Whether `take` can: groups have equally many rows, and devices a part of them each."""
        return not self.groups and self.model.rows is None

    def take(self, rows: jax.Array, count: int) -> "Policies":
        """The same for `rows`, int32 [R], of a batch of `count`."""
        found = copy.copy(self)
        if self.rows is not None:
            found.rows = self._per_example(count)[rows]
        if self.user_tokens is not None:
            found.user_tokens = jnp.asarray(self.user_tokens)[rows]
        return found

    def _per_example(self, count: int) -> jax.Array:
        """The row of `mix` of each of `count` examples."""
        if count % len(self.rows):
            raise ValueError(f"{count} examples cannot be split into {len(self.rows)} equal groups, one per row of mix")
        return jnp.repeat(self.rows, count // len(self.rows), axis=0, total_repeat_length=count)

    def _split(self, x: jax.Array, axis: int = 0) -> jax.Array:
        B = x.shape[axis]
        if B % self.groups:
            raise ValueError(f"{B} examples cannot be split into {self.groups} equal groups, one per row of mix")
        return x.reshape(*x.shape[:axis], self.groups, B // self.groups, *x.shape[axis + 1 :])

    def reserve(self, tokens: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rows [B, S] with slots for the user tokens, as a call takes them: [B, S + U]. Without any, the same rows."""
        if self.user_tokens is None:
            return tokens, valid
        return reserve(tokens, valid, self.user_tokens.shape[1], self.model.user_offset)

    def __call__(
        self,
        tokens: jax.Array,
        valid: jax.Array,
        cache: Cache | None = None,
        offset: jax.Array | int = 0,
        layout: Layout | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states [B, T, D] and the cache; arguments as in `Decoder.__call__`.

        With a `layout` its `owner` chooses among the rows of `mix`, where there are several, and `user_tokens`; groups
        of a full-parameter bank stay groups of rows. ValueError where B is no multiple of G.
        """
        B = tokens.shape[0]
        if not self.groups:
            rows = None
            if self.rows is not None and layout is not None and len(self.rows) > 1:
                rows = self.rows[layout.owner]
            elif self.rows is not None:
                rows = self._per_example(B)
            return self.model.apply(
                self.variables,
                tokens,
                valid,
                mix=rows,
                cache=cache,
                offset=offset,
                user_tokens=self.user_tokens,
                layout=layout,
            )

        # Groups are what is gone through; their rows are not those of the batch.
        loop = cache is None and self.model.attention == "blocks"
        # Neither a fused kernel nor a loop over blocks takes the masks of several groups at once.
        instead = {} if loop else {"cudnn": "xla", "splash": "xla", "blocks": "einsum", "auto": "einsum"}
        model = self.model.clone(rows=None, attention=instead.get(self.model.attention, self.model.attention))
        shared = self.user_tokens if layout is not None else None

        def group(variables, tokens, valid, cache, user_tokens, layout):
            user_tokens = user_tokens if shared is None else shared
            return model.apply(
                variables, tokens, valid, cache=cache, offset=offset, user_tokens=user_tokens, layout=layout
            )

        # Cache leaves are [L, B, ...], or [B, ...] of layers apart.
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

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] of hidden states [B, T, D]."""
        if not self.groups:
            return self.model.apply(self.variables, hidden, method="logits")
        model = self.model.clone(rows=None)
        logits = jax.vmap(lambda variables, h: model.apply(variables, h, method="logits"))(
            self.variables, self._split(hidden)
        )
        return logits.reshape(hidden.shape[0], *logits.shape[2:])
