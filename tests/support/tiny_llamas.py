"""Tiny Llamas for the tests beside this file: the checkpoints of the goldens, and one of random numbers to break."""

import functools
import json
import pathlib

import flax.traverse_util
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.families import leaf_shapes

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed; the goldens are compared instead")
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


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens, valid):
    """Logits [B, T, V]."""
    model = Decoder(config)
    hidden, _ = model.apply({"params": params}, tokens, valid)
    return model.apply({"params": params}, hidden, method="logits")


def torch_logits(folder, tokens, valid):
    import transformers

    # Some fused attention kernels know no soft caps.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    mask = torch.tensor(valid)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=mask.long(), position_ids=positions).logits.numpy()


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
