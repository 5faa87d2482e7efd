"""Several methods on one base, one set of comparisons and one set of reward models: every entry of `config.methods` is
trained into <workdir>/methods/<name>.

An entry says how it is trained (`train`: policy, modpo or ric; "" for one that trains nothing) and what differs from
the section of that name; `evaluate_front` says what else an entry may hold.
"""

import importlib
import json
import time
from typing import Any

from absl import logging

from pjrlhf.algorithms import policies as policy
from pjrlhf.errors import UserError
from pjrlhf.parallel.processes import on_process_zero
from pjrlhf.runtime.context import Run
from pjrlhf.training.workdir import write_json

TRAINERS = {
    "policy": "pjrlhf.algorithms.policies",
    "modpo": "pjrlhf.algorithms.modpo",
    "ric": "pjrlhf.algorithms.ric",
}
# What an entry says about answering, not about training; see `evaluate_front`.
ANSWERING = ("of", "answer", "extrapolation", "divergence", "prompted")


def folder(name: str) -> str:
    """Where an entry lives, below the run directory."""
    return f"methods/{name}"


def entry(run: Run, name: str) -> dict[str, Any]:
    """The entry of that name. Raises UserError for one there is not."""
    if name not in run.config.methods:
        raise UserError(f"methods: there is no entry {name!r}; there are {', '.join(run.config.methods)}")
    return run.config.methods[name].to_dict()


def settings_of(run: Run, name: str) -> Any:
    """The section that trains an entry, with the changes of the entry.

    Raises UserError for an unknown trainer or setting.
    """
    changes = entry(run, name)
    trainer = changes.pop("train", "policy")
    if trainer not in TRAINERS:
        raise UserError(f"methods.{name}.train {trainer!r}: unknown; choose one of {', '.join(TRAINERS)}")
    settings = policy.settings_of(run) if trainer == "policy" else run.config[trainer].copy_and_resolve_references()
    with settings.unlocked(), settings.ignore_type():
        for key, value in changes.items():
            if key in ANSWERING:
                continue
            if key not in settings:
                raise UserError(f"methods.{name}.{key}: no such setting of {trainer}; it has {', '.join(settings)}")
            if isinstance(value, dict):
                settings[key].update(value)
            else:
                settings[key] = value
    return settings


def run(run: Run) -> dict[str, Any]:
    """Trains the entries that are not yet trained."""
    for name in run.config.methods:
        changes = entry(run, name)
        if not changes.get("train", "policy"):
            continue
        stage, settings = folder(name), settings_of(run, name)
        described = json.loads(json.dumps(settings.to_dict()))
        kept = run.workdir.stage(stage) / "settings.json"
        if kept.is_file() and json.loads(kept.read_text(encoding="utf-8")) != described:
            raise UserError(f"methods.{name}: trained with other settings before; choose another name for it")
        if run.workdir.finished(stage):
            logging.info("%s: finished before, skipped", stage)
            continue
        on_process_zero(write_json)(kept, described)
        started = time.perf_counter()
        trainer = importlib.import_module(TRAINERS[changes.get("train", "policy")])
        info = trainer.train(run, settings, stage)
        run.workdir.mark_finished(stage, time.perf_counter() - started, **info)
    return {"methods": list(run.config.methods)}
