"""The shape of a decoder, independent of any file format."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama-3 frequency scaling (Llama 3.1 model card): long wavelengths divided by `factor`, smooth in between.

    With nothing but `factor` it is linear (arXiv 2306.15595): all frequencies are divided by it.
    """

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position: int | None = None

    def __post_init__(self):
        of_llama3 = (self.low_freq_factor, self.high_freq_factor, self.original_max_position)
        if None in of_llama3 and any(x is not None for x in of_llama3):
            raise ValueError(f"{self} is neither linear nor that of Llama 3; give factor alone, or all four numbers")


# Every linear layer that may have a bias, by its name in the decoder.
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

    Switches that are not given make a Llama.

    Attributes:
      max_length: tokens; with learned positions, rows of their table.
      rope_theta, rope_scaling: of the rotary embeddings.
      rotary_dim: how many channels of a head, its first ones, are rotated; None is all of them.
      rotary_interleaved: neighbouring channels form the pairs (GPT-J), not the halves of the rotated part.
      local_rope_theta: theta of the layers with a window, which then have no scaling (Gemma 3); None is `rope_theta`.
      positions: "rotary", or "learned" vectors added to the embeddings (GPT-2).
      windows: per layer, how many of the last tokens it sees, its own included, 0 for all; () where all see all.
      norm: "rms", "rms_plus_one" (scaled by 1 + the parameter, Gemma) or "layer" (with a bias).
      norm_placement: "before" attention and feed-forward, "after" them (OLMo 2), or "around" (Gemma 2).
      qk_norm: "head" normalises queries and keys head by head, "all" over all heads together (OLMo 2); "" does not.
      residual: "sequential", "parallel" (attention and feed-forward read the same input, GPT-NeoX) or "shared"
        (parallel, after one norm for both, GPT-J).
      activation: "silu", "gelu" or its approximation "gelu_tanh".
      gated: the activation is multiplied by a second projection (arXiv 2002.05202).
      biases: names of the linear layers that have one, of `LINEARS`.
      query_scalar: scores are divided by its root; None is `head_dim`.
      attention_softcap, logit_softcap: bounds of scores and logits, c tanh(x / c); None is unbounded.
      scale_embeddings: embeddings are multiplied by the root of `hidden_size`.
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
        if self.windows and (len(self.windows) != self.num_layers or min(self.windows) < 0):
            raise ValueError(
                f"windows={self.windows} must be one number of tokens for each of {self.num_layers} layers"
            )
        if self.residual != "sequential" and self.norm_placement != "before":
            raise ValueError(f"residual={self.residual!r} needs norm_placement='before'")
        if unknown := set(self.biases) - set(LINEARS):
            raise ValueError(f"biases: there is no linear layer {min(unknown)!r}; choose from {LINEARS}")
        if self.tie_embeddings and "head" in self.biases:
            raise ValueError("biases: a head that is tied to the embedding has none")

    def replace(self, **changes: Any) -> "ModelConfig":
        return dataclasses.replace(self, **changes)
