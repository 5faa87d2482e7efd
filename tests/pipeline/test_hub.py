"""Runs whose models are named on the hub: what they record, and what happens when a branch moves."""

import json
import logging

import jax
import numpy as np
import pytest
from huggingface_hub import constants
from support import hub_server, tiny, tiny_users

from pjrlhf.data import synthetic
from pjrlhf.export import merge
from pjrlhf.export.merge import MergeSettings
from pjrlhf.language_model import load_personal
from pjrlhf.models import hub
from pjrlhf.models.huggingface import fingerprint
from pjrlhf.models.peft import load_peft
from pjrlhf.models.storage import load_tree
from pjrlhf.runtime import inputs
from pjrlhf.runtime.inputs import fetch_models, fingerprints
from pjrlhf.training.workdir import Workdir


@pytest.fixture
def server(hub_model, tmp_path):
    with hub_server.serving(hub_model, tmp_path / "cache") as server:
        yield server


def moved(server, hub_model):
    """Another model under the same name."""
    files = {path.name: path.read_bytes() for path in hub_model.iterdir()}
    weights = bytearray(files["model.safetensors"])
    weights[-1] ^= 1
    return server.add("ann/small", {**files, "model.safetensors": bytes(weights)})


def config_of(folder):
    records = [
        {"prompt": request, "chosen": "it can shine .", "rejected": "it can melt .", "user_id": user}
        for request in synthetic.prompts()[:24]
        for user in ("ann", "bob")
    ]
    return tiny_users.settings(
        "records",
        data__max_prompt=16,
        data__max_completion=8,
        evaluate_users__cold_start=(),
        model__path="ann/small",
        preference__models={"pooled": {"kind": "uniform"}},
        preference__data__path=tiny_users.write_records(folder / "records.jsonl", records),
        stages=("preference",),
    )


def test_a_run_records_the_commit_and_stays_there(server, hub_model, tmp_path, monkeypatch, caplog):
    config, first = config_of(tmp_path), server.repos["models", "ann/small"]["branches"]["main"]
    run = tiny.run(tmp_path / "run", config)
    recorded = json.loads((run / "inputs.json").read_text())["model.path"]
    assert recorded["path"] == "ann/small" and recorded["commit"] == first
    assert recorded["hash"].startswith(fingerprint(hub_model))
    file = run / "preference" / "pooled" / "model.safetensors"
    assert load_tree(file)[1]["base_folder"] == f"ann/small@{first}", "others find the base without this machine"

    second = moved(server, hub_model)
    (run / "manifest.json").unlink()
    monkeypatch.setattr(hub, "_pinned", {})  # another process
    with caplog.at_level(logging.WARNING):
        tiny.run(tmp_path / "run", config)
    assert f"ann/small: is commit {second} on the hub now; this run stays at {first}, where it started" in caplog.text
    assert json.loads((run / "inputs.json").read_text())["model.path"] == recorded

    monkeypatch.setattr(hub, "_pinned", {})
    found = load_personal(file)  # which checks the fingerprint of the base
    assert found.model.backbone.model.config.vocab_size
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    tiny.run(tmp_path / "run", config)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    other = Workdir(tmp_path / "other")
    monkeypatch.setattr(hub, "_pinned", {})
    fetch_models({"model": {"path": "ann/small"}}, other)
    assert fingerprints({"model": {"path": "ann/small"}}, other.path)["model.path"]["commit"] == second


def test_all_processes_read_the_commit_of_process_zero(server, hub_model, tmp_path, monkeypatch):
    first = server.repos["models", "ann/small"]["branches"]["main"]
    moved(server, hub_model)  # after process 0 looked
    monkeypatch.setattr(inputs, "is_process_zero", lambda: False)
    monkeypatch.setattr(inputs, "broadcast_from_zero", lambda _: np.frombuffer(first.encode(), np.uint8))
    fetch_models({"model": {"path": "ann/small"}}, Workdir(tmp_path / "run"))
    assert hub.model_folder("ann/small").name == first


def test_what_a_config_names_on_the_hub(server, tmp_path, monkeypatch):
    """Models of all sections; neither data sets nor folders that the run itself writes for a merge."""
    monkeypatch.chdir(tmp_path)
    for name in ("judge", "second", "third", "first", "rewards", "adapter", "sampler", "writer"):
        server.add(f"ann/{name}", server.files("ann/small"))
    config = {
        "model": {"path": "ann/small@main"},
        "rewards": {"P1A": {"kind": "classifier", "path": "ann/rewards"}, "P1B": "some/file.py:function"},
        "evaluate": {
            "judge": {"kind": "model", "path": "ann/judge"},
            "judges": (
                {"kind": "model", "path": "ann/first"},
                {"kind": "model", "path": "ann/second"},
                {"kind": "reward", "source": {"kind": "classifier", "path": "ann/third"}},
            ),
        },
        "comparisons": {"judge": "synthetic", "sampler": "ann/sampler"},
        "preference": {"models": {"told": {"writer": {"kind": "profile", "sampler": "ann/writer"}}}},
        "data": {"prompts": {"kind": "datasets", "path": "ann/prompts"}},
        "merge": {"base": "run/model", "ingredients": ("ann/adapter",)},
    }
    workdir = Workdir(tmp_path / "run")
    fetch_models(config, workdir)
    found = fingerprints(config, workdir.path)
    assert {name: one["path"] for name, one in found.items()} == {
        "model.path": "ann/small@main",
        "rewards.P1A.path": "ann/rewards",
        "evaluate.judge.path": "ann/judge",
        "evaluate.judges.path 1": "ann/first",
        "evaluate.judges.path": "ann/second",
        "evaluate.judges.source.path": "ann/third",
        "comparisons.sampler": "ann/sampler",
        "preference.models.told.writer.sampler": "ann/writer",
        "merge.ingredients": "ann/adapter",
    }
    assert all("commit" in one for one in found.values())


def test_merges_by_name(server, finished, tmp_path):
    """A base and an adapter on the hub; the merged adapter names its base there."""
    adapters = [finished / "policy" / "ingredients" / name for name in ("P1A", "P1B")]
    commits = [server.add(f"ann/{folder.name}", folder) for folder in adapters]
    base = server.add("ann/base", finished / "sft" / "model")
    names = tuple(f"ann/{folder.name}" for folder in adapters)
    for space in ("delta", "concat"):
        found, expected = (
            merge.merge(MergeSettings(base=b, ingredients=parts, weights=(0.7, 0.3), space=space, output=str(out)))
            for b, parts, out in (
                ("ann/base", names, tmp_path / f"{space}1"),
                (str(finished / "sft" / "model"), tuple(map(str, adapters)), tmp_path / f"{space}2"),
            )
        )
        assert found["base"] == {"folder": "ann/base", "commit": base, "hash": expected["base"]["hash"]}
        parts = [(one["folder"], one["commit"]) for one in found["ingredients"]]
        assert parts == list(zip(names, commits, strict=True))
    assert fingerprint(tmp_path / "delta1") == fingerprint(tmp_path / "delta2")
    one, two = (load_peft(tmp_path / f"concat{i}")[0] for i in (1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    config = json.loads((tmp_path / "concat1" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("ann/base", base)
