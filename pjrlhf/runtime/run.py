"""A run: its settings, and the objects that its stages share.

A stage reads the results of earlier stages from the run directory and writes its own there, so a new process can
continue after any stage.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging

from pjrlhf.data.messages import Prompt
from pjrlhf.data.named_preferences import NAMED
from pjrlhf.data.packing import PackedRows
from pjrlhf.data.token_table import TokenRow, TokenTable
from pjrlhf.errors import UserError
from pjrlhf.judges.judge import BothOrders, JudgeContext, RewardJudge, ScoreJudge, judge_from
from pjrlhf.judges.language_model import LanguageModelJudge
from pjrlhf.models.adapters import AdapterConfig, is_low_rank
from pjrlhf.models.quantization import check_quantize
from pjrlhf.parallel.mesh import bytes_per_device
from pjrlhf.rewards.sources import SourceContext
from pjrlhf.rollout.reference import cache_key, reference_logps, summed_logps
from pjrlhf.rollout.sampler import Sampling
from pjrlhf.runtime.audience import Audience
from pjrlhf.runtime.baselines import BaseAnswers
from pjrlhf.runtime.devices import Devices, MeshSettings
from pjrlhf.runtime.packed_answers import PackedAnswers
from pjrlhf.runtime.records import CorpusSettings, DataSettings, Records
from pjrlhf.runtime.sampler import PoliciesOf, Sampler, mixed
from pjrlhf.runtime.scorer import Scorer
from pjrlhf.runtime.streams import Streams
from pjrlhf.runtime.text import Text
from pjrlhf.runtime.workspace import ModelSettings, Workspace, context_of
from pjrlhf.settings import SEEDS, Settings, check_names, setting
from pjrlhf.training import loop
from pjrlhf.training.loop import LoopSettings
from pjrlhf.training.state import State
from pjrlhf.training.workdir import Workdir

S = TypeVar("S", bound=Settings)
TIE = 1e-9  # scores closer than this are equal up to rounding


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotSettings(Settings):
    """Settings of a dry run."""

    users: int = setting(1000, "number of users in a dry run", low=1, high=10**9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedSettings(LoopSettings):
    """The settings that all stages of a run share."""

    title: str = setting("", "heading of the report")
    seed: int = setting(0, "seed of all random streams", low=SEEDS[0], high=SEEDS[1])
    seeds: tuple[int, ...] = setting((), "several seeds; one run follows the other", low=SEEDS[0], high=SEEDS[1])
    stages: tuple[str, ...] = setting((), "stages of the run, in order")
    mesh: MeshSettings = setting(MeshSettings())
    preferences: str | Mapping[str, Any] = setting(
        "synthetic", 'the preferences, or {id: {"dimension": ..., "sentence": ...}}', choices=tuple(NAMED)
    )
    objectives: tuple[str, ...] = setting(
        ("P1A", "P1B", "P2A", "P2B", "P3A", "P3B"), "preferences with an ingredient of their own"
    )
    general: str = setting("", 'a further general criterion, such as the reward of RLHF; "" for none')
    judge: str | Mapping[str, Any] = setting(
        "synthetic",
        "the judge of answers; rewards, the sources of the run; or {criterion: scorer, or reward source that only "
        "judges}, see rewards/scorers.py and rewards/sources.py",
        choices=("synthetic", "rewards"),
    )
    rewards: Mapping[str, Any] = setting(
        {},
        "{objective: reward source}, such as my_package.my_module:my_function; the others have reward models of the "
        "stage reward; see rewards/sources.py",
    )
    prompt_preference: str = setting(
        "never", "whether a prompt states its preference in training", choices=("never", "always", "half")
    )
    model: ModelSettings = setting(ModelSettings())
    adapter: AdapterConfig = setting(AdapterConfig())
    temperature: float = setting(1.0, "temperature of all sampling; 0 is greedy", low=0.0, high=100.0)
    sample_rows: int = setting(256, "rows that are sampled or scored at once outside training", low=1, high=2**20)
    aot: AotSettings = setting(AotSettings())
    data: DataSettings = setting(DataSettings())
    methods: Mapping[str, Any] = setting({}, "entries of the stage methods; see algorithms/methods.py")

    def check(self) -> None:
        super().check()
        if len(set(self.objectives)) < len(self.objectives):
            raise UserError(f"objectives: {self.objectives} repeats one; leave it out")
        if not self.objectives:
            raise UserError("objectives: is empty; name the preferences that get an ingredient")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: {self.seeds} repeats one, which understates their spread; leave it out")
        if self.general in self.objectives:
            raise UserError(f"general: {self.general!r} is an objective already; leave it empty")
        check_names("objectives", self.objectives)
        check_names("general", filter(None, [self.general]))
        check_names("methods", self.methods)
        check_quantize(self.model.quantize, self.adapter.rank)
        self.audience.check()

    @property
    def user_tokens(self) -> int:
        """The most user tokens that stand before a prompt of this run."""
        return 0

    def within_context(self) -> "SharedSettings":
        """These settings with lengths of texts that the base can read; as they are where its folder does not tell."""
        found = context_of(self.model)
        if found is None:
            return self
        context, learned = found
        data = self.data.within(context, self.user_tokens, learned)
        return self if data is self.data else self.replace(data=data)

    @functools.cached_property
    def audience(self) -> Audience:
        """The preferences, objectives, judge and reward sources of the run."""
        return Audience(self.preferences, self.objectives, self.general, self.judge, self.rewards)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
      name: of the stage, its section in the config and its folder in the run directory.
      run: does the work and returns JSON values for manifest.json.
      settings: the class of its section; None for a stage without settings.
      writes: a file in the run directory, outside its folder, without which a finished stage runs again.
    """

    name: str
    run: Callable[["Run"], dict[str, Any] | None]
    settings: type[Settings] | None = None
    writes: str = ""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A training method that entries of `methods` can name.

    Attributes:
      settings: the settings of a run -> the section that an entry changes.
      train: (run, settings, stage) -> JSON values for manifest.json: at least "ingredients", the names of the adapters,
        and "samples", how many answers were sampled. Writes <workdir>/<stage>/bank.safetensors, see `algorithms.banks`.
      answers: (run, settings, stage, `algorithms.answering.AnswerSettings`) -> the trained `EvaluatedPolicy`. None
        for a method whose only adapter, named "policy", answers for all preferences.
      check: (settings of a run, settings) -> nothing; raises UserError for settings that cannot be trained with.
    """

    settings: Callable[["Sections"], Settings]
    train: Callable[["Run", Any, str], dict[str, Any]]
    answers: Callable[["Run", Any, str, Any], Any] | None = None
    check: Callable[["Sections", Any], object] | None = None


class Sections:
    """The settings of a run.

    Args:
      settings: those that all stages share.
      sections: those of the stages, by class.
    """

    def __init__(self, settings: SharedSettings, sections: Mapping[type, Settings]):
        self.settings, self.sections = settings, dict(sections)
        self.audience = settings.audience

    def section(self, kind: type[S]) -> S:
        """The settings of a stage by their class; the defaults where the config does not have the section."""
        found = self.sections.setdefault(kind, kind())
        assert isinstance(found, kind), kind  # keys are the classes of the values
        return found


class Run(Sections):
    """A run: its settings, and the objects that its stages share, which are created at first use.

    Args:
      settings: those that all stages share.
      sections: those of the stages, by class.
      workdir: the run directory.
    """

    def __init__(self, settings: SharedSettings, sections: Mapping[type, Settings], workdir: Workdir):
        settings = settings.within_context()
        super().__init__(settings, sections)
        self.workdir = workdir
        self.streams = Streams(settings.seed)
        self.context = SourceContext(
            devices=lambda: self.devices,
            rows=settings.sample_rows,
            folder=workdir.path,
            base_answers=lambda prompts, how: self.base_answers(prompts, how),
        )
        self.audience = settings.audience.within(self.context)
        self.judging = self.context.nested()  # of the judges of a stage

    @functools.cached_property
    def devices(self) -> Devices:
        return Devices(self.settings.mesh, self.settings.data.max_completion)

    def end_stage(self) -> None:
        """Ends what the judges of a stage hold, such as models on the mesh, so that it is free for the next stage."""
        self.judging.close()

    def close(self) -> None:
        """Ends what the reward sources and judges of the run hold, such as processes of their own."""
        self.judging.close()
        self.context.close()

    @functools.cached_property
    def records(self) -> Records:
        return Records(
            self.settings.data,
            self.audience,
            self.streams,
            self.corpus,
            has_chat_template=lambda: self.workspace.has_chat_template,
            fitting=lambda examples, name: self.text.fitting(examples, name),
            note=self.workdir.check_contents,
        )

    @property
    def corpus(self) -> CorpusSettings:
        """The corpus of the stage that fine-tunes the base."""
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

    # ---- operations that stages share

    def sampler(self, policies: PoliciesOf = mixed, sampling: Sampling | None = None) -> Sampler:
        """A sampler of answers in chunks of `sample_rows`.

        Args:
          policies: makes the policies of a chunk.
          sampling: the sampling settings; those of the run where None.
        """
        if policies is mixed and sampling is None:
            return self._sampler
        return Sampler(self.text, self.workspace.backbone, policies, sampling)

    @functools.cached_property
    def _sampler(self) -> Sampler:
        # All stages share it, so that its programs compile once.
        return Sampler(self.text, self.workspace.backbone)

    @functools.cached_property
    def base_answers(self) -> BaseAnswers:
        """Answers of the base to plain requests, the same whenever they are asked for."""

        def sample(requests: Sequence[Prompt], how: str, number: int) -> list[str]:
            sampler = self.sampler(sampling=self.text.sampling(temperature=0.0)) if how == "greedy" else self._sampler
            prompts = [self.records.ask(request) for request in requests]
            return sampler("answers of the base", prompts, lambda i: self.streams.key("rewards/baseline", number, i))

        return BaseAnswers(self.workdir.path, self.workspace.base_hash, sample)

    def judge(self, spec: str | Mapping[str, Any]) -> BothOrders:
        """The judge that a config names, asked in both orders; see `judges.judge.judge_from`."""
        criteria = self.audience.sentences
        context = JudgeContext(self.scores, criteria, self.workdir.path, self.judging, self.records.columns_of)
        found = judge_from(spec, context)
        if isinstance(found, RewardJudge):
            found.check(self.records.columns)
        if isinstance(found, LanguageModelJudge) and found.template.columns:
            found.check_columns(self.records.columns)
        return BothOrders(found)

    @functools.cached_property
    def scores(self) -> ScoreJudge:
        """The judge by the scores of the run. All stages share it, so that each answer is scored once."""

        def together(requests: Sequence[Prompt], texts: Sequence[str], criterion: str) -> np.ndarray:
            return self.audience.scores(requests, texts, criterion, self.records.columns_of(requests))

        return ScoreJudge(self.audience.score, TIE, together if self.audience.judging_sources else None)

    def scorer(self, size: int = 0) -> Scorer:
        """A scorer of rows in chunks of `size`; of `sample_rows` where 0."""
        return Scorer(self.devices, size or self.text.sample_rows)

    def answer_scores(
        self, name: str, answers: Sequence[TokenRow], score: Callable[[PackedRows], jax.Array], rows: int = 0
    ) -> np.ndarray:
        """Scores [M, ...] of M answers in packed rows; see `runtime.packed_answers.PackedAnswers`.

        Args:
          rows: answers at once; `sample_rows` where 0.
        """
        return PackedAnswers(self.text, answers, rows or self.text.sample_rows).scores(name, score)

    def reference(self, table: TokenTable, rows: int) -> np.ndarray:
        """Log-probabilities of both answers of N pairs under the base: float32 [N, 2], in nats, cached on disk.

        Args:
          rows: answers at once.
        """
        workspace, backbone = self.workspace, self.workspace.backbone
        logps = functools.partial(jax.jit(summed_logps), backbone)
        key = cache_key(table, workspace.base_hash, jax.tree.leaves(backbone.base)[0].dtype, backbone.model)
        name = f"reference log-probs of {table.bad.source_name}"
        score = functools.partial(self.answer_scores, name, score=logps, rows=rows)
        return reference_logps(table, key, workspace.cache_folder / "reference", score)

    def train(self, method: loop.Method, stage: str, steps: int) -> State:
        """Trains a method and returns its state after `steps` steps; see `training.loop.run`."""
        on_start = functools.partial(self._log_bytes, stage)
        return loop.run(method, self.workdir, stage, steps, self.settings, on_start)

    def _log_bytes(self, stage: str, state: State) -> None:
        """Logs the memory of parameters and optimizer per device, without activations and sampled rows."""
        trained = state.trainable
        if "layers" in trained:  # the bank or the whole model, and nothing else
            trained = {"bank" if is_low_rank(trained) else "model": trained}
        base = vars(self.workspace).get("base")  # does not load the base
        found = {"base": base} if base is not None else {}
        found |= {**trained, "optimizer": state.opt_state}
        sizes = ", ".join(f"{name} {bytes_per_device(tree):,}" for name, tree in found.items())
        logging.info("stage %s: bytes per device of %d: %s", stage, self.devices.mesh.size, sizes)
