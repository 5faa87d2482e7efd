"""Import and export of Hugging Face folders: parity with `transformers`, exact bytes, and clear errors."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from support.tiny_llamas import (
    SMALL,
    assert_equal_trees,
    change_weights,
    edit,
    forward,
    golden,
    needs_torch,
    random_params,
    torch,
    torch_logits,
    weights_of,
    write,
)

from pjrlhf.errors import UserError
from pjrlhf.models import huggingface
from pjrlhf.models.decoder import rope_frequencies
from pjrlhf.models.families import leaf_shapes
from pjrlhf.models.huggingface import load_params, read_config, save_params


@pytest.fixture(params=["llama3_untied", "default_tied"])
def checkpoint(request, tmp_path):
    """(golden, folder) of a tiny random Llama, written without any code under test."""
    data = golden(request.param)
    return data, write(tmp_path / "model", json.loads(str(data["config"])), weights_of(request.param))


# --- numbers ---


def test_logits_equal_transformers(checkpoint):
    """320 positions, the second row left-padded by 41; short prompts could not reveal a mistake in the rotations."""
    data, folder = checkpoint
    config = read_config(folder)
    logits = forward(config, load_params(folder), data["tokens"], data["valid"])
    np.testing.assert_allclose(logits[:, data["positions"]], data["logits"], rtol=0, atol=1e-4)


def test_the_golden_would_reveal_unscaled_rotations(tmp_path):
    data = golden("llama3_untied")
    folder = write(tmp_path / "model", json.loads(str(data["config"])), weights_of("llama3_untied"))
    config = read_config(folder).replace(rope_scaling=None)
    logits = forward(config, load_params(folder), data["tokens"], data["valid"])
    assert data["tokens"].shape[1] == 320
    assert np.abs(logits[:, data["positions"]] - data["logits"]).max() > 0.01


@needs_torch
def test_live_logits_equal_transformers(checkpoint, tmp_path):
    data, folder = checkpoint
    tokens, valid = data["tokens"], data["valid"]
    config, params = read_config(folder), load_params(folder)
    original = torch_logits(folder, tokens, valid)[valid]
    np.testing.assert_allclose(forward(config, params, tokens, valid)[valid], original, rtol=0, atol=1e-4)
    save_params(tmp_path / "out", config, params)
    np.testing.assert_allclose(torch_logits(tmp_path / "out", tokens, valid)[valid], original, rtol=0, atol=1e-5)
    # Scaled norms change the function, so that the export differs from the file it came from.
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * 0.5
    save_params(tmp_path / "other", config, params, max_shard_bytes=20_000)
    changed = torch_logits(tmp_path / "other", tokens, valid)[valid]
    np.testing.assert_allclose(forward(config, params, tokens, valid)[valid], changed, rtol=0, atol=1e-4)
    assert np.abs(changed - original).max() > 0.1


@pytest.mark.real_data
def test_stories260k(shared, tmp_path):
    folder = shared / "models" / "stories260K"
    config, params = read_config(folder), load_params(folder)
    data = golden("stories260K")
    tokens, valid = data["tokens"], np.ones_like(data["tokens"], bool)
    assert tokens.shape[1] > 300
    logits = forward(config, params, tokens, valid)
    np.testing.assert_allclose(logits[:, data["positions"]], data["logits"], rtol=0, atol=1e-4)
    save_params(tmp_path / "out", config, params, tokenizer_folder=folder)
    assert_equal_trees(load_params(tmp_path / "out"), params)
    if torch is not None:
        original = torch_logits(folder, tokens, valid)
        np.testing.assert_allclose(logits, original, rtol=0, atol=1e-4)
        np.testing.assert_allclose(torch_logits(tmp_path / "out", tokens, valid), original, rtol=0, atol=1e-5)


@pytest.mark.real_data
def test_stories260k_tells_its_story(shared, tmp_path):
    from transformers import PreTrainedTokenizerFast

    folder = shared / "models" / "stories260K"
    config, params = read_config(folder), load_params(folder)
    save_params(tmp_path / "out", config, params, tokenizer_folder=folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert tokenizer(str(golden("stories260K")["text"]))["input_ids"] == golden("stories260K")["tokens"][0].tolist()
    prompt = tokenizer("Once upon a time")["input_ids"]
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(prompt)] = prompt
    for n in range(len(prompt), tokens.shape[1]):
        logits = forward(config, params, tokens, np.arange(tokens.shape[1])[None] < n)
        tokens[0, n] = int(logits[0, n - 1].argmax())
    story = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )
    assert tokenizer.decode(tokens[0], skip_special_tokens=True).startswith(story)


# --- weights ---


@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000, 1])
def test_export_is_the_original_tensor_for_tensor(checkpoint, tmp_path, max_shard_bytes):
    """Transposed kernels are views in memory, which safetensors would write in the wrong order."""
    _, folder = checkpoint
    config, params = read_config(folder), load_params(folder)
    save_params(tmp_path / "out", config, params, max_shard_bytes=max_shard_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    written = {}
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= max_shard_bytes
        written |= tensors
    original = load_file(folder / "model.safetensors")
    assert written.keys() == original.keys()
    for name in original:
        np.testing.assert_array_equal(written[name], original[name], err_msg=name)
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1) == (max_shard_bytes < 2**30)
    if index.exists():
        index = json.loads(index.read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in original.values())
        assert index["weight_map"].keys() == original.keys()
        assert set(index["weight_map"].values()) == {file.name for file in files}
    assert read_config(tmp_path / "out") == config
    assert_equal_trees(load_params(tmp_path / "out"), params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(tmp_path, dtype):
    params = random_params(SMALL)
    half = jax.tree.map(lambda x: x.astype(dtype), params)
    save_params(tmp_path / "cast", SMALL, params, dtype=dtype)
    save_params(tmp_path / "kept", SMALL, half)
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    for folder in ("cast", "kept"):
        assert_equal_trees(load_params(tmp_path / folder), jax.tree.map(lambda x: x.astype(np.float32), half))
        same = load_params(tmp_path / folder, dtype=dtype)
        assert_equal_trees(same, half)
        assert {x.dtype for x in jax.tree.leaves(same)} == {jnp.dtype(dtype)}


def test_leaves_are_read_in_the_parts_that_devices_hold(small, monkeypatch):
    """Each process reads what its devices hold, once, and at most one device's part of a leaf at a time."""
    mesh, reads, largest = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model")), {}, {}
    read = huggingface._read_part

    def recorded(tensors, slot, shape, dtype, index):
        part = read(tensors, slot, shape, dtype, index)
        name = next(iter(tensors.values()))[1]
        reads[name] = reads.get(name, 0) + part.size
        largest[name] = max(largest.get(name, 0), part.size)
        return part

    monkeypatch.setattr(huggingface, "_read_part", recorded)

    def place(path, shape):
        split = {"up/kernel": PartitionSpec(None, None, "model"), "down/kernel": PartitionSpec(None, "model")}
        return NamedSharding(mesh, split.get("/".join(path.split("/")[-2:]), PartitionSpec()))

    params = load_params(small, place=place)
    assert sum(reads.values()) == sum(math.prod(shape) for shape in leaf_shapes(read_config(small)).values())
    up = params["layers"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.shape == (2, 8, 5)
    assert (
        largest["model.layers.0.mlp.up_proj.weight"] == largest["model.layers.0.mlp.down_proj.weight"] == up.size // 2
    )
    monkeypatch.undo()
    assert_equal_trees(params, load_params(small))
    # Sharded leaves export like any others.
    save_params(small.with_name("again"), read_config(small), params)
    assert_equal_trees(load_params(small.with_name("again")), load_params(small))


def test_allowed_leftovers_are_ignored(tmp_path):
    config = json.loads(str(golden("default_tied")["config"]))
    weights = weights_of("default_tied")
    want = load_params(write(tmp_path / "plain", config, weights))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    ours = read_config(tmp_path / "plain")
    frequencies = rope_frequencies(ours.head_dim, ours.rope_theta, None)
    for dtype in (np.float32, np.float16):
        weights["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.asarray(frequencies).astype(dtype)
        assert_equal_trees(load_params(write(tmp_path / "extra", config, weights)), want)
    weights["model.layers.1.self_attn.rotary_emb.inv_freq"] *= 2
    with pytest.raises(UserError, match=r"layers\.1.*inv_freq is not what a model of this config\.json computes there"):
        load_params(write(tmp_path / "other", config, weights))


def own_head(folder):
    """A checkpoint that says it is tied and has a head of its own."""
    config = json.loads(str(golden("default_tied")["config"]))
    weights = weights_of("default_tied")
    return write(folder, config, weights | {"lm_head.weight": weights["model.embed_tokens.weight"][::-1].copy()})


def test_a_tied_model_with_a_head_of_its_own_is_not_tied(tmp_path):
    folder = own_head(tmp_path / "in")
    config, params = read_config(folder), load_params(folder)
    assert not config.tie_embeddings
    np.testing.assert_array_equal(params["head"]["kernel"].T, params["embed"]["embedding"][::-1])
    save_params(tmp_path / "out", config, params)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert_equal_trees(load_params(tmp_path / "out"), params)


@needs_torch
def test_transformers_does_not_tie_it_either(tmp_path):
    folder = own_head(tmp_path / "in")
    tokens = np.arange(12).reshape(2, 6)
    ours = forward(read_config(folder), load_params(folder), tokens, np.ones((2, 6), bool))
    np.testing.assert_allclose(ours, torch_logits(folder, tokens, np.ones((2, 6), bool)), rtol=0, atol=1e-4)


def test_a_stored_head_may_have_another_dtype_than_its_embedding(tmp_path):
    config = json.loads(str(golden("default_tied")["config"]))
    weights = weights_of("default_tied")
    half = weights["model.embed_tokens.weight"].astype(np.float16)
    weights |= {"lm_head.weight": half, "model.embed_tokens.weight": half.astype(np.float32)}
    assert read_config(write(tmp_path / "in", config, weights)).tie_embeddings
    weights["lm_head.weight"] = half + np.float16(0.01)
    assert not read_config(write(tmp_path / "other", config, weights)).tie_embeddings


def scale_to_int(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.int8)


BROKEN_WEIGHTS = {
    r"model\.layers\.1\.mlp\.up_proj\.weight is missing": change_weights(
        lambda w: w.pop("model.layers.1.mlp.up_proj.weight")
    ),
    r"lm_head\.weight is missing": change_weights(lambda w: w.pop("lm_head.weight")),
    r"model\.layers\.0\.self_attn\.q_proj\.bias in the weights does not belong": change_weights(
        lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": np.ones(2, np.float32)})
    ),
    r"old\.lm_head\.weight in the weights does not belong": lambda folder: (
        edit(folder, tie_word_embeddings=True),
        # Only the head of a tied model may be unused, under no other name.
        change_weights(lambda w: w.update({"old.lm_head.weight": w["lm_head.weight"]}))(folder),
    ),
    r"model\.embed_tokens\.weight has shape \(12, 8\) but config\.json asks for \(13, 8\)": lambda folder: edit(
        folder, vocab_size=13
    ),
    r"model\.norm\.weight is stored as I8": change_weights(scale_to_int),
    r"small: final_norm/scale holds numbers that are not finite as float32; restore": change_weights(
        lambda w: w["model.norm.weight"].__setitem__(3, np.nan)
    ),
    r"model\.safetensors: no such file": lambda folder: (folder / "model.safetensors").unlink(),
    r"model\.safetensors: cannot be read": lambda folder: (folder / "model.safetensors").write_bytes(b"abcdefghi"),
    r"model-1\.safetensors: no such file": lambda folder: index(folder, '{"weight_map": {"a": "model-1.safetensors"}}'),
    r"index\.json: weight_map names no weight files": lambda folder: index(folder, '{"weight_map": null}'),
    r"index\.json: weight_map names no weight files;": lambda folder: index(folder, '{"weight_map": {"a": 1}}'),
    r"index\.json: \.\./x\.safetensors lies outside the model folder": lambda folder: index(
        folder, '{"weight_map": {"a": "../x.safetensors"}}'
    ),
    r"index\.json: /etc/x lies outside the model folder": lambda folder: index(
        folder, '{"weight_map": {"a": "/etc/x"}}'
    ),
    r"2\.safetensors: lm_head\.weight is in another file of the model as well": lambda folder: (
        (folder / "model.safetensors").rename(folder / "1.safetensors"),
        save_file({"lm_head.weight": np.ones((12, 8), np.float32)}, folder / "2.safetensors"),
        index(folder, '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'),
    ),
    r"num_hidden_layers is 9999, but the weights hold 21 tensors": lambda folder: edit(folder, num_hidden_layers=9999),
    r"num_hidden_layers=1000000 is no whole number from 1 to 10000": lambda folder: edit(
        folder, num_hidden_layers=1000000
    ),
    r"vocab_size is 1000000000, but the weights hold": lambda folder: edit(folder, vocab_size=10**9),
    r"intermediate_size is 1000000000, but the weights hold": lambda folder: edit(folder, intermediate_size=10**9),
    r"hidden_size=1000000000000 is no whole number": lambda folder: edit(folder, hidden_size=10**12),
    r"head_dim=-6 is no whole number": lambda folder: edit(folder, head_dim=-6),
    r"vocab_size='12' is no whole number": lambda folder: edit(folder, vocab_size="12"),
    r"norm_eps='1e-5' must be a finite number above 0": lambda folder: edit(folder, rms_norm_eps="1e-5"),
    r"rope_theta=nan must be": lambda folder: edit(folder, rope_parameters=None, rope_theta=float("nan")),
    r"tie_embeddings='no' must be True or False": lambda folder: edit(folder, tie_word_embeddings="no"),
    r"factor=0.* holds a number that is not above 0": lambda folder: edit(
        folder, rope_parameters=None, rope_scaling={"type": "linear", "factor": 0}
    ),
    r"config\.json: float\(\) argument must be": lambda folder: edit(folder, rope_parameters={"rope_theta": [1]}),
    r"model_type \['llama'\] is not supported": lambda folder: edit(folder, model_type=["llama"]),
}


def index(folder, content):
    """Makes the model a sharded one."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(content)


@pytest.mark.parametrize("message", BROKEN_WEIGHTS)
def test_broken_weights_are_named(small, message):
    load_params(small)
    BROKEN_WEIGHTS[message](small)
    with pytest.raises(UserError, match=message):
        load_params(small)


def test_params_that_do_not_fit_the_config_are_named(tmp_path):
    params = random_params(SMALL)
    with pytest.raises(UserError, match=r"cannot export head/kernel of shape None"):
        save_params(tmp_path / "out", SMALL.replace(tie_embeddings=False), params)
    with pytest.raises(UserError, match=r"embed/embedding of shape \(12, 8\) where the config asks for \(14, 8\)"):
        save_params(tmp_path / "out", SMALL.replace(vocab_size=14), params)
    assert list(tmp_path.iterdir()) == []
