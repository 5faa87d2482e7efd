"""The folders that go into a merge, and the checks that they fit each other and the base."""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.traverse_util
import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.families import leaf_shapes
from pjrlhf.models.folders import read_json
from pjrlhf.models.hf_config import read_config
from pjrlhf.models.huggingface import fingerprint
from pjrlhf.models.peft import CONFIG as ADAPTER_CONFIG
from pjrlhf.models.peft import MANIFEST, load_peft
from pjrlhf.models.peft import WEIGHTS as ADAPTER_WEIGHTS
from pjrlhf.paths import content_hash
from pjrlhf.training.progress import megabytes


@dataclasses.dataclass(frozen=True)
class Ingredient:
    """One folder to merge.

    Attributes:
      folder: a full model in Hugging Face layout, or a LoRA adapter in PEFT layout.
      weight: its weight in the merge.
      adapter: nested dict with leaves `a` [L, D, R] and `b` [L, R, F], float32; None for a full model.
      rank, alpha: of the adapter.
    """

    folder: pathlib.Path
    weight: float
    adapter: Any = None
    rank: int = 0
    alpha: float = 0.0

    @property
    def scale(self) -> float:
        """The factor of the update a @ b."""
        return self.alpha / self.rank

    @property
    def factors(self) -> dict[str, np.ndarray]:
        """The leaves of the adapter by "/"-joined path, such as "layers/mlp/up/a"."""
        leaves = flax.traverse_util.flatten_dict(self.adapter, sep="/")
        return {path: np.asarray(leaf) for path, leaf in leaves.items()}

    def manifest_entry(self) -> dict[str, Any]:
        """What the manifest of a merge records: hash of the content, kind and weight."""
        if self.adapter is None:
            kind, content = "full", _fingerprint(self.folder)
        else:
            files = [(self.folder / name).read_bytes() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
            kind, content = "lora", hashlib.sha256(b"".join(files)).hexdigest()[:16]
        return {"hash": content, "kind": kind, "weight": self.weight}


def _fingerprint(folder: pathlib.Path) -> str:
    with megabytes(f"hashing {folder}") as report:
        return fingerprint(folder, report)


def open_ingredient(folder: pathlib.Path, weight: float, model_type: str, head_dim: int) -> Ingredient:
    """Reads the adapter of a PEFT folder; of a full model, nothing is read yet.

    Args:
      model_type, head_dim: of the base, which name the modules of an adapter; see `models.peft.load_peft`.

    Raises:
      UserError: the folder holds neither a model nor an adapter, or an adapter that is not plain LoRA.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return Ingredient(folder, weight, *load_peft(folder, model_type, head_dim))
    if (folder / "config.json").is_file():
        return Ingredient(folder, weight)
    raise UserError(f"{folder}: holds neither config.json nor {ADAPTER_CONFIG}; name a Hugging Face or PEFT folder")


def combine_adapters(function: Callable[..., Any], ingredients: Sequence[Ingredient]) -> Any:
    """One adapter from several, by `lora.concatenate` or `lora.average_factors`.

    Raises:
      UserError: the adapters update different kernels or have different ranks.
    """
    adapters, scales = [x.adapter for x in ingredients], [x.scale for x in ingredients]
    try:
        return function(adapters, scales, [x.weight for x in ingredients])
    except ValueError as error:
        raise UserError(f"merge.ingredients: {error}; use merge.space='delta'") from error


# ---- checks: each raises a UserError that names the folder


def check_kinds(base: pathlib.Path | None, ingredients: Sequence[Ingredient], space: str) -> None:
    """Full models have no factors to concatenate; without a base, all must be full models with weights of sum 1."""
    full = [ingredient for ingredient in ingredients if ingredient.adapter is None]
    if full and space != "delta":
        raise UserError(f"{full[0].folder}: a full model has no low-rank factors; use merge.space='delta'")
    if base is None and space != "concat":
        if len(full) < len(ingredients):
            raise UserError("merge.base: LoRA folders need the model they adapt; set it, or use merge.space='concat'")
        total = math.fsum(ingredient.weight for ingredient in full)
        if abs(total - 1) > 1e-6:
            raise UserError(f"merge.weights: they sum to {total:g}, not 1; make them sum to 1, or set merge.base")


def check_bases(base: pathlib.Path | None, ingredients: Sequence[Ingredient]) -> str | None:
    """Adapters that record the hash of their base must all record that of `base`, or the same one; returns the hash."""
    owner, known = base, _fingerprint(base) if base else None
    for ingredient in ingredients:
        if ingredient.adapter is None or not (ingredient.folder / MANIFEST).is_file():
            continue
        manifest = read_json(ingredient.folder / MANIFEST)
        weights = ingredient.folder / ADAPTER_WEIGHTS
        if manifest.get("checksum", "") not in ("", content_hash(weights)):
            raise UserError(f"{weights}: its contents are not what was saved; restore it, or run its stage again")
        stated = manifest.get("base")
        recorded = stated.get("hash") if isinstance(stated, dict) else None
        if recorded and not known:
            owner, known = ingredient.folder, recorded
        if recorded and recorded != known:
            raise UserError(
                f"{ingredient.folder}: was made for the base {recorded}, not for that of {owner} ({known}); "
                "merge adapters of one base"
            )
    return known


def check_config(folder: pathlib.Path, source: pathlib.Path) -> None:
    """Two full models must have the same family, and settings that give the same numbers."""
    here, there = (
        {"model_type": read_json(f / "config.json").get("model_type"), **dataclasses.asdict(read_config(f).essence)}
        for f in (folder, source)
    )
    for name, value in here.items():
        if value != there[name]:
            raise UserError(f"{folder}: {name} is {value} but {there[name]} in {source}; merge models of one shape")


def check_adapter(ingredient: Ingredient, config: ModelConfig, base: pathlib.Path) -> None:
    """The factors of an adapter must fit the kernels of the base."""
    for path, leaf in ingredient.factors.items():
        module, _, factor = path.rpartition("/")
        L, D, F = leaf_shapes(config)[f"{module}/kernel"]
        expected = (L, D, ingredient.rank) if factor == "a" else (L, ingredient.rank, F)
        if leaf.shape != expected:
            raise UserError(
                f"{ingredient.folder}: {path} has shape {leaf.shape}, {base} needs {expected}; "
                "merge adapters made for this base"
            )
