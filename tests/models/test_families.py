"""Every model family: parity with `transformers` in import and export, and consistent ways of computing it."""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.drawn_models import golden_families, inputs, weights_of
from support.tiny_llamas import SMALL, assert_equal_trees, edit, forward, needs_torch, torch_logits, write

from pjrlhf.errors import UserError
from pjrlhf.merging.lora import merge_dense
from pjrlhf.models.adapters import AdapterConfig, Policies, init_bank
from pjrlhf.models.config import RopeScaling
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.families import FAMILIES, leaf_shapes, tensor_slots
from pjrlhf.models.hf_config import config_to_hf, read_config
from pjrlhf.models.huggingface import load_params, save_params
from pjrlhf.models.unrolled import unroll
from pjrlhf.parallel.mesh import leaf_sharding, make_mesh, shard_params
from pjrlhf.rollout.batches import Prompts
from pjrlhf.rollout.sampler import Sampling, generate

ADAPTER = AdapterConfig(rank=3, alpha=5.0)


def saved(folder, model_type):
    return write(folder, golden_families()[model_type]["config"], weights_of(model_type))


@functools.cache
def checkpoint(model_type):
    """(config, params) of a family's golden file."""
    with tempfile.TemporaryDirectory() as folder:
        folder = saved(pathlib.Path(folder), model_type)
        return read_config(folder), load_params(folder)


@functools.cache
def short(model_type):
    """(config, params, tokens [4, 12], valid), with windows shorter than the right-padded rows."""
    config, params = checkpoint(model_type)
    tokens = np.random.default_rng(1).integers(3, config.vocab_size, (4, 12)).astype(np.int32)
    valid = np.arange(12) < np.array([[12], [7], [2], [10]])
    return config.replace(windows=tuple(min(w, 3) for w in config.windows)), params, tokens, valid


def some(*names):
    """Families in the default selection; the others are slow tests."""
    return pytest.mark.parametrize(
        "model_type", [pytest.param(x, marks=() if x in names else pytest.mark.slow) for x in FAMILIES]
    )


def test_there_is_a_golden_of_every_family():
    assert golden_families().keys() == FAMILIES.keys()


# --- numbers ---


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_equal_transformers(model_type):
    """320 positions, the second row left-padded by 41, windows of 24."""
    config, params = checkpoint(model_type)
    tokens, valid, positions = inputs(config.vocab_size)
    logits = forward(config, params, tokens, valid)[:, positions]
    np.testing.assert_allclose(logits, golden_families()[model_type]["logits"], rtol=0, atol=1e-4)


NEUTRAL = {
    "rope_scaling": None,
    "rotary_dim": None,
    "rotary_interleaved": False,
    "local_rope_theta": None,
    "windows": (),
    "query_scalar": None,
    "attention_softcap": None,
    "logit_softcap": None,
    "scale_embeddings": False,
}
OTHERS = {
    "activation": {"silu": "gelu", "gelu": "gelu_tanh", "gelu_tanh": "gelu"},
    "norm": {"rms": "rms_plus_one", "rms_plus_one": "rms"},
    "residual": {"parallel": "sequential"},
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_golden_would_reveal_a_switch_that_is_ignored(model_type):
    config, params = checkpoint(model_type)
    tokens, valid, positions = inputs(config.vocab_size)
    want = np.array(golden_families()[model_type]["logits"])
    changes = {name: value for name, value in NEUTRAL.items() if getattr(config, name) != value}
    changes |= {name: x[getattr(config, name)] for name, x in OTHERS.items() if getattr(config, name) in x}
    if config.positions == "rotary":
        changes["rope_theta"] = 2 * config.rope_theta
    assert changes
    for name, value in changes.items():
        logits = forward(config.replace(**{name: value}), params, tokens, valid)[:, positions]
        # The two forms of gelu are less than a thousandth apart.
        assert np.abs(logits - want).max() > (2e-4 if name == "activation" else 1e-2), name


@needs_torch
@pytest.mark.parametrize("model_type", FAMILIES)
def test_live_logits_equal_transformers(model_type, tmp_path):
    config, params = checkpoint(model_type)
    tokens, valid, _ = inputs(config.vocab_size)
    original = torch_logits(saved(tmp_path / "in", model_type), tokens, valid)[valid]
    np.testing.assert_allclose(forward(config, params, tokens, valid)[valid], original, rtol=0, atol=1e-4)
    save_params(tmp_path / "out", config, params, model_type=model_type)
    np.testing.assert_allclose(torch_logits(tmp_path / "out", tokens, valid)[valid], original, rtol=0, atol=1e-5)


# --- folders ---


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_table_covers_the_decoder(model_type):
    config, family = checkpoint(model_type)[0], FAMILIES[model_type]
    paths = [slot.path for slots in tensor_slots(family, config).values() for slot in slots if slot.index in (0, ())]
    assert sorted(paths) == sorted(leaf_shapes(config))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_export_is_the_original_tensor_for_tensor(model_type, tmp_path):
    config, params = checkpoint(model_type)
    save_params(tmp_path / "out", config, params, model_type=model_type)
    written, original = load_file(tmp_path / "out" / "model.safetensors"), weights_of(model_type)
    assert written.keys() == original.keys()
    for name in original:
        np.testing.assert_array_equal(written[name], original[name], err_msg=name)
    assert read_config(tmp_path / "out") == config
    assert_equal_trees(load_params(tmp_path / "out"), params)


# These keys describe the folder or the tokenizer, or have no effect: max_window_layers without windows, and n_inner
# null where it is four times the width.
UNLIKE = {"_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "max_window_layers", "n_inner"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_transformers_reads_the_exported_config(model_type, tmp_path):
    """No setting of the original changes, and the config that `transformers` saves is read back as the same."""
    from transformers import AutoConfig

    config, params = checkpoint(model_type)
    save_params(tmp_path / "out", config, params, model_type=model_type)
    theirs = AutoConfig.from_pretrained(tmp_path / "out")
    original = AutoConfig.from_pretrained(saved(tmp_path / "in", model_type))
    assert not {name for name, x in original.to_dict().items() if theirs.to_dict().get(name) != x} - UNLIKE
    theirs.save_pretrained(tmp_path / "theirs")
    assert read_config(tmp_path / "theirs") == config


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_parts_of_fused_projections_are_read_where_devices_hold_them(model_type, tmp_path):
    mesh = make_mesh({"tensor": 8 // 2, "fsdp": 2})
    config, params = checkpoint(model_type)
    split = load_params(saved(tmp_path / "in", model_type), place=functools.partial(leaf_sharding, mesh))
    kernel = split["layers"]["attention"]["key"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, config.hidden_size // 2, config.hidden_size // 4)
    assert_equal_trees(split, params)


def test_weights_saved_without_the_head_lack_a_prefix(tmp_path):
    """GPT-2 on the hub is such a folder, with mask buffers as well."""
    weights = {k.removeprefix("transformer."): v for k, v in weights_of("gpt2").items()}
    weights |= {"h.1.attn.bias": np.tri(4, dtype=np.uint8)[None, None], "h.1.attn.masked_bias": np.array(-1e4)}
    folder = write(tmp_path / "bare", golden_families()["gpt2"]["config"], weights)
    assert_equal_trees(load_params(folder), checkpoint("gpt2")[1])
    for name, wrong in (("h.1.attn.bias", np.tri(4, k=1)[None, None]), ("h.1.attn.masked_bias", np.array(0.0))):
        folder = write(tmp_path / "other", golden_families()["gpt2"]["config"], weights | {name: wrong})
        with pytest.raises(UserError, match=f"{name} is not what a model of this config.json computes there"):
            load_params(folder)


OLD_SPELLINGS = {
    "gemma3_text": {
        "rope_parameters": None,
        "rope_theta": 1000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "layer_types": None,
        "sliding_window_pattern": 2,
    },
    "gpt_neox": {"rope_parameters": None, "rotary_emb_base": 100, "rotary_pct": 0.5},
    "gemma2": {"rope_parameters": None, "rope_theta": 100.0, "layer_types": None, "hidden_act": "gelu"},
    "qwen2": {"rope_parameters": None, "rope_theta": 100.0, "layer_types": None},
    "gpt2": {"n_inner": 40, "n_ctx": 512},
}


@pytest.mark.parametrize("model_type", OLD_SPELLINGS)
def test_old_spellings(model_type, tmp_path):
    folder = saved(tmp_path / "in", model_type)
    edit(folder, **OLD_SPELLINGS[model_type])
    assert read_config(folder) == checkpoint(model_type)[0]


def test_absent_keys_have_the_defaults_of_transformers(tmp_path):
    """A config with sizes only, read by both."""
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 7, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 20, "num_key_value_heads": 2}
    gpt = {"vocab_size": 40, "n_embd": 16, "n_layer": 7, "n_head": 4}
    for model_type in FAMILIES:
        given = {"model_type": model_type, **(gpt if model_type in ("gpt2", "gptj") else sizes)}
        if model_type == "gptj":
            given["rotary_dim"] = 4
        folder = write(tmp_path / model_type, given, {"x": np.zeros(1, np.float32)})
        (folder / "model.safetensors").unlink()
        ours = read_config(folder)
        transformers.AutoConfig.from_pretrained(folder).save_pretrained(folder)
        assert read_config(folder) == ours, model_type


REFUSED = {
    "use_bidirectional_attention=True": ("gemma3_text", {"use_bidirectional_attention": True}),
    "attn_logit_softcapping=20": ("gemma3_text", {"attn_logit_softcapping": 20}),
    "scaled rope of sliding_attention": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
    ),
    "rope_scaling is no JSON object": ("mistral", {"rope_scaling": "linear"}),
    "sliding_attention is no JSON object": ("gemma3_text", {"rope_parameters": {"sliding_attention": 3}}),
    "rope_parameters must have the keys": ("gemma3_text", {"rope_parameters": {"rope_theta": 7.0}}),
    "'sliding_window' is missing": ("gemma2", {"sliding_window": 0}),
    "layer type 'chunked_attention'": ("qwen3", {"layer_types": ["chunked_attention", "full_attention"]}),
    "layer_types contradicts use_sliding_window": ("qwen2", {"use_sliding_window": False}),
    r"windows=\(24,\) must be one number": ("gemma2", {"layer_types": ["sliding_attention"]}),
    "layer_types=": ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}),
    "partial_rotary_factor is not supported": ("mistral", {"partial_rotary_factor": 0.5}),
    "partial_rotary_factor": ("gpt_neox", {"rotary_pct": 0.25}),
    "rotary_dim=5 must be even": ("gptj", {"rotary_dim": 5}),
    "rope_scaling is not supported": ("gptj", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "scale_attn_by_inverse_layer_idx=True": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "scale_attn_weights=False": ("gpt2", {"scale_attn_weights": False}),
    "activation_function='relu'": ("gpt2", {"activation_function": "relu"}),
    "tie_word_embeddings=True": ("gptj", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_decoder_cannot_compute_is_refused(message, tmp_path):
    model_type, changes = REFUSED[message]
    folder = saved(tmp_path / "in", model_type)
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        read_config(folder)


@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("llama", {"logit_softcap": 3.0}),
        ("llama", {"biases": ("query",)}),
        ("llama", {"windows": (4, 0)}),
        ("mistral", {"windows": (4, 0)}),
        ("gemma2", {"windows": (4, 8)}),
        ("olmo2", {}),
    ],
)
def test_a_type_that_cannot_say_what_the_config_says_is_refused(model_type, changes):
    with pytest.raises(UserError, match="export it as the type it came from"):
        config_to_hf(SMALL.replace(**changes), model_type=model_type)


@pytest.mark.parametrize(
    "message, changes",
    {
        "norm='batch' is unknown": {"norm": "batch"},
        r"windows=\(3,\) must be one number": {"windows": (3,)},
        "no linear layer 'queries'": {"biases": ("queries",)},
        "a head that is tied": {"biases": ("head",)},
        "needs norm_placement='before'": {"residual": "shared", "norm_placement": "after"},
    }.items(),
)
def test_mistakes_are_named(message, changes):
    with pytest.raises(ValueError, match=message):
        SMALL.replace(**changes)
    with pytest.raises(ValueError, match="neither linear nor Llama 3 scaling"):
        RopeScaling(factor=2.0, low_freq_factor=1.0)


# --- one function ---


@some("gemma2", "gpt2", "gptj")
def test_padding_and_unrolling_do_not_matter(model_type):
    config, params, tokens, valid = short(model_type)
    lengths = valid.sum(1)
    want = forward(config, params, np.pad(tokens, ((0, 0), (0, 3))), np.pad(valid, ((0, 0), (0, 3))))[:, :12]
    left = np.stack([np.roll(row, 12 - n) for row, n in zip(tokens, lengths, strict=True)])
    left, left_valid = np.pad(left, ((0, 0), (3, 0)), constant_values=7), np.pad(valid[:, ::-1], ((0, 0), (3, 0)))
    got = forward(config, params, left, left_valid)
    np.testing.assert_allclose(got[left_valid], want[valid], rtol=0, atol=1e-5)
    model, variables = Decoder(config, scan_layers=False), unroll({"params": params}, fused=True)
    hidden, _ = jax.jit(model.apply)(variables, left, left_valid)
    logits = jax.jit(functools.partial(model.apply, method="logits"))(variables, hidden)
    np.testing.assert_allclose(logits[left_valid], got[left_valid], rtol=0, atol=1e-5)


@some("gemma2", "gpt2")
def test_sampling_with_a_cache_equals_the_full_forward(model_type):
    """Left-padded prompts, user tokens, and more tokens than a window holds."""
    config, params, tokens, _ = short(model_type)
    model = Decoder(config)
    prompt, prompt_valid = tokens[:, :6], np.arange(6) >= np.array([[0], [2], [4], [1]])
    users = jnp.asarray(np.random.default_rng(2).standard_normal((4, 2, config.hidden_size)), jnp.float32)
    sampling = Sampling(max_new_tokens=8, eos_ids=(config.vocab_size,), pad_id=0)

    @jax.jit
    def run(params):
        policies = Policies(model, ADAPTER, params, None, None, users)
        sample = generate(policies, sampling, Prompts(prompt, prompt_valid), jax.random.key(3))
        rows = jnp.concatenate([prompt, sample.tokens], 1)
        hidden, _ = policies(*policies.reserve(rows, jnp.concatenate([prompt_valid, sample.valid], 1)))
        logps = jax.nn.log_softmax(policies.logits(hidden[:, -9:-1]))
        return sample.logps, jnp.take_along_axis(logps, sample.tokens[..., None], 2)[..., 0]

    got, want = run(params)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@some("gemma2", "gpt2")
def test_user_tokens_that_are_words_are_those_words(model_type):
    """Scaled embeddings and learned positions are the same for both."""
    config, params, tokens, _ = short(model_type)
    valid = np.arange(10) >= np.array([[0], [2], [4], [1]])

    @jax.jit
    def run(params):
        policies = Policies(Decoder(config), ADAPTER, params, None, None, params["embed"]["embedding"][tokens[:, 10:]])
        rows, rows_valid = policies.reserve(jnp.asarray(tokens[:, :10]), jnp.asarray(valid))
        return policies.logits(policies(rows, rows_valid)[0]), rows, rows_valid

    got, rows, rows_valid = run(params)
    spelled, start = np.array(rows), np.argmax(np.array(rows_valid), 1)
    for row, at, words in zip(spelled, start, tokens[:, 10:], strict=True):
        row[at + 1 : at + 3] = words
    want = forward(config, params, spelled, np.array(rows_valid))
    np.testing.assert_allclose(got[rows_valid], want[rows_valid], rtol=0, atol=1e-5)


@some("gpt2", "gptj")
def test_one_hot_adapters_are_the_merged_weights(model_type):
    config, params, tokens, valid = short(model_type)
    rng = np.random.default_rng(4)
    shapes = jax.eval_shape(lambda: init_bank(params, ADAPTER, 2, jax.random.key(0)))
    bank = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), shapes)
    assert ("gate" in bank["layers"]["mlp"]) == config.gated
    rows = np.array([0, 1, 0, 1])

    @jax.jit
    def mixed(params, bank):
        policies = Policies(Decoder(config), ADAPTER, params, bank, np.eye(2, dtype=np.float32)[rows])
        return policies.logits(policies(tokens, valid)[0])

    got = mixed(params, bank)
    for k in range(2):
        merged = merge_dense(params, [jax.tree.map(lambda x, k=k: x[k], bank)], [ADAPTER.scale], [1.0])
        want = forward(config, merged, tokens, valid)
        keep = valid & (rows == k)[:, None]
        np.testing.assert_allclose(got[keep], want[keep], rtol=0, atol=2e-5)
        assert np.abs(want - forward(config, params, tokens, valid)).max() > 0.1


@some("gpt2", "gemma2")
def test_split_over_eight_devices(model_type):
    config, params, tokens, valid = short(model_type)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    split = shard_params(mesh, params)
    got = forward(config, split, tokens, valid)
    np.testing.assert_allclose(got[valid], forward(config, params, tokens, valid)[valid], rtol=0, atol=1e-5)
    if "query" in config.biases:
        bias = split["layers"]["attention"]["query"]["bias"]
        assert bias.addressable_shards[0].data.shape == (config.num_layers, bias.shape[1] // 2)
    if config.positions == "learned":
        table = split["position"]["embedding"]
        assert table.addressable_shards[0].data.shape == (config.max_length, config.hidden_size // 2)
