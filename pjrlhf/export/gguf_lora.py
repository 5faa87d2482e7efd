"""Adapters as GGUF files, which llama.cpp mixes by a scale for each.

llama.cpp rotates neighbouring channels of queries and keys where checkpoints of Llama rotate the halves of a head. So
for that family their rows are permuted, as those of its base are. Fused projections hold all queries, then all keys,
then all values.
"""

import pathlib
from collections.abc import Mapping
from types import ModuleType

import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.export.adapter import soup_factors, uniform
from pjrlhf.export.soup import Source
from pjrlhf.models.folders import all_finite
from pjrlhf.paths import install

# Our families -> llama.cpp's architecture.
ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "olmo2": "OLMO2",
    "gpt2": "GPT2",
    "gpt_neox": "GPTNEOX",
}
PERMUTED = ("llama", "mistral")


def library() -> ModuleType:
    """The package `gguf`.

    Raises:
      UserError: it is not installed.
    """
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name}: is not installed; {install('gguf')}") from error
    return gguf


def check(source: Source) -> None:
    """Raises a UserError for a family that llama.cpp does not have, or without the package `gguf`."""
    if source.model_type not in ARCHITECTURES:
        raise UserError(
            f"--for gguf: llama.cpp has no models of type {source.model_type}; use --for peft or --for merged"
        )
    library()


def file_name(name: str) -> str:
    return f"{name}.gguf"


def write(work: pathlib.Path, source: Source, name: str) -> int:
    """Writes one ingredient with weight 1, float32; returns its rank.

    Raises:
      UserError: a factor is not finite.
    """
    gguf = library()
    modules, rank = uniform(soup_factors(source, source.adapters({name: 1.0})))
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[source.model_type]]
    names = gguf.get_tensor_name_map(architecture, source.config.num_layers)
    file = work / file_name(name)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # alpha over the rank is 1
    try:
        for module, (a, b) in modules.items():
            for layer in range(len(a)):
                place = names.get_name(module.format(layer=layer))
                assert place, module
                tensors = {"lora_a": a[layer].T, "lora_b": _rows(source, module, b[layer].T)}
                for kind, tensor in tensors.items():
                    if not all_finite(tensor):
                        raise UserError(f"{file}: {place}.weight.{kind} would hold NaN or infinity; train it again")
                    writer.add_tensor(f"{place}.weight.{kind}", np.ascontiguousarray(tensor, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return rank


def _rows(source: Source, module: str, b: np.ndarray) -> np.ndarray:
    """The rows of a factor B [out, R] in llama.cpp's order."""
    config, kind = source.config, module.rpartition(".")[2]
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(kind)
    if source.model_type in PERMUTED and heads:
        return b.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(b.shape)
    if source.family.by_head and kind == "query_key_value":
        return b.reshape(config.num_heads, 3, config.head_dim, -1).swapaxes(0, 1).reshape(b.shape)
    return b


def command(weights: Mapping[str, float]) -> str:
    """How llama.cpp serves a soup of the files in a folder."""
    scaled = ",".join(f"{file_name(name)}:{weight:g}" for name, weight in weights.items())
    return f"llama-server -m BASE.gguf --lora-scaled {scaled}"
