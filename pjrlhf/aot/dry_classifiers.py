"""The classifiers of a dry run: what they hold of every chip beside the steps, and what scoring takes."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from pjrlhf.aot.dry_run import DryRun, decoder_shapes
from pjrlhf.models.attention import choose
from pjrlhf.models.classifier import class_logits
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.families import FAMILIES
from pjrlhf.models.folders import read_json
from pjrlhf.models.hub import config_folder
from pjrlhf.models.huggingface import read_config
from pjrlhf.parallel.mesh import batch_sharding
from pjrlhf.runtime.classifiers import SHORTEST, ClassifierSettings
from pjrlhf.settings import parse
from pjrlhf.types import Params, Tree

Specs: TypeAlias = Sequence[tuple[str, Any]]  # (setting, specification) of reward sources or judges
REWARDS = "rewards."


@dataclasses.dataclass(frozen=True)
class DryClassifier:
    """A classifier on the mesh.

    Attributes:
      name: of the first setting that asks it.
      config: dimensions of its decoder.
      params: shapes of {"decoder", "score"}, sharded.
    """

    name: str
    settings: ClassifierSettings
    config: ModelConfig
    params: Params

    @property
    def bytes(self) -> int:
        """What its weights take of each chip."""
        return bytes_per_chip(self.params)


def bytes_per_chip(tree: Tree) -> int:
    """Bytes that arrays of these shapes and shardings take of each chip."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def decoder_of(run: DryRun, config: ModelConfig, dtype: str, **options: Any) -> Decoder:
    """A decoder on the mesh of a dry run, whose rows are split over the chips."""
    mesh = run.devices.mesh
    return Decoder(
        config,
        dtype=jnp.dtype(dtype),
        attention=choose("auto", mesh.devices.flat[0].platform, dtype, mesh.size),
        batch_sharding=batch_sharding(mesh) if mesh.size > 1 else None,
        **options,
    )


def rewards_of(run: DryRun) -> Specs:
    """(setting, specification) of the reward sources of a run."""
    return [(f"{REWARDS}{name}", spec) for name, spec in run.audience.source_specs.items()]


def classifiers_of(run: DryRun, specs: Specs) -> list[DryClassifier]:
    """The classifiers among reward sources that run on the mesh, each folder once; of it only config.json is read.

    Raises:
      UserError: settings that are not known, or a config.json that cannot be read.
    """
    found: dict[tuple[str, str, int], DryClassifier] = {}
    for name, spec in specs:
        if not isinstance(spec, Mapping) or spec.get("kind") != "classifier":
            continue
        values = {key: value for key, value in spec.items() if key not in ("kind", "missing")}
        settings = parse(ClassifierSettings, values, name)
        folder = config_folder(settings.path)
        if read_json(folder / "config.json").get("model_type") not in FAMILIES:
            logging.info("%s: %s runs in torch, beside the chips", name, settings.path)
            continue
        key = settings.path, settings.dtype, settings.batch_size
        if key not in found:
            config = read_config(folder)
            config = config.replace(tie_embeddings=True, biases=tuple(b for b in config.biases if b != "head"))
            found[key] = DryClassifier(name, settings, config, _params(run, config, settings.dtype))
    return list(found.values())


def _params(run: DryRun, config: ModelConfig, dtype: str) -> Params:
    score = jax.ShapeDtypeStruct((config.hidden_size, 1), jnp.float32)
    return {
        "decoder": run.devices.shard(decoder_shapes(config, dtype)),
        **run.devices.shard({"score": score}),
    }


def compile_classifiers(run: DryRun, classifiers: Iterable[DryClassifier], beside: Tree) -> None:
    """Scoring `sample_rows` answers of the greatest length by each of `classifiers`, which all lie on the chips, while
    `beside` lies there too.
    """
    for one in classifiers:
        s = one.settings
        rows = run.devices.even(s.batch_size or run.text.sample_rows)
        longest = run.settings.data.max_prompt + run.settings.data.max_completion
        length = max(SHORTEST, 1 << (longest - 1).bit_length())
        length = min(filter(None, (length, one.config.max_length, s.max_length)))
        model = decoder_of(run, one.config, s.dtype)
        whole: Any = np.zeros((rows, length), np.int32)
        batch = run.devices.place((whole, whole.astype(bool), whole[:, 0]))
        with (
            run.devices.part(f"classifier of {one.name.removeprefix(REWARDS)}"),
            run.devices.beside(bytes_per_chip(beside) - one.bytes),
        ):
            run.devices.program(functools.partial(class_logits, model))(one.params, *batch)
