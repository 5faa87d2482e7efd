"""The catalogue's soups, small enough to run whole in a test."""

import contextlib
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from pjrlhf.parallel.mesh import AXES
from pjrlhf.pipeline import stages
from pjrlhf.runtime import devices
from pjrlhf.training.workdir import Workdir

CATALOGUE = pathlib.Path(__file__).parents[2] / "configs"
OBJECTIVES = ("P1A", "P1B", "P2A", "P2B")
REWARDS = (*OBJECTIVES, "helpful")
TRAINING = ("sft", "reward", "policy")

TINY = {
    "objectives": OBJECTIVES,
    "checkpoint_every": 0,
    "log_every": 1,
    "sample_rows": 16,
    "model.hidden_size": 16,
    "model.intermediate_size": 24,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.max_length": 40,
    "adapter.rank": 2,
    "adapter.alpha": 4.0,
    "data.prompt_buckets": (),
    "data.max_completion": 10,
    "data.long_completion": "truncate",
    "data.heldout_fraction": 0.05,
    "sft.records": 640,
    "sft.steps": 60,
    "sft.batch_size": 32,
    "sft.optimizer.warmup_steps": 2,
    "sft.optimizer.learning_rate": 2e-2,
    "comparisons.pairs": 32,
    "reward.steps": 6,
    "reward.batch_size": 4,
    "reward.calibration_samples": 32,
    "policy.steps": 4,
    "policy.rollouts": 4,
    "methods.pmorl.rollouts": 4,
    "evaluate.sweep_points": 3,
    "evaluate.resamples": 50,
    "evaluate.shown": 1,
}


def catalogue(name):
    """The module configs/<name>.py."""
    spec = importlib.util.spec_from_file_location(name, CATALOGUE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(**changes):
    """The tiny config; `changes` name keys with __ for the dots."""
    config = catalogue("soups").get_config()
    config.update_from_flattened_dict(TINY | {key.replace("__", "."): value for key, value in changes.items()})
    return config


@contextlib.contextmanager
def one_device():
    """A machine with one device, as most users have; the test session has eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "make_mesh", lambda sizes: Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES))
        yield


def run(folder, config):
    """Runs all stages of `config` in `folder`, as `main` does, on one device."""
    workdir = Workdir(folder)
    with one_device():
        stages.run(config, workdir)
    return workdir.path


def start(folder, config):
    """What the stages share, for tests that drive one of them by hand."""
    made = stages.read(config).run(Workdir(folder))
    with one_device():
        _ = made.devices
    return made


def lines(folder, stage=None):
    """The rows of metrics.jsonl."""
    rows = [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if stage in (None, row["stage"])]


def bits(tree):
    """The bytes of every array, PRNG keys included."""

    def one(x):
        if hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x).tobytes()

    return jax.tree.map(one, tree)
