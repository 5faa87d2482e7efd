"""What a run does: each stage reads the results of earlier ones from the run directory and adds its own."""

import importlib
import time
from typing import Any

from absl import logging

from pjrlhf.errors import UserError

STAGES = ("sft", "comparisons", "reward", "policy", "evaluate", "merge")


def run(config: Any, workdir: Any) -> None:
    """Runs `config.stages` in order; a stage that this run directory has finished is skipped.

    Each stage is a module with `run(context) -> dict`, whose JSON values are recorded in manifest.json.

    Raises:
      UserError: unknown stage, or bad input met by a stage.
    """
    from pjrlhf.stages.context import Run

    unknown = [name for name in config.stages if name not in STAGES]
    if unknown:
        raise UserError(f"stages: {unknown[0]!r} is unknown; choose from {', '.join(STAGES)}")
    context = Run(config, workdir)
    for name in config.stages:
        if workdir.finished(name):
            logging.info("stage %s: finished before, skipped", name)
            continue
        started = time.perf_counter()
        info = importlib.import_module(f"pjrlhf.stages.{name}").run(context) or {}
        workdir.mark_finished(name, time.perf_counter() - started, **info)
