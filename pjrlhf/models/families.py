"""Names of weights and settings in Hugging Face folders: one table per `model_type`, for import and export.

To add a family, add a `Family` to `FAMILIES`; no other code knows a weight by name.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.models.adapters import TARGETS
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params, rope_frequencies
from pjrlhf.models.folders import DTYPES, equal_values
from pjrlhf.types import Params

FLOAT_TYPES = ("F64", *DTYPES)
FUSED = ("query", "key", "value")  # parts of a fused projection, in the order that all families use


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf of the parameter tree and its name on disk.

    Attributes:
      path: "/"-joined path of the leaf.
      name: name of the tensor. With `{layer}` in it, one tensor per layer, which the leaf stacks.
      transpose: the tensor on disk is the transpose of the leaf.
      part: index into `FUSED` where queries, keys and values are one tensor on disk, else None.
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
      modules: our module -> theirs; modules that a model does not have are skipped.
      fields: our name -> theirs, for values of `ModelConfig` that are copied.
      defaults: values that `transformers` assumes where config.json has none (their names).
      fixed: settings for which the decoder supports one value only (their names), assumed where absent.
      switches: our name -> value, for switches that are the same in all models of the family.
      activation: their name of the activation setting.
      gelu_tanh: their name of the activation "gelu_tanh".
      biases: their flag -> the linear layers that have a bias where it is set.
      rope: "plain", "by_layer_type" (Gemma 3), "neox" (rotates a fraction of the head), or "" where config.json has no
        settings of rotary embeddings.
      sliding: (content of config.json, L) -> which layers use the sliding window, where `layer_types` is absent; None
        for families without sliding windows.
      by_head: a fused projection stores queries, keys and values head by head.
      conv1d: kernels are stored as [in, out].
      computed: patterns of the names of tensors that old exports contain and that the decoder computes -> a key of
        `COMPUTED`.
      unused: names of tensors of the folder that are not the decoder's.
    """

    architecture: str
    modules: Mapping[str, str]
    fields: Mapping[str, str]
    defaults: dict[str, Any]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activation: str = "hidden_act"
    gelu_tanh: str = "gelu_pytorch_tanh"
    biases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    rope: str = "plain"
    sliding: Callable[[Mapping[str, Any], int], list[bool]] | None = None
    by_head: bool = False
    conv1d: bool = False
    computed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @functools.cached_property
    def entries(self) -> tuple[Entry, ...]:
        """All possible weights: for every module a scale, kernel or embedding, and a bias, which may be absent."""
        entries = []
        theirs = list(self.modules.values())
        for module, name in self.modules.items():
            kind = module.rpartition("/")[2]
            part = FUSED.index(kind) if theirs.count(name) == len(FUSED) else None
            leaf = "embedding" if kind in ("embed", "position") else "scale" if kind.endswith("norm") else "kernel"
            transposed = leaf == "kernel" and (kind == "head" or not self.conv1d)
            entries += [
                Entry(f"{module}/{leaf}", f"{name}.weight", transposed, part),
                Entry(f"{module}/bias", f"{name}.bias", False, part),
            ]
        return tuple(entries)

    @property
    def prefix(self) -> str:
        """Prefix of all names but the head's; folders saved without the head omit it."""
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


def _sliding_above(raw: Mapping[str, Any], layers: int) -> list[bool]:
    """Qwen: layers from `max_window_layers` on use the sliding window."""
    return [bool(raw.get("use_sliding_window")) and i >= raw.get("max_window_layers", 28) for i in range(layers)]


LLAMA = Family(
    architecture="LlamaForCausalLM",
    modules=_MODULES,
    fields=_FIELDS,
    defaults=_DEFAULTS | {"max_position_embeddings": 2048, "mlp_bias": False},
    biases={"attention_bias": _ATTENTION, "mlp_bias": ("gate", "up", "down")},
    computed={r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": "frequencies"},
)
MISTRAL = Family(
    architecture="MistralForCausalLM",
    modules=_MODULES,
    fields=_FIELDS,
    defaults=_DEFAULTS | {"max_position_embeddings": 131072, "sliding_window": 4096},
    # `transformers` gives all layers of a Mistral the window and ignores `layer_types`.
    fixed={"layer_types": None},
    sliding=lambda raw, layers: [True] * layers,
    computed=LLAMA.computed,
)
QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    modules=_MODULES,
    fields=_FIELDS,
    defaults=_DEFAULTS | {"sliding_window": 4096, "use_sliding_window": False},
    switches={"biases": ("query", "key", "value")},
    sliding=_sliding_above,
    computed=LLAMA.computed,
)
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    modules=_MODULES | _QK_NORMS,
    fields=_FIELDS,
    defaults=QWEN2.defaults | {"head_dim": 128},
    switches={"qk_norm": "head"},
    biases={"attention_bias": _ATTENTION},
    sliding=_sliding_above,
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
    sliding=lambda raw, layers: [i % 2 == 0 for i in range(layers)],
    computed=LLAMA.computed,
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
    sliding=lambda raw, layers: [(i + 1) % (raw.get("sliding_window_pattern") or 6) > 0 for i in range(layers)],
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
    computed={r"transformer\.h\.\d+\.attn\.bias": "causal", r"transformer\.h\.\d+\.attn\.masked_bias": "lowest"},
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
    computed={
        r"gpt_neox\.layers\.\d+\.attention\.bias": "causal",
        r"gpt_neox\.layers\.\d+\.attention\.masked_bias": "lowest",
        r"gpt_neox\.layers\.\d+\.attention\.rotary_emb\.inv_freq": "frequencies",
    },
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
    # GPT-J's head has a bias, which the decoder supports for an untied head only.
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
    computed=GPT2.computed,
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


def get_family(model_type: object, source: object) -> Family:
    """The table of a `model_type`.

    Raises:
      UserError: an unknown type; the message names `source`.
    """
    if model_type is None:
        raise UserError(
            f"{source}: has no model_type, so this is no model folder; name one in Hugging Face layout (of a run "
            "directory, sft/model)"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"{source}: model_type {model_type!r} is not supported; use a model of type {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def fused_runs(part: int, width: int, outputs: slice) -> Iterator[slice]:
    """Slices of a fused projection that hold the range `outputs` of its part number `part`, in order.

    The fused projection consists of blocks of 3 `width` outputs: `width` of each part in turn.
    """
    for block in range(outputs.start // width, -(-outputs.stop // width)):
        skipped = (block * (len(FUSED) - 1) + part) * width
        start, stop = max(outputs.start, block * width), min(outputs.stop, (block + 1) * width)
        yield slice(start + skipped, stop + skipped)


def part_runs(family: Family, part: int, outputs: int, head_dim: int) -> Iterator[slice]:
    """Slices of a fused projection of the family that hold all `outputs` of its part number `part`."""
    return fused_runs(part, head_dim if family.by_head else outputs, slice(0, outputs))


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of a tensor on disk, or of one part of a fused tensor, in the parameter tree: `leaf[index]`.

    Attributes:
      path: "/"-joined path of the leaf.
      index: layer of a stacked leaf, else ().
      shape: of the tensor on disk.
      transpose: the tensor is the transpose of `leaf[index]`.
      part, width: see `fused_runs`; `part` is None for a tensor that is not fused.
    """

    path: str
    index: int | tuple[()]
    shape: tuple[int, ...]
    transpose: bool
    part: int | None = None
    width: int = 0

    def runs(self, outputs: slice) -> Iterator[slice]:
        """Slices of the tensor that hold `outputs`, a range of the last axis of `leaf[index]`, in order."""
        return iter([outputs]) if self.part is None else fused_runs(self.part, self.width, outputs)

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """`leaf[index]` from the whole tensor."""
        tensor = tensor.T if self.transpose else tensor
        if self.part is None:
            return tensor
        runs = self.runs(slice(0, tensor.shape[-1] // len(FUSED)))
        return np.concatenate([tensor[..., run] for run in runs], axis=-1)


def join(slots: tuple[Slot, ...], layers: list[np.ndarray]) -> np.ndarray:
    """The tensor on disk from `leaf[index]` of each of its slots; the inverse of `Slot.take`."""
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
    """Shapes of the decoder's parameters by "/"-joined path, from an abstract initialisation."""
    tree = jax.eval_shape(lambda: init_params(Decoder(config), jax.random.key(0)))
    leaves: Params = flax.traverse_util.flatten_dict(tree, sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def tensor_slots(family: Family, config: ModelConfig) -> dict[str, tuple[Slot, ...]]:
    """All tensors that a folder of this model must contain: name on disk -> its slots, by leaf and layer."""
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
    """Linear layers that can carry a low-rank adapter: their module -> our paths ("layers/attention/query").

    A fused projection has the paths of its parts, other modules have one path.
    """
    targets = {f"layers/{block}/{name}" for block, names in TARGETS.items() for name in names}
    found: dict[str, tuple[str, ...]] = {}
    for path, module in family.modules.items():
        if path in targets:
            found[module] = (*found.get(module, ()), path)
    return found


def _are_frequencies(config: ModelConfig, x: np.ndarray) -> bool:
    """Frequencies of the rotary embeddings, with or without scaling: old versions scaled the positions instead."""
    width = config.rotary_dim or config.head_dim
    half = x.dtype.itemsize < 4
    return any(
        x.shape == want.shape and np.allclose(x.astype(np.float32), want, rtol=1e-2 if half else 1e-4, atol=1e-6)
        for scaling in (None, config.rope_scaling)
        for want in [np.asarray(rope_frequencies(width, config.rope_theta, scaling))]
    )


def _is_causal(config: ModelConfig, x: np.ndarray) -> bool:
    """The mask of ones up to the diagonal."""
    square = x.ndim >= 2 and x.shape[-1] == x.shape[-2]
    return square and all((mask == np.tri(len(mask))).all() for mask in x.reshape(-1, *x.shape[-2:]))


def _is_lowest(config: ModelConfig, x: np.ndarray) -> bool:
    """The score of what is masked: so low that its probability is 0."""
    return x.size == 1 and float(x.reshape(())) < -9e3  # -1e4 in bfloat16 is -9984


# Tensors that the decoder computes -> whether (config, tensor) is what it computes.
COMPUTED: Mapping[str, Callable[[ModelConfig, np.ndarray], bool]] = {
    "frequencies": _are_frequencies,
    "causal": _is_causal,
    "lowest": _is_lowest,
}


def is_redundant(family: Family, config: ModelConfig, files: Mapping[str, Any], name: str) -> bool | None:
    """Whether a tensor without a place in the decoder says nothing new: what the decoder computes itself, or a tied
    model's copy of its embedding. None for one that no model of the family has.

    Args:
      files: tensor name -> the open file that holds it, see `folders.open_tensors`.
    """
    if config.tie_embeddings and name == f"{family.modules['head']}.weight":
        embedding = f"{family.modules['embed']}.weight"
        return embedding in files and equal_values(files[name].flat(name), files[embedding].flat(embedding))
    for pattern, kind in family.computed.items():
        if re.fullmatch(pattern, name):
            return COMPUTED[kind](config, files[name].get_tensor(name))
    return None


def check_tensors(
    folder: pathlib.Path, files: Mapping[str, Any], family: Family, config: ModelConfig
) -> dict[str, tuple[Slot, ...]]:
    """The slots of a model's tensors, after a check that `files` hold these and nothing else.

    Args:
      folder: named in messages.
      files: tensor name -> the open file that holds it, see `folders.open_tensors`.

    Raises:
      UserError: a missing, unused or wrongly shaped tensor, or one that is no float, by name.
    """
    slots = tensor_slots(family, config)

    def refuse(names: list[str], complaint: str, remedy: str) -> None:
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{folder}: {names[0]}{more} {complaint}; {remedy}")

    together = "check that config.json and the weights belong together"
    refuse(sorted(slots.keys() - files.keys()), "is missing from the weights", together)
    others = sorted(files.keys() - slots.keys() - {*family.unused})
    redundant = {name: is_redundant(family, config, files, name) for name in others}
    unknown = [name for name, found in redundant.items() if found is None]
    refuse(unknown, "in the weights does not belong to the model", together)
    other = [name for name, found in redundant.items() if not found]
    refuse(other, "is not what a model of this config.json computes there", "correct config.json, or remove the tensor")
    for name, (slot, *_) in slots.items():
        view = files[name].get_slice(name)
        if tuple(view.get_shape()) != slot.shape:
            raise UserError(
                f"{folder}: {name} has shape {tuple(view.get_shape())} but config.json asks for {slot.shape}; "
                "use the config.json that came with the weights"
            )
        if view.get_dtype() not in FLOAT_TYPES:
            raise UserError(f"{folder}: {name} is stored as {view.get_dtype()}; use weights that are not quantised")
    return slots
