"""Adapters for llama.cpp, read back by its package; skipped where `gguf` is not installed."""

import json
import sys

import jax
import numpy as np
import pytest
from support.drawn_models import golden_families, save_family
from support.small_policies import noise

from pjrlhf import cli
from pjrlhf.models.adapters import AdapterConfig, init_bank
from pjrlhf.models.families import FAMILIES
from pjrlhf.models.huggingface import load_params, read_config
from pjrlhf.models.peft import save_peft

NAMES = ("P1A", "P2B")
SCALE = 2.0


def some(*quick):
    found = [x for x in golden_families() if x != "gptj"]
    return [x if x in quick else pytest.param(x, marks=pytest.mark.slow) for x in found]


def write_models(root, model_type):
    base = save_family(root / "base", model_type)
    folders, banks = {}, {}
    for i, name in enumerate(NAMES):
        bank = noise(init_bank(load_params(base), AdapterConfig(rank=3), 1, jax.random.key(i)), i, 0.2)
        banks[name] = jax.tree.map(lambda x: np.asarray(x[0]), bank)["layers"]
        folders[name] = root / name
        save_peft(
            folders[name], {"layers": banks[name]}, 3, 3 * SCALE, str(base), model_type, read_config(base).head_dim
        )
    return ["--model", str(base), "--ingredients", *(f"{k}={v}" for k, v in folders.items())], banks, read_config(base)


def neighbours(update, heads):
    """Columns of a kernel [in, out], of which llama.cpp rotates 2 i with 2 i + 1 where we rotate i with i + half."""
    halves = update.reshape(len(update), heads, 2, -1)
    return np.stack([halves[:, :, 0], halves[:, :, 1]], axis=-1).reshape(update.shape)


def expected(model_type, config, bank, layer):
    """Name in llama.cpp -> update [in, out]."""
    flat = {
        name: SCALE * pair["a"][layer] @ pair["b"][layer] for block in bank.values() for name, pair in block.items()
    }
    names = {"query": "attn_q", "key": "attn_k", "value": "attn_v", "output": "attn_output"}
    names |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    if model_type in ("llama", "mistral"):
        flat["query"] = neighbours(flat["query"], config.num_heads)
        flat["key"] = neighbours(flat["key"], config.num_kv_heads)
    if model_type in ("gpt2", "gpt_neox"):
        flat["attn_qkv"] = np.concatenate([flat.pop(name) for name in ("query", "key", "value")], axis=1)
    return {f"blk.{layer}.{names.get(name, name)}.weight": update for name, update in flat.items()}


@pytest.mark.parametrize("model_type", some("llama", "qwen2", "gpt2", "gpt_neox"))
def test_the_files_hold_the_updates_under_the_names_of_llama_cpp(model_type, tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    source, banks, config = write_models(tmp_path, model_type)
    cli.main(["export", *source, "--for", "gguf", "--mix=P1A=0.7,P2B=-0.4", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "--lora-scaled P1A.gguf:0.7,P2B.gguf:-0.4" in printed
    assert '"lora": [{"id": 0, "scale": 0.7}, {"id": 1, "scale": -0.4}]' in printed
    for name in NAMES:
        reader = gguf.GGUFReader(tmp_path / "out" / f"{name}.gguf")
        fields = {key: field.contents() for key, field in reader.fields.items()}
        assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
        architecture = {"mistral": "llama", "gemma3_text": "gemma3", "gpt_neox": "gptneox"}.get(model_type, model_type)
        assert fields["general.architecture"] == architecture
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
        # llama.cpp scales by alpha over the rank, the last axis of B.
        scales = {x.shape[1] / fields["adapter.lora.alpha"] for n, x in tensors.items() if n.endswith("lora_b")}
        assert scales == {1.0}
        found = {
            place: (tensors[f"{place}.lora_b"] @ tensors[f"{place}.lora_a"]).T
            for place in sorted({tensor.rpartition(".")[0] for tensor in tensors})
        }
        want = {}
        for layer in range(config.num_layers):
            want |= expected(model_type, config, banks[name], layer)
        assert found.keys() == want.keys()
        for place, update in want.items():
            np.testing.assert_allclose(found[place], update, atol=1e-5, err_msg=place)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["format"] == "gguf" and (tmp_path / "out" / "README.md").is_file()


def test_a_family_that_llama_cpp_does_not_have_is_refused(tmp_path, capsys):
    source, *_ = write_models(tmp_path, "gptj")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", *source, "--for", "gguf", "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    assert "llama.cpp has no models of type gptj; use --for peft or --for merged" in capsys.readouterr().err
    for kind in ("peft", "merged"):
        cli.main(["export", *source, "--mix=P1A=1", "--for", kind, "--output", str(tmp_path / kind)])


def test_the_package_is_named_where_it_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    source, *_ = write_models(tmp_path, "llama")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", *source, "--for", "gguf", "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2 and "gguf: is not installed; pip install '" in capsys.readouterr().err


def test_every_other_family_has_an_architecture():
    from pjrlhf.export.gguf_lora import ARCHITECTURES

    assert {*ARCHITECTURES} == {*FAMILIES} - {"gptj"}
