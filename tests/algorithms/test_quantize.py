"""Stages on a base in 8 bits: each of them sees that base, and says so where its numbers are kept."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny, tiny_users

from pjrlhf.algorithms import banks, policy, sft
from pjrlhf.errors import UserError
from pjrlhf.export import merge
from pjrlhf.export.merge import MergeSettings
from pjrlhf.models.huggingface import load_params
from pjrlhf.models.quantization import quantize_params
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.pipeline import stages
from pjrlhf.settings import parse
from pjrlhf.training.workdir import Workdir


def close(got, want):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), got, want)


def test_the_base_is_that_of_the_folder_quantised_and_has_a_name_of_its_own(finished):
    run = tiny.start(finished, tiny.settings(model__quantize="int8"))
    floats = tiny.start(finished, tiny.settings())
    close(run.workspace.base, quantize_params(load_params(finished / "sft" / "model")))
    assert (
        run.workspace.base_hash
        != floats.workspace.base_hash
        == run.workspace.folder_hash
        == floats.workspace.folder_hash
    )


@pytest.mark.slow
def test_policies_train_on_it_and_their_adapters_merge_into_the_folder(copied, tmp_path):
    """One step by hand; what is written for `merge` names the folder, whose floats it adds to."""
    run = tiny.start(copied, tiny.settings(model__quantize="int8", policy__steps=1))
    path = copied / "reward" / "model.safetensors"  # trained on the floats
    with pytest.raises(UserError, match=r"was trained with base: '(\w+)', here '\1-int8'"):
        policy.method_of(run)
    tree, note = load_tree(path)
    save_tree(path, tree, note | run.workspace.provenance)
    method = policy.method_of(run)
    state = method.init()
    before = tiny.bits(run.workspace.base)
    state, metrics = method.step(state, next(method.batches))
    # Nothing has moved yet when the first minibatch is scored: rollout and update see the same base.
    np.testing.assert_allclose(metrics["policy/first_approxkl"][0], 0.0, atol=1e-6)
    assert tiny.bits(run.workspace.base) == before
    bank = state.trainable["bank"]
    assert max(np.abs(leaf).max() for path, leaf in jax.tree.leaves_with_path(bank) if path[-1].key == "b") > 0
    names = method.targets.adapters
    assert banks.save(run, "policy", names, bank) == run.workspace.base_hash
    config = tiny.catalogue("merge").get_config().merge
    folder = copied / "policy" / "ingredients" / names[0]
    config.update({"base": str(run.workspace.base_folder), "ingredients": (str(folder),), "weights": (1.0,)})
    config.output = str(tmp_path / "merged")
    merge.merge(parse(MergeSettings, config))
    found, floats = (
        load_params(x)["layers"]["mlp"]["down"]["kernel"] for x in (config.output, run.workspace.base_folder)
    )
    pair = jax.tree.map(lambda x: x[0], bank["layers"]["mlp"]["down"])
    np.testing.assert_allclose(
        found, floats + run.workspace.adapter.scale * pair["a"] @ pair["b"], rtol=1e-5, atol=1e-6
    )
    assert json.loads((folder / merge.MANIFEST).read_text())["quantize"] == "int8"


def test_the_base_is_trained_as_floats(tmp_path):
    run = tiny.start(tmp_path, tiny.settings(model__quantize="int8"))
    leaves = jax.tree.leaves(sft.method_of(run).init().trainable)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_personal_policies_learn_on_it(people, tmp_path):
    """All stages; training moves as it does on floats."""
    config = tiny_users.settings(model__quantize="int8")
    path = tiny.run(tmp_path / "run", config)
    for entry in config.preference.models:
        note = [line for line in tiny.lines(path) if line["stage"] == f"preference/{entry}"]
        assert note and all(np.isfinite(line["loss"]) for line in note)
    summaries = [json.loads((x / "report" / "summary.json").read_text()) for x in (path, people)]
    assert summaries[0].keys() == summaries[1].keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__quantize": "int4"}, "'int4' is unknown; did you mean 'int8'"),
        ({"model__quantize": "int8", "adapter__rank": 0}, "adapter.rank"),
    ],
)
def test_settings_that_do_not_go_together_stop_the_first_stage(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"model\.quantize.*{message}"), tiny.one_device():
        stages.run(tiny.settings(**changes), Workdir(tmp_path / "run"))
    assert not (tmp_path / "run" / "sft" / "model").exists()
