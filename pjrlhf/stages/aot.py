"""Ahead-of-time compilation: every step of a run, compiled for chips that are not here, on shapes in place of arrays.

`python -m pjrlhf.main --config=FILE --aot=v5e:4x4` needs neither the TPUs nor the data nor the weights; it says what
each step takes of a chip's memory and the least time it can take, and how to make fit what does not.
"""

import dataclasses
import functools
import os
import pathlib
import re
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from pjrlhf.data import world
from pjrlhf.data.schema import Example
from pjrlhf.errors import UserError
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.families import leaf_shapes
from pjrlhf.models.huggingface import read_config
from pjrlhf.models.registry import UserRegistry
from pjrlhf.parallel.mesh import even_rows, make_mesh, row_sharding, shardings
from pjrlhf.parallel.roofline import CHIPS, Cost, Estimate, collective_bytes, estimate, memory_bytes, product_cost
from pjrlhf.paths import local
from pjrlhf.rollout import reference
from pjrlhf.rollout.experience import reward_scores, sample
from pjrlhf.stages import methods
from pjrlhf.stages.context import Run
from pjrlhf.stages.pairs import SIDES, Pairs
from pjrlhf.stages.policy import Policy, settings_of
from pjrlhf.stages.preference import Preference
from pjrlhf.stages.reward import Reward
from pjrlhf.stages.sft import Sft

FIRST_ID = 5  # of the ids that stand for text; lower ones are special


@dataclasses.dataclass(frozen=True)
class Step:
    """One compiled program.

    Attributes:
      memory: bytes on each chip at the peak, and `limit`, its HBM.
      cost: of the matrix products, on all chips; `useful` is the part that is not computed twice (rematerialised).
      sent: bytes that each chip sends, by kind of collective.
      problem: why it could not be compiled, if so: it needs more memory than there is.
    """

    name: str
    memory: int
    limit: int
    cost: Cost
    sent: Mapping[str, float]
    estimate: Estimate
    seconds: float
    problem: str = ""

    @property
    def fits(self) -> bool:
        return not self.problem and self.memory <= self.limit


class _Text:
    """A tokenizer for a run without text: every prompt and answer is as long as it may be."""

    bos_id, eos_id, pad_id, unk_id = 1, 2, 0, None

    def __init__(self, prompt: int, completion: int, vocab_size: int):
        self.prompt, self.completion, self.vocab_size = prompt, completion, vocab_size

    def encode_prompt(self, prompt: Any) -> list[int]:
        return [FIRST_ID] * self.prompt

    def encode_answers(self, prompt: Any, answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        return self.encode_prompt(prompt), [[FIRST_ID + i] * self.completion for i in range(len(answers))]


class Planned(Run):
    """A run on devices that are not here: parameters are shapes, records are stand-ins of the greatest length, and a
    program that is called is compiled and measured.
    """

    def __init__(self, config: Any, topology: str):
        super().__init__(config, types.SimpleNamespace(path=pathlib.Path("planned")))
        self.chip, self.devices = _devices(topology)
        self.mesh = make_mesh(config.mesh, self.devices)
        self.steps: list[Step] = []
        self.naming = "step"

    # ---- the devices

    def create(self, make: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
        return self.shapes(jax.eval_shape(make, *arguments))

    def shapes(self, tree: Any) -> Any:
        """The shapes of parameters, with the shardings of `parallel.mesh.RULES`."""
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings(self.mesh, tree)
        )

    def place(self, batch: Any) -> Any:
        def one(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=row_sharding(self.mesh, x.shape[0]))

        return jax.tree.map(one, batch)

    def program(self, step: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        jitted = jax.jit(step, **options)

        def compiled(*arguments: Any, **keywords: Any) -> Any:
            traced = jitted.trace(*arguments, **keywords)
            self.steps.append(self._compiled(traced))
            return traced.out_info

        return compiled

    def _compiled(self, traced: Any) -> Step:
        limit, started = int(CHIPS[self.chip].memory), time.perf_counter()
        cost = product_cost(traced.jaxpr.jaxpr, self.config.data.max_completion)
        memory, sent, problem = 0, {}, ""
        try:
            program = traced.lower().compile()
            memory, sent = memory_bytes(program), collective_bytes(program.as_text())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
                raise
            found = re.search(r"Used ([\d.]+)([KMGT]) of", str(error))
            problem = f"needs {found[1]} {found[2]}iB" if found else "needs more memory than a chip has"
            memory = int(float(found[1]) * 1024 ** (" KMGT".index(found[2]))) if found else limit + 1
        least = estimate(CHIPS[self.chip], len(self.devices), cost, sum(sent.values()))
        logging.info("%s: compiled in %.0f s", self.naming, time.perf_counter() - started)
        return Step(self.naming, memory, limit, cost, sent, least, time.perf_counter() - started, problem)

    # ---- what is read from disk elsewhere

    @functools.cached_property
    def model_config(self) -> ModelConfig:
        path = self.config.model.path
        if path and not os.path.isdir(path) and self.config.model.vocab_size:
            return self.sized()
        return read_config(local(f"{path}/config.json").parent) if path else self.sized()

    @functools.cached_property
    def tokenizer(self) -> Any:
        d, spec = self.config.data, self.config.model.tokenizer
        trained = len(world.vocabulary(world.WORLDS[spec])) if isinstance(spec, str) else spec["vocab_size"]
        return _Text(d.max_prompt, d.max_completion, self.config.model.vocab_size or trained)

    @functools.cached_property
    def base(self) -> Any:
        dtype = jnp.dtype(self.config.model.param_dtype)
        leaves = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in leaf_shapes(self.model_config).items()}
        return self.shapes(flax.traverse_util.unflatten_dict(leaves, sep="/"))

    base_hash = "planned"

    @functools.cached_property
    def rewarder(self) -> Any:
        """What `stages.reward.load` reads elsewhere."""
        K = len(self.rewards)
        scale = {name: jax.ShapeDtypeStruct((K,), jnp.float32) for name in ("mean", "std", "low", "high")}
        return {**Reward(self).init().trainable, **self.shapes(scale)}

    def start_params(self) -> Any:
        return self.base

    @property
    def _rows(self) -> int:
        """Records enough for every batch."""
        return 2 * max([64, *_batch_sizes(self.config).values()])

    @functools.cached_property
    def requests(self) -> tuple[list[str], list[str]]:
        names = [f"request {i}" for i in range(2 * self._rows)]
        return names[: self._rows], names[self._rows :]

    @functools.cached_property
    def completions(self) -> list[Example]:
        return [Example(prompt=request, completion="answer") for request in self.requests[0]]

    def preferences(self, spec: Mapping[str, Any]) -> tuple[list[Example], str]:
        examples = [
            Example(prompt=request, chosen="one", rejected="other", user_id=f"user {i}", objective=name)
            for i, request in enumerate(self.requests[0])
            for name in self.rewards
        ]
        return examples, "stand-ins"


class _PlannedPairs(Pairs):
    """Comparisons of `aot.users` people."""

    def __init__(self, run: Run):
        super().__init__(run)
        capacity = even_rows(run.mesh, run.config.aot.users + 1) - 1
        self.registry = UserRegistry.create(self.registry.rows, max(capacity, self.registry.capacity))

    def _reference(self, table: Any) -> np.ndarray:
        return np.zeros((len(table), len(SIDES)), np.float32)


def _batch_sizes(config: Any) -> dict[str, int]:
    """Dotted key -> how many rows a step takes."""
    flat = flax.traverse_util.flatten_dict(config.to_dict(), sep=".")
    return {key: value for key, value in flat.items() if key.endswith((".batch_size", ".rollouts"))}


@functools.cache
def _devices(topology: str) -> tuple[str, Sequence[Any]]:
    """(kind of chip, its devices) of a name such as v5e:4x4.

    Raises:
      UserError: a chip we know no figures of, or a topology that there is not, or no TPU compiler is installed.
    """
    from jax.experimental import topologies

    kind = topology.partition(":")[0]
    if kind not in CHIPS or ":" not in topology:
        raise UserError(f"--aot={topology}: give chip:shape, for example v5e:4x4; chips are {', '.join(CHIPS)}")
    # The compiler needs no TPU, and so neither the cluster's metadata nor to be alone on this machine.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    try:
        # Of the chips with two cores, both work as one device.
        whole = {"chip_config_name": "megacore"} if kind in ("v4", "v5p") else {}
        return kind, topologies.get_topology_desc(topology, "tpu", **whole).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--aot={topology}: there is no such topology, or no TPU compiler here ({reason}); check the shape, and "
            "pip install 'pjrlhf[tpu]'"
        ) from error


# ---- which programs a stage runs


def _step(method: Any) -> None:
    method.step(method.init(), next(method.batches))


def _sft(run: Planned) -> None:
    _step(Sft(run))


def _reward(run: Planned) -> None:
    _step(Reward(run))


def _policy(run: Planned, settings: Any = None) -> None:
    rewarder, name = run.rewarder, run.naming
    method = Policy(run, settings or settings_of(run), rewarder)
    state, batch = method.init(), next(method.batches)
    arrays = run.place({key: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]) for key, x in batch.items()})
    prompt = {"prompt": arrays["prompt"], "valid": arrays["valid"]}
    plain = {"prompt": arrays["reward_prompt"], "valid": arrays["reward_valid"]}
    static = run.model, run.adapter
    mix = arrays["weights"] if method.goals.mix == "weights" else jnp.eye(len(method.goals.policies))

    run.naming = f"{name}: rollout"
    draw = run.program(functools.partial(sample, *static, method.sampling))
    response = draw(run.base, state.trainable["bank"], mix, prompt, run.key)
    response = run.place(response)
    run.naming = f"{name}: rewards"
    objectives = arrays["objectives"] if method.goals.objectives is None else jnp.asarray(method.goals.objectives)
    score = run.program(functools.partial(reward_scores, *static, scale=method.settings.scale))
    score(run.base, rewarder, objectives, plain, response)
    run.naming = f"{name}: whole step"
    method.step(state, batch)


def _preference(run: Planned) -> None:
    pairs, name = _PlannedPairs(run), run.naming
    d, size = run.config.data, even_rows(run.mesh, 2 * run.config.preference.batch_size)
    rows = np.zeros((size, d.max_prompt + d.max_completion), np.int32)
    placed = run.place({"tokens": rows, "valid": rows.astype(bool)})
    if any(entry.get("head", "policy") == "policy" for entry in run.config.preference.models.values()):
        run.naming = f"{name}: reference"
        sums = functools.partial(reference._sums, run.model, run.adapter, prompt_slots=d.max_prompt)
        run.program(sums)(run.base, **placed)
    for entry in run.config.preference.models:
        if run.config.preference.models[entry]["kind"] == "soup":
            continue  # its step is that of another bank's run
        run.naming = f"{name}: {entry}"
        _step(Preference(run, entry, pairs))


def _methods(run: Planned) -> None:
    for entry in run.config.methods:
        if methods.entry(run, entry).get("train", "policy") == "policy":
            run.naming = f"methods/{entry}"
            _policy(run, methods.settings_of(run, entry))


PLANS = {"sft": _sft, "reward": _reward, "policy": _policy, "preference": _preference, "methods": _methods}


def plan(config: Any, topology: str, stages: Sequence[str] = ()) -> list[Step]:
    """Compiles the steps of a run for `topology` ("v5e:4x4").

    Args:
      config: as of a run; `aot.users` is how many people to reckon with. Of `model.path` only config.json is read, and
        where there is no such folder the dimensions in `model` count.
      stages: those of the run by default. Sampling and judging in evaluations is that of the stage policy.

    Raises:
      UserError: an unknown topology, or a batch that the mesh cannot share.
    """
    found = []
    for stage in stages or [name for name in config.stages if name in PLANS]:
        run = Planned(config, topology)
        run.naming = stage
        PLANS[stage](run)
        found += run.steps
    return found


def remedies(config: Any) -> Iterator[tuple[str, ConfigDict]]:
    """(flags, config with them) that take less memory, the ones that cost least first."""
    changes: list[dict[str, Any]] = []
    if config.model.remat != "full":
        changes.append({"model.remat": "full"})
    if config.model.param_dtype == "float32":
        changes.append({"model.param_dtype": "bfloat16"})
    mesh = config.mesh.to_dict()
    if mesh.get("data") != 1:
        changes.append({"mesh.data": 1, "mesh.fsdp": -1})
    sizes = _batch_sizes(config).items()
    changes.append({key: n // 2 for key, n in sizes if n > 1 and key.split(".")[0] in config.stages})
    changes.append({"data.max_completion": config.data.max_completion // 2})
    for many in (changes[:1], *([change] for change in changes[1:]), changes[:4]):
        merged = {key: value for change in many for key, value in change.items()}
        changed = config.copy_and_resolve_references()
        with changed.ignore_type():
            changed.update_from_flattened_dict(merged)
        yield " ".join(f"--config.{key}={value}" for key, value in merged.items()), changed


def remedy(config: Any, topology: str, step: Step) -> str:
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


def report(config: Any, topology: str) -> list[dict[str, Any]]:
    """Plans the run, prints a table, and returns its rows.

    Raises:
      UserError: a step does not fit; the message says what would make it fit.
    """
    from rich.console import Console
    from rich.table import Table

    steps = plan(config, topology)
    if not steps:
        raise UserError(f"--aot: none of the stages {', '.join(config.stages)} has a step to compile")
    chip, chips = CHIPS[topology.partition(":")[0]], len(_devices(topology)[1])
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
    Console().print(table)
    for step in steps:
        if not step.fits:
            raise UserError(
                f"{step.name}: {step.memory / 2**30:.1f} GiB on a chip of {step.limit / 2**30:.1f} ({topology}); "
                f"{remedy(config, topology, step)}"
            )
    return rows
