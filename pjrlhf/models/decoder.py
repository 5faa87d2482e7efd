"""The Llama-family decoder in linen, with a bank of low-rank adapters mixed per example.

Shapes: B batch, T tokens, S cache slots, D model width, V vocabulary, L layers, H query heads, G key/value heads,
C head width, F feed-forward width, K adapters, R adapter rank.

The base lives in the collection `params` (layer leaves stacked `[L, ...]`), the bank in `adapters` (leaves `[K, L,
...]`). A linear layer computes `x W + scale * sum_k mix[b, k] x A_k B_k` as one wide low-rank product.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from pjrlhf.errors import UserError
from pjrlhf.models.attention import attend
from pjrlhf.models.config import ModelConfig, RopeScaling

Cache = dict[str, jax.Array]


class Layout(NamedTuple):
    """What stands where in packed rows, int32 [B, T] each, see `data.packing`.

    A token sees those before it of its own segment that are in branch 0 or in its own branch; `owner` numbers the row
    of `mix` and of the user tokens it goes by.
    """

    position: jax.Array
    segment: jax.Array
    branch: jax.Array
    owner: jax.Array

    def mask(self) -> jax.Array:
        """Bool [B, T, T], True where a query may look."""
        segment, branch = self.segment, self.branch
        own = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        real = segment[:, None, :] > 0
        return jnp.tril(own & real & (segment[:, None, :] == segment[:, :, None]))


REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Angular frequencies of rotary embeddings (RoFormer, eq. 15; Llama-3 scaling), float32 [C / 2], radians per
    token.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies
    wavelength = 2 * jnp.pi / frequencies
    turns = scaling.original_max_position / wavelength
    smooth = jnp.clip(
        (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0, 1.0
    )
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def apply_rope(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Rotates `x` [B, T, H, C] by `positions` [B, T]; first and second half of the head form the pairs (Hugging Face
    order).
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Linear(nn.Module):
    """`x W`, plus the mixed low-rank update where a bank is present. Kernel [in, out]; no bias."""

    features: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mix: jax.Array | None) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), self.param_dtype)
        y = x @ kernel.astype(self.dtype)
        if mix is not None and self.has_variable("adapters", "a"):
            a = self.get_variable("adapters", "a").astype(self.dtype)
            b = self.get_variable("adapters", "b").astype(self.dtype)
            mix = mix[:, None] if mix.ndim == 2 else mix
            low = jnp.einsum("btd,kdr->btkr", x, a) * mix[..., None].astype(self.dtype)
            y = y + jnp.einsum("btkr,krf->btf", low, b)
        return y


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv 1910.07467) in float32."""

    epsilon: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class Attention(nn.Module):
    config: ModelConfig
    dtype: Any
    param_dtype: Any
    implementation: str

    @nn.compact
    def __call__(self, x, positions, mask, mix, cache, offset):
        c = self.config
        B, T, _ = x.shape

        def linear(name, features):
            return Linear(features, self.dtype, self.param_dtype, name=name)

        query = linear("query", c.num_heads * c.head_dim)(x, mix).reshape(B, T, c.num_heads, c.head_dim)
        key = linear("key", c.num_kv_heads * c.head_dim)(x, mix).reshape(B, T, c.num_kv_heads, c.head_dim)
        value = linear("value", c.num_kv_heads * c.head_dim)(x, mix).reshape(B, T, c.num_kv_heads, c.head_dim)
        frequencies = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        query, key = apply_rope(query, positions, frequencies), apply_rope(key, positions, frequencies)
        if cache is not None:
            cache = {
                "key": jax.lax.dynamic_update_slice_in_dim(cache["key"], key.astype(cache["key"].dtype), offset, 1),
                "value": jax.lax.dynamic_update_slice_in_dim(
                    cache["value"], value.astype(cache["value"].dtype), offset, 1
                ),
            }
            key, value = cache["key"].astype(self.dtype), cache["value"].astype(self.dtype)
        out = attend(query, key, value, mask, self.implementation).reshape(B, T, -1)
        return linear("output", c.hidden_size)(out, mix), cache


def split_rows(x: jax.Array, rows: NamedSharding | None) -> jax.Array:
    """`x` [B, ...] with its rows on the devices that `rows` says, where B divides evenly.

    Without it a compiler that is given split weights may split the sum over D instead, and send activations where it
    should send weights: for an 8B model seven times as many bytes.
    """
    if rows is None or x.shape[0] % math.prod(rows.mesh.shape[axis] for axis in rows.spec[0]):
        return x
    return jax.lax.with_sharding_constraint(x, rows)


class Layer(nn.Module):
    config: ModelConfig
    dtype: Any
    param_dtype: Any
    implementation: str
    rows: NamedSharding | None

    @nn.compact
    def __call__(self, x, cache, positions, mask, mix, offset):
        c = self.config

        def linear(name, features):
            return Linear(features, self.dtype, self.param_dtype, name=name)

        h = RMSNorm(c.norm_eps, self.dtype, self.param_dtype, name="attention_norm")(x)
        attention = Attention(c, self.dtype, self.param_dtype, self.implementation, name="attention")
        h, cache = attention(h, positions, mask, mix, cache, offset)
        x = split_rows(x + h, self.rows)
        h = RMSNorm(c.norm_eps, self.dtype, self.param_dtype, name="mlp_norm")(x)
        h = FeedForward(c, self.dtype, self.param_dtype, name="mlp")(h, mix)
        return split_rows(x + h, self.rows), cache


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202, eq. 6)."""

    config: ModelConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x, mix):
        def linear(name, features):
            return Linear(features, self.dtype, self.param_dtype, name=name)

        gate = linear("gate", self.config.intermediate_size)(x, mix)
        up = linear("up", self.config.intermediate_size)(x, mix)
        return linear("down", self.config.hidden_size)(nn.silu(gate) * up, mix)


class Decoder(nn.Module):
    """Tokens to hidden states; `logits` maps hidden states to the vocabulary, so that callers choose which tokens to
    score.

    Attributes:
      config: dimensions.
      dtype: dtype of activations; norms, softmax and rotary angles are computed in float32.
      param_dtype: dtype of created parameters.
      scan_layers: one compiled layer scanned over L (default), or unrolled; same parameters, same numbers.
      remat: "none", "full" or "dots" (keep matrix products).
      attention: see `pjrlhf.models.attention`.
      user_offset: position of the first user token: 1, after BOS, or 0 for tokenizers without BOS.
      rows: where the rows of a batch live, on several devices.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    attention: str = "auto"
    user_offset: int = 1
    rows: NamedSharding | None = None

    def setup(self):
        c = self.config
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"model.remat={self.remat!r} is unknown; choose one of {', '.join(REMAT_POLICIES)}")
        self.embed = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype)
        layer = Layer
        if self.remat != "none":
            layer = nn.remat(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        # Layers share positions, mask, mix and offset; the cache is consumed and produced one slice per layer.
        layers = nn.scan(
            layer,
            variable_axes={"params": 0, "adapters": 1},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            unroll=1 if self.scan_layers else c.num_layers,
        )
        self.layers = layers(c, self.dtype, self.param_dtype, self.attention, self.rows)
        self.final_norm = RMSNorm(c.norm_eps, self.dtype, self.param_dtype)
        if not c.tie_embeddings:
            self.head = Linear(c.vocab_size, self.dtype, self.param_dtype)

    def __call__(
        self,
        tokens: jax.Array,
        valid: jax.Array,
        *,
        mix: jax.Array | None = None,
        cache: Cache | None = None,
        offset: jax.Array | int = 0,
        user_tokens: jax.Array | None = None,
        layout: Layout | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the decoder.

        Args:
          tokens: int32 [B, T].
          valid: bool [B, S], False on padding. Without a cache S = T; with one, S is the number of cache slots and
          `valid`
            covers the whole cache including the T new tokens, which go to slots offset .. offset + T - 1.
          mix: float [B, K], weights of the adapters per example, [B, T, K] per token, or None for the base alone.
          cache: from `init_cache`, or None.
          offset: int, first slot written; the same for every row (rows differ by left padding).
          user_tokens: float [B, U, D], or None. They replace the embeddings at positions user_offset .. user_offset +
            U - 1, counted from the first valid token, where `users.reserve` makes room for them.
          layout: of packed rows, without a cache; `valid` is then not looked at, and `user_tokens` are [E, U, D], of
            which a token's `owner` has its own.

        Returns:
          hidden: [B, T, D] after the final norm, in `dtype`; the cache with the new keys and values.
        """
        T, S = tokens.shape[1], valid.shape[1]
        if layout is None:
            # A token's position is the number of valid tokens before it, so padding on either side changes nothing.
            positions = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
            positions = jax.lax.dynamic_slice_in_dim(positions, offset, T, axis=1)
            causal = jnp.arange(S)[None, :] <= (offset + jnp.arange(T))[:, None]
            mask = causal[None] & valid[:, None, :]
            owner = jnp.arange(tokens.shape[0])[:, None]
        else:
            positions, mask, owner = layout.position, layout.mask(), layout.owner
        x = self.embed(tokens)
        if user_tokens is not None:
            place = positions - self.user_offset
            own = user_tokens[owner, jnp.clip(place, 0, user_tokens.shape[1] - 1)]
            is_user = (place >= 0) & (place < user_tokens.shape[1])
            x = jnp.where(is_user[..., None], own.astype(x.dtype), x)
        x = split_rows(x, self.rows)
        x, cache = self.layers(x, cache, positions, mask, mix, offset)
        if self.is_initializing() and not self.config.tie_embeddings:
            self.head(x, None)
        return self.final_norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of hidden states [..., D]."""
        if self.config.tie_embeddings:
            return self.embed.attend(hidden).astype(jnp.float32)
        return self.head(hidden, None).astype(jnp.float32)


def init_params(model: Decoder, key: jax.Array) -> Any:
    """Random parameters as a plain dict pytree."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.jit(model.init)(key, tokens, jnp.ones((1, 2), bool))["params"]


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """Empty key/value cache: two arrays [L, B, S, G, C]."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}
