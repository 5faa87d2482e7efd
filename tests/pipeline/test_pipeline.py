"""The whole pipeline as a user runs it: what lands in the run directory, and that the parts fit together."""

import importlib.util
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from pjrlhf.data.schema import validate
from pjrlhf.data.sources import open_source
from pjrlhf.export import merge
from pjrlhf.export.merge import MergeSettings
from pjrlhf.models.adapters import Policies
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.huggingface import load_params, read_config
from pjrlhf.models.peft import load_peft
from pjrlhf.models.storage import load_tree
from pjrlhf.pipeline import stages
from pjrlhf.settings import parse
from pjrlhf.training.workdir import Workdir


def read(path):
    return json.loads(path.read_text())


def contents(folder):
    """Every file below `folder` with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits(config, params, adapter=None, bank=None, mix=None):
    tokens = jnp.arange(24).reshape(2, 12) % config.vocab_size
    policies = Policies(Decoder(config), adapter, params, bank, mix)
    return policies.logits(policies(tokens, jnp.ones(tokens.shape, bool))[0])


def test_run_directory(finished):
    config = tiny.settings()
    assert read(finished / "config.json") == json.loads(json.dumps(stages.read(config).to_dict()))
    assert set(read(finished / "manifest.json")["stages"]) == {*config.stages, "methods/pmorl"}
    for stage in tiny.TRAINING:
        steps = config[stage].steps
        assert [path.name for path in (finished / stage / "checkpoints").iterdir()] == [str(steps)]
        assert [row["step"] for row in tiny.lines(finished, stage)] == list(range(1, steps + 1))
    # Only what the stages wrote: no temporary file or folder is left behind.
    assert not [path for path in finished.rglob("*") if path.name.startswith(".") or path.name.endswith("tmp")]


@pytest.mark.parametrize(
    ("stage", "plain", "per_policy"),
    [
        ("sft", {"loss", "num_tokens", "grad_norm"}, set()),
        ("reward", set(), {"loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"}),
        (
            "policy",
            set(),
            {
                "objective/kl",
                "objective/scores",
                "objective/rlhf_reward",
                "objective/entropy",
                "policy/approxkl_avg",
                "policy/clipfrac_avg",
                "policy/first_approxkl",
                "loss/policy_avg",
                "loss/value_avg",
                "val/clipfrac_avg",
            },
        ),
    ],
)
def test_metrics(finished, stage, plain, per_policy):
    expected = plain | {f"{name}/{reward}" for name in per_policy for reward in tiny.REWARDS}
    for row in tiny.lines(finished, stage):
        assert expected <= row.keys()
        assert all(math.isfinite(row[name]) for name in expected)


def test_policies_start_at_the_reference(finished):
    first = tiny.lines(finished, "policy")[0]
    for name in tiny.REWARDS:
        assert first[f"objective/kl/{name}"] == pytest.approx(0, abs=1e-5)
        assert first[f"policy/first_approxkl/{name}"] == pytest.approx(0, abs=1e-6)


def test_learning_moves_what_it_should(finished):
    loss = [row["loss"] for row in tiny.lines(finished, "sft")]
    assert np.mean(loss[-5:]) < 0.6 * loss[0]
    bank, _ = load_tree(finished / "policy" / "bank.safetensors")
    config, params = read_config(finished / "sft" / "model"), load_params(finished / "sft" / "model")
    adapter, one_hot = stages.read(tiny.settings()).settings.adapter, jnp.eye(len(tiny.REWARDS))
    base, *policies = (
        jax.nn.log_softmax(logits(config, params, adapter, bank, mix[None])) for mix in (0 * one_hot[0], *one_hot)
    )
    for k, policy in enumerate(policies):
        # KL per token, nats: the learning rate of 3e-3 and four steps of eight updates allow no more than a little.
        for other in (base, *policies[:k]):
            assert 1e-5 < (jnp.exp(policy) * (policy - other)).sum(-1).mean() < 1


def test_summary(finished):
    config, summary = tiny.settings(), read(finished / "report" / "summary.json")
    assert summary["stage_seconds"].keys() == set(config.stages)
    assert summary["total_seconds"] == pytest.approx(sum(summary["stage_seconds"].values()))
    assert summary["reward_models"].keys() == set(tiny.REWARDS)
    for model in summary["reward_models"].values():
        assert 0 <= model["accuracy"] <= 1 and model["pairs"] > 0 and model["std"] > 0
    assert summary["ingredients"].keys() == set(tiny.REWARDS)
    for one in summary["ingredients"].values():
        assert {"win_rate_vs_base", "kl", "length", "score", "base_score"} <= one.keys()
        rate = one["win_rate_vs_base"]
        assert rate["wins"] + rate["losses"] + rate["ties"] == rate["n"] == 2 * summary["held_out_prompts"]
    methods = {"base", "prompting", "rlhf", "pmorl", "soups"}
    combos = {f"{a}+{b}" for a in ("P1A", "P1B") for b in ("P2A", "P2B")}
    assert summary["combos"].keys() == combos
    for table in (summary["win_rate"], *summary["combos"].values()):
        assert table.keys() == methods
        for method, row in table.items():
            assert row.keys() == methods - {method}
            for opponent, rate in row.items():
                back = table[opponent][method]
                assert (rate["wins"], rate["losses"]) == (back["losses"], back["wins"])
    assert summary["win_rate_average"].keys() == methods
    assert summary["sweep"].keys() == {"expertise", "informativeness"}
    for sweep in summary["sweep"].values():
        assert sweep["weights"] == [0, 0.5, 1]
        assert sweep["scores"].keys() == sweep["spearman"].keys() == {sweep["low"], sweep["high"]}
    assert summary["position_consistency"] is None  # scores do not depend on the order of the answers
    page = (finished / "report" / "index.html").read_text()
    assert config.title in page and "P1A+P2A" in page
    assert {path.suffix for path in (finished / "report").iterdir()} == {".html", ".json", ".jsonl", ".png"}


def test_a_second_call_changes_nothing(copied):
    before = contents(copied)
    tiny.run(copied, tiny.settings())
    assert contents(copied) == before


def test_a_deleted_report_is_written_again(copied):
    tables = (copied / "report" / "summary.json").read_bytes()
    shutil.rmtree(copied / "report")
    tiny.run(copied, tiny.settings())
    assert json.loads((copied / "report" / "summary.json").read_bytes()).keys() == json.loads(tables).keys()


def test_the_base_reloads(finished):
    folder = finished / "sft" / "model"
    state, _ = load_tree(finished / "policy" / "bank.safetensors")
    assert read_config(folder).hidden_size == tiny.settings().model.hidden_size
    params = load_params(folder)
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), (params, state)))
    assert read(folder / "generation_config.json")["eos_token_id"] == read(folder / "config.json")["eos_token_id"]


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
def test_the_base_reloads_in_transformers(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished / "sft" / "model"
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    config = read_config(folder)
    tokens = torch.arange(24).reshape(2, 12) % config.vocab_size
    with torch.no_grad():
        expected = theirs(tokens).logits.numpy()
    np.testing.assert_allclose(logits(config, load_params(folder)), expected, atol=1e-5, rtol=0)
    assert len(AutoTokenizer.from_pretrained(folder)) == config.vocab_size


def test_ingredient_folders_hold_the_slices_of_the_bank(finished):
    bank, note = load_tree(finished / "policy" / "bank.safetensors")
    assert note["adapters"] == list(tiny.REWARDS)
    for k, name in enumerate(tiny.REWARDS):
        adapter, rank, alpha = load_peft(finished / "policy" / "ingredients" / name)
        assert (rank, alpha) == (2, 4.0)
        assert tiny.bits(adapter) == tiny.bits(jax.tree.map(lambda x, k=k: x[k], bank))


@pytest.mark.parametrize("weights", [(0.5, 0.0, 0.0, 0.5, 0.0), (1.5, 0.25, -0.5, 0.0, 0.3)])
def test_merged_ingredients_equal_the_bank_run_with_mix(finished, tmp_path, weights):
    base = finished / "sft" / "model"
    ingredients = tuple(str(finished / "policy" / "ingredients" / name) for name in tiny.REWARDS)
    output = str(tmp_path / "soup")
    merge.merge(MergeSettings(base=str(base), ingredients=ingredients, weights=weights, output=output))
    bank, _ = load_tree(finished / "policy" / "bank.safetensors")
    adapter = stages.read(tiny.settings()).settings.adapter
    shape = read_config(base)
    expected = logits(shape, load_params(base), adapter, bank, jnp.array([weights]))
    np.testing.assert_allclose(logits(shape, load_params(tmp_path / "soup")), expected, atol=1e-4, rtol=0)
    plain = logits(shape, load_params(base))
    assert np.abs(expected - plain).max() > 1e-3, "the soup is the base: this test could not fail"


def test_comparisons_are_preference_records_labelled_by_the_judge(finished, tmp_path):
    path = finished / "comparisons" / "comparisons.jsonl"
    examples, bad = validate(open_source({"kind": "jsonl", "path": str(path)}), "preference")
    info = read(finished / "manifest.json")["stages"]["comparisons"]
    assert not bad.items
    assert {example.objective for example in examples} == set(tiny.REWARDS)
    for name in tiny.REWARDS:
        count = sum(example.objective == name for example in examples)
        assert count + info["ties"][name] + info["empty_answers"] == info["pairs"]
    run = tiny.start(tmp_path, tiny.settings())
    for example in examples:
        (message,) = example.prompt
        request = message["content"]
        assert request in run.records.requests[0], "a held-out request, or one with a preference sentence"
        score = [run.audience.score(request, text, example.objective) for text in (example.chosen, example.rejected)]
        assert score[0] > score[1]


@pytest.mark.slow
def test_sft_with_lora(tmp_path):
    config = tiny.settings(stages=("sft",), sft__steps=3, sft__adapter__rank=2)
    folder = tiny.run(tmp_path / "run", config) / "sft" / "model"
    start = tiny.start(tmp_path / "other", config)
    before, after = start.workspace.start_params(start.streams.key("base/init")), load_params(folder)
    assert tiny.bits(before["embed"]) == tiny.bits(after["embed"]), "LoRA leaves the embedding alone"
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), before["layers"], after["layers"])
    assert min(jax.tree.leaves(moved["attention"])) > 0 and max(jax.tree.leaves(moved["attention_norm"])) == 0


@pytest.mark.slow
def test_full_parameters_end_to_end(finished, tmp_path):
    shutil.copytree(finished / "sft", tmp_path / "run" / "sft")
    shutil.copytree(finished / "comparisons", tmp_path / "run" / "comparisons")
    config = tiny.settings(adapter__rank=0, reward__steps=2, policy__steps=2)
    model = str(tmp_path / "run" / "sft" / "model")
    config.stages, config.model.path = ("reward", "policy", "evaluate"), model
    folder = tiny.run(tmp_path / "run", config)
    bank, _ = load_tree(folder / "policy" / "bank.safetensors")
    for k, name in enumerate(tiny.REWARDS):
        one = load_params(folder / "policy" / "ingredients" / name)
        assert tiny.bits(one) == tiny.bits(jax.tree.map(lambda x, k=k: x[k], bank))
        assert tiny.bits(one) != tiny.bits(load_params(model))
    assert read(folder / "report" / "summary.json")["win_rate"]["soups"]["base"]["n"] > 0


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one(finished, tmp_path):
    """From one base and the same comparisons."""
    config = tiny.settings(
        model__path=str(finished / "sft" / "model"),
        stages=("reward", "policy"),
        policy__rollouts=8,
        policy__steps=2,
        reward__batch_size=8,
    )
    for name in ("one", "eight"):
        shutil.copytree(finished / "comparisons", tmp_path / name / "comparisons")
    assert jax.device_count() == 8
    stages.run(config, Workdir(tmp_path / "eight"))
    tiny.run(tmp_path / "one", config)
    for stage, tolerance in (("reward", 1e-2), ("policy", 1e-2)):
        one, eight = (tiny.lines(tmp_path / name, stage) for name in ("one", "eight"))
        assert [row.keys() for row in eight] == [row.keys() for row in one]
        for first, row, rtol in zip(one, eight, [1e-4] + (len(one) - 1) * [tolerance], strict=True):
            # More devices pad more.
            keys = row.keys() - {"stage", "wasted_tokens"}
            found, wanted = ([x[key] for key in keys] for x in (row, first))
            np.testing.assert_allclose(found, wanted, rtol, atol=rtol)


def test_the_merge_config_runs_as_a_stage(finished, tmp_path, capsys):
    """It says where it wrote, and another mix in the same run directory is another export."""
    ingredients = finished / "policy" / "ingredients"
    config = tiny.catalogue("merge").get_config()
    config.merge.base = str(finished / "sft" / "model")
    config.merge.ingredients = (str(ingredients / "P1A"), str(ingredients / "P2B"))
    config.merge.weights = (0.7, -0.2)
    workdir = Workdir(tmp_path / "merge")
    stages.run(config, workdir)
    merge.merge(parse(MergeSettings, config.merge, "merge").replace(output=str(tmp_path / "direct")))
    assert (workdir.path / "export" / "soup" / "model.safetensors").read_bytes() == (
        tmp_path / "direct" / "model.safetensors"
    ).read_bytes()
    assert workdir.finished("merge")["space"] == "delta"
    assert f"merged model: {workdir.path / 'export' / 'soup'}" in capsys.readouterr().out
    config.merge.ingredients = (str(ingredients / "P1A"), str(ingredients / "P2A"))
    stages.run(config, workdir)
    assert f"merged model: {workdir.path / 'export' / 'soup-2'}" in capsys.readouterr().out
    stages.run(config, workdir)
    assert "merged model" not in capsys.readouterr().out
    shutil.rmtree(workdir.path / "export" / "soup-2")
    stages.run(config, workdir)
    assert (workdir.path / "export" / "soup-2" / "model.safetensors").is_file()
