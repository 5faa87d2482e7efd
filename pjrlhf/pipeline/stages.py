"""What a run does: each stage reads the results of earlier ones from the run directory and adds its own."""

import contextlib
import dataclasses
import importlib
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from pjrlhf import config as configs
from pjrlhf.algorithms import methods, policy
from pjrlhf.data.sources import check_source
from pjrlhf.errors import UserError
from pjrlhf.export import merge
from pjrlhf.export.merge import MergeSettings
from pjrlhf.feedback.samplers import as_spec
from pjrlhf.models.hub import hub_name
from pjrlhf.parallel.processes import is_process_zero
from pjrlhf.paths import expand, is_remote
from pjrlhf.protocols.users import UsersSettings, check_people
from pjrlhf.registry import load
from pjrlhf.rewards.server import is_address, listens
from pjrlhf.rewards.sources import SourceFailed
from pjrlhf.runtime.devices import compilation_cache
from pjrlhf.runtime.inputs import fetch_models, fingerprints
from pjrlhf.runtime.run import Run, Sections, Stage
from pjrlhf.settings import Settings, parse, shown
from pjrlhf.terminal import masked, visible
from pjrlhf.training.progress import progress
from pjrlhf.training.workdir import Workdir, disk_errors, write_lines
from pjrlhf.types import Json

# Settings that may change between two runs in one run directory, because training does not depend on them.
FREE = (
    *("log_every", "loggers", "profile", "aot", "checkpoint_every", "max_to_keep", "keep_best"),
    *("log_completions", "num_completions_to_print"),
    *("title", "seeds", "stages", "methods", "evaluate", "evaluate_users", "evaluate_front", "user_models"),
    "merge",
)
FAILED = "failed_rewards.jsonl"  # what a source was asked when it failed, in the run directory

# Stage -> the module that has it as `STAGE`.
STAGES = {
    # Personalized Soups
    "sft": "pjrlhf.algorithms.sft",
    "comparisons": "pjrlhf.feedback.comparisons",
    "reward": "pjrlhf.algorithms.reward",
    "policy": "pjrlhf.algorithms.policy",
    "evaluate": "pjrlhf.protocols.soups",
    # P-RLHF
    "population": "pjrlhf.feedback.population",
    "preference": "pjrlhf.algorithms.pdpo",
    "evaluate_users": "pjrlhf.protocols.users",
    "user_models": "pjrlhf.protocols.user_models",
    # the multi-objective family
    "methods": "pjrlhf.algorithms.methods",
    "evaluate_front": "pjrlhf.protocols.front",
    "merge": "pjrlhf.pipeline.stages",
}


def stage_of(name: str) -> Stage:
    """The stage of a name, or of "package.module:stage" outside this package.

    Raises:
      UserError: there is none.
    """
    if name in STAGES:
        return importlib.import_module(STAGES[name]).STAGE
    if ":" not in name:
        raise UserError(f"stages: {name!r} is unknown; choose from {', '.join(STAGES)}, or name package.module:stage")
    found = load(name, "stages:")
    if not isinstance(found, Stage):
        raise UserError(f"stages: {name} is no Stage; make it one, see pjrlhf.runtime.run.Stage")
    return found


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config asks for, checked.

    Attributes:
      settings: of this package.
      foreign: sections of stages of other code, by name.
      stages: in order.
    """

    settings: configs.RunSettings
    foreign: Mapping[str, Settings]
    stages: tuple[Stage, ...]

    @property
    def sections(self) -> dict[type, Settings]:
        """The sections of the stages, by class."""
        return self.settings.sections | {type(section): section for section in self.foreign.values()}

    def run(self, workdir: Workdir) -> Run:
        """The run in a folder."""
        return Run(self.settings, self.sections, workdir)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, addresses without secrets."""
        return masked(self.values())

    def values(self) -> dict[str, Any]:
        """All settings as plain values."""
        return self.settings.to_dict() | {name: section.to_dict() for name, section in self.foreign.items()}

    def check_inputs(self, workdir: Workdir) -> None:
        """Checks that the files exist which unfinished stages will read, so that no one is missed hours later.

        Raises:
          UserError: a source or an artefact of another run that does not exist, or a wrong specification of a source.
        """
        waiting = [stage.name for stage in self.stages if not workdir.finished(stage.name)]
        self._check_rewards(waiting, workdir)
        data = self.settings.data
        sections: dict[str, Any] = {}
        if waiting:
            sections |= {"data.prompts": data.prompts, "data.heldout_prompts": data.heldout_prompts or None}
        for name in waiting:
            section = getattr(self.settings, name, None) or self.foreign.get(name)
            sections[f"{name}.data"] = getattr(section, "data", None)
            sections[f"{name}.heldout_data"] = getattr(section, "heldout_data", None) or None
            for key, path in _models(section):
                inside = pathlib.Path(os.path.abspath(path)).is_relative_to(workdir.path)  # this run may make it
                self._check_path(f"{name}.{key}", "" if inside else path)
        for name, spec in self.settings.rewards.items() if waiting else ():
            for key, path in _folders(f"rewards.{name}", spec):
                self._check_path(key, path)
        for name, field in (("reward", "path"), ("preference", "bank")) if waiting else ():
            self._check_path(f"{name}.{field}", getattr(getattr(self.settings, name), field, ""))
        for key, spec in sections.items():
            if isinstance(spec, Mapping):
                check_source(spec, key)
        if is_process_zero():
            values = self.values()
            _tell_servers({name: values.get(name) for name in (*waiting, *(["rewards"] if waiting else []))})

    def _check_rewards(self, waiting: Sequence[str], workdir: Workdir) -> None:
        """Checks that policies will find rewards: those of reward functions, too, have a scale to be measured."""
        made = workdir.finished("reward") or getattr(self.settings.reward, "path", "")
        if "policy" in waiting and not made and "reward" not in waiting[: waiting.index("policy")]:
            raise UserError(
                "stages: policy comes without reward before it, the stage that trains reward models and measures the "
                "scale of all rewards, also of reward functions; add it, or name the file of another run with "
                "--config.reward.path"
            )

    def _check_path(self, key: str, path: str) -> None:
        if path and path not in STAGES and not is_remote(path) and hub_name(path) is None and not os.path.exists(path):
            raise UserError(f"{key}: {path}: no such file; set --config.{key} to one that exists")


def _models(section: Any) -> Iterator[tuple[str, str]]:
    """(key, folder) of the judges and samplers of a section, or of its entries, that are models."""
    if isinstance(section, Settings):
        yield from _named(section.to_dict(), ())


def _named(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name, inner in value.items() if isinstance(value, Mapping) else ():
        own = *keys, str(name)
        for spec in inner if isinstance(inner, list | tuple) else (inner,):
            if name in ("judge", "judges", "sampler"):
                yield from _folders(".".join(own), as_spec(spec) if name == "sampler" and spec else spec)
            yield from _named(spec, own)


def _folders(key: str, spec: Any) -> Iterator[tuple[str, str]]:
    """(key, folder) of the model of a judge, a sampler or a reward source, where it has one that is not read before."""
    if isinstance(spec, Mapping) and spec.get("kind") == "reward":
        yield from _folders(f"{key}.source", spec.get("source"))
    if isinstance(spec, Mapping) and spec.get("kind") in ("model", "judge") and spec.get("path"):
        yield f"{key}.path", expand(str(spec["path"]))


def _tell_servers(values: Mapping[str, Any]) -> None:
    """Warns of servers that do not answer now: a stage may ask one hours later."""
    for url, key in {url: key for key, url in _servers(values, ())}.items():
        if is_address(url) and not listens(url):
            logging.warning(
                "%s: nothing listens at %s now; start it before its stage asks it, or that stage ends the run (the "
                "same command then goes on)",
                key,
                masked(url),
            )


def _servers(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(key, address) of the servers that judge, answer or reward."""
    if isinstance(value, Mapping) and not value.get("replay"):
        for name, inner in value.items():
            if name in ("base_url", "url") and isinstance(inner, str) and inner:
                yield ".".join((*keys, name)), inner
            yield from _servers(inner, (*keys, str(name)))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _servers(inner, keys)


def _judges(section: Any) -> list[tuple[str, Any]]:
    """(key, specification) of the judges of a section."""
    return [("judge", getattr(section, "judge", None)), *(("judges", one) for one in getattr(section, "judges", ()))]


def read(config: ConfigDict | Mapping[str, Json]) -> Plan:
    """What a config asks for.

    Raises:
      UserError: an unknown stage or key, or a bad value.
    """
    values = dict(config)
    names = values.get("stages", ())
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"stages: {shown(names)} is not a list of names; choose from {', '.join(STAGES)}")
    stages = tuple(stage_of(name) for name in names)
    names = [stage.name for stage in stages]
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(f"stages: {shown(repeated[0])} comes twice; name each stage once")
    # A stage of other code has a section of its own class under its name.
    known = {field.name for field in dataclasses.fields(configs.RunSettings)}
    kinds = {stage.name: stage.settings for stage in stages if stage.name not in known and stage.settings}
    foreign = {name: parse(kind, values.pop(name, {}), name) for name, kind in kinds.items()}
    plan = Plan(configs.read(values), foreign, stages)
    sections = Sections(plan.settings, plan.sections)
    if policy.STAGE in stages:
        policy.check(sections, policy.settings_of(sections))
    if methods.STAGE in stages:
        methods.check(sections)
    return plan


def run(config: ConfigDict | Mapping[str, Json], workdir: Workdir | str | os.PathLike) -> None:
    """Runs `config.stages` in order; a stage that this run directory has finished is skipped.

    Compiled programs are kept for later runs (`runtime.devices.compilation_cache`).

    Args:
      config: the settings; those that it leaves out have their defaults.
      workdir: the run directory, or its path.

    Raises:
      UserError: an unknown stage, a bad setting, bad input met by a stage, a run directory of another config or with
        other inputs, or one that another run uses.
    """
    plan = read(config)
    compilation_cache()
    workdir = workdir if isinstance(workdir, Workdir) else Workdir(os.fspath(workdir))
    configs.warn_of_rates(plan.settings)
    with workdir.locked():
        plan.check_inputs(workdir)
        workdir.check_config(plan.to_dict(), ignore=FREE)
        fetch_models(plan.values(), workdir)
        workdir.check_contents(fingerprints(plan.values(), workdir.path) if is_process_zero() else {})
        _run(plan, workdir)
        workdir.keep()


def _run(plan: Plan, workdir: Workdir) -> None:
    with contextlib.closing(plan.run(workdir)) as run:
        _run_stages(plan, run, workdir)


def _run_stages(plan: Plan, run: Run, workdir: Workdir) -> None:
    if not all(workdir.finished(stage.name) for stage in plan.stages):
        for source in (*run.audience.sources.values(), *run.audience.judging_sources.values()):
            source.check_columns(run.records.columns)
        for section in map(run.section, filter(None, (stage.settings for stage in plan.stages))):
            for _, spec in () if isinstance(section, UsersSettings) else _judges(section):  # its judge needs a person
                if isinstance(spec, Mapping) and spec.get("kind") in ("reward", "chat", "model"):
                    run.judge(spec)  # checks columns
            if isinstance(section, UsersSettings) and section.judge:
                check_people(run)
    for stage in plan.stages:
        # The entries of `methods` are settings that all stages share.
        section = masked(run.section(stage.settings).to_dict()) if stage.settings else plan.to_dict().get(stage.name)
        done = workdir.finished(stage.name)
        if done and not all((workdir.path / place).exists() for place in (stage.writes, str(done.get("output", "")))):
            done = None  # a report, or a merged model, that was deleted
        # Sections that may change between two runs of one folder (evaluate) make their stage run again.
        if done and done.get("config") == section:
            workdir.check_outputs(stage.name)
            logging.info("stage %s: finished before, skipped", stage.name)
            continue
        started = time.perf_counter()
        try:
            with progress(f"stage {stage.name}", 1):  # whatever has no progress of its own
                info = stage.run(run) or {}
        except SourceFailed as error:
            path = workdir.path / FAILED
            if is_process_zero():
                with disk_errors(path):
                    write_lines(path, error.batch)
            raise UserError(f"{error}; what it was asked is in {path}") from error
        run.end_stage()
        workdir.mark_finished(stage.name, time.perf_counter() - started, config=section, **info)


def _merge(run: Run) -> dict[str, Any]:
    """Merges as the section `merge` says; one process writes."""
    if not is_process_zero():
        return {}
    manifest = merge.merge(run.section(MergeSettings), run.workdir.path)
    print(f"merged model: {visible(manifest['output'])}")
    if "pushed" in manifest:
        print(f"pushed to {visible(manifest['pushed'])}")
    return manifest


STAGE = Stage("merge", _merge, MergeSettings)
