"""config.json in both spellings, and atomic folders."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_llamas import SMALL, assert_equal_trees, change_weights, edit, random_params

from pjrlhf.data.records import RecordError, from_json
from pjrlhf.errors import UserError
from pjrlhf.models import huggingface
from pjrlhf.models.config import RopeScaling
from pjrlhf.models.folders import Stream, read_json, stream_tensors
from pjrlhf.models.huggingface import config_to_hf, fingerprint, load_params, read_config, save_params
from pjrlhf.serving.protocol import Body, Refused
from pjrlhf.training.workdir import read_object

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
ROPES = {
    "nothing": ({}, 10_000.0, None),
    "old": ({"rope_theta": 7.0}, 7.0, None),
    "old scaled": ({"rope_theta": 7.0, "rope_scaling": LLAMA3}, 7.0, SCALING),
    "new": ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, 7.0, None),
    "new scaled": ({"rope_parameters": {"rope_theta": 7.0, **LLAMA3}}, 7.0, SCALING),
    "theta above, scaling below": ({"rope_theta": 7.0, "rope_parameters": LLAMA3}, 7.0, SCALING),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10_000.0, RopeScaling(factor=2.0)),
    "both": (
        {"rope_theta": 7.0, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 7.0, **LLAMA3}},
        7.0,
        SCALING,
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_both_spellings_of_rope(small, name):
    spelling, theta, scaling = ROPES[name]
    edit(small, **{"rope_theta": None, "rope_scaling": None, "rope_parameters": None, **spelling})
    config = read_config(small)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize("scaling", [None, SCALING])
def test_config_round_trip(tmp_path, scaling):
    config = SMALL.replace(rope_theta=7.0, rope_scaling=scaling, norm_eps=1e-3, max_length=77, tie_embeddings=False)
    raw = config_to_hf(config, dtype=jnp.bfloat16, eos_token_id=[3, 4], bos_token_id=1)
    assert raw["architectures"] == ["LlamaForCausalLM"] and raw["model_type"] == "llama"
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (1, [3, 4], None)
    for spelling in ({}, {"rope_parameters": None}, {"rope_theta": None, "rope_scaling": None}):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        edit(tmp_path, **spelling)
        assert read_config(tmp_path) == config
    with pytest.raises(UserError, match="unk_token_id"):
        config_to_hf(config, unk_token_id=0)


def test_transformers_reads_the_exported_config(tmp_path):
    from transformers import AutoConfig

    config = SMALL.replace(rope_theta=7.0, rope_scaling=SCALING)
    params = random_params(config)
    save_params(tmp_path / "out", config, params, token_ids={"bos_token_id": 5, "eos_token_id": 6})
    theirs = AutoConfig.from_pretrained(tmp_path / "out")
    assert theirs.rope_parameters == {"rope_theta": 7.0, **LLAMA3}
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (5, 6, None)
    theirs.save_pretrained(tmp_path / "theirs")
    assert read_config(tmp_path / "theirs") == config


def test_absent_keys_have_the_defaults_of_transformers(small):
    names = ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
    edit(small, **dict.fromkeys((*names, "hidden_act", "attention_bias", "mlp_bias")))
    config = read_config(small)
    assert (config.num_kv_heads, config.head_dim) == (2, 4)
    assert (config.norm_eps, config.max_length, config.tie_embeddings) == (1e-6, 2048, False)


BROKEN_CONFIGS = {
    "model_type 't5' is not supported": {"model_type": "t5"},
    "has no model_type, so this is no model folder": {"model_type": None},
    "'vocab_size' is missing": {"vocab_size": None},
    "'num_attention_heads' is missing": {"num_attention_heads": None},
    "hidden_act='mish'": {"hidden_act": "mish"},
    "quantization_config": {"quantization_config": {"quant_method": "gptq"}},
    "rope type 'yarn'": {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "rope type 'dynamic'": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "rope key 'mrope_section'": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1]}},
    "rope key 'full_attention'": {"rope_parameters": {"full_attention": {"rope_theta": 7.0}}, "rope_theta": None},
    "rope key 'factor' is missing": {"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": None},
    "rope_parameters contradicts": {"rope_theta": 3.0},
    "rope_parameters contradicts rope_theta or rope_scaling": {"rope_scaling": LLAMA3},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "num_heads=2 is not a multiple of num_kv_heads=3": {"num_key_value_heads": 3},
}


@pytest.mark.parametrize("message", BROKEN_CONFIGS)
def test_broken_configs_are_named(small, message):
    edit(small, **BROKEN_CONFIGS[message])
    with pytest.raises(UserError, match=message) as e:
        read_config(small)
    assert "config.json" in str(e.value)


def test_unreadable_configs_are_named(small):
    for content in ("{", "[]", "\udcff"):
        (small / "config.json").write_text(content, errors="surrogateescape")
        with pytest.raises(UserError, match=r"config\.json: "):
            read_config(small)
    with pytest.raises(UserError, match=r"nowhere/config\.json: no such file"):
        read_config("nowhere")
    with pytest.raises(UserError, match=r"model\.safetensors: is a file; name the folder that holds the model"):
        read_config(small / "model.safetensors")


# --- folders ---


def test_tokenizer_and_token_ids_travel(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", "notes.txt"):
        (source / name).write_text(name)
    params = random_params(SMALL)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    save_params(tmp_path / "out", SMALL, params, tokenizer_folder=source, token_ids=ids)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert read_config(tmp_path / "out") == SMALL
    with pytest.raises(UserError, match="no tokenizer files"):
        save_params(tmp_path / "other", SMALL, params, tokenizer_folder=tmp_path)


def test_settings_of_generation_travel(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    stated = {**sampling, "eos_token_id": [2, 7], "pad_token_id": 0}
    (source / "generation_config.json").write_text(json.dumps(stated))
    ids = {"bos_token_id": 1, "eos_token_id": [2, 7, 9], "pad_token_id": None}
    save_params(tmp_path / "out", SMALL, random_params(SMALL), tokenizer_folder=source, token_ids=ids)
    assert read_json(tmp_path / "out" / "generation_config.json") == {
        **sampling,
        "bos_token_id": 1,
        "eos_token_id": [2, 7, 9],
        "pad_token_id": 0,
    }
    assert read_json(tmp_path / "out" / "config.json")["eos_token_id"] == [2, 7, 9]
    (source / "generation_config.json").write_text("[")
    with pytest.raises(UserError, match=r"generation_config\.json: cannot be read"):
        save_params(tmp_path / "out", SMALL, random_params(SMALL), tokenizer_folder=source)


def test_an_interrupted_export_leaves_the_old_one(small, monkeypatch):
    before, config = fingerprint(small), read_config(small)
    params = jax.tree.map(lambda x: x + 1, load_params(small))

    def fail(file, tensors):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface, "stream_tensors", fail)
    for folder in (small, small.with_name("new")):
        with pytest.raises(KeyboardInterrupt):
            save_params(folder, config, params)
    assert fingerprint(small) == before
    assert [file.name for file in small.parent.iterdir()] == ["small"]
    monkeypatch.undo()
    # Leftovers of a killed process do no harm.
    (small.parent / ".small.partial").mkdir()
    (small / "stale.txt").touch()
    save_params(small, config, params)
    assert_equal_trees(load_params(small), params)
    assert [file.name for file in small.parent.iterdir()] == ["small"]
    assert not (small / "stale.txt").exists()


def test_other_folders_are_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").touch()
    params = random_params(SMALL)
    with pytest.raises(UserError, match="is no earlier export"):
        save_params(tmp_path, SMALL, params)
    with pytest.raises(UserError, match="is no earlier export"):
        save_params(tmp_path / "thesis.txt", SMALL, params)
    assert (tmp_path / "thesis.txt").exists()


def test_fingerprint_names_weights_and_config(small):
    first = fingerprint(small)
    assert len(first) == 16 and int(first, 16) >= 0
    copy = small.with_name("copy")
    shutil.copytree(small, copy)
    (copy / "README.md").write_text("anything")
    assert fingerprint(copy) == first
    change_weights(lambda w: w["model.norm.weight"].__setitem__(0, 2.0))(copy)
    assert fingerprint(copy) != first
    edit(small, rms_norm_eps=0.5)
    assert fingerprint(small) != first
    (small / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        fingerprint(small)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_streamed_tensors_are_those_that_the_library_reads(tmp_path, dtype):
    from safetensors.numpy import load_file

    whole = np.random.default_rng(0).normal(size=(6, 5)).astype(jnp.dtype(dtype))
    pieces = {"whole": lambda: [whole.T], "parts": lambda: (whole.ravel()[i : i + 7] for i in range(0, 30, 7))}
    file = tmp_path / "model.safetensors"
    stream_tensors(
        file, {name: Stream((5, 6) if name == "whole" else (6, 5), whole.dtype, made) for name, made in pieces.items()}
    )
    found = load_file(file)
    np.testing.assert_array_equal(found["whole"], whole.T)
    np.testing.assert_array_equal(found["parts"], whole)
    with pytest.raises(ValueError, match=r"parts ends at byte \d+, where its shape says"):
        stream_tensors(file, {"parts": Stream((31,), whole.dtype, pieces["parts"])})


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"b": {"a": 1, "c": 2, "a": 3}}', '{"b": [{"a": 1, "a": 3}]}'])
def test_a_key_that_stands_twice_is_named(tmp_path, text):
    """Python takes the last one."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json: cannot be read \('a' stands twice in one object\)"):
        read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config.json: not readable as JSON \('a' stands twice in one object\)"):
        read_object(tmp_path / "config.json")
    with pytest.raises(RecordError, match=r"repeated key \('a' stands twice"):
        from_json(text)
    with pytest.raises(Refused, match=r"body: repeated key \('a' stands twice in one object\); send a JSON object"):
        Body.read(text.encode())


def test_a_number_beyond_floats_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(f'{{"a": [{10**400}]}}')
    with pytest.raises(UserError, match=r"config.json: cannot be read \(a whole number of 401 digits\)"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(f'{{"a": {-(10**298)}}}')
    assert read_json(tmp_path / "config.json") == {"a": -(10**298)}
