"""Tiny Llamas for the tests beside this file: the checkpoints of the goldens, and one of random numbers to break."""

import functools
import json
import pathlib

import flax.traverse_util
import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from pjrlhf.models.config import ModelConfig
from pjrlhf.models.families import leaf_shapes

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
SMALL = ModelConfig(
    vocab_size=12, hidden_size=8, intermediate_size=10, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6
)


@functools.cache
def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as f:
        return dict(f)


def weights_of(name):
    return {k.removeprefix("weights/"): v for k, v in golden(name).items() if k.startswith("weights/")}


def write(folder, config, weights):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_params(config):
    rng = np.random.default_rng(0)
    leaves = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in leaf_shapes(config).items()}
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def edit(folder, **changes):
    """Sets keys of config.json; None removes one."""
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def assert_equal_trees(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def change_weights(change):
    def apply(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return apply
