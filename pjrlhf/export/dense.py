"""Writes a merge as a full model: base + sum_i w_i tau_i, or another method, one tensor after the other.

Memory holds the adapters, which are small, and of the full models little. Where a sum meets no adapter, it holds pieces
of a tensor; where it meets one, a single tensor and the running sum; methods that are not sums need the tensor of every
ingredient at once.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.export.ingredients import Ingredient, check_adapter, check_config, combine_adapters
from pjrlhf.export.inherited import Inherited
from pjrlhf.merging import lora, methods, trees
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.families import Family, Slot, check_tensors, get_family, leaf_shapes, tensor_slots
from pjrlhf.models.folders import all_finite, open_tensors, read_json, weight_files
from pjrlhf.models.hf_config import read_config
from pjrlhf.models.huggingface import save_params
from pjrlhf.training.progress import megabytes

SUMS = ("linear", "task_arithmetic")
Index = int | tuple[()]  # the layer of a stacked leaf, else ()


@dataclasses.dataclass(frozen=True)
class FullModel:
    """An open model and its weight; `files` maps the name of a tensor to the file that holds it."""

    folder: pathlib.Path
    files: Mapping[str, Any]
    weight: float

    def check(self, name: str, tensor: np.ndarray) -> None:
        """Raises a UserError for a tensor that is not finite: some methods would spread that, and others hide it."""
        if not all_finite(tensor):
            raise UserError(
                f"{self.folder}: {name} holds NaN or infinity; leave this model out, or use an earlier checkpoint of it"
            )

    def read(self, name: str, slot: Slot) -> np.ndarray:
        """`leaf[index]` of the slot, in the stored dtype."""
        tensor = self.files[name].get_tensor(name)
        self.check(name, tensor)
        return slot.take(tensor)

    def read_wide(self, name: str, slot: Slot) -> np.ndarray:
        """The same in float32 at least."""
        x = self.read(name, slot)
        return x.astype(trees.wide_dtype(x.dtype))


@dataclasses.dataclass(frozen=True)
class LowRankUpdate:
    """The update scale * a @ b of some kernels, and its weight; `factors` maps "layers/mlp/up/a" to [L, D, R]."""

    factors: Mapping[str, np.ndarray]
    scale: float
    weight: float

    def touches(self, path: str) -> bool:
        return f"{path.removesuffix('/kernel')}/a" in self.factors

    def delta(self, path: str, index: Index) -> jax.Array:
        """The update of one layer of a kernel that it touches, [D, F], float32."""
        a, b = (self.factors[f"{path.removesuffix('/kernel')}/{factor}"] for factor in "ab")
        return lora.delta(a[index], b[index], self.scale)

    def applied(self, start: np.ndarray, path: str, index: Index) -> Any:
        """`start` [D, F] plus the update, where it touches the kernel."""
        return start + self.delta(path, index) if self.touches(path) else start


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merge of open models and adapters that computes its tensors when they are written.

    Attributes:
      base: weighted by 1 - sum_i w_i over the full models, so that one-hot weights return theta_i exactly; None without
        a base.
      ingredients: full models and low-rank updates, in the order of the weights.
      slots: name of a tensor on disk -> its places in the parameter tree.
      method: a name of `merging.methods.METHODS`.
      options: what the method reads; `seed` stands for its key.
    """

    base: FullModel | None
    ingredients: Sequence[FullModel | LowRankUpdate]
    slots: Mapping[str, tuple[Slot, ...]]
    method: str
    options: Mapping[str, Any]

    @functools.cached_property
    def places(self) -> dict[tuple[str, Index], tuple[str, Slot]]:
        """(path, layer) of a leaf -> the tensor on disk that holds it, and where."""
        return {(slot.path, slot.index): (name, slot) for name, slots in self.slots.items() for slot in slots}

    @functools.cached_property
    def full(self) -> list[FullModel]:
        """The base, if any, and the full models. Their weights sum to 1."""
        return [x for x in (self.base, *self.ingredients) if isinstance(x, FullModel)]

    @functools.cached_property
    def updates(self) -> list[LowRankUpdate]:
        return [x for x in self.ingredients if isinstance(x, LowRankUpdate)]

    @functools.cached_property
    def dtypes(self) -> dict[str, str]:
        """Path of a leaf -> the dtype in which the base, or the first model, stores it."""
        files = self.full[0].files
        return {path: files[name].dtype(name).name for (path, _), (name, _) in self.places.items()}

    def tensor(self, path: str, index: Index) -> np.ndarray:
        """One layer of a merged leaf, or a whole leaf that is not stacked, in float32 at least."""
        return self._sum(path, index) if self.method in SUMS else self._combination(path, index)

    def _sum(self, path: str, index: Index) -> np.ndarray:
        (name, slot), total = self.places[path, index], None
        for model in self.full:
            if model.weight:
                total = trees.accumulate(total, model.read(name, slot), model.weight)
                jax.block_until_ready(total)  # frees this tensor before the next one is read
        for update in self.updates:
            if update.touches(path):
                total = trees.accumulate(total, update.delta(path, index), update.weight)
        return np.asarray(total)

    def _combination(self, path: str, index: Index) -> np.ndarray:
        name, slot = self.places[path, index]
        start = self.base.read_wide(name, slot) if self.base else None
        leaves = []
        for ingredient in self.ingredients:
            if isinstance(ingredient, FullModel):
                leaves.append(ingredient.read_wide(name, slot))
            else:
                assert start is not None, path  # adapters are refused without a base
                leaves.append(ingredient.applied(start, path, index))
        options = {key: value for key, value in self.options.items() if key != "seed"}
        if "seed" in self.options:
            layer = index if isinstance(index, int) else None
            options["key"] = methods.tensor_key(jax.random.key(self.options["seed"]), path, layer)
        weights = [ingredient.weight for ingredient in self.ingredients]
        return np.asarray(methods.METHODS[self.method](start, leaves, weights, **options))

    def streams(self, dtype: str | None) -> dict[str, Callable[[], Iterator[np.ndarray]]]:
        """For every tensor that is a sum of full models alone, by name on disk: what gives it in pieces.

        Args:
          dtype: of the pieces; the stored dtype where None.
        """
        if self.method not in SUMS:
            return {}
        return {
            name: functools.partial(self._pieces, name, dtype or self.dtypes[slots[0].path])
            for name, slots in self.slots.items()
            if not any(update.touches(slot.path) for update in self.updates for slot in slots)
        }

    def _pieces(self, name: str, dtype: str) -> Iterator[np.ndarray]:
        models = [model for model in self.full if model.weight]
        arrays = [model.files[name].flat(name) for model in models]
        for piece in trees.sum_in_pieces(arrays, [model.weight for model in models], dtype):
            # A sum of finite numbers that is not finite is too large for `dtype`, which the writer says.
            if not all_finite(piece):
                for model, array in zip(models, arrays, strict=True):
                    model.check(name, array)
            yield piece


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A parameter whose layers are computed when they are read: as much of an array as `save_params` needs."""

    shape: tuple[int, ...]
    dtype: np.dtype
    layer: Callable[[Index], np.ndarray]

    def __getitem__(self, index: Index) -> np.ndarray:
        return self.layer(index)


def write_dense(
    work: pathlib.Path,
    base: pathlib.Path | None,
    ingredients: Sequence[Ingredient],
    *,
    dtype: str | None,
    space: str,
    method: str,
    options: Mapping[str, Any],
    inherited: Inherited,
) -> str:
    """Writes the merged model into the folder `work`; returns the dtype of its embedding.

    Args:
      base: folder of the base; None where the weights of the full models sum to 1.
      dtype: of the weights; None keeps those of the base, or of the first ingredient.
      space: "delta" or "factors", see `merge.MergeSettings`.
      method, options: see `Merge`.
      inherited: tokenizer, special tokens and settings of generation.

    Raises:
      UserError: a model or adapter does not fit the base, or the first model; or a tensor that is read or written holds
        NaN or infinity.
    """
    if method == "task_arithmetic":
        ingredients = [dataclasses.replace(x, weight=options["scale"] * x.weight) for x in ingredients]
    source = base or ingredients[0].folder
    raw, config = read_json(source / "config.json"), read_config(source)
    family = get_family(raw["model_type"], source)
    full = [x for x in ingredients if x.adapter is None]
    adapters = [x for x in ingredients if x.adapter is not None]
    for ingredient in full:
        if ingredient.folder != source:
            check_config(ingredient.folder, source)
    for ingredient in adapters:
        check_adapter(ingredient, config, source)
    with contextlib.ExitStack() as stack:
        base_model = None
        if base:
            rest = 1.0 - math.fsum(ingredient.weight for ingredient in full)
            base_model = FullModel(base, _open_model(stack, base, family, config), rest)
        opened: list[FullModel | LowRankUpdate] = []
        for x in [_averaged(adapters)] if space == "factors" else ingredients:
            if x.adapter is None:
                opened.append(FullModel(x.folder, _open_model(stack, x.folder, family, config), x.weight))
            else:
                opened.append(LowRankUpdate(x.factors, x.scale, x.weight))
        merge = Merge(base_model, opened, tensor_slots(family, config), method, options)
        leaves = {
            path: _Leaf(shape, jnp.dtype(merge.dtypes[path]), functools.partial(merge.tensor, path))
            for path, shape in leaf_shapes(config).items()
        }
        with megabytes("merging") as report:
            save_params(
                work,
                config,
                flax.traverse_util.unflatten_dict(leaves, sep="/"),
                model_type=raw["model_type"],
                dtype=dtype,
                tokenizer_folder=inherited.tokenizer,
                token_ids=inherited.token_ids,
                generation=inherited.generation,
                pieces=merge.streams(dtype),
                report=report,
            )
        return dtype or merge.dtypes["embed/embedding"]


def _averaged(adapters: Sequence[Ingredient]) -> Ingredient:
    """The adapter whose factors are the averages of those of `adapters`; weight and scale are 1."""
    return Ingredient(adapters[0].folder, 1.0, combine_adapters(lora.average_factors, adapters), 1, 1.0)


def _open_model(
    stack: contextlib.ExitStack, folder: pathlib.Path, family: Family, config: ModelConfig
) -> Mapping[str, Any]:
    """Tensor name -> the file that holds it, open until `stack` closes; all tensors have their place and shape."""
    files = stack.enter_context(open_tensors(weight_files(folder), family.prefix))
    check_tensors(folder, files, family, config)
    return files
