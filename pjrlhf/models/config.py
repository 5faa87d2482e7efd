"""The shape of a decoder, independent of any file format."""

import dataclasses
import sys

# Numbers of a `ModelConfig` that divide something, or are the base of a power; None is none.
_POSITIVE = ("norm_eps", "rope_theta", "local_rope_theta", "query_scalar", "attention_softcap", "logit_softcap")


def _is_positive(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x <= sys.float_info.max


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings: that of Llama 3 (Llama 3.1 model card), or linear with `factor` alone.

    Llama 3 divides the frequencies of long wavelengths by `factor` and interpolates towards the short ones. Linear
    scaling (arXiv 2306.15595) divides all frequencies by `factor`.
    """

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position: int | None = None

    def __post_init__(self):
        llama3 = (self.low_freq_factor, self.high_freq_factor, self.original_max_position)
        if None in llama3 and any(x is not None for x in llama3):
            raise ValueError(f"{self} is neither linear nor Llama 3 scaling; give factor alone, or all four numbers")
        if not all(_is_positive(x) for x in (self.factor, *llama3) if x is not None):
            raise ValueError(f"{self} holds a number that is not above 0 and finite")
        if self.low_freq_factor is not None and self.low_freq_factor == self.high_freq_factor:
            raise ValueError(f"{self} has no range between low_freq_factor and high_freq_factor")


# Names of the decoder's linear layers that may have a bias.
LINEARS = ("query", "key", "value", "output", "gate", "up", "down", "head")
CHOICES = {
    "activation": ("silu", "gelu", "gelu_tanh"),
    "norm": ("rms", "rms_plus_one", "layer"),
    "norm_placement": ("before", "after", "around"),
    "residual": ("sequential", "parallel", "shared"),
    "qk_norm": ("", "head", "all"),
    "positions": ("rotary", "learned"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Dimensions and switches of a decoder; immutable and hashable, so it can be a static argument of `jax.jit`.

    The defaults of the switches describe a Llama.

    Attributes:
      max_length: maximum sequence length in tokens; with learned positions, the number of rows of their table.
      rope_theta, rope_scaling: base and frequency scaling of the rotary embeddings.
      rotary_dim: number of leading channels of a head that are rotated; None rotates all.
      rotary_interleaved: pair neighbouring channels (GPT-J) rather than the two halves of the rotated part.
      local_rope_theta: `rope_theta` of sliding-window layers, whose frequencies are then unscaled (Gemma 3); None uses
        `rope_theta` and `rope_scaling` for all layers.
      positions: "rotary", or "learned" vectors added to the embeddings (GPT-2).
      windows: attention window of each layer in tokens, the query's own included; 0 is global. () is global everywhere.
      norm: "rms", "rms_plus_one" (scale is 1 + parameter, Gemma) or "layer" (LayerNorm with a bias).
      norm_placement: "before" attention and feed-forward, "after" them (OLMo 2), or "around" (Gemma 2).
      qk_norm: normalise queries and keys per "head", over "all" heads together (OLMo 2), or not at all ("").
      residual: "sequential"; "parallel", where attention and feed-forward read the same input (GPT-NeoX); or "shared",
        parallel with one norm for both (GPT-J).
      activation: "silu", "gelu", or its approximation "gelu_tanh".
      gated: multiply the activation by a second projection (arXiv 2002.05202).
      biases: names of the linear layers with a bias, from `LINEARS`.
      query_scalar: attention scores are divided by its square root; None is `head_dim`.
      attention_softcap, logit_softcap: c of the soft cap c tanh(x / c) on scores and logits; None is uncapped.
      scale_embeddings: multiply embeddings by the square root of `hidden_size`.

    Raises:
      ValueError: dimensions or switches that contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    local_rope_theta: float | None = None
    positions: str = "rotary"
    windows: tuple[int, ...] = ()
    norm: str = "rms"
    norm_placement: str = "before"
    qk_norm: str = ""
    residual: str = "sequential"
    activation: str = "silu"
    gated: bool = True
    biases: tuple[str, ...] = ()
    query_scalar: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    scale_embeddings: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "grouped-query attention needs equal groups"
            )
        for name in _POSITIVE:
            if (value := getattr(self, name)) is not None and not _is_positive(value):
                raise ValueError(f"{name}={value!r} must be a finite number above 0")
        for name in ("tie_embeddings", "gated", "scale_embeddings", "rotary_interleaved"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {choices}")
        if self.positions == "rotary" and (self.rotary_dim is None and self.head_dim % 2):
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings rotate pairs, so it must be even")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise ValueError(
                f"rotary_dim={self.rotary_dim} must be even, above 0 and at most head_dim={self.head_dim}: "
                "rotary embeddings rotate pairs of channels of a head"
            )
        if self.windows and (
            len(self.windows) != self.num_layers or any(type(x) is not int or x < 0 for x in self.windows)
        ):
            raise ValueError(
                f"windows={self.windows} must be one number of tokens for each of {self.num_layers} layers"
            )
        if self.residual != "sequential" and self.norm_placement != "before":
            raise ValueError(f"residual={self.residual!r} needs norm_placement='before'")
        if unknown := set(self.biases) - set(LINEARS):
            raise ValueError(f"biases: there is no linear layer {min(unknown)!r}; choose from {LINEARS}")
        if self.tie_embeddings and "head" in self.biases:
            raise ValueError("biases: a head that is tied to the embedding has none")

    @property
    def essence(self) -> "ModelConfig":
        """The settings that change numbers: the context limits a model only where its positions are learned."""
        return self if self.positions == "learned" else self.replace(max_length=0)

    def replace(self, **changes: object) -> "ModelConfig":
        return dataclasses.replace(self, **changes)
