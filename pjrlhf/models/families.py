"""What a Hugging Face folder of each model family calls things: one table per `model_type`, for import and export.

A new family is a new `Family` in `FAMILIES`; no code knows a weight by name.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax

from pjrlhf.errors import UserError
from pjrlhf.models.adapters import TARGETS
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf of our tree and its name on disk; with `{layer}` in `name`, one tensor per layer there, stacked here."""

    path: str
    name: str
    transpose: bool = False

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The table of one `model_type`.

    Attributes:
      architecture: class name in `transformers`.
      entries: the weights.
      fields: our name -> theirs, for the plain numbers of `ModelConfig`.
      defaults: what `transformers` assumes where config.json is silent (their names).
      fixed: settings our decoder has only one value for (their names); it is also the assumed value where absent.
      ignored: patterns of tensors that old exports carry and that hold nothing to load.
    """

    architecture: str
    entries: tuple[Entry, ...]
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    ignored: tuple[str, ...] = ()


LLAMA = Family(
    architecture="LlamaForCausalLM",
    entries=(
        Entry("embed/embedding", "model.embed_tokens.weight"),
        Entry("layers/attention_norm/scale", "model.layers.{layer}.input_layernorm.weight"),
        Entry("layers/attention/query/kernel", "model.layers.{layer}.self_attn.q_proj.weight", transpose=True),
        Entry("layers/attention/key/kernel", "model.layers.{layer}.self_attn.k_proj.weight", transpose=True),
        Entry("layers/attention/value/kernel", "model.layers.{layer}.self_attn.v_proj.weight", transpose=True),
        Entry("layers/attention/output/kernel", "model.layers.{layer}.self_attn.o_proj.weight", transpose=True),
        Entry("layers/mlp_norm/scale", "model.layers.{layer}.post_attention_layernorm.weight"),
        Entry("layers/mlp/gate/kernel", "model.layers.{layer}.mlp.gate_proj.weight", transpose=True),
        Entry("layers/mlp/up/kernel", "model.layers.{layer}.mlp.up_proj.weight", transpose=True),
        Entry("layers/mlp/down/kernel", "model.layers.{layer}.mlp.down_proj.weight", transpose=True),
        Entry("final_norm/scale", "model.norm.weight"),
        Entry("head/kernel", "lm_head.weight", transpose=True),
    ),
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "max_length": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
    },
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
)

FAMILIES = {"llama": LLAMA}


def get_family(model_type: str | None, source: Any) -> Family:
    """The table of a `model_type`; UserError naming `source` where there is none."""
    if model_type not in FAMILIES:
        raise UserError(
            f"{source}: model_type {model_type!r} is not supported; use a model of type {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one tensor on disk, of shape `shape`, belongs: `leaf[index]` of ours, transposed or not."""

    path: str
    index: int | tuple[()]
    shape: tuple[int, ...]
    transpose: bool


@functools.lru_cache
def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the decoder's parameters by "/"-joined path, asked of the decoder itself."""
    tree = jax.eval_shape(lambda: init_params(Decoder(config), jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def tensor_slots(family: Family, config: ModelConfig) -> dict[str, Slot]:
    """Every tensor a folder of this model must hold: name on disk -> slot, leaf by leaf and layer by layer."""
    shapes = leaf_shapes(config)
    slots = {}
    for entry in family.entries:
        if entry.path not in shapes:  # the head of a tied model
            continue
        shape = shapes[entry.path][1:] if entry.stacked else shapes[entry.path]
        shape = shape[::-1] if entry.transpose else shape
        for index in range(config.num_layers) if entry.stacked else [()]:
            slots[entry.name.format(layer=index)] = Slot(entry.path, index, shape, entry.transpose)
    return slots


def adapter_modules(family: Family) -> dict[str, str]:
    """Their module -> our path of every linear layer that can carry a low-rank adapter ("layers/attention/query")."""
    targets = {f"layers/{block}/{name}/kernel" for block, names in TARGETS.items() for name in names}
    return {e.name.removesuffix(".weight"): e.path.removesuffix("/kernel") for e in family.entries if e.path in targets}


def is_ignorable(family: Family, config: ModelConfig, name: str) -> bool:
    """True for a tensor that may lie in a folder unused: computed buffers, and a tied model's copy of its embedding."""
    tied = [re.escape(e.name) for e in family.entries if config.tie_embeddings and e.path == "head/kernel"]
    return any(re.fullmatch(pattern, name) for pattern in (*family.ignored, *tied))
