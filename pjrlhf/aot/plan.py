"""Ahead-of-time compilation: every step of a run, compiled for chips that are not here, on shapes in place of arrays.

`python -m pjrlhf.main --config=FILE --aot=v5e:4x4` needs neither the TPUs nor the data nor the weights; it says what
each step takes of a chip's memory and the least time it can take, and how to make fit what does not.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from pjrlhf.algorithms import methods, modpo, policy, reward, ric, sft
from pjrlhf.algorithms.pdpo import Preference
from pjrlhf.algorithms.pdpo_settings import PreferenceSettings
from pjrlhf.aot import dry_run
from pjrlhf.aot.dry_classifiers import Specs, bytes_per_chip, classifiers_of, compile_classifiers, rewards_of
from pjrlhf.aot.dry_judges import compile_judges, judges_of
from pjrlhf.aot.dry_run import DryRun, Step, compile_draw, compile_reference, compile_rewards, dry_modpo, dry_pairs
from pjrlhf.errors import UserError
from pjrlhf.feedback.comparisons import ComparisonsSettings
from pjrlhf.feedback.samplers import ModelSamplerSettings, as_spec, other_base
from pjrlhf.models.adapters import init_bank
from pjrlhf.models.users import KINDS
from pjrlhf.parallel.roofline import CHIPS
from pjrlhf.protocols.role_play import PROMPT
from pjrlhf.protocols.soups import SoupsSettings
from pjrlhf.protocols.users import UsersSettings
from pjrlhf.settings import parse
from pjrlhf.training.loop import Method
from pjrlhf.types import Config, Params, Tree

# ---- which programs a stage runs


def _step(method: Method) -> None:
    method.step(method.init(), next(method.batches))


def _sft(run: DryRun) -> None:
    _step(sft.method_of(run))


def _asked(run: DryRun, specs: Specs, beside: Tree) -> None:
    """What models on the mesh do for reward sources and judges."""
    compile_classifiers(run, classifiers_of(run, specs), beside)
    compile_judges(run, judges_of(run, specs), beside)


def _resident(run: DryRun, specs: Specs) -> int:
    """Bytes of each chip that the models of reward sources and judges take."""
    return sum(one.bytes for one in (*classifiers_of(run, specs), *judges_of(run, specs)))


def _reward(run: DryRun) -> None:
    if run.audience.learned:
        _step(reward.method_of(run))


def _policy(run: DryRun, settings: policy.PolicySettings | None = None) -> None:
    devices, backbone = run.devices, run.workspace.backbone
    method = policy.method_of(run, settings or policy.settings_of(run), run.rewarder)
    state, batch = method.init(), next(method.batches)
    placed = method.place(batch)
    with devices.part("rollout"):
        bank = state.trainable["bank"]
        rollout = devices.place(devices.program(method.rollout)(backbone, bank, placed, run.streams.root))
    if run.audience.learned:
        with devices.part("rewards"):
            devices.program(method.score)(backbone, run.rewarder, placed, rollout)
    if run.audience.sources:
        host = np.zeros(placed.targets.objectives.shape, np.float32)
        with devices.part("update"):  # its rewards come from the host
            method.finish(state, placed, rollout, host)
        _asked(run, rewards_of(run), (backbone.base, state))
    else:
        with devices.part("whole step"):
            method.step(state, batch)


def _preference(run: DryRun) -> None:
    config = run.section(PreferenceSettings)
    pairs = dry_pairs(run, config)
    entries = [config.entry(name) for name in config.models]
    if any(entry.objective.head == "policy" for entry in entries):
        compile_reference(run, run.devices.even(2 * config.batch_size))
    for entry in entries:
        if KINDS.get(entry.users.kind).mixes:
            continue  # its step is that of another bank's run
        with run.devices.part(entry.name):
            _step(Preference(entry, pairs, run.devices, run.workspace.backbone, run.streams))


def _modpo(run: DryRun, settings: modpo.ModpoSettings) -> None:
    method = dry_modpo(run, settings)
    _asked(run, rewards_of(run), run.workspace.backbone.base)
    with run.devices.part("step"):
        _step(method)


def _ric(run: DryRun, settings: ric.RicSettings) -> None:
    backbone, rows = run.workspace.backbone, run.text.sample_rows
    with run.devices.part("rollout of the base"):
        compile_draw(run)
    compile_rewards(run)
    _asked(run, rewards_of(run), backbone.base)
    scores = [0.5] * len(run.audience.objectives)
    answers = [{"request": request, "text": "answer", "scores": scores} for request in run.records.requests[0]]
    data = ric.Round(ric.stated(run, settings, answers, run.devices.naming), settings.steps)
    method = ric.method_of(run, settings, data)
    with run.devices.part("step"):
        _step(method)
    if settings.rounds:
        with run.devices.part("rollout"):
            compile_draw(run, method.init().trainable, jnp.ones((rows, 1)))


def _methods(run: DryRun) -> None:
    trainers = {"policy": _policy, "modpo": _modpo, "ric": _ric}
    for name in run.settings.methods:
        train = methods.entry(run, name).train
        if train in trainers:
            run.devices.naming = methods.folder(name)
            trainers[train](run, methods.settings_of(run, name))
        elif train:
            logging.warning("methods.%s: the steps of trainer %s are not known here, and left out", name, train)


def _judged(run: DryRun, judges: Specs, adapters: int = 0, asks: bool = False) -> None:
    """What the judges of a stage do, beside the base and `adapters` adapters, and where it `asks` the reward sources,
    beside their models.
    """
    # A judge by a reward source has the model of that.
    specs = [(name, spec["source"] if _by_reward(spec) else spec) for name, spec in judges]
    specs += rewards_of(run) if asks else []
    backbone = run.workspace.backbone

    def make(base: Params) -> Params:
        return init_bank(base, backbone.adapter, adapters, run.streams.root)

    bank = run.devices.create(make, backbone.base) if adapters else None
    with run.devices.beside(_resident(run, specs)):
        _asked(run, specs, (backbone.base, bank))


def _by_reward(spec: Any) -> bool:
    return isinstance(spec, Mapping) and spec.get("kind") == "reward" and "source" in spec


def _comparisons(run: DryRun) -> None:
    settings = run.section(ComparisonsSettings)
    found = as_spec(settings.sampler)
    if found.pop("kind") == "model":
        own, base = parse(ModelSamplerSettings, found, "comparisons.sampler"), run.workspace.backbone.base
        other = run.answering(other_base(run.settings, own))
        with run.devices.part("rollout of the sampler"), run.devices.beside(bytes_per_chip(base)):
            compile_draw(other)
    by_rewards = settings.judge == "score" and run.settings.judge == "rewards"
    _judged(run, [("comparisons.judge", settings.judge)], asks=by_rewards)


def _evaluate(run: DryRun) -> None:
    s = run.section(SoupsSettings)
    judges = [("evaluate.judge", s.judge), *(("evaluate.judges", spec) for spec in s.judges)]
    _judged(run, judges, len(run.audience.rewards), asks=True)  # models of rewards stay from training on


def _evaluate_users(run: DryRun) -> None:
    spec = run.section(UsersSettings).judge
    _judged(run, [("evaluate_users.judge", {"prompt": PROMPT, **spec} if isinstance(spec, Mapping) else spec)])


ASKING = ("policy", "methods")  # stages that ask reward sources while they train
PLANS = {
    "sft": _sft,
    "comparisons": _comparisons,
    "reward": _reward,
    "policy": _policy,
    "evaluate": _evaluate,
    "preference": _preference,
    "evaluate_users": _evaluate_users,
    "methods": _methods,
}


def plan(config: Config, topology: str, stages: Sequence[str] = ()) -> list[Step]:
    """Compiles the steps of a run for `topology` ("v5e:4x4").

    Args:
      config: as of a run; `aot.users` is how many people to reckon with. Of `model.path` only config.json is read, and
        where there is no such folder the dimensions in `model` count.
      stages: those of the run by default. Sampling in evaluations is that of the stage policy.

    Raises:
      UserError: an unknown topology, or a batch that the mesh cannot share.
    """
    found = []
    for stage in stages or [name for name in config.stages if name in PLANS]:
        run = DryRun(config, topology)
        run.devices.naming = stage
        if stage in ASKING:
            run.devices.resident = _resident(run, rewards_of(run))
        PLANS[stage](run)
        found += run.devices.steps
    return found


def remedies(config: Config) -> Iterator[tuple[str, ConfigDict]]:
    """(flags, config with them) that take less memory, the ones that cost least first."""
    changes: list[dict[str, Any]] = []
    if config.model.remat != "full":
        changes.append({"model.remat": "full"})
    if config.model.param_dtype == "float32":
        changes.append({"model.param_dtype": "bfloat16"})
    mesh = config.mesh.to_dict()
    if mesh.get("data") != 1:
        changes.append({"mesh.data": 1, "mesh.fsdp": -1})
    sizes = dry_run.batch_sizes(config).items()
    # Entries of `methods` have the settings of these where they do not say otherwise.
    sections = {*config.stages, *(("policy", "modpo", "ric") if "methods" in config.stages else ())}
    changes.append({key: n // 2 for key, n in sizes if n > 1 and key.split(".")[0] in sections})
    changes.append({"data.max_completion": config.data.max_completion // 2})
    for many in (changes[:1], *([change] for change in changes[1:]), changes[:4]):
        merged = {key: value for change in many for key, value in change.items()}
        changed = config.copy_and_resolve_references()
        with changed.ignore_type():
            changed.update_from_flattened_dict(merged)
        yield " ".join(f"--config.{key}={value}" for key, value in merged.items()), changed


def remedy(config: Config, topology: str, step: Step) -> str:
    """Which flags make `step` fit, tried by compiling; or that none of those known does."""
    stage = re.split(r"[:/]", step.name)[0]
    for flags, changed in remedies(config):
        try:
            found = {one.name: one for one in plan(changed, topology, [stage])}
        except UserError:
            continue  # a batch too small for the mesh
        if step.name in found and found[step.name].fits:
            return f"with {flags} it fits ({found[step.name].memory / 2**30:.1f} GiB)"
    return (
        "none of remat, bfloat16 parameters, more fsdp, half the batch or half the answer makes it fit; use more chips"
    )


def report(config: Config, topology: str) -> list[dict[str, Any]]:
    """Plans the run, prints a table, and returns its rows.

    Raises:
      UserError: a step does not fit; the message says what would make it fit.
    """
    from rich.console import Console
    from rich.table import Table

    steps = plan(config, topology)
    if not steps:
        raise UserError(f"--aot: none of the stages {', '.join(config.stages)} has a step to compile")
    chip, chips = CHIPS[topology.partition(":")[0]], len(dry_run.devices_of(topology)[1])
    table = Table(title=f"{config.title or 'run'} on {topology}, {chips} chips", title_justify="left")
    for name in (
        "step",
        "GiB per chip",
        "TFLOP per chip",
        "GB sent per chip",
        "least ms",
        "bound by",
        "products' share",
    ):
        table.add_column(name, justify="left" if name in ("step", "bound by") else "right")
    rows = []
    for step in steps:
        row = {
            "step": step.name,
            "gib_per_chip": round(step.memory / 2**30, 2),
            "gib_limit": round(step.limit / 2**30, 2),
            "tflop_per_chip": round(step.cost.flops / chips / 1e12, 3),
            "gb_sent_per_chip": {kind: round(value / 1e9, 3) for kind, value in step.sent.items()},
            "least_ms": round(1e3 * step.estimate.seconds, 2),
            "bound": step.estimate.bound,
            "peak_share": round(step.cost.flops / chips / chip.flops / step.estimate.seconds, 3),
            "compile_seconds": round(step.seconds, 1),
            "fits": step.fits,
        }
        rows.append(row)
        table.add_row(
            step.name,
            f"{row['gib_per_chip']} of {row['gib_limit']}",
            str(row["tflop_per_chip"]),
            f"{sum(step.sent.values()) / 1e9:.2f}",
            str(row["least_ms"]),
            row["bound"],
            f"{100 * row['peak_share']:.0f} %",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)  # a log file has no width of its own
    for step in steps:
        if not step.fits:
            raise UserError(
                f"{step.name}: {step.memory / 2**30:.1f} GiB on a chip of {step.limit / 2**30:.1f} ({topology}); "
                f"{remedy(config, topology, step)}"
            )
    return rows
