import contextlib
import errno
import functools
import gc
import json
import os
import shutil
import subprocess
import weakref

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from pjrlhf.errors import UserError
from pjrlhf.export import dense, merge
from pjrlhf.export.merge import MergeSettings
from pjrlhf.merging import lora, methods, trees
from pjrlhf.models import huggingface
from pjrlhf.models.adapters import AdapterConfig, Policies, init_bank
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.families import leaf_shapes
from pjrlhf.models.folders import open_tensors
from pjrlhf.models.huggingface import fingerprint, load_params, read_config, save_params
from pjrlhf.models.peft import load_peft, save_peft
from pjrlhf.models.storage import save_tree
from pjrlhf.settings import parse

CONFIG = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=20,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_length=32,
    tie_embeddings=False,
)
LORA = AdapterConfig(rank=3, alpha=6.0)
TOKENIZER = json.loads(Tokenizer(WordLevel({"a": 0}, "a")).to_str())


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Three full models 'base', 'one', 'two' and two adapters of the base, 'lora0' and 'lora1', as folders."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "one", "two")):
        save_params(root / name, CONFIG, draw(CONFIG, seed), token_ids={"bos_token_id": 1, "eos_token_id": 2})
        (root / name / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    for k in range(2):
        adapter = jax.tree.map(lambda leaf, k=k: leaf[k], bank(root / "base"))
        save_peft(root / f"lora{k}", adapter, LORA.rank, LORA.alpha, str(root / "base"))
    return root


def draw(config, seed):
    rng = np.random.default_rng(seed)
    leaves = {path: 0.2 * rng.normal(size=shape).astype(np.float32) for path, shape in leaf_shapes(config).items()}
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def bank(base):
    leaves, structure = jax.tree.flatten(init_bank(load_params(base), LORA, 2, jax.random.key(7)))
    keys = jax.random.split(jax.random.key(8), len(leaves))
    noise = [jax.random.normal(key, leaf.shape) * 0.1 for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noise)


def run(models, output, names, weights, base=None, **changes):
    folders = tuple(str(models / name) for name in names)
    base = str(models / base) if base else None
    values = {"ingredients": folders, "weights": tuple(weights), "base": base, "output": str(output), **changes}
    return merge.merge(parse(MergeSettings, values, "merge"))


def assert_close(actual, expected, atol=0.0):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=0), actual, expected)


@functools.partial(jax.jit, static_argnums=0)
def hidden(config, params, adapters=None, mix=None):
    tokens = jnp.arange(12).reshape(2, 6) % config.vocab_size
    valid = jnp.ones(tokens.shape, bool)
    return Policies(Decoder(config), LORA, params, adapters, mix)(tokens, valid)[0]


@pytest.mark.parametrize("weights", [(0.3, 0.7), (1.5, -0.5)])
def test_full_models_without_a_base(models, tmp_path, weights):
    run(models, tmp_path / "out", ("one", "two"), weights)
    one, two = (load_params(models / name) for name in ("one", "two"))
    assert_close(load_params(tmp_path / "out"), trees.weighted_sum([one, two], weights))


@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.5, -2.0), (0.0, 0.0)])
def test_full_models_with_a_base(models, tmp_path, weights):
    run(models, tmp_path / "out", ("one", "two"), weights, base="base")
    base, one, two = (load_params(models / name) for name in ("base", "one", "two"))
    assert_close(load_params(tmp_path / "out"), trees.soup(base, [one, two], weights), atol=1e-6)


@pytest.mark.parametrize("base", [None, "base"])
def test_one_hot_returns_the_ingredient(models, tmp_path, base):
    run(models, tmp_path / "out", ("one", "two"), (0, 1), base=base)
    merged, original = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", models / "two"))
    assert merged == original


@pytest.mark.parametrize("weights", [pytest.param((0.25, 0.75), marks=pytest.mark.slow), (1.0, -1.5)])
@pytest.mark.parametrize("space", ["delta", "concat"])
def test_adapters_equal_the_bank_run_with_mix(models, tmp_path, weights, space):
    run(models, tmp_path / "out", ("lora0", "lora1"), weights, base="base", space=space)
    base = load_params(models / "base")
    expected = hidden(CONFIG, base, bank(models / "base"), jnp.asarray([weights]))
    assert np.abs(expected - hidden(CONFIG, base)).max() > 0.05
    if space == "delta":
        merged = hidden(CONFIG, load_params(tmp_path / "out"))
    else:
        adapter, rank, alpha = load_peft(tmp_path / "out")
        assert (rank, alpha) == (2 * LORA.rank, 2 * LORA.rank)
        # Scale 1 is what is left of alpha / rank; the mix undoes that of LORA.
        row = jnp.asarray([[1 / LORA.scale]])
        merged = hidden(CONFIG, base, jax.tree.map(lambda leaf: leaf[None], adapter), row)
    np.testing.assert_allclose(merged, expected, atol=2e-5)


def test_adapters_of_different_rank_and_alpha(models, tmp_path):
    base = load_params(models / "base")
    shapes = jax.eval_shape(lambda: init_bank(base, AdapterConfig(rank=5), 1, jax.random.key(0)))
    adapter = jax.tree.map(lambda leaf: np.full(leaf.shape[1:], 0.1, np.float32), shapes)
    save_peft(tmp_path / "wide", adapter, 5, 20.0, "base")
    run(models, tmp_path / "dense", ("lora0", tmp_path / "wide"), (0.5, 0.25), base="base")
    run(models, tmp_path / "concatenated", ("lora0", tmp_path / "wide"), (0.5, 0.25), space="concat")
    run(models, tmp_path / "applied", (tmp_path / "concatenated",), (1.0,), base="base")
    assert_close(load_params(tmp_path / "applied"), load_params(tmp_path / "dense"), atol=1e-6)
    kernels = [load_params(folder)["layers"]["mlp"]["up"]["kernel"] for folder in (tmp_path / "dense", models / "base")]
    pair = bank(models / "base")["layers"]["mlp"]["up"]
    expected = 0.5 * LORA.scale * pair["a"][0] @ pair["b"][0] + 0.25 * 4.0 * (5 * 0.01)
    np.testing.assert_allclose(kernels[0] - kernels[1], expected, atol=1e-6)


def test_full_models_and_adapters_together(models, tmp_path):
    run(models, tmp_path / "both", ("one", "lora0"), (0.5, 0.25), base="base")
    run(models, tmp_path / "full", ("one",), (0.5,), base="base")
    run(models, tmp_path / "lora", ("lora0",), (0.25,), base="base")
    base, both, full, lora = (
        load_params(f) for f in (models / "base", *(tmp_path / n for n in ("both", "full", "lora")))
    )
    assert_close(both, trees.weighted_sum([full, lora, base], (1, 1, -1)), atol=1e-6)


def test_factors_average_each_factor(models, tmp_path):
    run(models, tmp_path / "out", ("lora0", "lora1"), (0.5, 0.5), base="base", space="factors")
    pair = bank(models / "base")["layers"]["attention"]["query"]
    kernels = [load_params(f)["layers"]["attention"]["query"]["kernel"] for f in (tmp_path / "out", models / "base")]
    expected = LORA.scale * pair["a"].mean(0) @ pair["b"].mean(0)
    np.testing.assert_allclose(kernels[0] - kernels[1], expected, atol=1e-6)


# The settings of each method other than a plain sum, and the function of (base, ingredients, weights) it is.
KEY = jax.random.key(3)
LAYERS = {"stacked": ("layers",)}
METHODS = {
    "task_arithmetic": ({"scale": 0.7}, lambda b, x, w: methods.task_arithmetic(b, x, w, 0.7)),
    "ties": ({"density": 0.3, "scale": 0.7}, lambda b, x, w: methods.ties(b, x, w, 0.3, scale=0.7, **LAYERS)),
    "dare_linear": ({"density": 0.6, "seed": 3}, lambda b, x, w: methods.dare(b, x, w, 0.6, KEY, **LAYERS)),
    "dare_ties": (
        {"density": 0.6, "seed": 3, "scale": 2.0},
        lambda b, x, w: methods.dare(b, x, w, 0.6, KEY, scale=2.0, sign=True, **LAYERS),
    ),
    "slerp": ({}, lambda b, x, w: methods.slerp(*x, w[1], **LAYERS)),
    "model_stock": ({}, lambda b, x, w: methods.model_stock(b, x, **LAYERS)),
}


def weights_of(method):
    return (0.5, 0.5) if method == "model_stock" else (0.3, 0.7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("names", [("one", "two"), ("lora0", "two"), ("lora1", "lora0")], ids="-".join)
def test_methods_equal_their_functions(models, tmp_path, method, names):
    options, function = METHODS[method]
    weights = weights_of(method)
    run(models, tmp_path / "out", names, weights, base="base", method=method, **options)
    base = load_params(models / "base")
    adapters = bank(models / "base")
    ingredients = [
        lora.merge_dense(base, [jax.tree.map(lambda x, k=int(name[-1]): x[k], adapters)], [LORA.scale], [1.0])
        if name.startswith("lora")
        else load_params(models / name)
        for name in names
    ]
    merged = load_params(tmp_path / "out")
    assert_close(merged, function(base, ingredients, weights), atol=1e-5)
    kernels = [x["layers"]["mlp"]["up"]["kernel"] for x in (merged, trees.soup(base, ingredients, weights))]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3


def test_slerp_needs_no_base(models, tmp_path):
    for base in (None, "base"):
        run(models, tmp_path / f"out-{base}", ("one", "two"), (0.3, 0.7), base=base, method="slerp")
    assert_close(load_params(tmp_path / "out-None"), load_params(tmp_path / "out-base"))
    run(models, tmp_path / "end", ("one", "two"), (0, 1), method="slerp")
    assert_close(load_params(tmp_path / "end"), load_params(models / "two"))


@pytest.mark.parametrize("method", ["ties", "slerp"])
def test_methods_merge_sixteen_bit_models_in_float32(models, tmp_path, method):
    options, function = METHODS[method]
    for name in ("base", "one", "two"):
        save_params(tmp_path / name, CONFIG, load_params(models / name), dtype="bfloat16")
    names = (tmp_path / "one", tmp_path / "two")
    wide = run(models, tmp_path / "wide", names, (0.3, 0.7), tmp_path / "base", method=method, dtype="float32",
               **options)  # fmt: skip
    half = run(models, tmp_path / "half", names, (0.3, 0.7), tmp_path / "base", method=method, **options)
    assert (wide["dtype"], half["dtype"]) == ("float32", "bfloat16")
    base, *ingredients = (load_params(tmp_path / name) for name in ("base", "one", "two"))
    expected = function(base, ingredients, (0.3, 0.7))
    assert_close(load_params(tmp_path / "wide"), expected, atol=1e-6)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), load_params(tmp_path / "wide"))
    assert_close(load_params(tmp_path / "half"), rounded)


def test_draws_follow_the_seed(models, tmp_path):
    for name, seed in (("first", 0), ("again", None), ("other", 1)):
        options = {"method": "dare_linear", "density": 0.5, "seed": seed}
        run(models, tmp_path / name, ("one", "two"), (0.5, 0.5), base="base", **options)
    first, again, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("first", "again", "other"))
    assert first == again != other


@pytest.mark.parametrize("method", ["linear", *METHODS])
def test_the_manifest_names_the_method(models, tmp_path, method):
    options = METHODS[method][0] if method in METHODS else {}
    manifest = run(models, tmp_path / "out", ("one", "two"), weights_of(method), "base", method=method, **options)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    defaults = {"scale": 1.0} if method.startswith("dare") else {}
    recorded = {name: manifest[name] for name in ("method", "density", "scale", "seed") if name in manifest}
    assert recorded == {"method": method, **defaults, **options}
    assert [entry["weight"] for entry in manifest["ingredients"]] == [*weights_of(method)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "theirs", "options"),
    [
        ("linear", {}, {}),
        ("task_arithmetic", {"normalize": False, "lambda": 0.7}, {"scale": 0.7}),
        ("ties", {"lambda": 0.7, "density": 0.3}, {"scale": 0.7, "density": 0.3}),
        ("slerp", {"t": 0.7}, {}),
        ("model_stock", {}, {}),
        ("dare_linear", {"density": 0.5}, {"density": 0.5}),
    ],
)
def test_mergekit_agrees(models, tmp_path, method, theirs, options):
    """Against the command `mergekit-yaml` on the same folders, all in float32."""
    command = shutil.which("mergekit-yaml")
    if not command:
        pytest.skip("mergekit is not installed (pip install mergekit)")
    # Fine-tuned models lie close to their base and to each other, as far as model_stock's cosines go.
    base, step = (load_params(models / name) for name in ("base", "one"))
    folders = {"base": models / "base"}
    for seed, name in enumerate(("one", "two")):
        folders[name] = tmp_path / name
        tuned = trees.weighted_sum([base, step, draw(CONFIG, 10 + seed)], (1, 0.1, 0.05))
        save_params(folders[name], CONFIG, tuned)
    # One ingredient shows what DARE does to an entry; weights other than 1 would do the same to all.
    weights = {"model_stock": (0.5, 0.5), "dare_linear": (1.0,)}.get(method, (0.3, 0.7))
    names = ("one", "two")[: len(weights)]
    recipe = {
        "merge_method": method,
        "dtype": "float32",
        "parameters": theirs,
        "models": [
            {"model": str(folders[n]), "parameters": {"weight": w}} for n, w in zip(names, weights, strict=True)
        ],
    }
    if method != "linear":
        recipe["base_model"] = str(folders["one" if method == "slerp" else "base"])
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    quiet = ("--quiet", "--no-copy-tokenizer", "--no-write-model-card")
    subprocess.run([command, str(tmp_path / "recipe.yaml"), str(tmp_path / "theirs"), *quiet], check=True)
    run(models, tmp_path / "ours", [folders[n] for n in names], weights, base="base", method=method, **options)
    ours, theirs = (load_params(tmp_path / name) for name in ("ours", "theirs"))
    if method != "dare_linear":
        gap = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), ours, theirs)
        print(method, "largest difference", max(jax.tree.leaves(gap)))
        assert max(jax.tree.leaves(gap)) < 1e-5
        return
    # The draws differ. What can be compared is the fraction that is kept and its factor, one per tensor.
    tuned = load_params(folders["one"])
    for merged in (ours, theirs):
        start, end, now = (x["layers"]["mlp"]["up"]["kernel"][0] for x in (base, tuned, merged))
        kept = np.abs(now - start) > 1e-6
        factor = np.median((now - start)[kept] / (end - start)[kept])
        print(method, "kept", kept.mean(), "factor", factor)
        assert abs(kept.mean() - 0.5) < 0.1
        np.testing.assert_allclose(factor, np.abs(end - start).sum() / np.abs(end - start)[kept].sum(), rtol=1e-3)


def test_dtype_of_the_output(models, tmp_path):
    manifest = run(models, tmp_path / "half", ("one", "two"), (0.5, 0.5), dtype="bfloat16")
    assert manifest["dtype"] == "bfloat16"
    with open_tensors([tmp_path / "half" / "model.safetensors"]) as files:
        assert {files[name].get_slice(name).get_dtype() for name in files} == {"BF16"}
    one, two = (load_params(models / name) for name in ("one", "two"))
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trees.weighted_sum([one, two], (0.5, 0.5)))
    assert_close(load_params(tmp_path / "half", dtype=jnp.bfloat16), expected)
    # Where not set, the dtype is that of the first ingredient, and a one-hot merge of 16-bit weights is exact.
    assert run(models, tmp_path / "again", (tmp_path / "half",), (1,))["dtype"] == "bfloat16"
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "again")]
    assert files[0] == files[1]


def test_settings_of_generation_survive(models, tmp_path):
    shutil.copytree(models / "one", tmp_path / "one")
    sampling = {"do_sample": True, "temperature": 0.6}
    stated = {"bos_token_id": 1, "eos_token_id": [2, 5], **sampling}
    (tmp_path / "one" / "generation_config.json").write_text(json.dumps(stated))
    run(models, tmp_path / "all", (tmp_path / "one",), (1.0,))
    assert json.loads((tmp_path / "all" / "generation_config.json").read_text()) == stated
    assert json.loads((tmp_path / "all" / "config.json").read_text())["eos_token_id"] == [2, 5]


def test_folder_holds_config_tokenizer_and_manifest(models, tmp_path):
    manifest = run(models, tmp_path / "out", ("one", "two"), (0.5, 0.5), base="base")
    assert read_config(tmp_path / "out") == CONFIG
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (models / "base" / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert manifest["base"] == {"folder": str(models / "base"), "hash": fingerprint(models / "base")}
    assert [entry["hash"] for entry in manifest["ingredients"]] == [fingerprint(models / n) for n in ("one", "two")]
    assert [entry["weight"] for entry in manifest["ingredients"]] == [0.5, 0.5] and manifest["space"] == "delta"


def test_output_defaults_to_the_run_directory(models, tmp_path):
    """Another mix is another export."""
    for name, folder in (("one", "soup"), ("two", "soup-2")):
        merge.merge(MergeSettings(ingredients=(str(models / name),), weights=(1,)), tmp_path)
        assert_close(load_params(tmp_path / "export" / folder), load_params(models / name))


@pytest.mark.parametrize("space", ["delta", "concat"])
def test_everyone_may_read_what_is_written(models, tmp_path, space):
    old = os.umask(0o022)
    try:
        run(models, tmp_path / "out", ("lora0",), (1,), base="base", space=space)
        save_params(tmp_path / "model", CONFIG, draw(CONFIG, 0), tokenizer_folder=models / "base", max_shard_bytes=4000)
        save_tree(tmp_path / "bank.safetensors", {"a": np.ones(2, np.float32)})
    finally:
        os.umask(old)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 8
    assert {path.stat().st_mode & 0o777 for path in written} == {0o644}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.is_dir()} == {0o755}


def test_the_base_of_an_adapter_is_named_from_everywhere(models, tmp_path, monkeypatch):
    """A path is recorded as an absolute one; the name of a model on a hub stays."""
    monkeypatch.chdir(models)
    folders = {"base": "base", "ingredients": ("lora0",), "weights": (1.0,)}
    manifest = merge.merge(MergeSettings(**folders, space="concat", output=str(tmp_path / "out")))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        models / "base"
    )
    assert manifest["base"]["folder"] == str(models / "base")
    assert manifest["ingredients"][0]["folder"] == str(models / "lora0")
    pair = {"a": np.ones((2, 16, 3), np.float32), "b": np.ones((2, 3, 16), np.float32)}
    for name, recorded in (("base", str(models / "base")), ("some/base", "some/base")):
        save_peft(tmp_path / "lora", {"layers": {"attention": {"output": pair}}}, 3, 1.0, name)
        stated = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
        assert stated["base_model_name_or_path"] == recorded


def test_a_base_with_another_setting_that_changes_nothing_is_the_same_base(models, tmp_path):
    """And so is one whose weights are spread over other files."""
    run(models, tmp_path / "mine", ("lora0",), (1,), base="base", space="concat")
    save_params(tmp_path / "base", CONFIG, load_params(models / "base"), max_shard_bytes=4000)
    edit(tmp_path / "base", use_cache=False, transformers_version="9.9", max_position_embeddings=16)
    assert fingerprint(tmp_path / "base") == fingerprint(models / "base")
    run(models, tmp_path / "out", (tmp_path / "mine", "one"), (1, 0.5), base=tmp_path / "base")


@pytest.mark.parametrize("space", ["delta", "concat"])
def test_places_that_cannot_be_written_are_named(models, tmp_path, space):
    (tmp_path / "taken").write_text("")
    places = {
        "a file stands where a folder is needed": tmp_path / "taken" / "out",
        "the name is too long": tmp_path / ("x" * 300),
    }
    for message, output in places.items():
        with pytest.raises(UserError, match=f"cannot be written, {message}"):
            run(models, output, ("lora0",), (1,), base="base", space=space)
        assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("code, message", [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "is read-only")])
def test_a_disk_that_fails_while_a_merge_is_written(models, tmp_path, monkeypatch, code, message):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(huggingface, "stream_tensors", fail)
    output = tmp_path / "not" / "there"
    with pytest.raises(UserError, match=f"there: cannot be written, .*{message}"):
        run(models, output, ("one",), (1,))
    assert list(tmp_path.iterdir()) == []


def test_transformers_loads_the_folder(models, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    run(models, tmp_path / "out", ("one", "two"), (1.5, -0.5))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    kernel = model.model.layers[1].self_attn.q_proj.weight.detach().numpy().T
    np.testing.assert_array_equal(kernel, load_params(tmp_path / "out")["layers"]["attention"]["query"]["kernel"][1])


def test_one_tensor_of_one_ingredient_is_alive_at_a_time(models, tmp_path, monkeypatch):
    """And where no adapter changes a tensor, not even that: it is read in pieces."""
    alive, whole, mapped = weakref.WeakValueDictionary(), [], []

    class Counting:
        def __init__(self, handle):
            self.get_slice, self.dtype, self.handle = handle.get_slice, handle.dtype, handle

        def get_tensor(self, name):
            gc.collect(0)  # has JAX drop the references it is done with
            assert not list(alive), f"{name} is read while {list(alive)} is held"
            tensor = self.handle.get_tensor(name)
            whole.append(name)
            alive[len(whole), name] = tensor
            return tensor

        def flat(self, name):
            mapped.append(name)
            assert isinstance(self.handle.flat(name), np.memmap)
            return self.handle.flat(name)

    @contextlib.contextmanager
    def counting(files, prefix):
        with open_tensors(files, prefix) as found:
            yield {name: Counting(handle) for name, handle in found.items()}

    monkeypatch.setattr(dense, "open_tensors", counting)
    run(models, tmp_path / "out", ("one", "two", "lora0"), (0.25, 0.25, 1.0), base="base")
    with open_tensors([models / "one" / "model.safetensors"]) as files:
        assert sorted(whole + mapped) == sorted([*files] * 3)
    assert all("_proj" in name for name in whole) and not any("_proj" in name for name in mapped)


def test_shards_are_read(models, tmp_path):
    save_params(tmp_path / "shards", CONFIG, load_params(models / "one"), max_shard_bytes=4000)
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    run(models, tmp_path / "out", (tmp_path / "shards", "two"), (0.5, 0.5))
    run(models, tmp_path / "whole", ("one", "two"), (0.5, 0.5))
    assert_close(load_params(tmp_path / "out"), load_params(tmp_path / "whole"))


def edit(folder, file="config.json", **changes):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))


def other_weights(folder, change):
    """Rewrites the weights of `folder` without looking at its config.json."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NORM = "model.norm.weight"
DEFECTS = {
    "config": (lambda f: edit(f, rms_norm_eps=0.5), "norm_eps is 0.5 but 1e-05 in"),
    "vocabulary": (
        lambda f: edit(f, vocab_size=25),
        r"embed_tokens.weight has shape \(24, 16\) but config.json asks for \(25",
    ),
    "family": (lambda f: edit(f, model_type="t5"), "model_type 't5' is not supported"),
    "missing": (lambda f: other_weights(f, lambda t: t.pop(NORM)), "model.norm.weight is missing"),
    "extra": (
        lambda f: other_weights(f, lambda t: t.update(v_head=np.ones(1, np.float32))),
        "v_head in the weights does not",
    ),
    "shape": (
        lambda f: other_weights(f, lambda t: t.update({NORM: np.ones(8, np.float32)})),
        r"model.norm.weight has shape \(8,\) but config.json asks for \(16,\)",
    ),
    "integers": (
        lambda f: other_weights(f, lambda t: t.update({NORM: np.ones(16, np.int8)})),
        "model.norm.weight is stored as I8",
    ),
    "tokenizer": (
        lambda f: edit(f, "tokenizer.json", model=TOKENIZER["model"] | {"vocab": {"b": 0}, "unk_token": "b"}),
        r"tokenizer.json differs from that of .*one in model.unk_token",
    ),
    "empty": (shutil.rmtree, "holds neither config.json nor adapter_config.json"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_refuses_a_model_that_does_not_fit(models, tmp_path, defect):
    damage, message = DEFECTS[defect]
    shutil.copytree(models / "two", tmp_path / "damaged")
    damage(tmp_path / "damaged")
    with pytest.raises(UserError, match=message) as error:
        run(models, tmp_path / "out", ("one", tmp_path / "damaged"), (0.5, 0.5))
    assert str(tmp_path / "damaged") in str(error.value)
    assert [path.name for path in tmp_path.iterdir() if path.name != "damaged"] == []


def test_padding_and_truncation_of_a_tokenizer_do_not_matter(models, tmp_path):
    shutil.copytree(models / "two", tmp_path / "two")
    tokenizer = Tokenizer.from_str(json.dumps(TOKENIZER))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "two" / "tokenizer.json"))
    run(models, tmp_path / "out", ("one", tmp_path / "two"), (0.5, 0.5))
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("names", "weights", "changes", "message"),
    [
        (("one", "two"), (1, 2, 3), {}, "merge.weights: 3 weights for 2 ingredients"),
        (("one", "two"), (1, float("nan")), {}, "merge.weights: nan is not finite; give a finite number"),
        (("one", "two"), (float("-inf"), 1), {}, "merge.weights: -inf is not finite"),
        (("one", "two"), (1, "much"), {}, r"merge.weights: \(1, 'much'\) is not a list of numbers"),
        (("one", "two"), (0.5, 0.6), {}, "merge.weights: they sum to 1.1, not 1"),
        ((), (), {}, "merge.ingredients: is empty; name the folders"),
        (("one",), (1,), {"space": "slerp"}, "merge.space: 'slerp' is unknown"),
        (("one",), (1,), {"dtype": "int8"}, "merge.dtype: 'int8' is unknown"),
        (("one",), (1,), {"method": "mean"}, "merge.method: 'mean' is unknown; choose one of linear, task_arithmetic"),
        (("lora0",), (1,), {"method": "ties", "space": "concat", "base": "base"}, "merge.space: 'ties' merges dense"),
        (("lora0",), (1,), {"method": "ties", "space": "factors"}, "merge.space: 'ties' merges dense weights"),
        *(
            (("one", "two"), (0.5, 0.5), {"method": method}, f"merge.base: '{method}' merges updates of a base")
            for method in ("task_arithmetic", "ties", "dare_linear", "dare_ties", "model_stock")
        ),
        (("one",), (1,), {"method": "slerp"}, "merge.weights: 'slerp' goes from one ingredient to another"),
        (("one", "two"), (0.5, 0.6), {"method": "slerp", "base": "base"}, "merge.weights: 'slerp' goes from one"),
        (("lora0", "one"), (0.5, 0.5), {"method": "slerp"}, "merge.base: LoRA folders need the model they adapt"),
        (("one",), (1,), {"method": "model_stock", "base": "base"}, "merge.weights: 'model_stock' weighs by angles"),
        (("one", "two"), (1, 2), {"method": "model_stock", "base": "base"}, "merge.weights: 'model_stock' weighs by"),
        (("one",), (1,), {"method": "ties", "base": "base"}, "merge.density: is not set; 'ties' needs a number"),
        (
            ("one",),
            (1,),
            {"method": "dare_ties", "base": "base", "density": 1.5},
            "merge.density: 1.5 is out of range; choose a number above 0 and at most 1",
        ),
        (("one",), (1,), {"method": "ties", "base": "base", "density": 0.0}, "merge.density: 0.0 is out of range"),
        (("one",), (1,), {"density": 0.5}, "merge.density: 'linear' does not read it; leave it out"),
        (("one",), (1,), {"scale": 2.0}, "merge.scale: 'linear' does not read it"),
        (
            ("one",),
            (1,),
            {"method": "task_arithmetic", "base": "base", "seed": 1},
            "merge.seed: 'task_arithmetic' does",
        ),
        (
            ("one",),
            (1,),
            {"method": "task_arithmetic", "base": "base", "scale": float("nan")},
            "merge.scale: nan is not finite",
        ),
        (("one",), (1,), {"space": "concat"}, "one: a full model has no low-rank factors"),
        (("lora0", "one"), (1, 1), {"space": "factors", "base": "base"}, "one: a full model has no low-rank factors"),
        (("lora0",), (1,), {}, "merge.base: LoRA folders need the model they adapt"),
        (("one",), (1,), {"base": "nowhere"}, "nowhere/config.json: no such file"),
    ],
)
def test_refuses_settings_that_do_not_fit(models, tmp_path, names, weights, changes, message):
    with pytest.raises(UserError, match=message):
        run(models, tmp_path / "out", names, weights, **changes)
    assert not (tmp_path / "out").exists()


def test_refuses_an_output_that_is_taken_or_absent(models, tmp_path):
    (tmp_path / "out").mkdir()
    run(models, tmp_path / "out", ("one",), (1,))
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"out: exists and is not empty; choose another merge\.output"):
        run(models, tmp_path / "out", ("two",), (1,))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match=r"merge\.output: no folder to write to"):
        merge.merge(MergeSettings(ingredients=(str(models / "one"),), weights=(1,)))


def test_refuses_adapters_of_another_base(models, tmp_path):
    run(models, tmp_path / "mine", ("lora0",), (1,), base="base", space="concat")
    assert run(models, tmp_path / "ok", (tmp_path / "mine",), (1,), base="base")["base"]["hash"]
    with pytest.raises(UserError, match=r"mine: was made for the base \w{16}, not for that of .*one"):
        run(models, tmp_path / "out", (tmp_path / "mine",), (1,), base="one")
    run(models, tmp_path / "theirs", ("lora0",), (1,), base="one", space="concat")
    with pytest.raises(UserError, match=r"theirs: was made for the base \w{16}, not for that of .*mine"):
        run(models, tmp_path / "out", (tmp_path / "mine", tmp_path / "theirs"), (1, 1), space="concat")


@pytest.mark.parametrize("space", ["delta", "concat"])
def test_refuses_adapters_of_another_shape(models, tmp_path, space):
    wide = CONFIG.replace(intermediate_size=28)
    save_params(tmp_path / "wide", wide, draw(wide, 0))
    with pytest.raises(UserError, match=r"lora0: layers/mlp/\w+/\w has shape"):
        run(models, tmp_path / "out", ("lora0",), (1,), base=tmp_path / "wide", space=space)


@pytest.mark.parametrize(
    ("space", "rank", "message"),
    [("factors", 4, "but .* in adapter 0"), ("concat", 3, "adapter 0 updates .* but adapter 1 does not")],
)
def test_refuses_adapters_that_cannot_be_one(models, tmp_path, space, rank, message):
    pair = {"a": np.ones((2, 16, rank), np.float32), "b": np.ones((2, rank, 16), np.float32)}
    names = ("query",) if space == "concat" else ("query", "output")
    save_peft(tmp_path / "odd", {"layers": {"attention": dict.fromkeys(names, pair)}}, rank, 1.0, "base")
    same = {"a": np.ones((2, 16, 3), np.float32), "b": np.ones((2, 3, 16), np.float32)}
    save_peft(tmp_path / "even", {"layers": {"attention": dict.fromkeys(("query", "output"), same)}}, 3, 1.0, "base")
    with pytest.raises(UserError, match=rf"{message}.*; use merge\.space='delta'"):
        run(models, tmp_path / "out", (tmp_path / "even", tmp_path / "odd"), (1, 1), base="base", space=space)
    run(models, tmp_path / "dense", (tmp_path / "even", tmp_path / "odd"), (1, 1), base="base")


@pytest.mark.real_data
def test_a_real_model_merged_with_itself_is_itself(shared, tmp_path):
    folder = shared / "models" / "stories260K"
    run(folder.parent, tmp_path / "out", ("stories260K",) * 2, (0.3, 0.7))
    assert_close(load_params(tmp_path / "out"), load_params(folder), atol=1e-6)
    assert read_config(tmp_path / "out") == read_config(folder)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("model_type, by_head", [("gpt2", False), ("gpt_neox", True)])
def test_families_whose_projections_are_fused(tmp_path, model_type, by_head):
    """Of a base, a full model and an adapter: soups, and two adapters as one."""
    rotary = {"rotary_dim": 2, "residual": "parallel"} if by_head else {"positions": "learned"}
    config = CONFIG.replace(
        num_kv_heads=4,
        norm="layer",
        gated=False,
        activation="gelu" if by_head else "gelu_tanh",
        biases=("query", "key", "value", "output", "up", "down"),
        **rotary,
    )
    params = {name: draw(config, seed) for seed, name in enumerate(("base", "full"))}
    for name, tree in params.items():
        save_params(tmp_path / name, config, tree, model_type=model_type)
    adapters = [jax.tree.map(lambda leaf, k=k: leaf[k], bank(tmp_path / "base")) for k in range(2)]
    for k, adapter in enumerate(adapters):
        save_peft(tmp_path / f"lora{k}", adapter, LORA.rank, LORA.alpha, "base", model_type, config.head_dim)
    run(tmp_path, tmp_path / "soup", ["full", "lora1"], [0.25, 0.5], "base")
    want = jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, params["base"], params["full"])
    want = lora.merge_dense(want, [adapters[1]], [LORA.scale], [0.5])
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), load_params(tmp_path / "soup"), want)
    run(tmp_path, tmp_path / "both", ["lora0", "lora1"], [0.25, 0.5], "base", space="concat")
    both, rank, alpha = load_peft(tmp_path / "both", model_type, config.head_dim)
    assert rank == 2 * LORA.rank
    got = lora.merge_dense(params["base"], [both], [alpha / rank], [1.0])
    want = lora.merge_dense(params["base"], adapters, [LORA.scale] * 2, [0.25, 0.5])
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), got, want)
