"""What every evaluation leaves behind: its report, how the run was made, and all answers that were sampled for it."""

import importlib.metadata
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pjrlhf import __version__
from pjrlhf.evaluation.report import write_report
from pjrlhf.parallel.processes import on_process_zero
from pjrlhf.runtime.run import Run
from pjrlhf.terminal import masked
from pjrlhf.training.progress import progress
from pjrlhf.training.workdir import disk_errors, read_object, write_lines
from pjrlhf.types import Json

ANSWERS = "answers.jsonl"


def finish(
    run: Run,
    stage: str,
    started: float,
    summary: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]] = (),
    answers: Iterable[Json] = (),
) -> None:
    """Writes <workdir>/report and, where there are answers, <workdir>/report/answers.jsonl.

    Args:
      started: `time.perf_counter()` when the stage started.
      summary: see `evaluation.report`; title, configuration, times and the making of the run are added.
      samples: answers that the page shows.
      answers: JSON objects, one per sampled answer, from which it can be judged again.
    """
    seconds = {name: info["seconds"] for name in run.settings.stages if (info := run.workdir.finished(name))}
    seconds[stage] = time.perf_counter() - started
    summary = {
        "title": run.settings.title,
        "config": masked(run.settings.to_dict()),
        "run": made(run),
        "stage_seconds": seconds,
        "total_seconds": sum(seconds.values()),
        **summary,
    }
    folder = run.workdir.path / "report"
    with disk_errors(folder), progress(f"{stage}: report", 1):
        on_process_zero(write_report)(folder, summary, samples, metrics=run.workdir.path / "metrics.jsonl")
        if lines := list(answers):
            on_process_zero(write_lines)(folder / ANSWERS, lines)


def stated(run: Run) -> dict[str, str]:
    """Objective -> the sentence that states it, of those that have one."""
    return {name: sentence for name in run.audience.objectives if (sentence := run.audience.sentences[name])}


def made(run: Run) -> dict[str, Any]:
    """How the run was made: name -> text, with the contents of what it read from outside its folder."""
    read = read_object(run.workdir.path / "inputs.json")
    inputs = {name: _described(one["path"], one.get("commit"), one["hash"]) for name, one in read.items()}
    kinds = [device.device_kind for device in run.devices.mesh.devices.flat]
    libraries = ("jax", "flax", "optax", "numpy", "transformers")
    versions = [f"pjrlhf {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in libraries]
    return masked(
        {
            "command": shlex.join(sys.argv),
            "folder": str(run.workdir.path),
            "base": _described(*run.workspace.base_name, run.workspace.base_hash),
            **(inputs or {"data": "made by the run itself"}),
            "devices": ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)),
            "versions": ", ".join(versions),
        }
    )


def _described(path: str, commit: str | None, fingerprint: str) -> str:
    return f"{path} ({f'commit {commit}, ' if commit else ''}fingerprint {fingerprint})"
