"""One run: its settings, and the objects that each know one thing about it.

A stage reads the results of earlier stages from the run directory and writes its own there, so that any prefix of a
run can be continued in a new process.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging

from pjrlhf.data.tokenization import TokenTable
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import AdapterConfig, is_low_rank
from pjrlhf.parallel.mesh import bytes_per_device
from pjrlhf.rollout.reference import cache_key, reference_logps, summed_logps
from pjrlhf.rollout.sampler import Sampling
from pjrlhf.runtime.audience import NAMED, Audience
from pjrlhf.runtime.devices import Devices, MeshSettings
from pjrlhf.runtime.records import CorpusSettings, DataSettings, Records
from pjrlhf.runtime.sampler import PoliciesOf, Sampler, mixed
from pjrlhf.runtime.scorer import Scorer
from pjrlhf.runtime.streams import Streams
from pjrlhf.runtime.text import Text
from pjrlhf.runtime.workspace import ModelSettings, Workspace
from pjrlhf.settings import Settings, setting
from pjrlhf.training import loop
from pjrlhf.training.loop import LoopSettings
from pjrlhf.training.state import State
from pjrlhf.training.workdir import Workdir

S = TypeVar("S", bound=Settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotSettings(Settings):
    users: int = setting(1000, "how many people a dry run reckons with", low=1, high=10**9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedSettings(LoopSettings):
    """What all stages of a run share."""

    title: str = setting("", "heads the report")
    seed: int = setting(0, "of all random streams", low=0, high=2**32 - 1)
    seeds: tuple[int, ...] = setting((), "several seeds, one run after the other", low=0, high=2**32 - 1)
    stages: tuple[str, ...] = setting((), "what the run does, in order")
    mesh: MeshSettings = setting(MeshSettings())
    preferences: str | Mapping[str, Any] = setting(
        "synthetic", 'the preferences, or {id: {"dimension": ..., "sentence": ...}}', choices=tuple(NAMED)
    )
    objectives: tuple[str, ...] = setting(
        ("P1A", "P1B", "P2A", "P2B", "P3A", "P3B"), "the preferences that get an ingredient each"
    )
    general: str = setting("", 'a general criterion beside them, such as the reward of RLHF; "" for none')
    judge: str | Mapping[str, Any] = setting(
        "synthetic", "the judge, or {criterion: scorer}; see rewards/scorers.py", choices=("synthetic",)
    )
    prompt_preference: str = setting(
        "never", "whether a prompt states its preference in training", choices=("never", "always", "half")
    )
    model: ModelSettings = setting(ModelSettings())
    adapter: AdapterConfig = setting(AdapterConfig())
    temperature: float = setting(1.0, "of all sampling; 0 is greedy", low=0.0, high=100.0)
    sample_rows: int = setting(256, "rows sampled or scored at once outside training", low=1, high=2**20)
    aot: AotSettings = setting(AotSettings())
    data: DataSettings = setting(DataSettings())
    methods: Mapping[str, Any] = setting({}, "the entries of the stage methods; see algorithms/methods.py")

    def check(self) -> None:
        super().check()
        if len(set(self.objectives)) < len(self.objectives):
            raise UserError(f"objectives: {self.objectives} names one twice; leave it out")
        if not self.objectives:
            raise UserError("objectives: there are none; name the preferences that get an ingredient")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: {self.seeds} has one twice; their spread would be too small")
        if self.general in self.objectives:
            raise UserError(f"general: {self.general!r} is an objective already; leave it empty")
        self.audience.check()

    @functools.cached_property
    def audience(self) -> Audience:
        """Who the run pleases."""
        return Audience(self.preferences, self.objectives, self.general, self.judge)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
      name: of the stage, of its section in the config and of its folder in the run directory.
      run: does the work; the JSON values it returns are recorded in manifest.json.
      settings: the class of its section.
    """

    name: str
    run: Callable[["Run"], dict[str, Any] | None]
    settings: type[Settings] | None = None


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A training method that entries of `methods` can name.

    Attributes:
      settings: the settings of a run -> the section that an entry changes.
      train: (run, settings, stage) -> JSON values for manifest.json: at least "ingredients", the names of the adapters,
        and "samples", how many answers were sampled. Writes <workdir>/<stage>/bank.safetensors, see `algorithms.banks`.
      answers: (run, settings, stage, `algorithms.answering.AnswerSettings`) -> the trained `EvaluatedPolicy`; by
        default its only adapter, named "policy", answers whatever the preferences.
    """

    settings: Callable[["Sections"], Settings]
    train: Callable[["Run", Any, str], dict[str, Any]]
    answers: Callable[["Run", Any, str, Any], Any] | None = None


class Sections:
    """The settings of a run.

    Args:
      settings: what all stages share.
      sections: the settings of the stages, by class.
    """

    def __init__(self, settings: SharedSettings, sections: Mapping[type, Settings]):
        self.settings, self.sections = settings, dict(sections)

    def section(self, kind: type[S]) -> S:
        """The settings of a stage, by their class; the defaults where the config has no such section."""
        found = self.sections.setdefault(kind, kind())
        assert isinstance(found, kind), kind  # sections are kept by their class
        return found


class Run(Sections):
    """One run of a pipeline of stages: its settings, and the objects that each know one thing about it."""

    def __init__(self, settings: SharedSettings, sections: Mapping[type, Settings], workdir: Workdir):
        super().__init__(settings, sections)
        self.workdir = workdir
        self.streams = Streams(settings.seed)
        self.audience = settings.audience

    @functools.cached_property
    def devices(self) -> Devices:
        return Devices(self.settings.mesh, self.settings.data.max_completion)

    @functools.cached_property
    def records(self) -> Records:
        return Records(self.settings.data, self.audience, self.streams, self.corpus)

    @property
    def corpus(self) -> CorpusSettings:
        """What the base is fine-tuned on, by the stage that does so."""
        found = [section for section in self.sections.values() if isinstance(section, CorpusSettings)]
        return found[0] if found else CorpusSettings()

    @functools.cached_property
    def workspace(self) -> Workspace:
        s = self.settings
        return Workspace(s.model, s.adapter, self.workdir, self.devices, self.records, "sft" in s.stages)

    @functools.cached_property
    def text(self) -> Text:
        s = self.settings
        return Text(s.data, self.workspace, self.devices, s.temperature, s.sample_rows)

    # ---- what stages do alike

    def sampler(self, policies: PoliciesOf = mixed, sampling: Sampling | None = None) -> Sampler:
        """Samples answers `sample_rows` at a time."""
        if policies is mixed and sampling is None:
            return self._sampler
        return Sampler(self.text, self.workspace.backbone, policies, sampling)

    @functools.cached_property
    def _sampler(self) -> Sampler:
        # One for all stages, so that its programs are compiled once.
        return Sampler(self.text, self.workspace.backbone)

    def scorer(self, size: int = 0) -> Scorer:
        """Scores rows `size` at a time, by default `sample_rows`."""
        return Scorer(self.devices, size or self.text.sample_rows)

    def reference(self, table: TokenTable, rows: int) -> np.ndarray:
        """float32 [N, 2]: log-probs of both answers of every pair under the base, `rows` answers at a time, which are
        kept on disk; see `rollout.reference`.
        """
        workspace, backbone = self.workspace, self.workspace.backbone
        scorer, logps = self.scorer(rows), functools.partial(jax.jit(summed_logps), backbone)
        key = cache_key(table, workspace.base_hash, jax.tree.leaves(backbone.base)[0].dtype, backbone.model)

        def score(answers: list[dict[str, np.ndarray]]) -> np.ndarray:
            lengths = [len(answer["prompt"]) + len(answer["completion"]) for answer in answers]
            return scorer("reference", answers, self.text.pad_completions, logps, lengths)

        return reference_logps(table, key, workspace.cache_folder / "reference", score)

    def train(self, method: loop.Method, stage: str, steps: int) -> State:
        """The state after `steps` steps; see `training.loop.run`."""
        on_start = functools.partial(self._log_bytes, stage)
        return loop.run(method, self.workdir, stage, steps, self.settings, on_start)

    def _log_bytes(self, stage: str, state: State) -> None:
        """Logs what a stage keeps on each device; activations and sampled rows come on top."""
        trained = state.trainable
        if "layers" in trained:  # nothing but a bank, or a whole model
            trained = {"bank" if is_low_rank(trained) else "model": trained}
        base = vars(self.workspace).get("base")  # not read for this
        found = {"base": base} if base is not None else {}
        found |= {**trained, "optimizer": state.opt_state}
        sizes = ", ".join(f"{name} {bytes_per_device(tree):,}" for name, tree in found.items())
        logging.info("stage %s: bytes per device of %d: %s", stage, self.devices.mesh.size, sizes)
