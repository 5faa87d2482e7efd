"""Hugging Face folders in and out: config.json and safetensors, tensor by tensor through the tables of `families`.

Folders are local; a half-written export never carries the name of a finished one.
"""

import functools
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.models.config import ModelConfig, RopeScaling
from pjrlhf.models.families import Family, Slot, get_family, is_ignorable, leaf_shapes, tensor_slots
from pjrlhf.models.folders import Folder, new_folder, open_tensors, read_json, reading, weight_files, write_tensors

Params = Any

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Our names of the Llama-3 scaling -> theirs.
ROPE_FIELDS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position": "original_max_position_embeddings",
}
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")


def read_config(folder: Folder) -> ModelConfig:
    """The shape of the model in `folder`, from its config.json.

    Reads both spellings of RoPE: top-level `rope_theta` / `rope_scaling`, and `rope_parameters` of transformers 5.
    Raises UserError on a missing or unreadable file, a missing key, or anything the decoder cannot compute.
    """
    source = pathlib.Path(folder) / "config.json"
    raw = read_json(source)
    family = get_family(raw.get("model_type"), source)
    for name, value in family.fixed.items():
        if raw.get(name, value) != value:
            raise UserError(f"{source}: {name}={raw[name]!r} is not supported; use a model with {name}={value!r}")
    values = {ours: raw.get(theirs) for ours, theirs in family.fields.items()}
    for ours, theirs in family.fields.items():
        if values[ours] is None:
            values[ours] = family.defaults.get(theirs)
    if values["num_kv_heads"] is None:
        values["num_kv_heads"] = values["num_heads"]
    if values["head_dim"] is None and values["hidden_size"] and values["num_heads"]:
        values["head_dim"] = values["hidden_size"] // values["num_heads"]
    missing = [family.fields[ours] for ours, value in values.items() if value is None]
    if missing:
        raise UserError(f"{source}: the key {missing[0]!r} is missing; copy the config.json that came with the weights")
    theta, scaling = _read_rope(raw, source)
    try:
        return ModelConfig(**values, rope_theta=theta, rope_scaling=scaling)
    except ValueError as e:
        raise UserError(f"{source}: {e}") from e


def _read_rope(raw: Mapping[str, Any], source: pathlib.Path) -> tuple[float, RopeScaling | None]:
    blocks = [raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)]
    thetas = {float(block["rope_theta"]) for block in (raw, *blocks) if block.get("rope_theta") is not None}
    scalings = {_read_scaling(block, source) for block in blocks}
    if any(block.get("partial_rotary_factor", 1.0) != 1.0 for block in (raw, *blocks)):
        raise UserError(f"{source}: partial_rotary_factor is not supported; use a model that rotates whole heads")
    if len(thetas) > 1 or len(scalings) > 1:
        raise UserError(
            f"{source}: rope_parameters contradicts rope_theta or rope_scaling; keep the one the model was trained with"
        )
    return next(iter(thetas), 10_000.0), next(iter(scalings), None)


def _read_scaling(block: Mapping[str, Any], source: pathlib.Path) -> RopeScaling | None:
    kind = block.get("rope_type", block.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{source}: rope type {kind!r} is not supported; use a model with rope type default or llama3")
    missing = [theirs for theirs in ROPE_FIELDS.values() if theirs not in block]
    if missing:
        raise UserError(
            f"{source}: the rope key {missing[0]!r} is missing; copy the config.json that came with the weights"
        )
    return RopeScaling(**{ours: block[theirs] for ours, theirs in ROPE_FIELDS.items()})


def config_to_hf(config: ModelConfig, *, model_type: str = "llama", dtype: Any = jnp.float32, **token_ids: Any) -> dict:
    """The content of config.json, with both spellings of RoPE and of the dtype.

    `token_ids`: bos_token_id, eos_token_id, pad_token_id (ints, or a list for eos); those not given are written as
    null, so that no library fills in its own.
    """
    if unknown := set(token_ids) - set(TOKEN_IDS):
        raise UserError(f"token_ids: {sorted(unknown)} is unknown; choose from {', '.join(TOKEN_IDS)}")
    family = get_family(model_type, "config")
    scaling = None
    if config.rope_scaling is not None:
        scaling = {theirs: getattr(config.rope_scaling, ours) for ours, theirs in ROPE_FIELDS.items()}
        scaling["rope_type"] = "llama3"
    name = jnp.dtype(dtype).name
    return {
        "architectures": [family.architecture],
        "model_type": model_type,
        **{theirs: getattr(config, ours) for ours, theirs in family.fields.items()},
        **family.fixed,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "dtype": name,
        "torch_dtype": name,
        **{name: token_ids.get(name) for name in TOKEN_IDS},
    }


def load_params(
    folder: Folder,
    config: ModelConfig | None = None,
    dtype: Any = jnp.float32,
    place: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> Params:
    """The parameters in `folder` (one model.safetensors, or shards with their index) as our tree.

    A process reads what its devices hold and nothing else; host memory holds one device's part of one leaf, and of that
    one layer twice.

    Args:
      config: from `read_config` where None; its dimensions are checked against every tensor.
      dtype: of all leaves, whatever the storage (float64, float32, bfloat16, float16).
      place: `(path, shape) -> sharding` of a leaf; on the default device where None.

    Raises UserError on missing, unused or wrongly shaped tensors, by name.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder) if config is None else config
    family = get_family(read_json(folder / "config.json").get("model_type"), folder)
    shapes = leaf_shapes(config)
    leaves: dict[str, Any] = {}
    with open_tensors(weight_files(folder)) as files:
        slots = tensor_slots(family, config)
        _check_names(folder, files, slots, family, config)
        for name, slot in slots.items():
            view = files[name].get_slice(name)
            if tuple(view.get_shape()) != slot.shape:
                raise UserError(
                    f"{folder}: {name} has shape {tuple(view.get_shape())} but config.json asks for {slot.shape}; "
                    "use the config.json that came with the weights"
                )
            if view.get_dtype() not in FLOAT_TYPES:
                raise UserError(f"{folder}: {name} is stored as {view.get_dtype()}; use weights that are not quantised")
        for path, shape in shapes.items():
            tensors = {slot.index: (files[name], name) for name, slot in slots.items() if slot.path == path}
            transpose = next(slot.transpose for slot in slots.values() if slot.path == path)
            read = functools.partial(_read_part, tensors, transpose, shape, jnp.dtype(dtype))
            if place is None:
                leaves[path] = jnp.asarray(read(tuple(slice(None) for _ in shape)))
                continue
            leaves[path] = _placed(read, shape, place(path, shape))
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def _placed(
    read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], sharding: jax.sharding.Sharding
) -> jax.Array:
    """The array of `shape` whose parts `read` gives, each read once for all devices that hold it."""
    parts = sharding.addressable_devices_indices_map(shape)
    holders: dict[str, list[Any]] = {}
    for device, index in parts.items():
        holders.setdefault(repr(index), []).append(device)
    arrays = {}
    for devices in holders.values():
        part = read(parts[devices[0]])
        arrays |= {device: jax.device_put(part, device) for device in devices}
    return jax.make_array_from_single_device_arrays(shape, sharding, [arrays[device] for device in parts])


def _read_part(
    tensors: Mapping[int | tuple[()], tuple[Any, str]],
    transpose: bool,
    shape: tuple[int, ...],
    dtype: np.dtype,
    index: tuple[slice, ...],
) -> np.ndarray:
    """`leaf[index]` of the leaf of `shape` that is made of `tensors`: one, or one per layer."""
    ranges = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    part = np.empty([len(r) for r in ranges], dtype)
    stacked = () not in tensors
    inner = tuple(slice(r.start, r.stop) for r in ranges[stacked:])
    for i, layer in enumerate(ranges[0] if stacked else [()]):
        file, name = tensors[layer]
        piece = file.get_slice(name)[inner[::-1] if transpose else inner]
        part[i if stacked else ()] = piece.T if transpose else piece
    return part


def _check_names(folder, found: Iterable[str], slots: Iterable[str], family: Family, config: ModelConfig) -> None:
    missing = sorted(set(slots) - set(found))
    unused = sorted(name for name in set(found) - set(slots) if not is_ignorable(family, config, name))
    for names, complaint in (
        (missing, "is missing from the weights"),
        (unused, "in the weights has no place in the model"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(
                f"{folder}: {names[0]}{more} {complaint}; check that config.json and the weights belong together"
            )


def save_params(
    folder: Folder,
    config: ModelConfig,
    params: Params,
    *,
    model_type: str = "llama",
    dtype: Any = None,
    tokenizer_folder: Folder | None = None,
    token_ids: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 2 * 2**30,
) -> None:
    """Writes a folder that `transformers` loads: weights, config.json, generation_config.json, the tokenizer's files.

    An earlier export of the same name is replaced by renaming. Host memory holds one shard. Leaves must be addressable
    by this process: on several hosts, gather first and call it on one.

    Args:
      params: our tree, jax or numpy arrays.
      dtype: of the stored weights; None keeps that of each leaf.
      tokenizer_folder: its tokenizer files are copied.
      token_ids: see `config_to_hf`.
      max_shard_bytes: weights beyond this go into several files with an index; a tensor is never split.
    """
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    shapes = leaf_shapes(config)
    for path in sorted({*leaves, *shapes}):
        have = tuple(leaves[path].shape) if path in leaves else None
        if have != shapes.get(path):
            raise UserError(
                f"{folder}: cannot export {path} of shape {have} where the config asks for {shapes.get(path)}"
            )
    slots = tensor_slots(get_family(model_type, folder), config)
    dtypes = {path: jnp.dtype(dtype or leaf.dtype) for path, leaf in leaves.items()}
    shards, total, fill = [[]], 0, 0
    for name, slot in slots.items():
        size = int(np.prod(slot.shape)) * dtypes[slot.path].itemsize
        if shards[-1] and fill + size > max_shard_bytes:
            shards.append([])
            fill = 0
        shards[-1].append(name)
        fill, total = fill + size, total + size

    def tensor(slot: Slot) -> np.ndarray:
        leaf = _take(leaves[slot.path], slot.index).astype(dtypes[slot.path])
        return leaf.T if slot.transpose else leaf

    ids = dict(token_ids or {})
    hf = config_to_hf(config, model_type=model_type, dtype=dtypes["embed/embedding"], **ids)
    with new_folder(folder, marker="config.json") as work:
        if tokenizer_folder is not None:
            _copy_tokenizer(pathlib.Path(tokenizer_folder), work)
        (work / "generation_config.json").write_text(
            json.dumps({name: value for name, value in ids.items() if value is not None}, indent=2)
        )
        weight_map = {}
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            write_tensors(work / file, ((name, tensor(slots[name])) for name in names))
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (work / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        (work / "config.json").write_text(json.dumps(hf, indent=2))


def _take(leaf: Any, index: int | tuple[()]) -> np.ndarray:
    """One layer of a stacked leaf, fetched alone: a device array would else keep a host copy of the whole stack."""
    if isinstance(leaf, jax.Array) and index != ():
        leaf, index = jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), ()
    return np.asarray(leaf[index])


def _copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not files:
        raise UserError(f"{source}: no tokenizer files to export; name a folder with a tokenizer.json")
    for file in files:
        shutil.copyfile(file, target / file.name)


def fingerprint(folder: Folder) -> str:
    """16 hex digits naming the model in `folder`: SHA-256 over name and content of config.json and the weight files."""
    folder = pathlib.Path(folder)
    digest = hashlib.sha256()
    for file in (folder / "config.json", *weight_files(folder)):
        with reading(file), file.open("rb") as f:
            digest.update(file.name.encode() + b"\0" + hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]
