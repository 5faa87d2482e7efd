"""Merges finished models into one: a weighted sum, or a relative of it, of Hugging Face folders and LoRA folders.

Weights are streamed and merged in float32: sums in pieces of a tensor, or where an adapter changes it one ingredient
at a time; other methods with all ingredients' versions of one tensor at hand. Adapters, being small, are held whole.
What does not fit together is refused, and a refused merge leaves no folder behind.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf import __version__
from pjrlhf.errors import UserError
from pjrlhf.merging import lora, methods, trees
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.families import get_family, is_ignorable, leaf_shapes, tensor_slots
from pjrlhf.models.folders import DTYPES, new_folder, open_tensors, read_json, weight_files
from pjrlhf.models.hf_config import TOKEN_IDS, read_config
from pjrlhf.models.huggingface import TOKENIZER_FILES, fingerprint, save_params
from pjrlhf.models.peft import CONFIG as ADAPTER_CONFIG
from pjrlhf.models.peft import MANIFEST, load_peft, save_peft
from pjrlhf.models.peft import WEIGHTS as ADAPTER_WEIGHTS
from pjrlhf.paths import local, refuse_remote
from pjrlhf.settings import Settings, setting

SPACES = ("delta", "factors", "concat")
# The settings each method reads.
SETTINGS = {
    "linear": (),
    "task_arithmetic": ("scale",),
    "ties": ("density", "scale"),
    "dare_linear": ("density", "scale", "seed"),
    "dare_ties": ("density", "scale", "seed"),
    "slerp": (),
    "model_stock": (),
}
SUMS = ("linear", "task_arithmetic")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeSettings(Settings):
    """What is merged, and how. tau_i = theta_i - base is what ingredient i learned."""

    base: str | None = setting(
        None,
        "Hugging Face folder the ingredients were trained from. LoRA ingredients need it, but for space concat. With "
        "it the result is base + sum_i w_i tau_i; without it the weights must sum to 1",
    )
    ingredients: tuple[str, ...] = setting((), "folders of full models, or of LoRA adapters in PEFT layout")
    weights: tuple[float, ...] = setting(
        (), "one per ingredient; may be negative, and need not sum to 1 where there is a base"
    )
    space: str = setting(
        "delta",
        "delta: the exact weighted sum of updates, a dense model; factors: averages the two LoRA factors on their own, "
        "to compare with published soups; concat: exact too, one LoRA adapter whose rank is the sum of the ranks",
        choices=SPACES,
    )
    method: str = setting(
        "linear",
        "linear: the weighted sum; task_arithmetic: base + scale sum_i w_i tau_i; ties: the density of largest "
        "magnitude of each tensor of tau_i, where signs disagree the weighted majority's; dare_linear, dare_ties: each "
        "entry of tau_i with probability density, rescaled; slerp: along the arc between two ingredients; model_stock: "
        "base + t mean(tau_i), t from the angles between the tau_i",
        choices=tuple(SETTINGS),
    )
    density: float | None = setting(None, "of ties, dare_linear and dare_ties, which need it", above=0.0, high=1.0)
    scale: float | None = setting(None, "of task_arithmetic, ties and dare; 1 where not set", low=-1e6, high=1e6)
    seed: int | None = setting(None, "of the draws of dare; 0 where not set", low=0, high=2**32 - 1)
    output: str | None = setting(None, "must be new or empty; <workdir>/export/soup where not set")
    dtype: str | None = setting(
        None,
        "of the written weights; that of the base (or the first ingredient) where not set, float32 for concat",
        choices=tuple(DTYPES.values()),
    )


@dataclasses.dataclass
class Ingredient:
    """One folder to merge; `adapter` (leaves [L, in, R] and [L, R, out]) is None for a full model."""

    folder: pathlib.Path
    weight: float
    adapter: Any = None
    rank: int = 0
    alpha: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def entry(self) -> dict[str, Any]:
        """What the manifest says of it."""
        if self.adapter is None:
            kind, content = "full", fingerprint(self.folder)
        else:
            files = [(self.folder / name).read_bytes() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
            kind, content = "lora", hashlib.sha256(b"".join(files)).hexdigest()[:16]
        return {"folder": str(self.folder), "hash": content, "kind": kind, "weight": self.weight}


def merge(config: MergeSettings, workdir: pathlib.Path | None = None) -> dict[str, Any]:
    """Writes the merged folder and returns its manifest (also written there, as manifest.json).

    Args:
      config: what is merged, and how.
      workdir: the run directory; the output goes to <workdir>/export/soup where `config.output` is not set.

    Raises UserError on ingredients that do not fit each other, the base or the weights, naming what differs.
    """
    weights = _read_weights(config)
    settings = _read_method(config, weights)
    output = _output_folder(config, workdir)
    base = local(config.base) if config.base else None
    model_type = read_json(base / "config.json").get("model_type") if base else "llama"
    head_dim = read_config(base).head_dim if base else 0
    ingredients = [_open(local(f), w, model_type, head_dim) for f, w in zip(config.ingredients, weights, strict=True)]
    _check_kinds(base, ingredients, config.space)
    _check_tokenizers([*([base] if base else []), *(ingredient.folder for ingredient in ingredients)])
    base_hash = _check_bases(base, ingredients)
    with new_folder(output, marker=MANIFEST) as work:
        if config.space == "concat":
            dtype = _write_adapter(work, base, ingredients, config.dtype or "float32", model_type)
        else:
            dtype = _write_model(work, base, ingredients, config.dtype, config.space, config.method, settings)
        manifest = {
            "package": "pjrlhf",
            "version": __version__,
            "space": config.space,
            "method": config.method,
            **settings,
            "dtype": dtype,
            "base": {"folder": str(base) if base else None, "hash": base_hash},
            "ingredients": [ingredient.entry() for ingredient in ingredients],
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=2))
    return manifest


def _read_weights(config: MergeSettings) -> list[float]:
    try:
        weights = [float(weight) for weight in config.weights]
        trees.check_weights(weights, len(config.ingredients))
    except (TypeError, ValueError) as e:
        raise UserError(f"merge.weights: {e}; give one finite number per ingredient") from e
    if not weights:
        raise UserError("merge.ingredients: there are none; name the folders to merge")
    return weights


def _read_method(config: MergeSettings, weights: Sequence[float]) -> dict[str, Any]:
    """The settings that `config.method` reads; UserError where they, the weights, the base or the space do not suit."""
    method = config.method
    if method != "linear" and config.space != "delta":
        raise UserError(f"merge.space: {method!r} merges dense weights; use merge.space='delta'")
    if method not in ("linear", "slerp") and not config.base:
        raise UserError(f"merge.base: {method!r} merges what was learned since the base; set it")
    if method == "slerp" and (len(weights) != 2 or abs(math.fsum(weights) - 1) > 1e-6):
        raise UserError("merge.weights: 'slerp' goes from one ingredient to another; give it two weights that sum to 1")
    if method == "model_stock" and (len(weights) < 2 or len(set(weights)) > 1):
        raise UserError("merge.weights: 'model_stock' weighs by angles; give two or more ingredients equal weights")
    for name in ("density", "scale", "seed"):
        if getattr(config, name) is not None and name not in SETTINGS[method]:
            raise UserError(f"merge.{name}: {method!r} does not read it; leave it out")
    defaults = {"density": None, "scale": 1.0, "seed": 0}
    given = {name: getattr(config, name) for name in SETTINGS[method]}
    settings = {name: defaults[name] if value is None else value for name, value in given.items()}
    if "density" in settings and settings["density"] is None:
        raise UserError(f"merge.density: is not set; {method!r} needs one above 0 and up to 1")
    return settings


def _output_folder(config: MergeSettings, workdir: pathlib.Path | None) -> pathlib.Path:
    if not config.output and not workdir:
        raise UserError("merge.output: no folder to write to; set it, or give --workdir")
    refuse_remote(config.output or "", "a merged model", "write it to a folder and copy that")
    output = pathlib.Path(config.output) if config.output else pathlib.Path(workdir) / "export" / "soup"
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: exists and is not empty; choose another merge.output")
    return output


def _open(folder: pathlib.Path, weight: float, model_type: str, head_dim: int) -> Ingredient:
    if (folder / ADAPTER_CONFIG).is_file():
        return Ingredient(folder, weight, *load_peft(folder, model_type, head_dim))
    if (folder / "config.json").is_file():
        return Ingredient(folder, weight)
    raise UserError(f"{folder}: holds neither config.json nor {ADAPTER_CONFIG}; name a Hugging Face or PEFT folder")


def _check_kinds(base: pathlib.Path | None, ingredients: Sequence[Ingredient], space: str) -> None:
    full = [ingredient for ingredient in ingredients if ingredient.adapter is None]
    if full and space != "delta":
        raise UserError(f"{full[0].folder}: a full model has no low-rank factors; use merge.space='delta'")
    if base is None and space != "concat":
        if len(full) < len(ingredients):
            raise UserError("merge.base: LoRA folders need the model they adapt; set it, or use merge.space='concat'")
        total = math.fsum(ingredient.weight for ingredient in full)
        if abs(total - 1) > 1e-6:
            raise UserError(f"merge.weights: they sum to {total:g}, not 1; make them sum to 1, or set merge.base")


def _check_tokenizers(folders: Sequence[pathlib.Path]) -> None:
    """UserError where two folders hold different tokenizers; a folder without one fits any."""
    first, known = None, None
    for folder in folders:
        if not (folder / "tokenizer.json").is_file():
            continue
        content = read_json(folder / "tokenizer.json")
        # Left behind by whoever tokenised last; they name no token.
        for key in ("padding", "truncation"):
            content.pop(key, None)
        if first is None:
            first, known = folder, content
        elif content != known:
            raise UserError(f"{folder}: tokenizer.json differs from that of {first}; merge models of one tokenizer")


def _check_bases(base: pathlib.Path | None, ingredients: Sequence[Ingredient]) -> str | None:
    """The hash of the base, given or recorded by an adapter; UserError where an adapter recorded another."""
    owner, known = base, fingerprint(base) if base else None
    for ingredient in ingredients:
        if ingredient.adapter is None or not (ingredient.folder / MANIFEST).is_file():
            continue
        recorded = read_json(ingredient.folder / MANIFEST).get("base", {}).get("hash")
        if recorded and not known:
            owner, known = ingredient.folder, recorded
        if recorded and recorded != known:
            raise UserError(
                f"{ingredient.folder}: was made for the base {recorded}, not for that of {owner} ({known}); "
                "merge adapters of one base"
            )
    return known


def _check_config(folder: pathlib.Path, source: pathlib.Path) -> None:
    here, there = (
        {"model_type": read_json(f / "config.json").get("model_type"), **dataclasses.asdict(read_config(f))}
        for f in (folder, source)
    )
    for name, value in here.items():
        if value != there[name]:
            raise UserError(f"{folder}: {name} is {value} but {there[name]} in {source}; merge models of one shape")


def _check_tensors(folder: pathlib.Path, files: dict[str, Any], slots: dict[str, Any], ignored: Callable) -> None:
    for name in sorted({*files, *slots}):
        if name not in files:
            raise UserError(f"{folder}: {name} is missing from the weights; export the model again")
        if name not in slots:
            if not ignored(name):
                raise UserError(f"{folder}: {name} has no place in the model; merge models of one shape")
            continue
        view = files[name].get_slice(name)
        shape, expected = tuple(view.get_shape()), slots[name][0].shape
        if shape != expected:
            raise UserError(f"{folder}: {name} has shape {shape}, the model {expected}; merge models of one shape")
        if view.get_dtype() not in DTYPES:
            raise UserError(
                f"{folder}: {name} is stored as {view.get_dtype()}; store it as {', '.join(DTYPES.values())}"
            )


def _check_adapter(ingredient: Ingredient, config: ModelConfig, base: pathlib.Path) -> None:
    for path, leaf in flax.traverse_util.flatten_dict(ingredient.adapter, sep="/").items():
        module, _, factor = path.rpartition("/")
        L, inputs, outputs = leaf_shapes(config)[f"{module}/kernel"]
        expected = (L, inputs, ingredient.rank) if factor == "a" else (L, ingredient.rank, outputs)
        if leaf.shape != expected:
            raise UserError(
                f"{ingredient.folder}: {path} has shape {leaf.shape}, {base} needs {expected}; "
                "merge adapters made for this base"
            )


def _combine(function: Callable, adapters: Sequence[Ingredient]) -> Any:
    """`lora.concatenate` or `lora.average_factors` of the ingredients."""
    try:
        return function([x.adapter for x in adapters], [x.scale for x in adapters], [x.weight for x in adapters])
    except ValueError as e:
        raise UserError(f"merge.ingredients: {e}; use merge.space='delta'") from e


def _write_adapter(
    work: pathlib.Path, base: pathlib.Path | None, ingredients: Sequence[Ingredient], dtype: str, model_type: str
) -> str:
    """Writes the rank-concatenated adapter; returns its dtype."""
    base_name = str(base) if base else read_json(ingredients[0].folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    head_dim = 0
    if base:
        config = read_config(base)
        head_dim = config.head_dim
        for ingredient in ingredients:
            _check_adapter(ingredient, config, base)
    adapter = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), _combine(lora.concatenate, ingredients))
    rank = sum(ingredient.rank for ingredient in ingredients)
    save_peft(work, adapter, rank, rank, base_name, model_type, head_dim)
    return dtype


@dataclasses.dataclass
class _Leaf:
    """A parameter whose layers are computed as they are written: as much of an array as `save_params` asks for."""

    shape: tuple[int, ...]
    dtype: Any
    layer: Callable[[int | tuple[()]], np.ndarray]

    def __getitem__(self, index: int | tuple[()]) -> np.ndarray:
        return self.layer(index)


def _write_model(
    work: pathlib.Path,
    base: pathlib.Path | None,
    ingredients: Sequence[Ingredient],
    dtype: str | None,
    space: str,
    method: str,
    settings: dict[str, Any],
) -> str:
    """Writes the dense model; returns the dtype of its embedding."""
    if method == "task_arithmetic":
        ingredients = [dataclasses.replace(x, weight=settings["scale"] * x.weight) for x in ingredients]
    full = [(x.folder, x.weight) for x in ingredients if x.adapter is None]
    adapters = [x for x in ingredients if x.adapter is not None]
    if base:
        # base + sum_i w_i (theta_i - base), in the form that returns theta_i exactly for one-hot weights.
        full.insert(0, (base, 1.0 - math.fsum(weight for _, weight in full)))
    source = full[0][0]
    raw, config = read_json(source / "config.json"), read_config(source)
    family = get_family(raw["model_type"], source)
    slots = tensor_slots(family, config)
    for folder, _ in full[1:]:
        _check_config(folder, source)
    for ingredient in adapters:
        _check_adapter(ingredient, config, source)
    updates = [(flax.traverse_util.flatten_dict(x.adapter, sep="/"), x.scale, x.weight) for x in adapters]
    if space == "factors":
        updates = [(flax.traverse_util.flatten_dict(_combine(lora.average_factors, adapters), sep="/"), 1.0, 1.0)]

    with contextlib.ExitStack() as stack:
        opened = [
            (stack.enter_context(open_tensors(weight_files(folder), family.prefix)), weight) for folder, weight in full
        ]
        for (folder, _), (files, _) in zip(full, opened, strict=True):
            _check_tensors(folder, files, slots, functools.partial(is_ignorable, family, config))
        names = {(slot.path, slot.index): (name, slot) for name, several in slots.items() for slot in several}

        def summed(path: str, index: int | tuple[()]) -> np.ndarray:
            (name, slot), total = names[path, index], None
            for files, weight in opened:
                if weight:
                    # Waiting lets go of this tensor before the next one is read.
                    total = trees.accumulate(total, slot.take(files[name].get_tensor(name)), weight)
                    jax.block_until_ready(total)
            module = path.removesuffix("/kernel")
            for adapter, scale, weight in updates:
                if f"{module}/a" in adapter:
                    update = lora.delta(adapter[f"{module}/a"][index], adapter[f"{module}/b"][index], scale)
                    total = trees.accumulate(total, update, weight)
            return np.asarray(total)

        def combined(path: str, index: int | tuple[()]) -> np.ndarray:
            """By a method that needs all ingredients' versions of the tensor at once."""
            (name, slot), module = names[path, index], path.removesuffix("/kernel")

            def read(files):
                x = slot.take(files[name].get_tensor(name))
                return x.astype(trees.wide_dtype(x.dtype))

            def adapted(adapter, scale, _):
                a, b = (adapter.get(f"{module}/{factor}") for factor in "ab")
                return start if a is None else start + lora.delta(a[index], b[index], scale)

            fulls, lows = (files for files, _ in opened), iter(updates)
            start = read(next(fulls)) if base else None
            leaves = [read(next(fulls)) if x.adapter is None else adapted(*next(lows)) for x in ingredients]
            options = {setting: value for setting, value in settings.items() if setting != "seed"}
            if "seed" in settings:
                key = jax.random.key(settings["seed"])
                options["key"] = methods.tensor_key(key, path, index if isinstance(index, int) else None)
            return np.asarray(methods.METHODS[method](start, leaves, [x.weight for x in ingredients], **options))

        def plain(name: str) -> Iterator[np.ndarray]:
            """A sum of nothing but what lies in the folders, as it lies there."""
            used = [(files[name].flat(name), weight) for files, weight in opened if weight] or [
                (opened[0][0][name].flat(name), 0.0)
            ]
            arrays, weights = zip(*used, strict=True)
            return trees.sum_in_pieces(arrays, weights, dtype or stored[slots[name][0].path])

        moved = {path for adapter, _, _ in updates for path in adapter}
        pieces = {
            name: functools.partial(plain, name)
            for name, several in slots.items()
            if method in SUMS and not any(f"{slot.path.removesuffix('/kernel')}/a" in moved for slot in several)
        }
        layer = summed if method in SUMS else combined
        stored = {path: DTYPES[opened[0][0][n].get_slice(n).get_dtype()] for (path, _), (n, _) in names.items()}
        leaves = {
            path: _Leaf(shape, jnp.dtype(stored[path]), functools.partial(layer, path))
            for path, shape in leaf_shapes(config).items()
        }
        folders = [source, *(ingredient.folder for ingredient in ingredients)]
        tokenizers = [f for f in folders if any((f / name).is_file() for name in TOKENIZER_FILES)]
        save_params(
            work,
            config,
            flax.traverse_util.unflatten_dict(leaves, sep="/"),
            model_type=raw["model_type"],
            dtype=dtype,
            tokenizer_folder=tokenizers[0] if tokenizers else None,
            token_ids={name: raw.get(name) for name in TOKEN_IDS},
            pieces=pieces,
        )
    return dtype or stored["embed/embedding"]
