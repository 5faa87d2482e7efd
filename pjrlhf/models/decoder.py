"""One Flax decoder for every model family, with a bank of low-rank adapters mixed per example.

The collection `params` holds the base (layer leaves stacked `[L, ...]`), `adapters` the bank (leaves `[K, L, ...]`). A
linear layer computes `x W + scale * sum_k mix[b, k] x A_k B_k` as one wide low-rank matmul.

Families differ in the switches of `ModelConfig`. Switches that vary by layer are arrays [L, ...], which the scan over
layers slices, so that one layer is compiled for all.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float, Int, Shaped

from pjrlhf.errors import UserError
from pjrlhf.models.attention import CUDNN_FORWARD, attend, attend_cached, attend_used, soft_cap
from pjrlhf.models.config import ModelConfig, RopeScaling
from pjrlhf.models.matmul import matmul, matmul_transposed
from pjrlhf.models.quantization import quantization_of
from pjrlhf.parallel.activations import constrain_batch, constrain_reshard, layer_sharding
from pjrlhf.types import Array, DType, Params, PRNGKey

# "key" and "value" [L, B, Hkv, M, Dh], or for unrolled layers a list of L dicts without the axis L.
Cache: TypeAlias = dict[str, Array] | list[dict[str, Array]]


class Layout(NamedTuple):
    """Structure of packed rows, see `data.packing`.

    Attributes:
      position: of the token in its sequence.
      segment: sequence group of the token; 0 is padding.
      branch: a token attends to earlier tokens of its segment in branch 0 and in its own branch.
      owner: index of the token's row of `mix` and of its user tokens.
    """

    position: Int[Array, "B T"]
    segment: Int[Array, "B T"]
    branch: Int[Array, "B T"]
    owner: Int[Array, "B T"]

    def mask(self) -> Bool[Array, "B T T"]:
        """Attention mask, True where a query may attend."""
        segment, branch = self.segment, self.branch
        own = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        real = segment[:, None, :] > 0
        return jnp.tril(own & real & (segment[:, None, :] == segment[:, :, None]))


def _save_matmuls(primitive: Primitive, *arguments: object, **parameters: object) -> bool:
    """Remat policy: save matmuls with kernels, and cuDNN attention, which is opaque to JAX and treated as a matmul."""
    if primitive.name == CUDNN_FORWARD:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arguments, **parameters)


REMAT_POLICIES = {"none": None, "full": jax.checkpoint_policies.nothing_saveable, "dots": _save_matmuls}


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Float[Array, " pairs"]:
    """Angular frequencies of rotary embeddings in radians per token (RoFormer, eq. 15; Llama-3 scaling).

    `head_dim` is the number of rotated channels, two for each frequency.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position
    if low is None or high is None or length is None:  # linear: `RopeScaling` allows all three or none
        return frequencies / scaling.factor
    wavelength = 2 * jnp.pi / frequencies
    rotations = length / wavelength
    smooth = jnp.clip((rotations - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def apply_rope(
    x: Float[Array, "B T Hq Dh"],
    positions: Int[Array, "B T"],
    frequencies: Float[Array, " pairs"],
    interleaved: bool = False,
) -> Float[Array, "B T Hq Dh"]:
    """Applies rotary embeddings to the first 2 `pairs` channels of each head.

    Args:
      frequencies: see `rope_frequencies`.
      interleaved: rotate pairs of neighbouring channels rather than channels i and i + pairs (the order of Hugging
        Face).
    """
    rotated = 2 * frequencies.shape[-1]
    if rotated < x.shape[-1]:
        head = apply_rope(x[..., :rotated], positions, frequencies, interleaved)
        return jnp.concatenate([head, x[..., rotated:]], axis=-1)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if interleaved:
        first, second = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
        pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return pairs.reshape(x.shape).astype(x.dtype)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def per_layer(config: ModelConfig) -> dict[str, Array] | None:
    """Settings that vary by layer, leaves [L, ...]; None where all layers are alike.

    Returns:
      `window` int32 [L], tokens that a query may attend to, its own included; and where sliding-window layers have
      another theta, `frequencies` float32 [L, pairs] of the rotary embeddings.
    """
    if not config.windows:
        return None
    sliding = jnp.array(config.windows) > 0
    arrays = {"window": jnp.where(sliding, jnp.array(config.windows, jnp.int32), jnp.iinfo(jnp.int32).max)}
    if config.local_rope_theta is not None:
        width = config.rotary_dim or config.head_dim
        local_frequencies = rope_frequencies(width, config.local_rope_theta, None)
        global_frequencies = rope_frequencies(width, config.rope_theta, config.rope_scaling)
        arrays["frequencies"] = jnp.where(sliding[:, None], local_frequencies, global_frequencies)
    return arrays


def choose_decode(backend: str) -> str:
    """The fastest `Decoder.decode` on a backend ("cpu", "gpu", "tpu").

    On TPUs a scan reads each layer's parameters in place; elsewhere it would copy them for every token.
    """
    return {"tpu": "scan", "cpu": "transposed"}.get(backend, "unrolled")


def row_by_row(apply: Callable[..., Array], *arguments: Array | None) -> Array:
    """`apply(*arguments)`, one row of the batch after the other.

    Rounding depends on the shape of a product. So a prompt that a CPU reads with others keeps the bits it has alone,
    and a kernel is still in the processor's cache when the next row needs it.
    """
    return jax.lax.map(lambda row: apply(*row)[0], jax.tree.map(lambda x: x[:, None], arguments))


class Linear(nn.Module):
    """`x W`, plus the mixed low-rank update where a bank is present.

    The kernel is [in, out], or [out, in] where `transposed`; the optional bias is [out]. Other arrays store a quantised
    kernel (see `quantization`). An A that all policies share is a parameter "a" [in, R] beside the kernel (see
    `shared_a`), and the bank holds B only. In the fused layout of `unrolled.unroll`, the LoRA factors A are appended to
    the kernel as further columns, R where the policies share them and else K R; the bank holds B only.

    With a random stream "dropout", the fraction `dropout` of the inputs of A is dropped, as in PEFT.
    """

    features: int
    dtype: DType
    param_dtype: DType
    use_bias: bool = False
    transposed: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch D"], mix: Float[Array, "*mix K"] | None
    ) -> Float[Array, "*batch {self.features}"]:
        a, b, features = None, None, self.features
        if mix is not None and self.has_variable("adapters", "b"):
            b = self.get_variable("adapters", "b").astype(self.dtype)
            if self.has_variable("adapters", "a"):
                a = self.get_variable("adapters", "a").astype(self.dtype)
            elif self.has_variable("params", "a"):
                a = self.get_variable("params", "a").astype(self.dtype)
            else:
                features = self.get_variable("params", "kernel").shape[0 if self.transposed else -1]
        quantization = quantization_of(self.variables.get("params", {}))
        if quantization is None:
            shape = (features, x.shape[-1]) if self.transposed else (x.shape[-1], features)
            kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype).astype(self.dtype)
            multiply = functools.partial(matmul_transposed if self.transposed else matmul, kernel=kernel)
        else:
            stored = {name: self.get_variable("params", name) for name in quantization.leaves}
            if x.shape[1] == 1 and self.path[0] != "layers" and not self.transposed:
                # Stop XLA from hoisting the conversion of unrolled layers to floats out of the decode loop, which would
                # hold all kernels as floats. On a CPU (transposed kernels) hoisting is right: there the conversion
                # takes longer than the matmul.
                x, stored = jax.lax.optimization_barrier((x, stored))
            multiply = quantization.product(stored, self.dtype, self.transposed)

        def apply(x: Float[Array, "B T D"], mix: Array | None) -> Float[Array, "B T _"]:
            low = None
            if a is not None:
                kept = x
                if self.dropout and self.has_rng("dropout"):
                    keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.dropout, x.shape)
                    kept = jnp.where(keep, x / (1.0 - self.dropout), 0.0).astype(x.dtype)
                low = kept @ a if a.ndim == 2 else jnp.einsum("btd,kdr->btkr", kept, a)
            y = multiply(x)
            if b is not None and mix is not None:
                mix = (mix[:, None] if mix.ndim == 2 else mix).astype(self.dtype)
                if low is None:
                    y, low = jnp.split(y, [self.features], axis=-1)
                if low.ndim == 3:
                    if low.shape[-1] == b.shape[1]:  # of one A for all policies
                        low = jnp.tile(low, b.shape[0])
                    y = y + (low * jnp.repeat(mix, b.shape[1], axis=-1)) @ b.reshape(-1, self.features)
                else:
                    y = y + jnp.einsum("btkr,krf->btf", low * mix[..., None], b)
            return y

        apart = self.transposed and x.ndim == 3 and min(x.shape[:2]) > 1
        y = row_by_row(apply, x, mix) if apart else apply(x, mix)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(self.dtype)
        return y


def project(
    module: "Attention | FeedForward",
    sizes: dict[str, int],
    x: Float[Array, "B T D"],
    mix: Float[Array, "*mix K"] | None,
) -> list[Float[Array, "B T _"]]:
    """Outputs of the linear layers that read `x`, given as name -> features; one matmul where they are fused."""

    def linear(features, *names):
        biased = bool(set(names) & set(module.config.biases))
        settings = features, module.dtype, module.param_dtype, biased, module.transposed, module.dropout
        return Linear(*settings, name="_".join(names))(x, mix)

    if module.has_variable("params", "_".join(sizes)):
        ends = list(itertools.accumulate(sizes.values()))
        return jnp.split(linear(ends[-1], *sizes), ends[:-1], axis=-1)
    return [linear(features, name) for name, features in sizes.items()]


class Norm(nn.Module):
    """Normalisation of the last axis in float32: RMSNorm (arXiv 1910.07467), or LayerNorm (arXiv 1607.06450) with bias.

    `kind` is the `norm` of `ModelConfig`.
    """

    kind: str
    epsilon: float
    dtype: DType
    param_dtype: DType

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        start = nn.initializers.zeros if self.kind == "rms_plus_one" else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        if self.kind == "rms":
            return x.astype(self.dtype) * scale.astype(self.dtype)
        # These two follow their authors in rounding to `dtype` only after scaling.
        scale = scale.astype(jnp.float32)
        if self.kind == "rms_plus_one":
            return (x * (1.0 + scale)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return (x * scale + bias.astype(jnp.float32)).astype(self.dtype)


ACTIVATIONS = {"silu": nn.silu, "gelu": functools.partial(nn.gelu, approximate=False), "gelu_tanh": nn.gelu}


def _columns(offset: Int[Array, ""] | Int[Array, " B"] | int, count: int) -> Int[Array, "*B {count}"]:
    """The cache positions that `count` new tokens take, for each row where `offset` has one per row."""
    return jnp.asarray(offset)[..., None] + jnp.arange(count)


def _write(
    cache: Shaped[Array, "*L B Hkv M Dh"],
    new: Shaped[Array, "B T Hkv Dh"],
    offset: Int[Array, ""] | Int[Array, " B"] | int,
    layer: Int[Array, ""] | None,
) -> Shaped[Array, "*L B Hkv M Dh"]:
    """Writes only the new positions of one layer: the cache is the carry of the scan over layers, updated in place.

    Positions beyond M are dropped where `offset` has one per row.
    """
    new, first = new.astype(cache.dtype), () if layer is None else (layer,)
    if jnp.ndim(offset):
        rows = jnp.arange(len(new))[:, None]
        return cache.at[*first, rows, :, _columns(offset, new.shape[1])].set(new)
    new = new.swapaxes(1, 2).reshape(*[1] * len(first), *new.swapaxes(1, 2).shape)
    return jax.lax.dynamic_update_slice(cache, new, (*first, 0, 0, offset, 0))


class Attention(nn.Module):
    config: ModelConfig
    dtype: DType
    param_dtype: DType
    implementation: str
    batch_sharding: NamedSharding | None
    transposed: bool
    dropout: float

    @nn.compact
    def __call__(self, x, positions, mask, mix, cache, offset, layer, own):
        c = self.config
        B, T, _ = x.shape
        between = layer_sharding(x.shape, self.batch_sharding)

        groups = c.num_kv_heads * c.head_dim
        query, key, value = project(self, {"query": c.num_heads * c.head_dim, "key": groups, "value": groups}, x, mix)

        def heads(name, y, normed=""):
            y = constrain_reshard(y, between, self.batch_sharding)
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
            else:  # valid tokens of a row are consecutive, so differences of cache positions are those of tokens
                distance = _columns(offset, T)[..., None] - jnp.arange(mask.shape[-1])
            mask = mask & (distance < own["window"])
        if cache is not None:
            cache = {name: _write(cache[name], new, offset, layer) for name, new in (("key", key), ("value", value))}
        if cache is None or mask.shape[-1] == T:  # keys are those of the tokens themselves

            def over_tokens(query, key, value, mask):
                return attend(query, key, value, mask, self.implementation, c.attention_softcap, self.batch_sharding)

            apart = self.transposed and min(B, T) > 1
            out = (functools.partial(row_by_row, over_tokens) if apart else over_tokens)(query, key, value, mask)
        else:
            key, value = cache["key"], cache["value"]
            if layer is not None:
                key, value = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (key, value))
            # Rows of a server differ in length, and a CPU gains by reading no more than the longest needs.
            ragged = self.implementation == "blocks" and jnp.ndim(offset) > 0
            over_cache = attend_used if ragged else attend_cached
            out = over_cache(query, key.astype(self.dtype), value.astype(self.dtype), mask, c.attention_softcap)
        out = constrain_reshard(out.reshape(B, T, -1), self.batch_sharding, between)
        return project(self, {"output": c.hidden_size}, out, mix)[0], cache


class Layer(nn.Module):
    config: ModelConfig
    dtype: DType
    param_dtype: DType
    implementation: str
    batch_sharding: NamedSharding | None
    transposed: bool
    dropout: float

    @nn.compact
    def __call__(self, carry, own, positions, mask, mix, offset):
        (x, cache), (layer, own), c = carry, own, self.config

        def norm(name, y, wanted):
            return Norm(c.norm, c.norm_eps, self.dtype, self.param_dtype, name=name)(y) if wanted else y

        before, after = c.norm_placement != "after", c.norm_placement != "before"
        h = norm("attention_norm", x, before)
        common = c, self.dtype, self.param_dtype
        last = self.transposed, self.dropout
        attention = Attention(*common, self.implementation, self.batch_sharding, *last, name="attention")
        mlp = FeedForward(*common, *last, name="mlp")
        between = layer_sharding(x.shape, self.batch_sharding)
        attended, cache = attention(h, positions, mask, mix, cache, offset, layer, own)
        if c.residual != "sequential":
            h = norm("mlp_norm", x, True) if c.residual == "parallel" else h
            return (constrain_batch(x + attended + mlp(h, mix), between), cache), None
        x = constrain_batch(x + norm("attention_out_norm", attended, after), between)
        h = mlp(norm("mlp_norm", x, before), mix)
        return (constrain_batch(x + norm("mlp_out_norm", h, after), between), cache), None


class FeedForward(nn.Module):
    """Two linear layers with an activation in between, or a gated one such as SwiGLU (arXiv 2002.05202, eq. 6)."""

    config: ModelConfig
    dtype: DType
    param_dtype: DType
    transposed: bool
    dropout: float

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
    """Maps tokens to hidden states; `logits` maps hidden states to the vocabulary for the tokens that callers choose.

    Attributes:
      config: dimensions and switches.
      dtype: dtype of activations; norms, softmax and rotary angles are computed in float32.
      param_dtype: dtype of created parameters.
      scan_layers: scan one compiled layer over L (default), or unroll L layers with parameters of their own (see
        `unrolled.unroll`). The numbers are the same. A scan copies a layer's parameters before it uses them; on CPU and
        GPU, where XLA does not fuse that copy, it costs more than the rest of a decode step with few rows.
      decode: layout for sampling: "scan", "unrolled", or "transposed" (unrolled with kernels [out, in]).
      transposed: kernels are [out, in], see `matmul.matmul_transposed`.
      remat: "none", "full" or "dots" (save matmuls with kernels and cuDNN attention).
      attention: implementation, see `attention.choose`.
      user_offset: position of the first user token: 1, after BOS, or 0 for tokenizers without BOS.
      batch_sharding: sharding of the batch axis over several devices, None on one.
    """

    config: ModelConfig
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    attention: str = "auto"
    user_offset: int = 1
    batch_sharding: NamedSharding | None = None
    decode: str = "scan"
    transposed: bool = False
    dropout: float = 0.0

    def setup(self):
        c = self.config
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"model.remat={self.remat!r} is unknown; choose one of {', '.join(REMAT_POLICIES)}")
        self.embed = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype)
        common = c, self.dtype, self.param_dtype, self.attention, self.batch_sharding, self.transposed, self.dropout
        layer = Layer
        if self.remat != "none":
            layer = nn.remat(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        if c.positions == "learned":
            self.position = nn.Embed(c.max_length, c.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype)
        if self.scan_layers:
            # Carried: hidden states and cache. Scanned: layer index and per-layer settings. The rest is shared.
            layers = nn.scan(
                layer,
                variable_axes={"params": 0, "adapters": 1},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=c.num_layers,
            )
            self.layers: Any = layers(*common)
        else:
            self.layers = [layer(*common) for _ in range(c.num_layers)]
        self.final_norm = Norm(c.norm, c.norm_eps, self.dtype, self.param_dtype)
        if not c.tie_embeddings:
            self.head = Linear(c.vocab_size, self.dtype, self.param_dtype, "head" in c.biases, self.transposed)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B M"],
        *,
        mix: Float[Array, "B K"] | Float[Array, "B T K"] | None = None,
        cache: Cache | None = None,
        offset: Int[Array, ""] | Int[Array, " B"] | int = 0,
        user_tokens: Float[Array, "O E D"] | None = None,
        personal: Bool[Array, " O"] | None = None,
        layout: Layout | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Runs the decoder.

        Args:
          tokens: token ids.
          valid: False on padding. Without a cache M = T. With a cache M is its length, and `valid` covers the whole
            cache including the T new tokens, which are written to positions offset .. offset + T - 1.
          mix: weights of the adapters per example or per token; None for the base alone.
          cache: from `init_cache`, or None.
          offset: first cache position written; the same for every row (rows differ in left padding), or one per row.
            With one per row, tokens at positions of M or more are not written, and their hidden states mean nothing.
          user_tokens: O = B sets of user tokens, or None. They replace the embeddings at positions user_offset ..
            user_offset + E - 1, counted from the first valid token; `users.reserve` inserts these positions.
          personal: whether a set of user tokens counts; rows of another keep the embeddings of their tokens. None: all.
          layout: of packed rows, without a cache. `valid` is then unused, and `layout.owner` indexes `user_tokens`.

        Returns:
          Hidden states after the final norm, in `dtype`; and the cache with the new keys and values, None without one.
        """
        T, M = tokens.shape[1], valid.shape[1]
        if layout is None:
            # A token's position is the number of valid tokens before it, so padding on either side changes nothing.
            positions = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
            columns = _columns(offset, T)
            if columns.ndim == 1:
                positions = jax.lax.dynamic_slice_in_dim(positions, offset, T, axis=1)
            else:
                positions = jnp.take_along_axis(positions, jnp.minimum(columns, M - 1), axis=1)
            causal = jnp.arange(M) <= columns[..., None]
            mask = causal & valid[:, None, :]
            owner = jnp.arange(tokens.shape[0])[:, None]
        else:
            positions, mask, owner = layout.position, layout.mask(), layout.owner
        between = layer_sharding((*tokens.shape, self.config.hidden_size), self.batch_sharding)
        x = self.embed(constrain_reshard(tokens, self.batch_sharding, between))
        if user_tokens is not None:
            place = positions - self.user_offset
            own = jnp.asarray(user_tokens)[owner, jnp.clip(place, 0, user_tokens.shape[1] - 1)]
            is_user = (place >= 0) & (place < user_tokens.shape[1])
            if personal is not None:
                is_user &= jnp.asarray(personal)[owner]
            x = jnp.where(is_user[..., None], own.astype(x.dtype), x)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        if self.config.positions == "learned":
            x = x + self.position(constrain_reshard(positions, self.batch_sharding, between))
        x = constrain_batch(x, between)
        own = per_layer(self.config)
        if self.scan_layers:
            each = jnp.arange(self.config.num_layers), own
            (x, cache), _ = self.layers((x, cache), each, positions, mask, mix, offset)
        else:
            caches: list[Any] = [None] * len(self.layers) if cache is None else list(cache)
            for i, layer in enumerate(self.layers):
                each = None, jax.tree.map(lambda x, i=i: x[i], own)
                (x, caches[i]), _ = layer((x, caches[i]), each, positions, mask, mix, offset)
            cache = cache if cache is None else caches
        if self.is_initializing() and not self.config.tie_embeddings:
            self.head(x, None)
        return self.final_norm(x), cache

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Float32 logits of hidden states."""
        between = layer_sharding(hidden.shape, self.batch_sharding)
        hidden = hidden if between == self.batch_sharding else constrain_batch(hidden, between)
        if not self.config.tie_embeddings:
            logits = self.head(hidden, None)
        else:
            logits = matmul_transposed(hidden, self.embed.embedding.astype(self.dtype))
        logits = constrain_reshard(logits, between, self.batch_sharding)
        return soft_cap(logits.astype(jnp.float32), self.config.logit_softcap)


def init_params(model: Decoder, key: PRNGKey) -> Params:
    """Random parameters as a plain dict pytree."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.jit(model.init)(key, tokens, jnp.ones((1, 2), bool))["params"]


def init_cache(config: ModelConfig, batch: int, length: int, dtype: DType) -> Cache:
    """Zero key/value cache for B = `batch` rows of M = `length` positions."""
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}
