"""Several methods on one base, one set of comparisons and one set of reward models: every entry of `config.methods` is
trained into <workdir>/methods/<name>.

An entry says how it is trained (`train`: policy, modpo, ric, or "package.module:TRAINER" of yours; "" for one that
trains nothing), what differs from the section of that trainer, and how it answers (see `answering`).
"""

import contextlib
import dataclasses
import difflib
import importlib
import pkgutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging

from pjrlhf import algorithms
from pjrlhf.algorithms.answering import AnswerSettings, by_base, by_one_adapter
from pjrlhf.errors import UserError
from pjrlhf.parallel.processes import on_process_zero
from pjrlhf.registry import load
from pjrlhf.runtime.answers import EvaluatedPolicy
from pjrlhf.runtime.run import Run, Sections, Stage, Trainer
from pjrlhf.settings import Settings, overlay, parse
from pjrlhf.training.workdir import read_object, write_json


def trainer_of(name: str) -> Trainer:
    """The trainer of a name: `TRAINER` of the module of that name in this folder, or "package.module:trainer" of yours.

    Raises:
      UserError: there is none.
    """
    known = [module.name for module in pkgutil.iter_modules(algorithms.__path__)]
    if name in known:
        found = getattr(importlib.import_module(f"pjrlhf.algorithms.{name}"), "TRAINER", None)
    elif ":" in name:
        found = load(name, "methods: train")
    else:
        found = None
    if isinstance(found, Trainer):
        return found
    names = [one for one in known if hasattr(importlib.import_module(f"pjrlhf.algorithms.{one}"), "TRAINER")]
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]!r}? The choices are" if near else "choose one of"
    raise UserError(f"methods: train {name!r} is no trainer; {hint} {', '.join(names)}, or package.module:name")


def folder(name: str) -> str:
    """Where an entry lives, below the run directory."""
    return f"methods/{name}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of `config.methods`.

    Attributes:
      train: name of its trainer; "" for an entry that trains nothing.
      answering: what it says about answering.
      changes: what differs from the section of its trainer.
    """

    name: str
    train: str
    answering: AnswerSettings
    changes: Mapping[str, Any]

    @property
    def stage(self) -> str:
        """The folder that holds its adapters, below the run directory."""
        return folder(self.answering.of or self.name)


def entry(run: Sections, name: str) -> Entry:
    """The entry of that name.

    Raises:
      UserError: there is none, or it says something wrong about answering.
    """
    if name not in run.settings.methods:
        raise UserError(f"methods: there is no entry {name!r}; there are {', '.join(run.settings.methods)}")
    found = run.settings.methods[name]
    if not isinstance(found, Mapping):
        raise UserError(f"methods.{name}: {found!r} is not an entry; give settings such as {{'train': 'policy'}}")
    changes = dict(found)
    train = changes.pop("train", "policy")
    own = {field.name for field in dataclasses.fields(AnswerSettings)}
    answering = parse(AnswerSettings, {key: changes.pop(key) for key in own & changes.keys()}, f"methods.{name}")
    if answering.of and answering.of not in run.settings.methods:
        raise UserError(f"methods.{name}.of: there is no entry {answering.of!r}; name one of the others")
    return Entry(name, train, answering, changes)


def settings_of(run: Sections, name: str) -> Settings:
    """The section that trains an entry, with the changes of the entry.

    Raises UserError for an unknown trainer or setting.
    """
    found = entry(run, name)
    return overlay(trainer_of(found.train).settings(run), found.changes, f"methods.{name}")


def check(run: Sections) -> None:
    """Raises UserError for an entry that cannot be trained or answer as it stands."""
    for name in run.settings.methods:
        if train := entry(run, name).train:
            settings = settings_of(run, name)
            if check := trainer_of(train).check:
                with _named(name):
                    check(run, settings)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts the name of an entry before the messages of its trainer."""
    try:
        yield
    except UserError as error:
        raise UserError(f"methods.{name}: {error}") from error


def evaluated(run: Run, name: str) -> EvaluatedPolicy:
    """A trained entry, ready to be asked.

    Raises:
      UserError: it cannot answer as it says.
    """
    found = entry(run, name)
    source = entry(run, found.answering.of or name)
    if source.train:
        answers = trainer_of(source.train).answers or by_one_adapter
        policy = answers(run, settings_of(run, source.name), found.stage, found.answering)
    else:
        policy = by_base(run, found.answering)
    return dataclasses.replace(policy, best_of=found.answering.best_of)


def run(run: Run) -> dict[str, Any]:
    """Trains the entries that are not yet trained."""
    for name in run.settings.methods:
        if not (train := entry(run, name).train):
            continue
        stage, settings = folder(name), settings_of(run, name)
        described = settings.to_dict()
        kept = run.workdir.stage(stage) / "settings.json"
        if run.workdir.finished(stage):
            if read_object(kept, f"delete {kept.parent} to train it again") != described:
                raise UserError(f"methods.{name}: trained with other settings before; choose another name for it")
            run.workdir.check_outputs(stage)
            logging.info("%s: finished before, skipped", stage)
            continue
        started = time.perf_counter()
        info = trainer_of(train).train(run, settings, stage)
        on_process_zero(write_json)(kept, described)
        run.workdir.mark_finished(stage, time.perf_counter() - started, **info)
    return {"methods": list(run.settings.methods)}


STAGE = Stage("methods", run)
