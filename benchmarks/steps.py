"""What the steps of a config take on the devices at hand, with random weights: `python benchmarks/steps.py`.

    python benchmarks/steps.py --config=configs/llama.py:pdpo_8b --entries=individualized --config.mesh.data=1

Runs the programs that `--aot` plans, on records of the greatest length, and says for each of them seconds and the share
of the peak: MFU, FLOPs of its matrix products without rematerialisation / (seconds x devices x peak bf16 FLOP/s), and
HFU, the same with those computed twice. Of a rollout besides tokens per second and the share of the memory's bandwidth:
(weights and cache, read once per token) / (seconds x bandwidth). Adds to --output one JSON object per program.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from pjrlhf.aot.dry_run import DryDevices, DryRun
from pjrlhf.aot.plan import PLANS
from pjrlhf.parallel.mesh import shardings
from pjrlhf.parallel.roofline import CHIPS, matmul_cost, memory_bytes
from pjrlhf.runtime.devices import Devices, MeshSettings
from pjrlhf.training.performance import peak_flops

# Bytes per second of a device's memory, from the vendors' data sheets.
BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12, "TPU v5 lite": CHIPS["v5e"].bandwidth}
CONFIG = config_flags.DEFINE_config_file("config", "configs/llama.py:pdpo_8b")
ROUNDS = flags.DEFINE_integer("rounds", 3, "timed runs of each program, after one that warms up")
ENTRIES = flags.DEFINE_list("entries", [], "entries of preference.models to run; all by default")
ONLY = flags.DEFINE_string("only", "", "run only programs whose name has this in it; others are skipped")
OUTPUT = flags.DEFINE_string("output", "benchmarks/results/steps.jsonl", "where rows are added")


class LocalDevices(DryDevices):
    """The devices of this machine for a dry run: random arrays in place of shapes, and programs that run.

    Attributes:
      model: what rows say of the model.
      found: a row per program that ran.
    """

    make_mesh, create, place = Devices.make_mesh, Devices.create, Devices.place

    def __init__(self, config: ConfigDict, trip_count: int, model: Mapping[str, Any]):
        Devices.__init__(self, MeshSettings(**config.mesh), trip_count)
        self.naming, self.model, self.found = "step", model, []

    def shard(self, tree: Any) -> Any:
        """Random parameters of these shapes."""

        def make(key):
            leaves, structure = jax.tree.flatten(tree)
            keys = jax.random.split(key, len(leaves))
            return structure.unflatten([one(k, x) for k, x in zip(keys, leaves, strict=True)])

        def one(key, x):
            if jnp.issubdtype(x.dtype, jnp.integer):
                return jax.random.randint(key, x.shape, jnp.iinfo(x.dtype).min, jnp.iinfo(x.dtype).max, x.dtype)
            return 0.02 * jax.random.normal(key, x.shape, x.dtype)

        tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        return jax.jit(make, out_shardings=shardings(self.mesh, tree))(jax.random.key(1))

    def program(self, step: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        jitted = jax.jit(step, **options)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            if ONLY.value not in self.naming and "rollout" not in self.naming:  # others need what was sampled
                return None
            cost = matmul_cost(jitted.trace(*arguments, **keywords).jaxpr.jaxpr, self.trip_count)
            started = time.perf_counter()
            program = jitted.lower(*arguments, **keywords).compile()
            compiled = time.perf_counter() - started
            seconds = []
            for _ in range(ROUNDS.value + 1):
                started = time.perf_counter()
                result = jax.block_until_ready(program(*arguments, **keywords))
                seconds.append(time.perf_counter() - started)
                if options.get("donate_argnums") == 0:
                    arguments = (result[0], *arguments[1:])
            self._say(cost.flops, memory_bytes(program), compiled, seconds[1:])
            return result

        return timed

    def _say(self, flops: float, memory: int, compiled: float, seconds: list[float]) -> None:
        device, best = jax.devices()[0], float(np.median(seconds))
        peak = peak_flops(device.device_kind)
        stats = device.memory_stats() or {}
        row = {
            "step": self.naming,
            "device": device.device_kind,
            "devices": jax.device_count(),
            **self.model,
            "seconds": seconds,
            "tflops": flops / best / 1e12,
            "hfu": flops / best / peak / jax.device_count() if peak else None,
            "program_gib": memory / 2**30,
            "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
            "compile_seconds": compiled,
        }
        self.found.append(row)
        shown = {name: row[name] for name in ("hfu", "program_gib", "peak_gib", "compile_seconds")}
        print(f"{self.naming}: {best:.3f} s", {k: v and round(v, 3) for k, v in shown.items()}, flush=True)


class TracedDevices(DryDevices):
    """The devices of this machine for a dry run that only traces its programs.

    Attributes:
      flops: program -> FLOPs of its matrix products.
    """

    make_mesh = Devices.make_mesh

    def __init__(self, config: ConfigDict, trip_count: int):
        Devices.__init__(self, MeshSettings(**config.mesh), trip_count)
        self.naming, self.flops = "step", {}

    def program(self, step: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        jitted = jax.jit(step, **options)

        def traced(*arguments: Any, **keywords: Any) -> Any:
            made = jitted.trace(*arguments, **keywords)
            self.flops[self.naming] = matmul_cost(made.jaxpr.jaxpr, self.trip_count).flops
            return made.out_info

        return traced


def useful(config: ConfigDict, stage: str) -> dict[str, float]:
    """Program -> FLOPs without rematerialisation, from tracing alone."""
    config = config.copy_and_resolve_references()
    config.model.remat = "none"
    run = DryRun(config, "local")
    run.devices = TracedDevices(config, config.data.max_completion)
    run.devices.naming = stage
    PLANS[stage](run)
    return run.devices.flops


def measured(config: ConfigDict, stage: str) -> DryRun:
    """The run whose programs of `stage` have run on this machine."""
    run = DryRun(config, "local")
    about = {"remat": config.model.remat, "quantize": config.model.quantize}
    run.devices = LocalDevices(config, config.data.max_completion, about)
    run.devices.naming = stage
    about |= {"model": dataclasses.asdict(run.workspace.model_config), "attention": run.workspace.model.attention}
    PLANS[stage](run)
    return run


def main(_: list[str]) -> None:
    config = CONFIG.value
    if ENTRIES.value:
        with config.unlocked():
            for name in set(config.preference.models) - set(ENTRIES.value):
                del config.preference.models[name]
    for stage in config.stages:
        if stage not in PLANS:
            continue
        flops = useful(config, stage)
        run = measured(config, stage)
        kind, d = jax.devices()[0].device_kind, config.data
        peak = peak_flops(kind)
        bandwidth = next((value for name, value in BANDWIDTHS.items() if name in kind), None)
        for row in run.devices.found:
            best = float(np.median(row["seconds"]))
            if peak:
                row["mfu"] = flops[row["step"]] / best / peak / jax.device_count()
            if row["step"].endswith("rollout"):
                rows = config.policy.rollouts * len(run.audience.rewards)
                c, width = run.workspace.model_config, jnp.dtype(config.model.dtype).itemsize
                cache = (
                    2 * c.num_layers * rows * c.num_kv_heads * c.head_dim * width * (d.max_prompt + d.max_completion)
                )
                weights = sum(x.nbytes for x in jax.tree.leaves(run.workspace.base))
                row["tokens_per_second"] = rows * d.max_completion / best
                if bandwidth:
                    row["bandwidth_share"] = (
                        d.max_completion * (weights + cache) / best / bandwidth / run.devices.mesh.size
                    )
            print({k: round(v, 3) for k, v in row.items() if k in ("mfu", "tokens_per_second", "bandwidth_share")})
            with open(OUTPUT.value, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    app.run(main)
