"""What a run does: each stage reads the results of earlier ones from the run directory and adds its own."""

import contextlib
import importlib
import json
import time
from collections.abc import Iterator
from typing import Any

from absl import logging

from pjrlhf.errors import UserError, missing_key

# Stage -> the module whose `run(context)` it is.
STAGES = {
    # Personalized Soups
    "sft": "pjrlhf.algorithms.sft",
    "comparisons": "pjrlhf.feedback.comparisons",
    "reward": "pjrlhf.algorithms.reward",
    "policy": "pjrlhf.algorithms.policies",
    "evaluate": "pjrlhf.protocols.soups",
    # P-RLHF
    "population": "pjrlhf.feedback.population",
    "preference": "pjrlhf.algorithms.pdpo",
    "evaluate_users": "pjrlhf.protocols.users",
    # the multi-objective family
    "methods": "pjrlhf.algorithms.methods",
    "evaluate_front": "pjrlhf.protocols.front",
    "merge": "pjrlhf.export.merge",
}


@contextlib.contextmanager
def _config_errors(where: str) -> Iterator[None]:
    """Turns the lack of a key in the config into a UserError."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        if not (missing := missing_key(error)):
            raise
        raise UserError(f"{where}: the config has no {missing[0]!r}; add it as in configs/") from error


def run(config: Any, workdir: Any) -> None:
    """Runs `config.stages` in order; a stage that this run directory has finished is skipped.

    Each stage is a module with `run(context) -> dict`, whose JSON values are recorded in manifest.json.

    Raises:
      UserError: unknown stage, or bad input met by a stage.
    """
    from pjrlhf.runtime.context import Run

    unknown = [name for name in config.stages if name not in STAGES]
    if unknown:
        raise UserError(f"stages: {unknown[0]!r} is unknown; choose from {', '.join(STAGES)}")
    with _config_errors("run"):
        context = Run(config, workdir)
    for name in config.stages:
        section = config.get(name)
        section = section and section.to_dict()
        done = workdir.finished(name)
        # Sections that may change between two runs of one folder (evaluate) make their stage run anew.
        if done and done["config"] == json.loads(json.dumps(section)):
            logging.info("stage %s: finished before, skipped", name)
            continue
        started = time.perf_counter()
        with _config_errors(f"stage {name}"):
            info = importlib.import_module(STAGES[name]).run(context) or {}
        workdir.mark_finished(name, time.perf_counter() - started, config=section, **info)
