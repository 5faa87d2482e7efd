"""The models of a dry run that judge: what they hold of every chip, and what reading their prompts takes."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf.aot.dry_classifiers import REWARDS, Specs, bytes_per_chip, decoder_of
from pjrlhf.aot.dry_run import DryRun, decoder_shapes
from pjrlhf.judges.language_model import PromptSettings
from pjrlhf.judges.templates import read_template
from pjrlhf.models.adapters import AdapterConfig, Backbone
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.hub import config_folder
from pjrlhf.models.huggingface import read_config
from pjrlhf.rollout.batches import Prompts
from pjrlhf.runtime.judges import MULTIPLE, ModelJudgeSettings, model_key, next_logps
from pjrlhf.settings import parse
from pjrlhf.types import Params, Tree

CHARACTERS = 3  # of a token of English, at least, where its tokenizer is not read
FORMS = 32  # tokens that a verdict may begin with
OF_REWARDS = ("kind", "missing", "criterion", "cache", "baseline", "baseline_column", "score")  # not of the model


@dataclasses.dataclass(frozen=True)
class DryJudge:
    """A judge on the mesh.

    Attributes:
      name: of the first setting that asks it.
      length: tokens of its longest prompt.
      config: dimensions of its decoder.
      params: their shapes, sharded.
    """

    name: str
    settings: ModelJudgeSettings
    length: int
    config: ModelConfig
    params: Params

    @property
    def bytes(self) -> int:
        """What its weights take of each chip."""
        return bytes_per_chip(self.params)


def judges_of(run: DryRun, specs: Specs) -> list[DryJudge]:
    """The model folders among judges and reward sources, each once; of it only config.json is read.

    Raises:
      UserError: settings that are not known, or a config.json that cannot be read.
    """
    found: dict[tuple[Any, ...], DryJudge] = {}
    for name, spec in specs:
        if not isinstance(spec, Mapping) or spec.get("kind") not in ("model", "judge") or not spec.get("path"):
            continue
        values = {key: value for key, value in spec.items() if key not in OF_REWARDS}
        settings = parse(ModelJudgeSettings, values, name)
        compares = spec["kind"] == "model" or spec.get("baseline") or spec.get("baseline_column")
        config = read_config(config_folder(settings.path))
        length = min(_longest(run, settings, "criterion" if compares else "rating"), config.max_length)
        key = model_key(settings)
        if key not in found:
            found[key] = DryJudge(name, settings, length, config, _params(run, config, settings))
        found[key] = dataclasses.replace(found[key], length=max(length, found[key].length))
    return list(found.values())


def _longest(run: DryRun, settings: PromptSettings, default: str) -> int:
    """Tokens of a prompt with request and answers of the greatest length."""
    template, data = read_template(settings.prompt or default), run.settings.data
    answers = 2 if template.kind == "pair" else 1
    words = -(-len(template.system + template.user) // CHARACTERS)
    length = words + data.max_prompt + answers * data.max_completion
    return length + -length % MULTIPLE


def _params(run: DryRun, config: ModelConfig, settings: ModelJudgeSettings) -> Params:
    return run.devices.shard(decoder_shapes(config, settings.param_dtype, settings.quantize))


def compile_judges(run: DryRun, judges: Iterable[DryJudge], beside: Tree) -> None:
    """Reading `batch_size` prompts of the greatest length by each of `judges`, which all lie on the chips, while
    `beside` lies there too.
    """
    for one in judges:
        s = one.settings
        model = decoder_of(run, one.config, s.dtype, user_offset=1)
        whole = np.zeros((run.devices.even(s.batch_size), one.length), np.int32)
        prompts: Any = Prompts(whole, whole.astype(bool))  # pyright: ignore[reportArgumentType]
        backbone, wanted = Backbone(model, AdapterConfig(), one.params), jax.ShapeDtypeStruct((FORMS,), jnp.int32)
        with (
            run.devices.part(f"judge of {one.name.removeprefix(REWARDS)}"),
            run.devices.beside(bytes_per_chip(beside) - one.bytes),
        ):
            run.devices.program(next_logps)(backbone, run.devices.place(prompts), wanted)
