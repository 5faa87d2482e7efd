"""Runs whose policies share one frozen first factor: it never moves, files have it, and soups keep the rank."""

import jax
import numpy as np
import pytest
from support import tiny, tiny_users

from pjrlhf.algorithms import banks, pdpo_entries, policy
from pjrlhf.errors import UserError
from pjrlhf.export import merge
from pjrlhf.export.merge import MergeSettings
from pjrlhf.language_model import load_bank, load_personal
from pjrlhf.models.adapters import frozen_factors
from pjrlhf.models.folders import read_json
from pjrlhf.models.storage import load_tree
from pjrlhf.pipeline import stages


def first_factors(bank):
    return {
        (block, name): np.asarray(factors["a"])
        for block, tree in bank["layers"].items()
        for name, factors in tree.items()
    }


def names_of(tree):
    return {path[-1].key for path, _ in jax.tree.leaves_with_path(tree) if hasattr(path[-1], "key")}


def check_file(path, run, count):
    """All policies of a file have the factor that the run draws."""
    tree, _ = load_tree(path)
    frozen = frozen_factors(run.workspace.base, run.workspace.adapter)
    for (block, name), a in first_factors(tree.get("bank", tree)).items():
        assert len(a) == count
        np.testing.assert_array_equal(a, np.broadcast_to(frozen[block][name]["a"], a.shape))


@pytest.mark.slow
def test_a_policy_trains_second_factors_alone_and_its_soups_keep_the_rank(copied, tmp_path):
    """The reward models of `copied` have first factors of their own, and judge as before."""
    config = tiny.settings(adapter__freeze_a=True, policy__steps=1)
    run = tiny.start(copied, config)
    method = policy.method_of(run)
    state = method.init()
    assert names_of(state.trainable["bank"]) == {"b"}
    before = tiny.bits(run.workspace.base)
    state, metrics = method.step(state, next(method.batches))
    np.testing.assert_allclose(metrics["policy/first_approxkl"][0], 0.0, atol=1e-6)
    assert tiny.bits(run.workspace.base) == before
    names = method.targets.adapters
    banks.save(run, "policy", names, state.trainable["bank"])
    check_file(copied / "policy" / banks.BANK, run, len(names))
    assert tiny.bits(banks.load(run, names=names)) == tiny.bits(state.trainable["bank"])
    bank, _, adapter = load_bank(copied / "policy")
    assert names_of(bank) == {"a", "b"} and adapter.rank == run.workspace.adapter.rank
    # A soup as an adapter has the rank of its ingredients.
    folders = tuple(str(copied / "policy" / "ingredients" / name) for name in names[:2])
    soup = str(tmp_path / "soup")
    merge.merge(MergeSettings(ingredients=folders, weights=(0.7, 0.6), space="concat", output=soup))
    assert read_json(tmp_path / "soup" / "adapter_config.json")["r"] == adapter.rank


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    config = tiny.settings(adapter__freeze_a=True)
    folder = tiny.run(tmp_path / "run", config)
    run = tiny.start(folder, config)
    rewards = len(run.audience.rewards)
    check_file(folder / "reward" / "model.safetensors", run, rewards)
    check_file(folder / "policy" / banks.BANK, run, rewards)


@pytest.mark.slow
def test_people_learn_second_factors(tmp_path):
    models = {
        "individualized": {"kind": "individualized", "tokens": 2},
        "reward": {"kind": "individualized", "tokens": 2, "head": "reward"},
    }
    config = tiny_users.settings(adapter__freeze_a=True, preference__models=models)
    folder = tiny.run(tmp_path / "run", config)
    run = tiny.start(folder, config)
    for name in models:
        path = folder / "preference" / name / "model.safetensors"
        found, _ = pdpo_entries.load(run, tiny_users.entry_of(run, name))
        assert names_of(found["bank"]) == {"b"}
        check_file(path, run, len(jax.tree.leaves(found["bank"])[0]))
    personal = load_personal(folder / "preference" / "individualized")
    assert names_of(personal.params["bank"]) == {"a", "b"}


def test_nothing_is_shared_by_full_parameters_and_by_fine_tuning():
    full = {"adapter__freeze_a": True, "adapter__rank": 0}
    for changes in (full, {"sft__adapter__freeze_a": True, "sft__adapter__rank": 2}):
        with pytest.raises(UserError, match="freeze_a"):
            stages.read(tiny.settings(**changes))
