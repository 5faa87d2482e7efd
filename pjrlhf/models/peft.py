"""One LoRA ingredient in the folder format of PEFT, out and in.

An adapter here is an ingredient of a bank, so without the axis K: `{'layers': {'attention': {'query': {'a': [L, in, R],
'b': [L, R, out]}, ...}, ...}}`, and its update of a kernel is `alpha / rank * a[l] @ b[l]`. PEFT stores both factors
transposed.
"""

import json
import pathlib
import re
from typing import Any

import flax.traverse_util
import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.models.families import adapter_modules, get_family
from pjrlhf.models.folders import Folder, new_folder, open_tensors, read_json, write_tensors

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FACTORS = {"a": "lora_A", "b": "lora_B"}
# What an adapter of ours always is: written, and demanded of a folder that states otherwise.
FIXED = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "modules_to_save": None}
# Settings that change the update and must be off; they are not written, for versions of PEFT that do not know them.
OFF = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "layer_replication",
    "lora_bias",
    "rank_pattern",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)


def save_peft(folder: Folder, adapter: Any, rank: int, alpha: float, base_name: str, model_type: str = "llama") -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
      adapter: leaves `a` [L, in, R] and `b` [L, R, out]; modules may be absent.
      rank, alpha: the update is scaled by alpha / rank.
      base_name: folder or hub name of the base model, for whoever loads it.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(adapter, sep="/").items()}
    modules = {
        module: path
        for module, path in adapter_modules(get_family(model_type, folder)).items()
        if f"{path}/a" in leaves
    }
    if unknown := leaves.keys() - {f"{path}/{factor}" for path in modules.values() for factor in FACTORS}:
        raise UserError(f"{folder}: {min(unknown)} has no name in PEFT; export adapters of linear layers only")
    config = {
        **FIXED,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "r": rank,
        "target_modules": sorted(module.rsplit(".", 1)[-1] for module in modules),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    tensors = (
        (f"base_model.model.{module.format(layer=layer)}.{name}.weight", matrix.T)
        for module, path in modules.items()
        for factor, name in FACTORS.items()
        for layer, matrix in enumerate(leaves[f"{path}/{factor}"])
    )
    with new_folder(folder, marker=CONFIG) as work:
        write_tensors(work / WEIGHTS, tensors)
        (work / CONFIG).write_text(json.dumps(config, indent=2))


def load_peft(folder: Folder, model_type: str = "llama") -> tuple[Any, int, float]:
    """(adapter, rank, alpha) of a LoRA folder; leaves float32 numpy arrays.

    With `use_rslora` (arXiv 2312.03732) the update is scaled by alpha / sqrt(rank), so alpha * sqrt(rank) is returned:
    alpha / rank is the factor to apply either way. Raises UserError on anything but plain LoRA on whole linear layers.
    """
    folder = pathlib.Path(folder)
    config = read_json(folder / CONFIG)
    for name, value in {**FIXED, **dict.fromkeys(OFF)}.items():
        if (config.get(name) or value) != value:
            raise UserError(
                f"{folder / CONFIG}: {name}={config[name]!r} is not supported; export the adapter as plain LoRA"
            )
    if missing := [name for name in ("r", "lora_alpha") if not config.get(name)]:
        raise UserError(f"{folder / CONFIG}: the key {missing[0]!r} is missing; export the adapter again")
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    factors = _read_factors(folder, rank, adapter_modules(get_family(model_type, folder)))
    depth = 1 + max((layer for layers in factors.values() for layer in layers), default=-1)
    adapter = {}
    for path in sorted({path.rpartition("/")[0] for path in factors}):
        for factor, name in FACTORS.items():
            layers = factors.get(f"{path}/{factor}", {})
            if absent := sorted(set(range(depth)) - set(layers)):
                raise UserError(
                    f"{folder}: {name} of {path} is missing in layer {absent[0]}; "
                    "adapt every layer of a module, with both factors"
                )
            if len({x.shape for x in layers.values()}) > 1:
                raise UserError(f"{folder}: {name} of {path} differs in shape between layers; export the adapter again")
            adapter[f"{path}/{factor}"] = np.stack([layers[i] for i in range(depth)])
    if not adapter:
        raise UserError(f"{folder}: holds no LoRA matrices; export the adapter again")
    return (
        flax.traverse_util.unflatten_dict(adapter, sep="/"),
        rank,
        alpha * rank**0.5 if config.get("use_rslora") else alpha,
    )


def _read_factors(folder: pathlib.Path, rank: int, modules: dict[str, str]) -> dict[str, dict[int, np.ndarray]]:
    """Our path -> layer -> factor, `a` [in, R] or `b` [R, out]."""
    factors: dict[str, dict[int, np.ndarray]] = {}
    with open_tensors([folder / WEIGHTS]) as files:
        for key in sorted(files):
            match = re.fullmatch(r"base_model\.model\.(.+\.layers)\.(\d+)\.(.+)\.lora_([AB])\.weight", key)
            path = match and modules.get(f"{match[1]}.{{layer}}.{match[3]}")
            if not path:
                raise UserError(
                    f"{folder}: {key} adapts no module of this model; adapt linear layers of the blocks only"
                )
            factor = files[key].get_tensor(key).astype(np.float32).T
            axis = -1 if match[4] == "A" else 0
            if factor.ndim != 2 or factor.shape[axis] != rank:
                raise UserError(
                    f"{folder}: {key} has shape {factor.shape[::-1]}, which is not of rank {rank}; export it again"
                )
            factors.setdefault(f"{path}/{match[4].lower()}", {})[int(match[2])] = factor
    return factors
