"""Numbers that are not finite are refused by name, by every writer, and nothing is left behind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny_llamas import SMALL, change_weights, random_params

from pjrlhf.errors import UserError
from pjrlhf.export import merge
from pjrlhf.export.merge import MergeSettings
from pjrlhf.models.huggingface import save_params
from pjrlhf.models.peft import save_peft
from pjrlhf.models.storage import save_tree

METHODS = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "slerp": {},
    "model_stock": {},
}
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def models(tmp_path):
    """Folders base, one and two of full models, and an adapter of the base, lora."""
    folder = tmp_path / "in"
    folder.mkdir()
    for k, name in enumerate(("base", "one", "two")):
        save_params(folder / name, SMALL, jax.tree.map(lambda x, k=k: x * (1 + k / 8), random_params(SMALL)))
    pair = {"a": np.ones((2, 8, 3), np.float32), "b": np.ones((2, 3, 12), np.float32)}
    save_peft(folder / "lora", {"layers": {"attention": {"query": pair}}}, 3, 6.0, "base")
    return folder


def refused(output, message, *arguments, **settings):
    with pytest.raises(UserError, match=message):
        run(output, *arguments, **settings)
    assert not output.exists() and [path.name for path in output.parent.iterdir()] == ["in"]


def run(output, ingredients, base=None, weights=(0.5, 0.5), **settings):
    folders = tuple(str(folder) for folder in ingredients)
    base = str(base) if base else None
    merge.merge(MergeSettings(ingredients=folders, base=base, weights=weights, output=str(output), **settings))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("culprit", ["base", "two"])
def test_every_method_names_the_folder_and_the_tensor(models, tmp_path, method, culprit, bad):
    """TIES would hide a NaN, others would spread it."""
    if (method, culprit) == ("slerp", "base"):
        return  # slerp reads no base
    change_weights(lambda w: w[QUERY].__setitem__((0, 0), bad))(models / culprit)
    weights = (0.5, 0.5) if method in ("slerp", "model_stock") else (0.4, 0.4)
    if method == "model_stock":
        weights = (0.25, 0.25)
    refused(
        tmp_path / "out",
        f"{models / culprit}: {QUERY} holds NaN or infinity",
        [models / "one", models / "two"],
        models / "base",
        weights,
        method=method,
        **METHODS[method],
    )


@pytest.mark.parametrize("space", ["delta", "factors", "concat"])
def test_adapters_too(models, tmp_path, space):
    file = models / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = f"base_model.model.{QUERY.removesuffix('.weight')}.lora_A.weight"
    tensors[key][0, 0] = np.inf
    save_file(tensors, file)
    refused(
        tmp_path / "out",
        f"{models / 'lora'}: {key} holds NaN or infinity",
        [models / "lora"],
        models / "base",
        (1.0,),
        space=space,
    )


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_what_is_too_large_for_float16(models, tmp_path, method):
    """A sum of finite numbers; the other dtypes take it."""
    change_weights(lambda w: w[QUERY].__setitem__((0, 0), 7e4))(models / "two")
    arguments = [models / "one", models / "two"], models / "base", (0.0, 1.0)
    options = METHODS[method] | {"method": method}
    message = rf"out/model\.safetensors: {QUERY} would hold NaN or infinity as float16.*; choose bfloat16 or float32"
    refused(tmp_path / "out", message, *arguments, dtype="float16", **options)
    run(tmp_path / "out", *arguments, dtype="bfloat16", **options)


def test_adapters_that_become_too_large(models, tmp_path):
    refused(
        tmp_path / "out",
        r"out/adapter_model\.safetensors: .*lora_[AB].weight would hold NaN or infinity as float16",
        [models / "lora"],
        models / "base",
        (1e6,),
        space="concat",
        dtype="float16",
    )


def test_a_sum_with_an_adapter_that_overflows(models, tmp_path):
    message = r"out/model\.safetensors: .*q_proj.weight would hold NaN or infinity as float16"
    refused(tmp_path / "out", message, [models / "lora"], models / "base", (1e6,), dtype="float16")


def test_an_ingredient_of_weight_zero_takes_no_part(models, tmp_path):
    change_weights(lambda w: w[QUERY].__setitem__((0, 0), np.nan))(models / "two")
    run(tmp_path / "out", [models / "one", models / "two"], models / "base", (1.0, 0.0))


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_exports_and_banks(tmp_path, bad):
    params = random_params(SMALL)
    params["layers"]["mlp"]["up"]["kernel"][1, 2, 3] = bad
    pair = {"a": np.ones((2, 8, 3), np.float32), "b": np.full((2, 3, 12), bad, np.float32)}
    with pytest.raises(UserError, match=r"out/model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight would hold"):
        save_params(tmp_path / "a" / "out", SMALL, params)
    with pytest.raises(UserError, match=r"lora/adapter_model\.safetensors: .*q_proj\.lora_B\.weight would hold"):
        save_peft(tmp_path / "lora", {"layers": {"attention": {"query": pair}}}, 3, 6.0, "base")
    for dtype in (jnp.float32, jnp.bfloat16):
        with pytest.raises(UserError, match=r"/bank\.safetensors: a/b would hold NaN or infinity"):
            save_tree(tmp_path / "bank.safetensors", {"a": {"b": jnp.asarray([1.0, bad], dtype), "c": jnp.arange(2)}})
    assert list(tmp_path.iterdir()) == []
