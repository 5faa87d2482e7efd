"""The same run with several seeds, one after the other, and a report of their means."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from pjrlhf.errors import UserError
from pjrlhf.evaluation.report import write_report
from pjrlhf.evaluation.statistics import mean_interval
from pjrlhf.parallel.processes import on_process_zero
from pjrlhf.pipeline import stages
from pjrlhf.training.workdir import Workdir, disk_errors, read_object


def run(config: ConfigDict, workdir: Workdir) -> None:
    """Runs `config` once for every one of `config.seeds` in <workdir>/seed<n>; writes <workdir>/report.

    Raises:
      UserError: seeds given twice, stages that do not end in `evaluate_front`, or see `stages.run`.
    """
    plan = stages.read(config)
    with workdir.locked():
        workdir.check_config(plan.to_dict(), ignore=stages.FREE)
        _run(config, plan.settings.seeds, workdir)


def _run(config: ConfigDict, seeds: Sequence[int], workdir: Workdir) -> None:
    summaries = []
    for seed in seeds:
        logging.info("seed %s", seed)
        one = config.copy_and_resolve_references()
        one.seed, one.seeds = seed, ()
        folder = Workdir(workdir.path / f"seed{seed}")
        stages.run(one, folder)
        workdir.keep()
        path = folder.path / "report" / "summary.json"
        remedy = f"delete {folder.path / 'manifest.json'}, and the stages write it again"
        summary = read_object(path, remedy)
        if not summary:
            raise UserError(f"{path}: is missing or empty; {remedy}")
        summaries.append(summary)
    with disk_errors(workdir.path / "report"):
        on_process_zero(write_report)(workdir.path / "report", average(summaries))


def average(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """One summary of several seeds: metrics as {"mean", "low", "high"} (95 %, Student's t), points as means."""
    first = summaries[0]
    metrics = first["front"]["metrics"] | {"seconds": {"averaged": True}, "samples": {"averaged": False}}
    methods = {name: _average([s["methods"][name] for s in summaries], metrics) for name in first["methods"]}
    for name, found in methods.items():
        unseen = [s["methods"][name]["unseen"] for s in summaries]
        found["unseen"] = _average(unseen, metrics) if all(unseen) else None
        points = [s["methods"][name]["points"] for s in summaries]
        rewards = np.mean([p["rewards"] for p in points], axis=0).tolist()
        found["points"] = {**points[0], "rewards": rewards}
    stage_seconds = {stage: sum(s["stage_seconds"][stage] for s in summaries) for stage in first["stage_seconds"]}
    front = {name: np.mean([s["front"][name] for s in summaries], axis=0).tolist() for name in ("low", "high")}
    return {
        **{
            name: first[name] for name in ("title", "config", "run", "preferences", "held_out_prompts") if name in first
        },
        "stage_seconds": stage_seconds,
        "total_seconds": sum(stage_seconds.values()),
        "front": {**first["front"], **front, "seeds": len(summaries)},
        "methods": methods,
    }


def _average(values: list[dict[str, Any]], metrics: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key, how in metrics.items():
        if key in values[0]:
            found[key] = mean_interval([v[key] for v in values]) if how["averaged"] else values[0][key]
    return found
