"""LoRA folders: PEFT's names and layout, the right update, and no silently ignored parts."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny_llamas import SMALL, forward, random_params

from pjrlhf.errors import UserError
from pjrlhf.merging.lora import merge_dense
from pjrlhf.models.adapters import AdapterConfig, init_bank
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.models.huggingface import load_params, read_config, save_params
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
    """PEFT's update of a weight [out, in], (alpha / r) B A, is the transpose of ours."""
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
    "init_lora_weights='pissa'.*path_initial_model_for_weight_conversion": {"init_lora_weights": "pissa"},
    "init_lora_weights='pissa_niter_4'.*weight_conversion": {"init_lora_weights": "PiSSA_niter_4"},
    "init_lora_weights='olora'.*weight_conversion": {"init_lora_weights": "olora"},
    "init_lora_weights='corda'": {"init_lora_weights": "corda"},
    "init_lora_weights='lora_ga'": {"init_lora_weights": "lora_ga"},
    "init_lora_weights='mica'": {"init_lora_weights": "mica"},
    "init_lora_weights='loftq'.*merge_and_unload": {"init_lora_weights": "loftq"},
    "init_lora_weights='eva'.*merge_and_unload": {"init_lora_weights": "eva"},
    "init_lora_weights=1 may": {"init_lora_weights": 1},
    r"init_lora_weights=\['gaussian'\]": {"init_lora_weights": ["gaussian"]},
    "use_dora=True.*merge_and_unload": {"use_dora": True},
    "layer_replication=": {"layer_replication": [[0, 1]]},
    "trainable_token_indices=": {"trainable_token_indices": [3]},
    "target_parameters=": {"target_parameters": ["mlp.experts"]},
    "megatron_config=": {"megatron_config": {"a": 1}},
    "arrow_config=": {"arrow_config": {"top_k": 3}},
    "monteclora_config=": {"monteclora_config": {"num_samples": 3}},
    "use_bdlora=": {"use_bdlora": {"nblocks": 2}},
    "ensure_weight_tying=True": {"ensure_weight_tying": True},
    "something_new=0.5": {"something_new": 0.5},
    "task_type='SEQ_CLS'": {"task_type": "SEQ_CLS"},
    "proj.lora_A.weight adapts a module that target_modules": {"target_modules": ["v_proj", "o_proj"]},
    "adapts a module that target_modules, exclude_modules": {"exclude_modules": ["mlp.up_proj"]},
    r"layers\.1.* adapts a module that .* layers_to_transform": {"layers_to_transform": [0]},
    "target_modules=7 is neither a list nor a pattern": {"target_modules": 7},
    r"exclude_modules='\(' is neither": {"exclude_modules": "("},
    "r=3.5 is no whole number": {"r": 3.5},
    "r=0 is no whole number": {"r": 0},
    "lora_alpha=inf is no finite number": {"lora_alpha": float("inf")},
    "lora_alpha='16' is no finite number": {"lora_alpha": "16"},
    "adapter_config.json: cannot be read .a whole number of 401 digits": {"lora_alpha": 10**400},
    "use_rslora='false' is neither true nor false": {"use_rslora": "false"},
    "lora_bias=True": {"lora_bias": True},
    "use_qalora=True": {"use_qalora": True},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "bias='all'": {"bias": "all"},
    "fan_in_fan_out=True": {"fan_in_fan_out": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "q_proj.lora_A.weight has shape .* is not of rank 2": {"rank_pattern": {"q_proj": 2}},
    "rank_pattern.q_proj=0 is no whole number": {"rank_pattern": {"q_proj": 0}},
    "rank_pattern.q_proj=True is no whole number": {"rank_pattern": {"q_proj": True}},
    r"rank_pattern=\['q_proj'\] is no object": {"rank_pattern": ["q_proj"]},
    r"rank_pattern has no pattern '\('": {"rank_pattern": {"(": 2}},
    "alpha_pattern.q_proj='2' is no finite number": {"alpha_pattern": {"q_proj": "2"}},
    "alpha_pattern.q_proj=nan is no finite number": {"alpha_pattern": {"q_proj": float("nan")}},
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
    edit(folder, modules_to_save=[], layer_replication=None, rank_pattern={}, use_dora=False, loftq_config={})
    raw = json.loads((folder / "adapter_config.json").read_text())
    del raw["bias"], raw["fan_in_fan_out"], raw["use_rslora"]
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    assert load_peft(folder)[2] == ALPHA


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "Gaussian", "orthogonal"])
def test_starts_that_leave_the_base_alone(folder, start):
    """And settings that change nothing, such as those of a start that was not used."""
    edit(
        folder, init_lora_weights=start, lora_dropout=0.1, peft_version="0.21.2", revision="main", corda_config={"a": 1}
    )
    edit(
        folder, target_modules=r".*\.(self_attn|mlp)\.\w+_proj", exclude_modules=["lm_head"], layers_to_transform=[0, 1]
    )
    jax.tree.map(np.testing.assert_array_equal, load_peft(folder)[0], ingredient())
    edit(folder, target_modules="all-linear", task_type=None, inference_mode=False, layers_to_transform=[])
    assert load_peft(folder)[1:] == (RANK, ALPHA)


PREFIX = "base_model.model.model.layers.1.self_attn.q_proj"
WEIGHTS = {
    "q_proj.lora_B.weight is stored as I8": lambda w: w.update({f"{PREFIX}.lora_B.weight": np.ones((12, 3), np.int8)}),
    "q_proj.lora_B.weight holds NaN": lambda w: w[f"{PREFIX}.lora_B.weight"].__setitem__((0, 0), np.nan),
    "lora_A of .* is missing in layer 2": lambda w: w.update(
        {f"{PREFIX.replace('.1.', '.999999999.')}.lora_A.weight": np.ones((3, 8), np.float32)},
    ),
    r"layers\.1000000000\..* adapts no module": lambda w: w.update(
        {f"{PREFIX.replace('.1.', '.1000000000.')}.lora_A.weight": np.ones((3, 8), np.float32)},
    ),
    r"layers\.01\..* adapts no module": lambda w: w.update(
        {f"{PREFIX.replace('.1.', '.01.')}.lora_A.weight": np.ones((3, 8), np.float32)},
    ),
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


# --- fused projections ---

FUSED = CONFIG.replace(num_kv_heads=2, head_dim=4, gated=False, norm="layer", positions="learned")
FUSED_MODULE = {"gpt2": "transformer.h.{}.attn.c_attn", "gpt_neox": "gpt_neox.layers.{}.attention.query_key_value"}


@functools.cache
def fused_ingredient():
    rng = np.random.default_rng(3)

    def init(key):
        return init_bank(init_params(Decoder(FUSED), key), AdapterConfig(rank=RANK), 2, key)

    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape[1:]).astype(np.float32), shapes)


@pytest.fixture(params=FUSED_MODULE)
def fused(request, tmp_path):
    save_peft(tmp_path / "lora", fused_ingredient(), RANK, ALPHA, "base", request.param, FUSED.head_dim)
    return request.param, tmp_path / "lora"


def in_order(model_type, parts):
    """Queries, keys and values [..., D] in the fused order of the family: [..., 3 D]."""
    heads = np.stack([x.reshape(*x.shape[:-1], FUSED.num_heads, -1) for x in parts], -3)
    return (heads.swapaxes(-3, -2) if model_type == "gpt_neox" else heads).reshape(*parts[0].shape[:-1], -1)


def test_fused_projections_round_trip(fused):
    model_type, folder = fused
    adapter, rank, alpha = load_peft(folder, model_type, FUSED.head_dim)
    assert (rank, alpha) == (RANK, ALPHA)
    jax.tree.map(np.testing.assert_array_equal, adapter, fused_ingredient())


def test_the_update_of_a_fused_projection_is_that_of_its_parts(fused):
    model_type, folder = fused
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    module = FUSED_MODULE[model_type].format(1)
    (target,) = [x for x in config["target_modules"] if module.endswith(f".{x}")]
    scale = config["alpha_pattern"][target] / config["rank_pattern"][target]
    key = f"base_model.model.{module}"
    update = scale * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
    pairs = [fused_ingredient()["layers"]["attention"][part] for part in ("query", "key", "value")]
    want = in_order(model_type, [ALPHA / RANK * pair["a"][1] @ pair["b"][1] for pair in pairs])
    np.testing.assert_allclose(update.T, want, rtol=1e-5, atol=1e-5)
    assert config["fan_in_fan_out"] == (model_type == "gpt2")


def test_plain_adapters_of_a_fused_projection_share_a(fused):
    """As PEFT trains them: one pair of factors for the whole projection."""
    model_type, folder = fused
    edit(folder, rank_pattern={}, alpha_pattern={})
    a, b = np.ones((RANK, 8), np.float32), np.arange(24 * RANK, dtype=np.float32).reshape(24, RANK)
    keys = [f"base_model.model.{FUSED_MODULE[model_type].format(i)}" for i in range(2)]
    tensors = {f"{key}.lora_{factor}.weight": x for key in keys for factor, x in (("A", a), ("B", b))}
    save_file(tensors, folder / "adapter_model.safetensors")
    attention = load_peft(folder, model_type, FUSED.head_dim)[0]["layers"]["attention"]
    parts = [attention[part] for part in ("query", "key", "value")]
    assert all((pair["a"] == a.T).all() for pair in parts)
    np.testing.assert_array_equal(in_order(model_type, [pair["b"][0] for pair in parts]), b.T)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_fused_adapter_that_mixes_its_parts_has_the_update_of_its_factors(fused, rslora):
    model_type, folder = fused
    weights = load_file(folder / "adapter_model.safetensors")
    key = f"base_model.model.{FUSED_MODULE[model_type].format(0)}"
    weights[f"{key}.lora_B.weight"] += 1
    save_file(weights, folder / "adapter_model.safetensors")
    edit(folder, use_rslora=rslora)
    adapter, rank, alpha = load_peft(folder, model_type, FUSED.head_dim)
    parts = [adapter["layers"]["attention"][part] for part in ("query", "key", "value")]
    got = in_order(model_type, [alpha / rank * pair["a"][0] @ pair["b"][0] for pair in parts])
    scale = 3 * ALPHA / ((3 * RANK) ** 0.5 if rslora else 3 * RANK)
    want = scale * weights[f"{key}.lora_B.weight"] @ weights[f"{key}.lora_A.weight"]
    np.testing.assert_allclose(got, want.T, rtol=1e-5, atol=1e-5)


def test_parts_of_a_fused_projection_are_adapted_together(tmp_path):
    model_type = "gpt2"
    attention = {name: pair for name, pair in fused_ingredient()["layers"]["attention"].items() if name != "key"}
    with pytest.raises(UserError, match=r"attention/key/[ab] is missing; .* all parts of a fused projection"):
        save_peft(tmp_path / "other", {"layers": {"attention": attention}}, RANK, ALPHA, "base", model_type, 4)


# --- modules with a rank or scale of their own ---

OWN = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5, "mlp": 7},
    "alpha_pattern": {"up_proj": 4, "q_proj": 0},
}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_alpha": 0}, {"r": 9}], ids=str)
def test_modules_may_have_a_rank_and_scale_of_their_own(folder, settings):
    """The update of every module is the one of its factors; the first pattern that matches its end counts."""
    rng, keys = np.random.default_rng(0), sorted(load_file(folder / "adapter_model.safetensors"))
    config = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": False, **OWN, **settings}
    edit(folder, **config)

    def own(key):
        rank = 2 if "q_proj" in key else 5 if "layers.1.mlp.up_proj" in key else config["r"]
        return rank, 4 if "up_proj" in key else 0 if "q_proj" in key else config["lora_alpha"]

    old = load_file(folder / "adapter_model.safetensors")
    tensors = {}
    for key in keys:
        shape = [own(key)[0] if (axis == 0) == ("lora_A" in key) else n for axis, n in enumerate(old[key].shape)]
        tensors[key] = rng.standard_normal(shape).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter, rank, alpha = load_peft(folder)
    assert rank == max(own(key)[0] for key in keys)
    names = {"self_attn.q_proj": "attention/query", "mlp.up_proj": "mlp/up", "mlp.down_proj": "mlp/down"}
    for name, path in names.items():
        block, module = path.split("/")
        for layer in range(CONFIG.num_layers):
            key = f"base_model.model.model.layers.{layer}.{name}"
            own_rank, own_alpha = own(key)
            scale = own_alpha / (own_rank**0.5 if config["use_rslora"] else own_rank)
            want = scale * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            pair = {factor: x[layer] for factor, x in adapter["layers"][block][module].items()}
            np.testing.assert_allclose(alpha / rank * (pair["a"] @ pair["b"]).T, want, rtol=1e-5, atol=1e-5)


# --- PEFT itself ---

TOKENS = np.arange(12).reshape(2, 6)


class Trained:
    """The base in a folder, with an adapter of PEFT that is not as it starts.

    Attributes:
      start: the folder of the adapter as it starts, saved where `changes_base`.
    """

    def __init__(self, folder, changes_base=False, **settings):
        torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        self.torch, self.start = torch, str(folder / "start")
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        self.model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, **settings))
        if changes_base:
            start, self.config.init_lora_weights = self.config.init_lora_weights, True
            self.model.save_pretrained(self.start)
            self.config.init_lora_weights = start
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if "lora_" in name:
                    weight += 0.1 * torch.randn_like(weight)
        self.model.save_pretrained(folder / "trained")

    @property
    def config(self):
        return self.model.peft_config["default"]

    def logits(self):
        with self.torch.no_grad():
            return self.model(self.torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_patterns_of_peft(model_type, rslora, tmp_path):
    if model_type == "llama":
        save_params(tmp_path / "base", SMALL, random_params(SMALL))
    else:
        pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        transformers.set_seed(0)
        shape = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=2, n_positions=16, vocab_size=12)
        transformers.GPT2LMHeadModel(shape).save_pretrained(tmp_path / "base")
    config = read_config(tmp_path / "base")
    own = {
        "llama": {
            "target_modules": ["q_proj", "o_proj", "down_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 7, "q_proj": 2, "proj": 9, "^o_proj": 9},
            "alpha_pattern": {"down_proj": 3, r"layers\.0\..*_proj": 5},
        },
        "gpt2": {
            "target_modules": ["c_attn", "c_fc"],
            "rank_pattern": {"c_attn": 12, r"h\.1\.mlp\.c_fc": 3},  # three times the default, as for three parts
            "alpha_pattern": {"c_attn": 18},
        },
    }
    trained = Trained(tmp_path, use_rslora=rslora, task_type="CAUSAL_LM", **own[model_type])
    adapter, rank, alpha = load_peft(tmp_path / "trained", model_type, config.head_dim)
    params = merge_dense(load_params(tmp_path / "base"), [adapter], [alpha / rank], [1.0])
    got = forward(config, params, TOKENS, np.ones((2, 6), bool))
    np.testing.assert_allclose(got, trained.logits(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_of_peft(start, rslora, tmp_path):
    """Loaded with its base, an adapter gives PEFT's logits; one that changes its base is refused until it is converted,
    as the message says.
    """
    save_params(tmp_path / "base", SMALL, random_params(SMALL))
    changes_base = isinstance(start, str) and start.startswith(("pissa", "olora"))
    modules = {"target_modules": ["q_proj", "down_proj"]}
    trained = Trained(tmp_path, changes_base, init_lora_weights=start, use_rslora=rslora, **modules)
    want = trained.logits()
    if changes_base:
        with pytest.raises(UserError, match="path_initial_model_for_weight_conversion=START"):
            load_peft(tmp_path / "trained")
        trained.model.save_pretrained(tmp_path / "trained", path_initial_model_for_weight_conversion=trained.start)
    adapter, rank, alpha = load_peft(tmp_path / "trained")
    params = merge_dense(load_params(tmp_path / "base"), [adapter], [alpha / rank], [1.0])
    got = forward(read_config(tmp_path / "base"), params, TOKENS, np.ones((2, 6), bool))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
