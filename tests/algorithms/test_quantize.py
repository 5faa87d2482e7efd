"""Stages on a base in 8 or 4 bits: each of them sees that base, and says so where its numbers are kept."""

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
from pjrlhf.language_model import load_personal
from pjrlhf.models.huggingface import load_params
from pjrlhf.models.quantization import QUANTIZATIONS, NormalFloat4, kind_of, quantize_params
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.pipeline import stages
from pjrlhf.settings import parse
from pjrlhf.training.workdir import Workdir


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Of 4 bits: the tiny model has 16 inputs."""
    monkeypatch.setitem(QUANTIZATIONS, "nf4", NormalFloat4(block=8))


def close(got, want):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), got, want)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_the_base_is_that_of_the_folder_quantised_and_has_a_name_of_its_own(finished, kind):
    run = tiny.start(finished, tiny.settings(model__quantize=kind))
    floats = tiny.start(finished, tiny.settings())
    close(run.workspace.base, quantize_params(QUANTIZATIONS[kind], load_params(finished / "sft" / "model")))
    assert (
        run.workspace.base_hash
        != floats.workspace.base_hash
        == run.workspace.folder_hash
        == floats.workspace.folder_hash
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_policies_train_on_it_and_their_adapters_merge_into_the_folder(copied, tmp_path, kind):
    """One step by hand; what is written for `merge` names the folder, whose floats it adds to."""
    run = tiny.start(copied, tiny.settings(model__quantize=kind, policy__steps=1))
    path = copied / "reward" / "model.safetensors"  # trained on the floats
    with pytest.raises(UserError, match=rf"was trained with base: '(\w+)', here '\1-{kind}'"):
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
    assert json.loads((folder / merge.MANIFEST).read_text())["quantize"] == kind


def test_the_base_is_trained_as_floats(tmp_path):
    run = tiny.start(tmp_path, tiny.settings(model__quantize="int8"))
    leaves = jax.tree.leaves(sft.method_of(run).init().trainable)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_personal_policies_learn_on_it(people, tmp_path, kind):
    """All stages; training moves as it does on floats, and what is read back has the base it was trained on."""
    config = tiny_users.settings(model__quantize=kind)
    path = tiny.run(tmp_path / "run", config)
    for entry in config.preference.models:
        note = [line for line in tiny.lines(path) if line["stage"] == f"preference/{entry}"]
        assert note and all(np.isfinite(line["loss"]) for line in note)
        personal = load_personal(path / "preference" / entry)
        assert kind_of(personal.model.backbone.base) == kind
    summaries = [json.loads((x / "report" / "summary.json").read_text()) for x in (path, people)]
    assert summaries[0].keys() == summaries[1].keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__quantize": "int4"}, "'int4' is unknown; did you mean 'int8'"),
        ({"model__quantize": "nf4", "adapter__rank": 0}, "adapter.rank"),
        ({"model__quantize": "int8", "adapter__rank": 0}, "adapter.rank"),
    ],
)
def test_settings_that_do_not_go_together_stop_the_first_stage(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"model\.quantize.*{message}"), tiny.one_device():
        stages.run(tiny.settings(**changes), Workdir(tmp_path / "run"))
    assert not (tmp_path / "run" / "sft" / "model").exists()
