"""Several methods on one base, one set of comparisons and one set of reward models: every entry of `config.methods` is
trained into <workdir>/methods/<name>.

An entry says how it is trained (`train`: policy, modpo or ric; "" for one that trains nothing) and what differs from
the section of that name; `evaluate_front` says what else an entry may hold.
"""

import importlib
import json
import pkgutil
import time
from collections.abc import Mapping
from typing import Any

from absl import logging

from pjrlhf import algorithms
from pjrlhf.errors import UserError
from pjrlhf.parallel.processes import on_process_zero
from pjrlhf.registry import load
from pjrlhf.runtime.run import Run, Sections, Stage, Trainer
from pjrlhf.settings import Settings, overlay
from pjrlhf.training.workdir import write_json

# What an entry says about answering, not about training; see `protocols.front`.
ANSWERING = ("of", "answer", "extrapolation", "divergence", "prompted")


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
    raise UserError(f"methods: train {name!r} is no trainer; choose one of {', '.join(names)}, or package.module:name")


def folder(name: str) -> str:
    """Where an entry lives, below the run directory."""
    return f"methods/{name}"


def entry(run: Sections, name: str) -> dict[str, Any]:
    """The entry of that name. Raises UserError for one there is not."""
    if name not in run.settings.methods:
        raise UserError(f"methods: there is no entry {name!r}; there are {', '.join(run.settings.methods)}")
    found = run.settings.methods[name]
    if not isinstance(found, Mapping):
        raise UserError(f"methods.{name}: {found!r} is not an entry; give settings such as {{'train': 'policy'}}")
    return dict(found)


def settings_of(run: Sections, name: str) -> Settings:
    """The section that trains an entry, with the changes of the entry.

    Raises UserError for an unknown trainer or setting.
    """
    changes = entry(run, name)
    trainer = trainer_of(changes.pop("train", "policy"))
    changes = {key: value for key, value in changes.items() if key not in ANSWERING}
    return overlay(trainer.settings(run), changes, f"methods.{name}")


def check(run: Sections) -> None:
    """Raises UserError for an entry that cannot be trained as it stands."""
    for name in run.settings.methods:
        changes = entry(run, name)
        if (source := changes.get("of")) and source not in run.settings.methods:
            raise UserError(f"methods.{name}.of: there is no entry {source!r}; name one of the others")
        if changes.get("train", "policy"):
            settings_of(run, name)


def run(run: Run) -> dict[str, Any]:
    """Trains the entries that are not yet trained."""
    for name in run.settings.methods:
        changes = entry(run, name)
        if not changes.get("train", "policy"):
            continue
        stage, settings = folder(name), settings_of(run, name)
        described = settings.to_dict()
        kept = run.workdir.stage(stage) / "settings.json"
        if kept.is_file() and json.loads(kept.read_text(encoding="utf-8")) != described:
            raise UserError(f"methods.{name}: trained with other settings before; choose another name for it")
        if run.workdir.finished(stage):
            logging.info("%s: finished before, skipped", stage)
            continue
        on_process_zero(write_json)(kept, described)
        started = time.perf_counter()
        info = trainer_of(changes.get("train", "policy")).train(run, settings, stage)
        run.workdir.mark_finished(stage, time.perf_counter() - started, **info)
    return {"methods": list(run.settings.methods)}


STAGE = Stage("methods", run)
