"""Import and export of Hugging Face folders: safetensors weights, one tensor at a time, by the tables of `families`.

Folders are local. An export appears under its name only when it is complete.
"""

import functools
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from huggingface_hub import split_state_dict_into_shards_factory

from pjrlhf.errors import UserError
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.families import Family, Slot, check_tensors, get_family, join, leaf_shapes, tensor_slots
from pjrlhf.models.folders import (
    INDEX,
    Folder,
    Stream,
    new_folder,
    open_tensors,
    read_json,
    reading,
    stream_tensors,
    weight_files,
)
from pjrlhf.models.hf_config import GENERATION, config_to_hf, generation_config, read_config
from pjrlhf.models.peft import MANIFEST
from pjrlhf.models.quantization import Quantization, check_kernels, quantize_leaf
from pjrlhf.parallel.processes import to_host
from pjrlhf.paths import Report
from pjrlhf.types import DType, Json, Params

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
TEMPLATES = "additional_chat_templates"  # a folder


def load_params(
    folder: Folder,
    config: ModelConfig | None = None,
    dtype: DType = jnp.float32,
    place: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
    quantization: Quantization | None = None,
    family: Family | None = None,
    report: Report | None = None,
) -> Params:
    """Loads the parameters in `folder` (model.safetensors, or shards with an index) as a tree of the decoder.

    A process reads only what its devices hold. Host memory peaks at one device's part of one leaf, plus one layer of
    it. While quantising, devices also hold one leaf in floating point.

    Args:
      config: from `read_config` where None; its dimensions are checked against every tensor.
      dtype: of all leaves, for any stored dtype (float64, float32, bfloat16, float16).
      place: `(path, shape) -> sharding` of a leaf; the default device where None.
      quantization: how kernels are stored; as floats where None.
      family: the table of the folder's `model_type` where None.
      report: told how much is read.

    Raises:
      UserError: a missing, unused or wrongly shaped tensor, by name, a leaf that holds NaN or infinity, or a kernel
        that cannot be quantised.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder) if config is None else config
    family = family or get_family(read_json(folder / "config.json").get("model_type"), folder)
    shapes = leaf_shapes(config)
    if quantization:
        check_kernels(quantization, shapes.items())
    sizes = {path: math.prod(shape) * jnp.dtype(dtype).itemsize for path, shape in shapes.items()}
    leaves: Params = {}
    sizes_read = 0
    with open_tensors(weight_files(folder), family.prefix) as files:
        slots = check_tensors(folder, files, family, config)
        for path, shape in shapes.items():
            found = [(name, slot) for name, several in slots.items() for slot in several if slot.path == path]
            tensors = {slot.index: (files[name], name) for name, slot in found}
            read = functools.partial(_read_part, tensors, found[0][1], shape, jnp.dtype(dtype))
            if place is None:
                leaf = jnp.asarray(read(tuple(slice(None) for _ in shape)))
            else:
                leaf = _placed(read, shape, place(path, shape))
            if not to_host(_is_finite(leaf)):
                raise UserError(
                    f"{folder}: {path} holds numbers that are not finite as {jnp.dtype(dtype).name}; restore the "
                    "weights, or set --config.model.param_dtype to a dtype of their range"
                )
            leaves |= quantize_leaf(quantization, path, leaf, place) if quantization else {path: leaf}
            sizes_read += sizes[path]
            if report:
                report(sizes_read, sum(sizes.values()))
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


def _placed(
    read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], sharding: jax.sharding.Sharding
) -> jax.Array:
    """An array of `shape` from `read(index)`, called once for each distinct shard."""
    parts = sharding.addressable_devices_indices_map(shape)
    holders: dict[str, list[Any]] = {}
    for device, index in parts.items():
        holders.setdefault(repr(index), []).append(device)
    arrays = {}
    for devices in holders.values():
        part = read(parts[devices[0]] or ())
        arrays |= {device: jax.device_put(part, device) for device in devices}
    return jax.make_array_from_single_device_arrays(shape, sharding, [arrays[device] for device in parts])


def _read_part(
    tensors: Mapping[int | tuple[()], tuple[Any, str]],
    slot: Slot,
    shape: tuple[int, ...],
    dtype: np.dtype,
    index: tuple[slice, ...],
) -> np.ndarray:
    """`leaf[index]` of a leaf of `shape` that is stored as `tensors`: one, or one per layer.

    `slot` describes any of them.
    """
    ranges = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    part = np.empty([len(r) for r in ranges], dtype)
    stacked = () not in tensors
    *inner, outputs = (slice(r.start, r.stop) for r in ranges[stacked:])
    for i, layer in enumerate(ranges[0] if stacked else [()]):
        file, name = tensors[layer]
        filled = 0
        for run in slot.runs(outputs):
            where = (*inner, run)
            piece = file.get_slice(name)[where[::-1] if slot.transpose else where]
            end = filled + run.stop - run.start
            part[i if stacked else ()][..., filled:end] = piece.T if slot.transpose else piece
            filled = end
    return part


def save_params(
    folder: Folder,
    config: ModelConfig,
    params: Params,
    *,
    model_type: str = "llama",
    dtype: DType | None = None,
    tokenizer_folder: Folder | None = None,
    token_ids: Mapping[str, Json] | None = None,
    generation: Mapping[str, Json] | None = None,
    max_shard_bytes: int = 2 * 2**30,
    pieces: Mapping[str, Callable[[], Iterable[np.ndarray]]] | None = None,
    report: Report | None = None,
) -> None:
    """Writes a folder that `transformers` loads: weights, config.json, generation_config.json and tokenizer files.

    Replaces an earlier export of the same name atomically. Host memory holds one tensor at a time. This process must be
    able to address all leaves: on several hosts, gather them first and call this on one.

    Args:
      params: parameter tree of the decoder, jax or numpy arrays.
      dtype: of the stored weights; None keeps the dtype of each leaf.
      tokenizer_folder: folder whose tokenizer files are copied.
      token_ids: see `config_to_hf`.
      generation: further content of generation_config.json, such as temperature and top_p; that of `tokenizer_folder`
        where None.
      max_shard_bytes: larger models are split into several files with an index; a tensor is never split.
      pieces: by name on disk, content of tensors that are streamed instead of taken from `params`, see
        `folders.Stream`.
      report: told how much is written.

    Raises:
      UserError: leaves that do not match `config`, a tensor that holds NaN or infinity (or would, in `dtype`), an
        existing folder that is no earlier export, or a disk that is full or unwritable.
    """
    leaves: Params = flax.traverse_util.flatten_dict(params, sep="/")
    shapes = leaf_shapes(config)
    for path in sorted({*leaves, *shapes}):
        have = tuple(leaves[path].shape) if path in leaves else None
        if have != shapes.get(path):
            raise UserError(
                f"{folder}: cannot export {path} of shape {have} where the config asks for {shapes.get(path)}"
            )
    slots = tensor_slots(get_family(model_type, folder), config)
    dtypes = {path: jnp.dtype(dtype or leaf.dtype) for path, leaf in leaves.items()}

    def whole(several: tuple[Slot, ...]) -> list[np.ndarray]:
        with np.errstate(over="ignore"):  # what is too large for `dtype` is refused when it is written
            return [join(several, [_take(leaves[x.path], x.index).astype(dtypes[several[0].path]) for x in several])]

    def tensor(name: str) -> Stream:
        first, *_ = several = slots[name]
        made = (pieces or {}).get(name) or functools.partial(whole, several)
        return Stream(first.shape, dtypes[first.path], functools.partial(counted, made))

    written = 0

    def counted(made: Callable[[], Iterable[np.ndarray]]) -> Iterator[np.ndarray]:
        nonlocal written
        for piece in made():
            yield piece
            written += piece.nbytes
            if report:
                report(written, total)

    tensors = {name: tensor(name) for name in slots}
    total = sum(math.prod(stream.shape) * stream.dtype.itemsize for stream in tensors.values())
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda stream: math.prod(stream.shape) * stream.dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    ids = dict(token_ids or {})
    hf = config_to_hf(config, model_type=model_type, dtype=dtypes["embed/embedding"], **ids)
    settings = generation_config(tokenizer_folder, generation, ids, config.vocab_size)
    with new_folder(folder, marker="config.json") as work:
        if tokenizer_folder is not None:
            copy_tokenizer(pathlib.Path(tokenizer_folder), work)
        (work / GENERATION).write_text(json.dumps(settings, indent=2))
        for file, names in shards.filename_to_tensors.items():
            stream_tensors(work / file, {name: tensors[name] for name in names})
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (work / INDEX).write_text(json.dumps(index, indent=2))
        (work / "config.json").write_text(json.dumps(hf, indent=2))


def _take(leaf: Any, index: int | tuple[()]) -> np.ndarray:
    """`leaf[index]` on the host; `leaf` is an array or is indexed like one.

    Slices a device array on the device: else it would cache a host copy of all layers.
    """
    if isinstance(leaf, jax.Array) and index != ():
        leaf, index = jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), ()
    return np.asarray(leaf[index])


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the files of a tokenizer, and its chat templates.

    Raises:
      UserError: there are none.
    """
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not files:
        raise UserError(f"{source}: no tokenizer files to export; name a folder with a tokenizer.json")
    for file in files:
        shutil.copyfile(file, target / file.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES, copy_function=shutil.copyfile)


_fingerprints: dict[Any, str] = {}  # state of the files of a folder -> fingerprint


def fingerprint(folder: Folder, report: Report | None = None) -> str:
    """Identifies the model in `folder` by 16 hex digits: XXH3 of its family, its essential settings and the content of
    every tensor.

    Neither settings that change no result, nor how tensors are spread over files, enter. XXH3 is as fast as reading the
    files, but not cryptographic. A process reads unchanged files once.

    Args:
      report: told how much is read.

    Raises:
      UserError: the folder holds no model that `load_params` reads, or not the one that its manifest.json records.
    """
    folder = pathlib.Path(folder)
    state = tuple(_state(file) for file in (folder / "config.json", *weight_files(folder)))
    key = (*state, _state(folder / MANIFEST))
    if None in state or key not in _fingerprints:
        _fingerprints[key] = _fingerprint(folder, report)
    return _fingerprints[key]


def _state(file: pathlib.Path) -> tuple[str, int, int, int] | None:
    """Changes whenever a file does, also where its time is set back; None where there is no such file."""
    try:
        found = file.stat()
    except OSError:
        return None
    return str(file.absolute()), found.st_ino, found.st_size, found.st_ctime_ns


def _fingerprint(folder: pathlib.Path, report: Report | None) -> str:
    config = read_config(folder)
    model_type = read_json(folder / "config.json")["model_type"]
    family = get_family(model_type, folder)
    digest = xxhash.xxh3_64(repr((model_type, config.essence)).encode())
    read, total = 0, sum(file.stat().st_size for file in weight_files(folder) if file.is_file())
    with open_tensors(weight_files(folder), family.prefix) as files:
        for name in sorted(check_tensors(folder, files, family, config)):
            digest.update(f"\0{name}\0{files[name].dtype(name)}\0".encode())
            with reading(folder):
                content = files[name].flat(name).view(np.uint8)
                for start in range(0, len(content), 2**24):
                    digest.update(content[start : start + 2**24].data)
                    if report:
                        report(read + start, total)
            read += len(content)
    found, manifest = digest.hexdigest(), folder / MANIFEST
    if manifest.is_file() and read_json(manifest).get("fingerprint", found) != found:
        raise UserError(
            f"{folder}: its model is not what was saved; restore it or make it again, or delete {MANIFEST} if you "
            "changed it on purpose"
        )
    return found
