"""What a Hugging Face folder of each model family calls things: one table per `model_type`, for import and export.

A new family is a new `Family` in `FAMILIES`; no code knows a weight by name.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.models.adapters import TARGETS
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params

FUSED = ("query", "key", "value")  # the parts of a fused projection, in the order of all families


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf of our tree and its name on disk; with `{layer}` in `name`, one tensor per layer there, stacked here.

    `part` numbers the third of the tensor that it is, where queries, keys and values are one on disk.
    """

    path: str
    name: str
    transpose: bool = False
    part: int | None = None

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The table of one `model_type`.

    Attributes:
      architecture: class name in `transformers`.
      modules: our module -> theirs; those that a model of ours does not have are passed over.
      fields: our name -> theirs, for the plain values of `ModelConfig`.
      defaults: what `transformers` assumes where config.json is silent (their names).
      fixed: settings our decoder has only one value for (their names); it is also the assumed value where absent.
      switches: our name -> value, for what all models of the family have in common.
      activation: their name of the activation, and `gelu_tanh` what they call that one.
      biases: their flag -> the linear layers that have a bias where it is set.
      rope: "plain", "by_layer_type" (Gemma 3), "neox" (with a share of the head), or "" where config.json says nothing.
      near: (content of config.json, L) -> for each layer whether it has the window, where `layer_types` does not say;
        None for families without windows.
      by_head: a fused projection holds queries, keys and values of one head, then of the next.
      conv1d: kernels lie on disk as [in, out].
      ignored: patterns of tensors that old exports carry and that hold nothing to load.
    """

    architecture: str
    modules: Mapping[str, str]
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activation: str = "hidden_act"
    gelu_tanh: str = "gelu_pytorch_tanh"
    biases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    rope: str = "plain"
    near: Callable[[Mapping[str, Any], int], list[bool]] | None = None
    by_head: bool = False
    conv1d: bool = False
    ignored: tuple[str, ...] = ()

    @functools.cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The weights: of every module a scale or kernel, and a bias, which not all models have."""
        entries = []
        theirs = list(self.modules.values())
        for module, name in self.modules.items():
            kind = module.rpartition("/")[2]
            part = FUSED.index(kind) if theirs.count(name) == len(FUSED) else None
            leaf = "embedding" if kind in ("embed", "position") else "scale" if kind.endswith("norm") else "kernel"
            turned = leaf == "kernel" and (kind == "head" or not self.conv1d)
            entries += [
                Entry(f"{module}/{leaf}", f"{name}.weight", turned, part),
                Entry(f"{module}/bias", f"{name}.bias", False, part),
            ]
        return tuple(entries)

    @property
    def prefix(self) -> str:
        """Of all names but the head's; weights saved without the head lack it."""
        return self.modules["embed"].partition(".")[0] + "."


_LAYER = "model.layers.{layer}."
_MODULES = {
    "embed": "model.embed_tokens",
    "layers/attention_norm": _LAYER + "input_layernorm",
    "layers/attention/query": _LAYER + "self_attn.q_proj",
    "layers/attention/key": _LAYER + "self_attn.k_proj",
    "layers/attention/value": _LAYER + "self_attn.v_proj",
    "layers/attention/output": _LAYER + "self_attn.o_proj",
    "layers/mlp_norm": _LAYER + "post_attention_layernorm",
    "layers/mlp/gate": _LAYER + "mlp.gate_proj",
    "layers/mlp/up": _LAYER + "mlp.up_proj",
    "layers/mlp/down": _LAYER + "mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_QK_NORMS = {
    "layers/attention/query_norm": _LAYER + "self_attn.q_norm",
    "layers/attention/key_norm": _LAYER + "self_attn.k_norm",
}
_OUT_NORMS = {
    "layers/attention_out_norm": _LAYER + "post_attention_layernorm",
    "layers/mlp_norm": _LAYER + "pre_feedforward_layernorm",
    "layers/mlp_out_norm": _LAYER + "post_feedforward_layernorm",
}
_FIELDS = {
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
}
_GEMMA_FIELDS = {"query_scalar": "query_pre_attn_scalar", "logit_softcap": "final_logit_softcapping"}
_GPT_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "max_length": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
_DEFAULTS = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
}
_GEMMA_DEFAULTS = _DEFAULTS | {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GPT_DEFAULTS = {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}
_ATTENTION = ("query", "key", "value", "output")
_GEMMA_SWITCHES = {"norm": "rms_plus_one", "norm_placement": "around", "scale_embeddings": True}


def _near_above(raw: Mapping[str, Any], layers: int) -> list[bool]:
    """Qwen: the layers from `max_window_layers` on."""
    return [bool(raw.get("use_sliding_window")) and i >= raw.get("max_window_layers", 28) for i in range(layers)]


LLAMA = Family(
    architecture="LlamaForCausalLM",
    modules=_MODULES,
    fields=_FIELDS,
    defaults=_DEFAULTS | {"max_position_embeddings": 2048, "mlp_bias": False},
    biases={"attention_bias": _ATTENTION, "mlp_bias": ("gate", "up", "down")},
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
)
MISTRAL = Family(
    architecture="MistralForCausalLM",
    modules=_MODULES,
    fields=_FIELDS,
    defaults=_DEFAULTS | {"max_position_embeddings": 131072, "sliding_window": 4096},
    # `transformers` lets all layers of the type have the window, whatever config.json says of them.
    fixed={"layer_types": None},
    near=lambda raw, layers: [True] * layers,
    ignored=LLAMA.ignored,
)
QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    modules=_MODULES,
    fields=_FIELDS,
    defaults=_DEFAULTS | {"sliding_window": 4096, "use_sliding_window": False},
    switches={"biases": ("query", "key", "value")},
    near=_near_above,
    ignored=LLAMA.ignored,
)
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    modules=_MODULES | _QK_NORMS,
    fields=_FIELDS,
    defaults=QWEN2.defaults | {"head_dim": 128},
    switches={"qk_norm": "head"},
    biases={"attention_bias": _ATTENTION},
    near=_near_above,
)
GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    modules=_MODULES | _OUT_NORMS,
    fields=_FIELDS | _GEMMA_FIELDS | {"attention_softcap": "attn_logit_softcapping"},
    defaults=_GEMMA_DEFAULTS
    | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    fixed={"use_bidirectional_attention": None},
    switches=_GEMMA_SWITCHES,
    activation="hidden_activation",
    biases={"attention_bias": _ATTENTION},
    near=lambda raw, layers: [i % 2 == 0 for i in range(layers)],
    ignored=LLAMA.ignored,
)
GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    modules=_MODULES | _OUT_NORMS | _QK_NORMS,
    fields=_FIELDS | _GEMMA_FIELDS,
    defaults=_GEMMA_DEFAULTS | {"max_position_embeddings": 131072},
    fixed={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    switches=_GEMMA_SWITCHES | {"qk_norm": "head"},
    activation="hidden_activation",
    biases={"attention_bias": _ATTENTION},
    rope="by_layer_type",
    near=lambda raw, layers: [(i + 1) % (raw.get("sliding_window_pattern") or 6) > 0 for i in range(layers)],
)
OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    modules=_MODULES | _OUT_NORMS | _QK_NORMS,
    fields=_FIELDS,
    defaults=_DEFAULTS | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    switches={"norm_placement": "after", "qk_norm": "all"},
    biases={"attention_bias": _ATTENTION},
)
GPT2 = Family(
    architecture="GPT2LMHeadModel",
    modules={
        "embed": "transformer.wte",
        "position": "transformer.wpe",
        "layers/attention_norm": "transformer.h.{layer}.ln_1",
        **{f"layers/attention/{part}": "transformer.h.{layer}.attn.c_attn" for part in FUSED},
        "layers/attention/output": "transformer.h.{layer}.attn.c_proj",
        "layers/mlp_norm": "transformer.h.{layer}.ln_2",
        "layers/mlp/up": "transformer.h.{layer}.mlp.c_fc",
        "layers/mlp/down": "transformer.h.{layer}.mlp.c_proj",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    fields=_GPT_FIELDS,
    defaults=_GPT_DEFAULTS | {"n_positions": 1024, "tie_word_embeddings": True},
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    switches={
        "norm": "layer",
        "positions": "learned",
        "gated": False,
        "biases": (*_ATTENTION, "up", "down"),
    },
    activation="activation_function",
    gelu_tanh="gelu_new",
    rope="",
    conv1d=True,
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
)
GPT_NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    modules={
        "embed": "gpt_neox.embed_in",
        "layers/attention_norm": "gpt_neox.layers.{layer}.input_layernorm",
        **{f"layers/attention/{part}": "gpt_neox.layers.{layer}.attention.query_key_value" for part in FUSED},
        "layers/attention/output": "gpt_neox.layers.{layer}.attention.dense",
        "layers/mlp_norm": "gpt_neox.layers.{layer}.post_attention_layernorm",
        "layers/mlp/up": "gpt_neox.layers.{layer}.mlp.dense_h_to_4h",
        "layers/mlp/down": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    },
    fields={ours: _FIELDS[ours] for ours in _GPT_FIELDS} | {"norm_eps": "layer_norm_eps"},
    defaults={
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "gelu",
        "attention_bias": True,
        "use_parallel_residual": True,
    },
    switches={"norm": "layer", "gated": False, "biases": ("up", "down")},
    gelu_tanh="gelu_new",
    biases={"attention_bias": _ATTENTION},
    rope="neox",
    by_head=True,
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
)
GPTJ = Family(
    architecture="GPTJForCausalLM",
    modules={
        "embed": "transformer.wte",
        "layers/attention_norm": "transformer.h.{layer}.ln_1",
        "layers/attention/query": "transformer.h.{layer}.attn.q_proj",
        "layers/attention/key": "transformer.h.{layer}.attn.k_proj",
        "layers/attention/value": "transformer.h.{layer}.attn.v_proj",
        "layers/attention/output": "transformer.h.{layer}.attn.out_proj",
        "layers/mlp/up": "transformer.h.{layer}.mlp.fc_in",
        "layers/mlp/down": "transformer.h.{layer}.mlp.fc_out",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    fields=_GPT_FIELDS | {"rotary_dim": "rotary_dim"},
    defaults=_GPT_DEFAULTS | {"n_positions": 2048, "rotary_dim": 64, "tie_word_embeddings": False},
    # Its head has a bias, which a tied one cannot have here.
    fixed={"tie_word_embeddings": False},
    switches={
        "norm": "layer",
        "residual": "shared",
        "rotary_interleaved": True,
        "gated": False,
        "biases": ("up", "down", "head"),
    },
    activation="activation_function",
    gelu_tanh="gelu_new",
    rope="",
    ignored=GPT2.ignored,
)

FAMILIES = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "olmo2": OLMO2,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "gptj": GPTJ,
}


def get_family(model_type: str | None, source: Any) -> Family:
    """The table of a `model_type`; UserError naming `source` where there is none."""
    if model_type not in FAMILIES:
        raise UserError(
            f"{source}: model_type {model_type!r} is not supported; use a model of type {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def fused_runs(part: int, width: int, outputs: slice) -> Iterator[slice]:
    """Where a range of the outputs of a part of a fused projection lies in it: in blocks of 3 `width` outputs, the
    `part`-th `width` of each is its own.
    """
    for block in range(outputs.start // width, -(-outputs.stop // width)):
        skipped = (block * (len(FUSED) - 1) + part) * width
        start, stop = max(outputs.start, block * width), min(outputs.stop, (block + 1) * width)
        yield slice(start + skipped, stop + skipped)


def part_runs(family: Family, part: int, outputs: int, head_dim: int) -> Iterator[slice]:
    """Where the `outputs` of a part of a fused projection of a family lie in it."""
    return fused_runs(part, head_dim if family.by_head else outputs, slice(0, outputs))


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one tensor on disk, of shape `shape`, belongs: `leaf[index]` of ours, transposed or not.

    A fused tensor has a slot for each of its parts, see `fused_runs`.
    """

    path: str
    index: int | tuple[()]
    shape: tuple[int, ...]
    transpose: bool
    part: int | None = None
    width: int = 0

    def runs(self, outputs: slice) -> Iterator[slice]:
        """Where our `outputs`, a range of the last axis, lie in the tensor: consecutive runs, in their order."""
        return iter([outputs]) if self.part is None else fused_runs(self.part, self.width, outputs)

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """Our layer, of the whole tensor."""
        tensor = tensor.T if self.transpose else tensor
        if self.part is None:
            return tensor
        runs = self.runs(slice(0, tensor.shape[-1] // len(FUSED)))
        return np.concatenate([tensor[..., run] for run in runs], axis=-1)


def join(slots: tuple[Slot, ...], layers: list[np.ndarray]) -> np.ndarray:
    """The tensor on disk, of our layers for each of its slots; `Slot.take` gives them back."""
    first = slots[0]
    if first.part is None:
        (whole,) = layers
    else:
        whole = np.empty(first.shape[::-1] if first.transpose else first.shape, layers[0].dtype)
        for slot, layer in zip(slots, layers, strict=True):
            start = 0
            for run in slot.runs(slice(0, layer.shape[-1])):
                end = start + run.stop - run.start
                whole[..., run], start = layer[..., start:end], end
    return whole.T if first.transpose else whole


@functools.lru_cache
def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the decoder's parameters by "/"-joined path, asked of the decoder itself."""
    tree = jax.eval_shape(lambda: init_params(Decoder(config), jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def tensor_slots(family: Family, config: ModelConfig) -> dict[str, tuple[Slot, ...]]:
    """Every tensor a folder of this model must hold: name on disk -> its slots, leaf by leaf and layer by layer."""
    shapes = leaf_shapes(config)
    slots: dict[str, tuple[Slot, ...]] = {}
    for entry in family.entries:
        if entry.path not in shapes:  # the head of a tied model
            continue
        shape = shapes[entry.path][1:] if entry.stacked else shapes[entry.path]
        width = (config.head_dim if family.by_head else shape[-1]) if entry.part is not None else 0
        shape = shape if entry.part is None else (*shape[:-1], len(FUSED) * shape[-1])
        shape = shape[::-1] if entry.transpose else shape
        for index in range(config.num_layers) if entry.stacked else [()]:
            slot = Slot(entry.path, index, shape, entry.transpose, entry.part, width)
            name = entry.name.format(layer=index)
            slots[name] = (*slots.get(name, ()), slot)
    return slots


def adapter_modules(family: Family) -> dict[str, tuple[str, ...]]:
    """Their module -> our paths of every linear layer that can carry a low-rank adapter ("layers/attention/query"):
    one path, or those of the parts of a fused projection.
    """
    targets = {f"layers/{block}/{name}" for block, names in TARGETS.items() for name in names}
    found: dict[str, tuple[str, ...]] = {}
    for path, module in family.modules.items():
        if path in targets:
            found[module] = (*found.get(module, ()), path)
    return found


def is_ignorable(family: Family, config: ModelConfig, name: str) -> bool:
    """True for a tensor that may lie in a folder unused: computed buffers, and a tied model's copy of its embedding."""
    tied = [re.escape(e.name) for e in family.entries if config.tie_embeddings and e.path == "head/kernel"]
    return any(re.fullmatch(pattern, name) for pattern in (*family.ignored, *tied))
