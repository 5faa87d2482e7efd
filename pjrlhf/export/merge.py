"""Merges trained models and LoRA adapters into one folder: by a weighted sum, or by another merging method.

Weights are read and merged tensor by tensor, in float32 (`dense`); adapters are small and held in memory. Ingredients
that do not fit each other are refused, and a refused merge leaves no folder behind.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf import __version__
from pjrlhf.errors import UserError
from pjrlhf.export.card import write_card
from pjrlhf.export.dense import write_dense
from pjrlhf.export.ingredients import (
    Ingredient,
    check_adapter,
    check_bases,
    check_kinds,
    combine_adapters,
    open_ingredient,
)
from pjrlhf.export.inherited import check_tokenizers, inherit
from pjrlhf.export.push import check_push, push
from pjrlhf.merging import lora, trees
from pjrlhf.models.folders import DTYPES, new_folder, read_json
from pjrlhf.models.hf_config import GENERATION, read_config
from pjrlhf.models.hub import model_folder, portable
from pjrlhf.models.huggingface import copy_tokenizer, fingerprint
from pjrlhf.models.peft import CONFIG as ADAPTER_CONFIG
from pjrlhf.models.peft import MANIFEST, WEIGHTS, save_peft
from pjrlhf.paths import content_hash, disk_errors, is_remote, refuse_remote
from pjrlhf.settings import SEEDS, Settings, fold_seed, setting
from pjrlhf.training.progress import megabytes
from pjrlhf.types import Json

SPACES = ("delta", "factors", "concat")
# Method -> the settings that it reads.
METHOD_OPTIONS = {
    "linear": (),
    "task_arithmetic": ("scale",),
    "ties": ("density", "scale"),
    "dare_linear": ("density", "scale", "seed"),
    "dare_ties": ("density", "scale", "seed"),
    "slerp": (),
    "model_stock": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeSettings(Settings):
    """What is merged, and how. tau_i = theta_i - base is what ingredient i learned."""

    base: str | None = setting(
        None,
        "Hugging Face folder, or name on the hub, that the ingredients were trained from. LoRA ingredients need it, "
        "except for space concat. With a base the result is base + sum_i w_i tau_i; without one the weights must sum "
        "to 1",
        path=True,
    )
    ingredients: tuple[str, ...] = setting(
        (), "folders, or names on the hub, of full models or of LoRA adapters in PEFT layout", path=True
    )
    weights: tuple[float, ...] = setting(
        (), "one per ingredient; may be negative, and need not sum to 1 where a base is set"
    )
    space: str = setting(
        "delta",
        "delta: the exact weighted sum of updates, a full model; factors: averages the two LoRA factors separately, to "
        "compare with published soups; concat: also exact, one LoRA adapter whose rank is the sum of the ranks",
        choices=SPACES,
    )
    method: str = setting(
        "linear",
        "linear: the weighted sum; task_arithmetic: base + scale sum_i w_i tau_i; ties: keeps the fraction density of "
        "each tensor of tau_i that is largest in magnitude, and where signs disagree follows the weighted majority; "
        "dare_linear, dare_ties: keep each entry of tau_i with probability density, and rescale; slerp: along the arc "
        "between two ingredients; model_stock: base + t mean(tau_i), with t from the angles between the tau_i",
        choices=tuple(METHOD_OPTIONS),
    )
    density: float | None = setting(None, "for ties, dare_linear and dare_ties; required there", above=0.0, high=1.0)
    scale: float | None = setting(None, "for task_arithmetic, ties and dare; 1 where not set", low=-1e6, high=1e6)
    seed: int | None = setting(None, "of the draws of dare; 0 where not set", low=SEEDS[0], high=SEEDS[1])
    output: str | None = setting(
        None,
        "a new or empty folder; where not set, <workdir>/export/soup, or soup-2, soup-3, ... beside other mixes",
        path=True,
    )
    tokenizer: str | None = setting(
        None,
        "the folder, one of base and ingredients, that decides about tokenizer files, chat template, special tokens "
        "and generation_config.json. Where not set, the folders with a chat template decide, and must agree",
        path=True,
    )
    dtype: str | None = setting(
        None,
        "of the written weights; where not set, that of the base or of the first ingredient, and float32 for concat",
        choices=tuple(DTYPES.values()),
    )
    push: str = setting("", "USER/NAME on the Hugging Face hub to which the merged model is uploaded, with its card")
    private: bool = setting(False, "whether a new repository on the hub is private")


def merge(config: MergeSettings, workdir: pathlib.Path | None = None) -> dict[str, Any]:
    """Writes the merged folder and returns its manifest, which is also written there as manifest.json. The folder has a
    model card, and is uploaded where `config.push` says so.

    Args:
      config: what is merged, and how.
      workdir: the run directory, for `config.output`.

    Raises:
      UserError: the ingredients do not fit each other, the base or the weights; the output folder is taken or cannot be
        written; it cannot be uploaded; or a number is not finite, in an ingredient or in the result.
    """
    if config.push:
        check_push(config.push)
    weights = _read_weights(config)
    options = _read_options(config, weights)
    _check_output(config, workdir)
    base = _folder(config.base) if config.base else None
    model_type = str(read_json(base / "config.json").get("model_type")) if base else "llama"
    head_dim = read_config(base).head_dim if base else 0
    ingredients = [
        open_ingredient(_folder(path), weight, model_type, head_dim)
        for path, weight in zip(config.ingredients, weights, strict=True)
    ]
    check_kinds(base, ingredients, config.space)
    folders = [ingredient.folder for ingredient in ingredients]
    parents = [*([base] if base else []), *folders]
    check_tokenizers(parents)
    chosen = _folder(config.tokenizer) if config.tokenizer else None
    if chosen:  # as it is called there
        same = [folder for folder in parents if folder.absolute() == chosen.absolute()]
        if not same:
            raise UserError(f"merge.tokenizer: {chosen} is neither the base nor an ingredient; name one of them")
        chosen = same[0]
    inherited = inherit(base, folders, chosen)
    base_hash = check_bases(base, ingredients)
    if config.output:
        output = pathlib.Path(config.output)
    else:
        assert workdir, "see _check_output"
        output = _free_folder(workdir / "export")
    manifest = {
        "package": "pjrlhf",
        "version": __version__,
        "space": config.space,
        "method": config.method,
        **options,
        "base": {**_place(config.base, base), "hash": base_hash},
        "tokenizer": str(inherited.tokenizer.absolute()) if inherited.tokenizer else None,
        "ingredients": [
            _place(path, ingredient.folder) | ingredient.manifest_entry()
            for path, ingredient in zip(config.ingredients, ingredients, strict=True)
        ],
        "output": str(output.absolute()),
    }
    with new_folder(output, marker=MANIFEST) as work:
        if config.space == "concat":
            dtype = _write_adapter(work, base, manifest["base"], ingredients, config.dtype or "float32", model_type)
            if inherited.tokenizer not in (None, base):  # that of the base is found with the base
                copy_tokenizer(inherited.tokenizer, work)
            if inherited.token_ids["eos_token_id"] is not None:
                (work / GENERATION).write_text(json.dumps({"eos_token_id": inherited.token_ids["eos_token_id"]}))
            manifest["checksum"] = content_hash(work / WEIGHTS)
        else:
            dtype = write_dense(
                work,
                base,
                ingredients,
                dtype=config.dtype,
                space=config.space,
                method=config.method,
                options=options,
                inherited=inherited,
            )
            manifest["fingerprint"] = fingerprint(work)
        manifest["dtype"] = dtype
        (work / MANIFEST).write_text(json.dumps(manifest, indent=2))
        write_card(work, output.name)
    if config.push:
        manifest["pushed"] = push(output, config.push, config.private)
    return manifest


def _folder(path: str) -> pathlib.Path:
    with megabytes(f"downloading {path}") as report:
        return model_folder(path, report)


def _read_weights(config: MergeSettings) -> list[float]:
    if not config.ingredients:
        raise UserError("merge.ingredients: is empty; name the folders to merge")
    try:
        trees.check_weights(config.weights, len(config.ingredients))
    except ValueError as error:
        raise UserError(f"merge.weights: {error}; give one finite number per ingredient") from error
    return list(config.weights)


def _read_options(config: MergeSettings, weights: Sequence[float]) -> dict[str, Any]:
    """The settings that `config.method` reads, with their defaults.

    Raises:
      UserError: the method does not read a setting that is set, or does not go with the weights, the base or the space.
    """
    method = config.method
    if method != "linear" and config.space != "delta":
        raise UserError(f"merge.space: {method!r} merges dense weights; use merge.space='delta'")
    if method not in ("linear", "slerp") and not config.base:
        raise UserError(f"merge.base: {method!r} merges updates of a base; set it")
    if method == "slerp" and (len(weights) != 2 or abs(math.fsum(weights) - 1) > 1e-6):
        raise UserError("merge.weights: 'slerp' goes from one ingredient to another; give it two weights that sum to 1")
    if method == "model_stock" and (len(weights) < 2 or len(set(weights)) > 1):
        raise UserError("merge.weights: 'model_stock' weighs by angles; give two or more ingredients equal weights")
    for name in ("density", "scale", "seed"):
        if getattr(config, name) is not None and name not in METHOD_OPTIONS[method]:
            raise UserError(f"merge.{name}: {method!r} does not read it; leave it out")
    if "density" in METHOD_OPTIONS[method] and config.density is None:
        raise UserError(f"merge.density: is not set; {method!r} needs a number above 0 and at most 1")
    values = {
        "density": config.density,
        "scale": 1.0 if config.scale is None else config.scale,
        "seed": fold_seed(config.seed or 0),
    }
    return {name: values[name] for name in METHOD_OPTIONS[method]}


def _check_output(config: MergeSettings, workdir: pathlib.Path | None) -> None:
    """Refuses an output that is taken, or none, before anything is read."""
    if not config.output:
        if not workdir:
            raise UserError("merge.output: no folder to write to; set it, or give --workdir")
        return
    refuse_remote(config.output, "a merged model", "write it to a folder and copy that")
    output = pathlib.Path(config.output)
    with disk_errors(output):
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise UserError(f"{output}: exists and is not empty; choose another merge.output")


def _free_folder(exports: pathlib.Path) -> pathlib.Path:
    """The first of soup, soup-2, soup-3, ... in a folder that is free: another mix is another export."""
    names = itertools.chain(["soup"], (f"soup-{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := exports / name).exists() or not any(path.iterdir()))


def _place(path: str | None, folder: pathlib.Path | None) -> dict[str, Json]:
    """Where others find the model of `folder`: its name and commit on the hub, its address, or its absolute path."""
    if not path or not folder:
        return {"folder": None}
    name, commit = (path, None) if is_remote(path) else portable(path, folder)
    return {"folder": name, "commit": commit} if commit else {"folder": name}


def _write_adapter(
    work: pathlib.Path,
    base: pathlib.Path | None,
    origin: dict[str, Json],
    ingredients: Sequence[Ingredient],
    dtype: str,
    model_type: str,
) -> str:
    """Writes the rank-concatenated adapter; returns its dtype.

    Args:
      origin: of the base, see `_place`; where None, what the first adapter records.
    """
    head_dim = 0
    if base:
        config = read_config(base)
        head_dim = config.head_dim
        for ingredient in ingredients:
            check_adapter(ingredient, config, base)
    noted = read_json(ingredients[0].folder / ADAPTER_CONFIG)
    recorded, revision = noted.get("base_model_name_or_path"), noted.get("revision")
    if isinstance(recorded, str) and (found := ingredients[0].folder / recorded).is_dir():  # relative to the adapter
        recorded = str(found.resolve())
    combined = combine_adapters(lora.concatenate, ingredients)
    with np.errstate(over="ignore"):  # what is too large for `dtype` is refused when it is written
        adapter = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), combined)
    rank = next(a for path, a in jax.tree.leaves_with_path(adapter) if path[-1].key == "a").shape[-1]
    if origin["folder"]:
        recorded, revision = origin["folder"], origin.get("commit")
    save_peft(work, adapter, rank, rank, recorded, model_type, head_dim, revision)
    return dtype
