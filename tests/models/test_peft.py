"""LoRA folders: PEFT's names and layout, the right update, and no silent half-reading."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pjrlhf.errors import UserError
from pjrlhf.models.adapters import AdapterConfig, init_bank
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.models.peft import load_peft, save_peft

CONFIG = ModelConfig(
    vocab_size=12, hidden_size=8, intermediate_size=10, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6
)
RANK, ALPHA = 3, 6.0


@functools.cache
def ingredient():
    """Random factors in the shapes of a bank, without its leading axis."""
    adapter = AdapterConfig(rank=RANK, alpha=ALPHA)

    def init(key):
        return init_bank(init_params(Decoder(CONFIG), key), adapter, 2, key)

    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape[1:]).astype(np.float32), shapes)


@pytest.fixture
def folder(tmp_path):
    save_peft(tmp_path / "lora", ingredient(), RANK, ALPHA, "some/base")
    return tmp_path / "lora"


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_round_trip(folder):
    adapter, rank, alpha = load_peft(folder)
    assert (rank, alpha) == (RANK, ALPHA)
    jax.tree.map(np.testing.assert_array_equal, adapter, ingredient())


def test_layout_and_update(folder):
    """The update PEFT computes from the folder, (alpha / r) B A on a weight [out, in], is ours transposed."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (RANK, ALPHA, "some/base")
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * CONFIG.num_layers
    names = {"self_attn.k_proj": ("attention", "key"), "mlp.down_proj": ("mlp", "down")}
    for name, (block, module) in names.items():
        for layer in range(CONFIG.num_layers):
            key = f"base_model.model.model.layers.{layer}.{name}"
            update = (
                config["lora_alpha"] / config["r"] * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            )
            pair = ingredient()["layers"][block][module]
            want = AdapterConfig(rank=RANK, alpha=ALPHA).scale * pair["a"][layer] @ pair["b"][layer]
            np.testing.assert_allclose(update.T, want, rtol=1e-6, atol=1e-6)
            assert tensors[f"{key}.lora_A.weight"].shape == (RANK, pair["a"].shape[1])


def test_rank_stabilised_scale_becomes_alpha(folder):
    edit(folder, use_rslora=True)
    _, rank, alpha = load_peft(folder)
    assert alpha / rank == pytest.approx(ALPHA / RANK**0.5)


def test_a_subset_of_modules(tmp_path):
    attention = ingredient()["layers"]["attention"]
    adapter = {"layers": {"attention": {"query": attention["query"], "value": attention["value"]}}}
    save_peft(tmp_path / "lora", adapter, RANK, ALPHA, "base")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    jax.tree.map(np.testing.assert_array_equal, load_peft(tmp_path / "lora")[0], adapter)
    with pytest.raises(UserError, match="embed/a has no name"):
        save_peft(tmp_path / "other", {"embed": {"a": attention["query"]["a"]}}, RANK, ALPHA, "base")


CONFIGS = {
    "use_dora=True": {"use_dora": True},
    "lora_bias=True": {"lora_bias": True},
    "use_qalora=True": {"use_qalora": True},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "bias='all'": {"bias": "all"},
    "fan_in_fan_out=True": {"fan_in_fan_out": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 2}},
    "peft_type='IA3'": {"peft_type": "IA3"},
    "'r' is missing": {"r": None},
    "is not of rank 4": {"r": 4},
}


@pytest.mark.parametrize("message", CONFIGS)
def test_other_adapters_are_refused(folder, message):
    edit(folder, **CONFIGS[message])
    with pytest.raises(UserError, match=message):
        load_peft(folder)


def test_absent_and_empty_settings_mean_plain_lora(folder):
    edit(folder, modules_to_save=[], layer_replication=None, rank_pattern={}, use_dora=False)
    raw = json.loads((folder / "adapter_config.json").read_text())
    del raw["bias"], raw["fan_in_fan_out"], raw["use_rslora"]
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    assert load_peft(folder)[2] == ALPHA


PREFIX = "base_model.model.model.layers.1.self_attn.q_proj"
WEIGHTS = {
    "lora_B of layers/attention/query is missing in layer 1": lambda w: w.pop(f"{PREFIX}.lora_B.weight"),
    "lora_A of layers/attention/query is missing in layer 1": lambda w: w.pop(f"{PREFIX}.lora_A.weight"),
    "lm_head.* adapts no module": lambda w: w.update({"base_model.model.lm_head.lora_A.weight": np.ones((3, 8))}),
    "router.* adapts no module": lambda w: w.update({f"{PREFIX[:-9]}router.lora_A.weight": np.ones((3, 8))}),
    "magnitude.* adapts no module": lambda w: w.update({f"{PREFIX}.lora_magnitude_vector": np.ones(3)}),
    "differs in shape": lambda w: w.update({f"{PREFIX}.lora_A.weight": np.ones((3, 9))}),
    "holds no LoRA matrices": lambda w: w.clear(),
}


@pytest.mark.parametrize("message", WEIGHTS)
def test_incomplete_or_foreign_matrices_are_named(folder, message):
    weights = load_file(folder / "adapter_model.safetensors")
    WEIGHTS[message](weights)
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        load_peft(folder)


def test_missing_files_are_named(folder):
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: no such file"):
        load_peft(folder)
    with pytest.raises(UserError, match=r"adapter_config\.json: no such file"):
        load_peft(folder / "nowhere")
