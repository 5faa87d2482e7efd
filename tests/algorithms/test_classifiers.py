"""The setting of MOC on classifiers: one policy that reads preference weights, and three reward models like GPT-2."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from support import tiny, tiny_family
from support.tiny_classifiers import gpt2_folder

from pjrlhf.algorithms import reward
from pjrlhf.data import synthetic
from pjrlhf.errors import UserError
from pjrlhf.models.storage import save_tree
from pjrlhf.pipeline import stages
from pjrlhf.rewards.sources import reward_source
from pjrlhf.runtime import classifiers
from pjrlhf.runtime.inputs import fingerprints
from pjrlhf.training.workdir import Workdir

NAMES = ("harmless", "helpful", "humor")
WORDS = ("so", "happy", "day")  # of the small vocabulary, in place of the names
POINTS = ((1.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.2, 0.4, 0.4))


def settings(folder, base, **changes):
    """The catalogue's config on stand-ins in `folder`."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in synthetic.prompts()))
    config = tiny.catalogue("moc").get_config("classifiers")
    flat = {key: x for key, x in tiny_family.TINY.items() if not key.startswith(("model.", "modpo.", "ric."))}
    flat |= {
        "data.prompt_buckets": (),
        "data.max_prompt": 30,
        "data.long_prompt": "truncate_left",
        "data.prompts.path": str(prompts),
    }
    flat |= {"data.prompts.kind": "jsonl", "model.path": str(base), "evaluate_front.points": POINTS}
    for i, name in enumerate(NAMES):
        labels = ("dull", "funny") if name == "humor" else 1
        flat[f"preferences.{name}.label"] = WORDS[i]
        flat[f"rewards.{name}.path"] = str(gpt2_folder(folder / name, labels, seed=i, chat=False))
    config.update_from_flattened_dict(flat | {key.replace("__", "."): x for key, x in changes.items()})
    config.methods.moc.update({"rollouts": 4})
    return config


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers")
    config = settings(folder, finished / "sft" / "model")
    return tiny.run(folder / "run", config), config


@pytest.mark.slow
def test_the_setting_of_moc_runs_on_classifiers(trained):
    folder, _ = trained
    found = json.loads((folder / "report" / "summary.json").read_text())
    assert found["front"]["objectives"] == list(NAMES) and set(found["methods"]) == {"moc"}
    assert np.isfinite(found["methods"]["moc"]["hypervolume"])
    models = found["reward_models"]
    assert all(models[name]["std"] > 1e-3 and f"rewards.{name}.path" in models[name]["files"] for name in NAMES)
    rows = tiny.lines(folder, "methods/moc")
    assert len(rows) == 2 and all(np.isfinite(row["rewards/humor/mean"]) for row in rows)
    answers = [json.loads(line) for line in (folder / "report" / "answers.jsonl").read_text().splitlines()]
    assert answers


@pytest.mark.slow
def test_a_scale_of_other_weights_is_refused(trained, finished):
    folder, config = trained
    other = settings(folder.parent, finished / "sft" / "model", reward__path=str(folder / "reward" / reward.MODEL))
    run = tiny.start(folder.parent / "other", other)
    assert reward.load(run)["models"].tolist() == [-1, -1, -1]
    gpt2_folder(folder.parent / "helpful", 1, seed=7, chat=False)
    with pytest.raises(UserError, match=r"has the scale of the reward 'helpful' from files of other contents; restore"):
        reward.load(run)
    with tiny.one_device(), pytest.raises(UserError, match=r"has changed since it started \(rewards.helpful.path"):
        stages.run(config, Workdir(folder))


def test_a_template_of_two_texts_is_the_one_that_the_scale_was_measured_with(copied):
    """Tuples of a config are lists in the file."""
    spec = {
        "kind": "classifier",
        "path": str(gpt2_folder(copied / "c", chat=False)),
        "template": ("{prompt}", "{answer}"),
    }
    run = tiny.start(copied, tiny.settings(stages=tiny.TRAINING, rewards=dict.fromkeys(tiny.REWARDS, spec)))
    models = {name: {"source": run.audience.source_specs[name]} for name in tiny.REWARDS}
    scale = dict.fromkeys(reward.SCALE, jnp.ones(len(tiny.REWARDS)))
    note = {"rewards": list(tiny.REWARDS), "models": models, **run.workspace.provenance}
    save_tree(run.workdir.path / "reward" / reward.MODEL, scale, note)
    assert set(reward.load(run)) == {*reward.SCALE, "models"}


def test_classifiers_that_only_judge(finished, tmp_path):
    """Their scores are those of the same classifier as a reward; the others keep the scorers of the config."""
    spec = {"kind": "classifier", "path": str(gpt2_folder(tmp_path / "c", ("bad", "good"))), "label": "good"}
    scorers = dict.fromkeys(tiny.REWARDS, "short")
    config = tiny.settings()
    with config.ignore_type():  # a mapping in place of a name
        config.judge = ConfigDict({**scorers, "P1A": spec})
    run = tiny.start(finished, config)
    prompts, answers = synthetic.prompts()[:3], ["it holds air .", "so happy to help !", "it can fly ."]
    assert run.audience.learned == tiny.REWARDS and set(run.audience.judging_sources) == {"P1A"}
    want = reward_source("P1A", spec, run.context)(prompts, answers)
    np.testing.assert_allclose(run.audience.scores(prompts, answers, "P1A"), want, rtol=1e-6)
    np.testing.assert_allclose(run.audience.score(prompts[0], answers[0], "P1A"), want[0], rtol=1e-5)
    assert run.scores.scores(prompts, answers, "P1B").tolist() == [-3, -4, -3]
    np.testing.assert_allclose(run.scores.scores(prompts, answers, "P1A"), want, rtol=1e-6)
    assert fingerprints(run.settings.to_dict(), tmp_path / "run")["judge.P1A.path"]["path"] == spec["path"]
    config.judge.P1A.activation = "tanh"
    with pytest.raises(UserError, match=r"judge: rewards.P1A.activation: 'tanh' is unknown"):
        stages.read(config)


def test_rewards_judge_where_they_are_not_trained_in_the_run(finished):
    with pytest.raises(UserError, match=r"judge: rewards, but 'P1A' has a reward model that this run trains"):
        tiny.start(finished, tiny.settings(judge="rewards"))


def test_models_on_the_hub_are_not_fetched_to_check_a_config(monkeypatch):
    def fetch(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(classifiers, "model_folder", fetch)
    plan = stages.read(tiny.catalogue("moc").get_config("classifiers"))
    assert set(plan.settings.audience.sources) == set(NAMES)
    config = tiny.catalogue("moc").get_config("classifiers")
    config.rewards.humor.activation = "tanh"
    with pytest.raises(UserError, match=r"rewards.humor.activation: 'tanh' is unknown"):
        stages.read(config)
