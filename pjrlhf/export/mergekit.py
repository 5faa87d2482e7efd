"""Ingredients as full models, and recipes by which mergekit makes a soup of them.

`task_arithmetic` without normalisation is base + sum_i w_i (theta_i - base). `linear` is the same as a weighted sum
with the base, whose weight is 1 - sum_i w_i.
"""

import json
import math
import pathlib
from collections.abc import Mapping

from pjrlhf.export import merged
from pjrlhf.export.soup import Source
from pjrlhf.types import Json

RECIPES = {"task_arithmetic": "task_arithmetic.yaml", "linear": "linear.yaml"}


def write(
    work: pathlib.Path, output: pathlib.Path, source: Source, weights: Mapping[str, float], dtype: str | None
) -> None:
    """Writes one full model per ingredient of the soup, and the recipes.

    Args:
      output: what `work` will be called, which the recipes name.
      dtype: of the ingredients and of what mergekit writes; that of the base where None.

    Raises:
      UserError: a tensor is not finite.
    """
    for name in weights:
        merged.write(work / name, source, {name: 1.0}, dtype)
    kind = str(json.loads((work / next(iter(weights)) / "config.json").read_text())["dtype"])
    base, commit = source.origin
    models = {str((output / name).absolute()): weight for name, weight in weights.items()}
    for method, file in RECIPES.items():
        (work / file).write_text(_recipe(method, (base, commit), models, kind), encoding="utf-8")


def _recipe(method: str, base: tuple[str, str | None], models: Mapping[str, float], dtype: str) -> str:
    path, commit = base
    # mergekit reads "@" and "+" in a plain name as a revision and an adapter.
    place: dict[str, Json] = {"model": {"path": path, **({"revision": commit} if commit else {})}}
    entries = [({"model": {"path": one}}, weight) for one, weight in models.items()]
    if method == "linear":
        entries.append((place, 1.0 - math.fsum(models.values())))
    lines = ["models:"]
    for one, weight in entries:
        lines += [f"  - model: {json.dumps(one)}", "    parameters:", f"      weight: {float(weight)!r}"]
    lines.append(f"merge_method: {method}")
    if method != "linear":
        lines.append(f"base_model: {json.dumps(place)}")
    lines += ["parameters:", "  normalize: false", "dtype: float32", f"out_dtype: {dtype}"]
    return "\n".join(lines) + "\n"
