"""Import and export of one LoRA ingredient in PEFT's folder format.

An adapter is an ingredient of a bank without the axis K: `{'layers': {'attention': {'query': {'a': [L, in, R], 'b':
[L, R, out]}, ...}, ...}}`. It adds `alpha / rank * a[l] @ b[l]` to the kernel of layer l. PEFT stores both factors
transposed.

Where queries, keys and values are one module on disk, their three updates become one of rank 3 R without loss: `a` is
concatenated and `b` is block-diagonal. `rank_pattern` and `alpha_pattern` record this.
"""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.models.families import FLOAT_TYPES, Family, adapter_modules, get_family, part_runs
from pjrlhf.models.folders import Folder, all_finite, new_folder, open_tensors, read_json, write_tensors
from pjrlhf.types import Json, Params

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MANIFEST = "manifest.json"  # provenance, next to an adapter or an exported model
FACTORS = {"a": "lora_A", "b": "lora_B"}
# Settings with one supported value: always written, and required where a folder states them.
FIXED = {"peft_type": "LORA", "bias": "none", "modules_to_save": None}
# Settings that change neither the base nor the sum, whatever their value: names, how the adapter was trained, and
# options of initialisations and variants that another setting turns on.
FREE = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
)
# Settings that `load_peft` reads.
READ = (
    "alpha_pattern",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_rslora",
)
# Values of init_lora_weights that leave the base as it is. All others (PiSSA, OLoRA, CorDA, LoftQ, ...) take something
# from the base at the start of training, so that the adapter belongs to what is left.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
CONVERT = (
    "convert it to a plain LoRA with PEFT: model.save_pretrained(FOLDER, "
    "path_initial_model_for_weight_conversion=START), where START is the adapter as saved before training"
)
MERGE = "merge it into its base with PEFT, model.merge_and_unload().save_pretrained(FOLDER), and use this full model"


def save_peft(
    folder: Folder,
    adapter: Params,
    rank: int,
    alpha: float,
    base_name: str | None,
    model_type: str = "llama",
    head_dim: int = 0,
    revision: str | None = None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
      adapter: leaves `a` [L, in, R] and `b` [L, R, out]; modules may be absent.
      rank, alpha: the update is scaled by alpha / rank.
      base_name: folder or hub name of the base model, recorded for loading (of a folder, the absolute path); None where
        it is not known.
      model_type: family of the base.
      head_dim: of the base; needed for families whose projections are fused head by head.
      revision: commit of the base on the hub.

    Raises:
      UserError: a leaf without a name in PEFT, a missing factor, a factor that holds NaN or infinity, an existing
        folder that is no earlier export, or a disk that is full or unwritable.
    """
    modules = module_factors(folder, adapter, model_type, head_dim)
    fused = {name: b.shape[1] // rank for name, (_, b) in modules.items() if b.shape[1] != rank}
    write_peft(folder, modules, rank, alpha, base_name, model_type, revision, fused)


def module_factors(
    folder: Folder, adapter: Params, model_type: str = "llama", head_dim: int = 0
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The factors [L, in, R'] and [L, R', out] of every module on disk, such as "model.layers.{layer}.mlp.up_proj".

    R' is the rank of the adapter; of a fused projection, the sum of the ranks of its three parts.

    Raises:
      UserError: see `save_peft`; the message names `folder`.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(adapter, sep="/").items()}
    family = get_family(model_type, folder)
    modules = {
        module: paths
        for module, paths in adapter_modules(family).items()
        if any(f"{path}/{factor}" in leaves for path in paths for factor in FACTORS)
    }
    wanted = {f"{path}/{factor}" for paths in modules.values() for path in paths for factor in FACTORS}
    if unknown := leaves.keys() - wanted:
        raise UserError(f"{folder}: {min(unknown)} has no name in PEFT; export adapters of linear layers only")
    if missing := wanted - leaves.keys():
        raise UserError(f"{folder}: {min(missing)} is missing; adapt both factors, and all parts of a fused projection")

    def factors(paths: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        a, b = ([leaves[f"{path}/{factor}"] for path in paths] for factor in FACTORS)
        if len(paths) == 1:
            return a[0], b[0]
        depth, rank, outputs = b[0].shape
        wide = np.zeros((depth, len(paths) * rank, len(paths) * outputs), b[0].dtype)
        for part, block in enumerate(b):
            start = 0
            for run in part_runs(family, part, outputs, head_dim):
                end = start + run.stop - run.start
                wide[:, part * rank : (part + 1) * rank, run] = block[..., start:end]
                start = end
        return np.concatenate(a, axis=-1), wide

    return {module: factors(paths) for module, paths in modules.items()}


def write_peft(
    folder: Folder,
    modules: Mapping[str, tuple[np.ndarray, np.ndarray]],
    rank: int,
    alpha: float,
    base_name: str | None,
    model_type: str = "llama",
    revision: str | None = None,
    fused: Mapping[str, int] | None = None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors from factors of modules, see `module_factors`.

    Args:
      rank, alpha, base_name, model_type, revision: see `save_peft`.
      fused: module -> multiple of `rank` that it has; recorded in `rank_pattern` and `alpha_pattern`.

    Raises:
      UserError: see `save_peft`.
    """
    if base_name and pathlib.Path(base_name).is_dir():
        base_name = str(pathlib.Path(base_name).absolute())
    family = get_family(model_type, folder)
    config = {
        **FIXED,
        "base_model_name_or_path": base_name,
        "fan_in_fan_out": family.conv1d,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "r": rank,
        "revision": revision,
        "target_modules": sorted(_target(family, module) for module in modules),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    if fused:
        parts = {_target(family, module): count for module, count in fused.items()}
        config["rank_pattern"] = {target: count * rank for target, count in parts.items()}
        config["alpha_pattern"] = {target: count * alpha for target, count in parts.items()}
    tensors = (
        (f"base_model.model.{module.format(layer=layer)}.{name}.weight", matrix.T)
        for module, factors in modules.items()
        for name, stack in zip(FACTORS.values(), factors, strict=True)
        for layer, matrix in enumerate(stack)
    )
    with new_folder(folder, marker=CONFIG) as work:
        write_tensors(work / WEIGHTS, tensors)
        (work / CONFIG).write_text(json.dumps(config, indent=2))


def _target(family: Family, module: str) -> str:
    """The shortest suffix of the module's name that identifies it."""
    names = module.split(".")
    ends = (".".join(names[-n:]) for n in range(1, len(names)))
    return next(end for end in ends if sum(x.endswith(f".{end}") for x in adapter_modules(family)) == 1)


def load_peft(folder: Folder, model_type: str = "llama", head_dim: int = 0) -> tuple[Params, int, float]:
    """Loads (adapter, rank, alpha) from a LoRA folder; leaves are float32 numpy arrays.

    The update is always scaled by alpha / rank: for `use_rslora` (arXiv 2312.03732), which scales by alpha /
    sqrt(rank), alpha * sqrt(rank) is returned. Where `rank_pattern` and `alpha_pattern` give modules ranks and scales
    of their own, the rank is the largest one, to which the others are padded with zeros, and `b` is scaled by what
    remains. An adapter of a fused projection is split into one per part, either the ones that `save_peft` fused, or
    ones that share `a`.

    Raises:
      UserError: anything but plain LoRA on whole linear layers, settings that this loader does not know, or factors
        that hold NaN or infinity.
    """
    folder = pathlib.Path(folder)
    config = read_json(folder / CONFIG)
    family, scales = get_family(model_type, folder), _Scales.read(config, folder / CONFIG)
    _check_settings(config, family, folder / CONFIG)
    factors = _read_factors(folder, scales, family, head_dim, config)
    if not factors:
        raise UserError(f"{folder}: holds no LoRA matrices; export the adapter again")
    rank = max(_rank(path, x) for path, layers in factors.items() for x in layers.values())
    # At most one layer more than there are, so that a wild number builds nothing.
    depth = max(min(max(layers), len(layers)) + 1 for layers in factors.values())
    adapter = {}
    for path in sorted({path.rpartition("/")[0] for path in factors}):
        for factor, name in FACTORS.items():
            layers = factors.get(f"{path}/{factor}", {})
            if absent := sorted(set(range(depth)) - set(layers)):
                raise UserError(
                    f"{folder}: {name} of {path} is missing in layer {absent[0]}; "
                    "adapt every layer of a module, with both factors"
                )
            wide = [_padded(f"{path}/{factor}", layers[i], rank) for i in range(depth)]
            if len({x.shape for x in wide}) > 1:
                raise UserError(f"{folder}: {name} of {path} differs in shape between layers; export the adapter again")
            adapter[f"{path}/{factor}"] = np.stack(wide)
    return flax.traverse_util.unflatten_dict(adapter, sep="/"), rank, scales.alpha_of(rank)


def _rank(path: str, factor: np.ndarray) -> int:
    """The rank of a factor `a` [in, R] or `b` [R, out]."""
    return factor.shape[1 if path.endswith("a") else 0]


def _padded(path: str, factor: np.ndarray, rank: int) -> np.ndarray:
    """A factor with zeros up to a rank, which leave the product as it is."""
    more = rank - _rank(path, factor)
    return np.pad(factor, ((0, 0), (0, more)) if path.endswith("a") else ((0, more), (0, 0)))


@dataclasses.dataclass(frozen=True)
class _Scales:
    """Rank and scale of every module, as PEFT finds them.

    Attributes:
      rank, alpha: where no pattern says otherwise.
      ranks, alphas: `rank_pattern` and `alpha_pattern`: regular expression for the end of a module's name -> value.
      stabilised: `use_rslora`.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    stabilised: bool

    @classmethod
    def read(cls, config: Mapping[str, Json], source: pathlib.Path) -> "_Scales":
        """Those of an adapter_config.json."""
        if missing := [name for name in ("r", "lora_alpha") if config.get(name) is None]:
            raise UserError(f"{source}: the key {missing[0]!r} is missing; export the adapter again")
        stabilised = config.get("use_rslora") or False
        if not isinstance(stabilised, bool):
            raise UserError(f"{source}: use_rslora={stabilised!r} is neither true nor false; correct it")
        patterns = {"rank_pattern": ("r", _check_rank), "alpha_pattern": ("lora_alpha", _check_alpha)}
        found = {}
        for name, (default, check) in patterns.items():
            check(default, config[default], source)
            found[name] = config.get(name) or {}
            if not isinstance(found[name], dict):
                raise UserError(f"{source}: {name}={found[name]!r} is no object; export the adapter again")
            for pattern, value in found[name].items():
                check(f"{name}.{pattern}", value, source)
                try:
                    re.compile(pattern)
                except re.error:
                    raise UserError(f"{source}: {name} has no pattern {pattern!r}; export the adapter again") from None
        return cls(config["r"], config["lora_alpha"], found["rank_pattern"], found["alpha_pattern"], stabilised)

    def of(self, module: str) -> tuple[int, float]:
        """(rank, factor of the update relative to the default) of a module "model.layers.0.mlp.up_proj"."""
        rank, alpha = _matching(self.ranks, module, self.rank), _matching(self.alphas, module, self.alpha)
        return rank, self._scale(rank, alpha) / (self._scale(self.rank, self.alpha) or 1.0)

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (rank**0.5 if self.stabilised else rank)

    def alpha_of(self, rank: int) -> float:
        """The alpha for which alpha / rank is the default scale; 1 takes the place of a default scale of 0."""
        if not self.alpha:
            return float(rank)
        return (self.alpha * self.rank**0.5 if self.stabilised else float(self.alpha)) * (rank / self.rank)


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _check_rank(name: str, value: Json, source: pathlib.Path) -> None:
    if type(value) is not int or value < 1:
        raise UserError(f"{source}: {name}={value!r} is no whole number above 0; export the adapter again")


def _check_alpha(name: str, value: Json, source: pathlib.Path) -> None:
    # Python compares whole numbers of any size with floats.
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise UserError(f"{source}: {name}={value!r} is no finite number; export the adapter again")


def _check_settings(config: Mapping[str, Json], family: Family, source: pathlib.Path) -> None:
    """Refuses every setting that may mean another base or another sum; one that is null, false or empty is off."""
    start = config.get("init_lora_weights", True)
    start = start.lower() if isinstance(start, str) else True if start is None else start
    if not any(start is known or (isinstance(start, str) and start == known) for known in PLAIN_STARTS):
        way_out = MERGE if start in ("loftq", "eva") else CONVERT
        raise UserError(
            f"{source}: init_lora_weights={start!r} may belong to another base than the folder's; {way_out}"
        )
    allowed = {**FIXED, "task_type": "CAUSAL_LM"}
    if (
        not family.conv1d
    ):  # for a Conv1D module, PEFT stores the factors as for any other, with either value of the flag
        allowed["fan_in_fan_out"] = False
    for name in ("target_modules", "exclude_modules"):
        wanted = config.get(name)
        try:
            sound = wanted is None or isinstance(wanted, list) or re.compile(wanted) is not None
        except (TypeError, re.error):
            sound = False
        if not sound:
            raise UserError(f"{source}: {name}={wanted!r} is neither a list nor a pattern; export the adapter again")
    for name, value in config.items():
        known = name in FREE or (name in READ and name not in allowed)
        if not known and value and value != allowed.get(name):
            raise UserError(f"{source}: {name}={value!r} is not supported, because only plain LoRA is; {MERGE}")


def _is_targeted(config: Mapping[str, Json], module: str, layer: int) -> bool:
    """Whether PEFT adapts `module` ("model.layers.0.mlp.up_proj"): it ignores the tensors of all others."""

    def names(setting: str) -> bool | None:
        wanted = config.get(setting)
        if not wanted:
            return None
        if isinstance(wanted, str):
            return wanted == "all-linear" or re.fullmatch(wanted, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in wanted)

    layers = config.get("layers_to_transform")
    if layers not in (None, []) and layer not in (layers if isinstance(layers, list) else [layers]):
        return False
    return names("target_modules") is not False and not names("exclude_modules")


def _read_factors(
    folder: pathlib.Path, scales: _Scales, family: Family, head_dim: int, config: Mapping[str, Json]
) -> dict[str, dict[int, np.ndarray]]:
    """Our path -> layer -> factor `a` [in, R] or `b` [R, out], with b for the default scale.

    Args:
      config: the content of adapter_config.json.
    """
    modules = adapter_modules(family)
    found: dict[tuple[tuple[str, ...], int], dict[str, np.ndarray]] = {}
    with open_tensors([folder / WEIGHTS]) as files:
        for key in sorted(files):
            match = re.fullmatch(r"base_model\.model\.(.+?)\.(0|[1-9][0-9]{0,8})\.(.+)\.lora_([AB])\.weight", key)
            paths = modules.get(f"{match[1]}.{{layer}}.{match[3]}") if match else None
            if match is None or paths is None:
                raise UserError(
                    f"{folder}: {key} adapts no module of this model; adapt linear layers of the blocks only"
                )
            module, layer = key.removeprefix("base_model.model.").rpartition(".lora_")[0], int(match[2])
            if not _is_targeted(config, module, layer):
                raise UserError(
                    f"{folder}: {key} adapts a module that target_modules, exclude_modules and layers_to_transform of "
                    f"{CONFIG} leave out; export the adapter again"
                )
            stored = files[key].get_slice(key).get_dtype()
            if stored not in FLOAT_TYPES:
                raise UserError(f"{folder}: {key} is stored as {stored}; export the adapter as floats")
            whole = files[key].get_tensor(key).astype(np.float32).T
            if not all_finite(whole):
                raise UserError(f"{folder}: {key} holds NaN or infinity; use the adapter of an earlier checkpoint")
            kind, (rank, scale) = match[4].lower(), scales.of(module)
            if whole.ndim != 2 or _rank(kind, whole) != rank:
                raise UserError(
                    f"{folder}: {key} has shape {whole.shape[::-1]}, which is not of rank {rank}; export it again"
                )
            found.setdefault((paths, layer), {})[kind] = whole * np.float32(scale) if kind == "b" else whole
    factors: dict[str, dict[int, np.ndarray]] = {}
    for (paths, layer), pair in found.items():
        for path, factor in _parts(family, paths, pair, scales.rank, head_dim):
            factors.setdefault(path, {})[layer] = factor
    return factors


def _parts(
    family: Family, paths: tuple[str, ...], pair: Mapping[str, np.ndarray], rank: int, head_dim: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(path, factor) of every part of a module; parts of a fused one have their own block of it, as `save_peft` writes
    them with `rank` each, or share `a`.
    """
    if len(paths) == 1:
        yield from ((f"{paths[0]}/{kind}", factor) for kind, factor in pair.items())
        return
    own = [slice(part * rank, (part + 1) * rank) for part in range(len(paths))]
    columns = []
    if "b" in pair:
        width = pair["b"].shape[1] // len(paths)
        columns = [
            np.concatenate([pair["b"][:, run] for run in part_runs(family, part, width, head_dim)], axis=1)
            for part in range(len(paths))
        ]
    blocks = all(_rank(kind, x) == len(paths) * rank for kind, x in pair.items()) and all(
        np.count_nonzero(x) == np.count_nonzero(x[rows]) for x, rows in zip(columns, own, strict=False)
    )
    for part, path in enumerate(paths):
        if "a" in pair:
            yield f"{path}/a", pair["a"][:, own[part]] if blocks else pair["a"]
        if columns:
            yield f"{path}/b", columns[part][own[part]] if blocks else columns[part]
