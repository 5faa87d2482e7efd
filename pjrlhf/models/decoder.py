"""One decoder in linen for every model family, with a bank of low-rank adapters mixed per example.

Shapes: B batch, T tokens, S cache slots, D model width, V vocabulary, L layers, H query heads, G key/value heads,
C head width, F feed-forward width, K adapters, R adapter rank.

The base lives in the collection `params` (layer leaves stacked `[L, ...]`), the bank in `adapters` (leaves `[K, L,
...]`). A linear layer computes `x W + scale * sum_k mix[b, k] x A_k B_k` as one wide low-rank product.

What families differ in are the switches of `ModelConfig`. Those that differ from layer to layer are arrays [L, ...]
that the scan over layers hands out one by one, so that there is one layer to compile.
"""

import functools
import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from pjrlhf.errors import UserError
from pjrlhf.models.attention import CUDNN_FORWARD, attend, attend_cached, soft_cap
from pjrlhf.models.config import ModelConfig, RopeScaling
from pjrlhf.models.matmul import product, turned_product
from pjrlhf.parallel.activations import move_rows, split_between, split_rows

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


def _products(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """Products with kernels, and what cuDNN's attention returns: that it is made of products is hidden from JAX."""
    if primitive.name == CUDNN_FORWARD:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arguments, **parameters)


REMAT_POLICIES = {"none": None, "full": jax.checkpoint_policies.nothing_saveable, "dots": _products}


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Angular frequencies of rotary embeddings (RoFormer, eq. 15; Llama-3 scaling), float32 [C / 2], radians per
    token; C is `head_dim`, or as much of it as is rotated.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.low_freq_factor is None:
        return frequencies / scaling.factor
    wavelength = 2 * jnp.pi / frequencies
    turns = scaling.original_max_position / wavelength
    smooth = jnp.clip(
        (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0, 1.0
    )
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def apply_rope(x: jax.Array, positions: jax.Array, frequencies: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotates the first channels of `x` [B, T, H, C], two for each of `frequencies`, by `positions` [B, T].

    First and second half of these channels form the pairs (Hugging Face order), or neighbours where `interleaved`.
    """
    rotated = 2 * frequencies.shape[-1]
    if rotated < x.shape[-1]:
        turned = apply_rope(x[..., :rotated], positions, frequencies, interleaved)
        return jnp.concatenate([turned, x[..., rotated:]], axis=-1)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if interleaved:
        first, second = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
        pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return pairs.reshape(x.shape).astype(x.dtype)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def per_layer(config: ModelConfig) -> dict[str, jax.Array] | None:
    """What the layers of a decoder differ in, leaves [L, ...], or None where they are all alike.

    `window` int32 [L], tokens that a layer sees; `frequencies` float32 [L, C / 2], of its rotary embeddings.
    """
    if not config.windows:
        return None
    near = jnp.array(config.windows) > 0
    arrays = {"window": jnp.where(near, jnp.array(config.windows, jnp.int32), jnp.iinfo(jnp.int32).max)}
    if config.local_rope_theta is not None:
        width = config.rotary_dim or config.head_dim
        local = rope_frequencies(width, config.local_rope_theta, None)
        everywhere = rope_frequencies(width, config.rope_theta, config.rope_scaling)
        arrays["frequencies"] = jnp.where(near[:, None], local, everywhere)
    return arrays


def choose_decode(backend: str) -> str:
    """How a decoder on a backend ("cpu", "gpu", "tpu") had best sample, see `Decoder.decode`. TPUs read the layers of a
    scan where they are; elsewhere each would be copied for every token.
    """
    return {"tpu": "scan", "cpu": "turned"}.get(backend, "apart")


class Linear(nn.Module):
    """`x W`, plus the mixed low-rank update where a bank is present. Kernel [in, out], [out, in] where `turned`; bias
    [out] if any. W is the kernel, or its columns times `scale` [out] where that is present, see `models.quantization`.
    Where `unstacked.apart` has joined them, first factors of the bank are further columns of the kernel.
    """

    features: int
    dtype: Any
    param_dtype: Any
    use_bias: bool = False
    turned: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mix: jax.Array | None) -> jax.Array:
        low, b, features = None, None, self.features
        if mix is not None and self.has_variable("adapters", "b"):
            b = self.get_variable("adapters", "b").astype(self.dtype)
            if self.has_variable("adapters", "a"):
                low = jnp.einsum("btd,kdr->btkr", x, self.get_variable("adapters", "a").astype(self.dtype))
            else:
                features += b.shape[0] * b.shape[1]
        shape = (features, x.shape[-1]) if self.turned else (x.shape[-1], features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
        quantized = self.has_variable("params", "scale")
        if not quantized:
            kernel = kernel.astype(self.dtype)
        elif x.shape[1] == 1 and self.path[0] != "layers" and not self.turned:
            # Of layers apart, a compiler would take the conversion out of the loop that samples and keep floats of all
            # of them. On a CPU, where kernels are turned, it may: converting takes longer there than the product.
            x, kernel = jax.lax.optimization_barrier((x, kernel))
        y = turned_product(x, kernel) if self.turned else product(x, kernel)
        if quantized:
            y = (y.astype(jnp.float32) * self.get_variable("params", "scale")).astype(self.dtype)
        if b is not None:
            mix = (mix[:, None] if mix.ndim == 2 else mix).astype(self.dtype)
            if low is None:
                y, low = jnp.split(y, [self.features], axis=-1)
                y = y + (low * jnp.repeat(mix, b.shape[1], axis=-1)) @ b.reshape(-1, self.features)
            else:
                y = y + jnp.einsum("btkr,krf->btf", low * mix[..., None], b)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(self.dtype)
        return y


def project(module: nn.Module, sizes: dict[str, int], x: jax.Array, mix: jax.Array | None) -> list[jax.Array]:
    """The linear layers of a block that read `x`, name -> features; by one product where `unstacked.apart` has joined
    them.
    """

    def linear(features, *names):
        biased = bool(set(names) & set(module.config.biases))
        return Linear(features, module.dtype, module.param_dtype, biased, module.turned, name="_".join(names))(x, mix)

    if module.has_variable("params", "_".join(sizes)):
        ends = list(itertools.accumulate(sizes.values()))
        return jnp.split(linear(ends[-1], *sizes), ends[:-1], axis=-1)
    return [linear(features, name) for name, features in sizes.items()]


class Norm(nn.Module):
    """Normalisation of the last axis in float32: root-mean-square (arXiv 1910.07467), or LayerNorm (arXiv 1607.06450)
    with a bias; `kind` is the `norm` of `ModelConfig`.
    """

    kind: str
    epsilon: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.zeros if self.kind == "rms_plus_one" else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        if self.kind == "rms":
            return x.astype(self.dtype) * scale.astype(self.dtype)
        # As their authors have it, these two are rounded at the end alone.
        scale = scale.astype(jnp.float32)
        if self.kind == "rms_plus_one":
            return (x * (1.0 + scale)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return (x * scale + bias.astype(jnp.float32)).astype(self.dtype)


ACTIVATIONS = {"silu": nn.silu, "gelu": functools.partial(nn.gelu, approximate=False), "gelu_tanh": nn.gelu}


def _like(x: jax.Array, other: jax.Array) -> jax.Array:
    return x.astype(other.dtype).reshape(*[1] * (other.ndim - x.ndim), *x.shape)


class Attention(nn.Module):
    config: ModelConfig
    dtype: Any
    param_dtype: Any
    implementation: str
    rows: NamedSharding | None
    turned: bool

    @nn.compact
    def __call__(self, x, positions, mask, mix, cache, offset, layer, own):
        c = self.config
        B, T, _ = x.shape
        between = split_between(x.shape, self.rows)

        groups = c.num_kv_heads * c.head_dim
        query, key, value = project(self, {"query": c.num_heads * c.head_dim, "key": groups, "value": groups}, x, mix)

        def heads(name, y, normed=""):
            y = move_rows(y, between, self.rows)
            if normed == "head":
                y = y.reshape(B, T, -1, c.head_dim)
            if normed:
                y = Norm(c.norm, c.norm_eps, self.dtype, self.param_dtype, name=f"{name}_norm")(y)
            return y.reshape(B, T, -1, c.head_dim)

        query, key, value = heads("query", query, c.qk_norm), heads("key", key, c.qk_norm), heads("value", value)
        if c.positions == "rotary":
            if own and "frequencies" in own:
                frequencies = own["frequencies"]
            else:
                frequencies = rope_frequencies(c.rotary_dim or c.head_dim, c.rope_theta, c.rope_scaling)
            query = apply_rope(query, positions, frequencies, c.rotary_interleaved)
            key = apply_rope(key, positions, frequencies, c.rotary_interleaved)
        if c.query_scalar not in (None, c.head_dim):
            query = query * (c.head_dim / c.query_scalar) ** 0.5  # `attend` divides by the root of C
        if own:
            if cache is None:
                distance = positions[:, :, None] - positions[:, None, :]
            else:  # the valid tokens of a row are consecutive, so slots are as far apart as positions
                distance = (offset + jnp.arange(T))[:, None] - jnp.arange(mask.shape[-1])
            mask = mask & (distance < own["window"])
        if cache is not None:
            # Only the new slots of this layer are written: the cache is carried from layer to layer, never copied.
            place = (0, 0, offset, 0) if layer is None else (layer, 0, 0, offset, 0)
            cache = {
                name: jax.lax.dynamic_update_slice(old, _like(new.swapaxes(1, 2), old), place)
                for name, old, new in (("key", cache["key"], key), ("value", cache["value"], value))
            }
        if cache is None or mask.shape[-1] == T:  # the tokens are all there is to see
            out = attend(query, key, value, mask, self.implementation, c.attention_softcap, self.rows)
        else:
            key, value = cache["key"], cache["value"]
            if layer is not None:
                key, value = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (key, value))
            out = attend_cached(query, key.astype(self.dtype), value.astype(self.dtype), mask, c.attention_softcap)
        out = move_rows(out.reshape(B, T, -1), self.rows, between)
        return project(self, {"output": c.hidden_size}, out, mix)[0], cache


class Layer(nn.Module):
    config: ModelConfig
    dtype: Any
    param_dtype: Any
    implementation: str
    rows: NamedSharding | None
    turned: bool

    @nn.compact
    def __call__(self, carry, own, positions, mask, mix, offset):
        (x, cache), (layer, own), c = carry, own, self.config

        def norm(name, y, wanted):
            return Norm(c.norm, c.norm_eps, self.dtype, self.param_dtype, name=name)(y) if wanted else y

        before, after = c.norm_placement != "after", c.norm_placement != "before"
        h = norm("attention_norm", x, before)
        common = c, self.dtype, self.param_dtype
        attention = Attention(*common, self.implementation, self.rows, self.turned, name="attention")
        mlp = FeedForward(*common, self.turned, name="mlp")
        between = split_between(x.shape, self.rows)
        attended, cache = attention(h, positions, mask, mix, cache, offset, layer, own)
        if c.residual != "sequential":
            h = norm("mlp_norm", x, True) if c.residual == "parallel" else h
            return (split_rows(x + attended + mlp(h, mix), between), cache), None
        x = split_rows(x + norm("attention_out_norm", attended, after), between)
        h = mlp(norm("mlp_norm", x, before), mix)
        return (split_rows(x + norm("mlp_out_norm", h, after), between), cache), None


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, or gated: SwiGLU and its kin (arXiv 2002.05202, eq. 6)."""

    config: ModelConfig
    dtype: Any
    param_dtype: Any
    turned: bool

    @nn.compact
    def __call__(self, x, mix):
        c = self.config

        activation = ACTIVATIONS[c.activation]
        if c.gated:
            gate, up = project(self, {"gate": c.intermediate_size, "up": c.intermediate_size}, x, mix)
            y = activation(gate) * up
        else:
            y = activation(project(self, {"up": c.intermediate_size}, x, mix)[0])
        return project(self, {"down": c.hidden_size}, y, mix)[0]


class Decoder(nn.Module):
    """Tokens to hidden states; `logits` maps hidden states to the vocabulary, so that callers choose which tokens to
    score.

    Attributes:
      config: dimensions.
      dtype: dtype of activations; norms, softmax and rotary angles are computed in float32.
      param_dtype: dtype of created parameters.
      scan_layers: one compiled layer scanned over L (default), or L layers apart, each with arrays of its own
        (`unstacked.apart`); same numbers. A scan copies the parameters of a layer before it uses them, which costs a
        decoder of few rows more than the rest of the step where the compiler does not fuse it (CPU, GPU).
      decode: how to sample: with layers in a "scan", "apart", or apart and their kernels "turned", see
        `unstacked.apart`.
      turned: kernels are [out, in], see `products.turned_product`.
      remat: "none", "full" or "dots" (keep products with kernels and cuDNN's attention).
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
    decode: str = "scan"
    turned: bool = False

    def setup(self):
        c = self.config
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"model.remat={self.remat!r} is unknown; choose one of {', '.join(REMAT_POLICIES)}")
        self.embed = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype)
        layer = Layer
        if self.remat != "none":
            layer = nn.remat(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        if c.positions == "learned":
            self.position = nn.Embed(c.max_length, c.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype)
        if self.scan_layers:
            # Layers share positions, mask, mix and offset and hand on the cache; what they differ in comes one by one.
            layers = nn.scan(
                layer,
                variable_axes={"params": 0, "adapters": 1},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
                length=c.num_layers,
            )
            self.layers = layers(c, self.dtype, self.param_dtype, self.attention, self.rows, self.turned)
        else:
            each = c, self.dtype, self.param_dtype, self.attention, self.rows, self.turned
            self.layers = [layer(*each) for _ in range(c.num_layers)]
        self.final_norm = Norm(c.norm, c.norm_eps, self.dtype, self.param_dtype)
        if not c.tie_embeddings:
            self.head = Linear(c.vocab_size, self.dtype, self.param_dtype, "head" in c.biases, self.turned)

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
          cache: from `init_cache`, or None; of layers apart a list of L such, without that axis.
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
        between = split_between((*tokens.shape, self.config.hidden_size), self.rows)
        x = self.embed(move_rows(tokens, self.rows, between))
        if user_tokens is not None:
            place = positions - self.user_offset
            own = jnp.asarray(user_tokens)[owner, jnp.clip(place, 0, user_tokens.shape[1] - 1)]
            is_user = (place >= 0) & (place < user_tokens.shape[1])
            x = jnp.where(is_user[..., None], own.astype(x.dtype), x)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        if self.config.positions == "learned":
            x = x + self.position(move_rows(positions, self.rows, between))
        x = split_rows(x, between)
        own = per_layer(self.config)
        if self.scan_layers:
            each = jnp.arange(self.config.num_layers), own
            (x, cache), _ = self.layers((x, cache), each, positions, mask, mix, offset)
        else:
            caches = [None] * len(self.layers) if cache is None else list(cache)
            for i, layer in enumerate(self.layers):
                each = None, jax.tree.map(lambda x, i=i: x[i], own)
                (x, caches[i]), _ = layer((x, caches[i]), each, positions, mask, mix, offset)
            cache = cache if cache is None else caches
        if self.is_initializing() and not self.config.tie_embeddings:
            self.head(x, None)
        return self.final_norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of hidden states [..., D]."""
        between = split_between(hidden.shape, self.rows)
        hidden = hidden if between == self.rows else split_rows(hidden, between)
        if not self.config.tie_embeddings:
            logits = self.head(hidden, None)
        else:
            logits = turned_product(hidden, self.embed.embedding.astype(self.dtype))
        logits = move_rows(logits, between, self.rows)
        return soft_cap(logits.astype(jnp.float32), self.config.logit_softcap)


def init_params(model: Decoder, key: jax.Array) -> Any:
    """Random parameters as a plain dict pytree."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.jit(model.init)(key, tokens, jnp.ones((1, 2), bool))["params"]


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """Empty key/value cache: two arrays [L, B, G, S, C]."""
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}
