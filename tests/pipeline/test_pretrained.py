"""A pretrained model keeps what it knows where it is trained with the settings that configs have for it."""

import json
import logging
import pathlib

import numpy as np
import pytest
from support import tiny, tiny_users

from pjrlhf import config as configs
from pjrlhf.data.batching import pad_right
from pjrlhf.pipeline import stages
from pjrlhf.rollout import scoring

OPENINGS = pathlib.Path(__file__).parents[2] / "configs" / "story_openings.jsonl"
SHORT, LONG = "small.", "small. They were very happy and they played with the big red ball all day long."


def likelihood(run, bank=None):
    """Mean log-likelihood per token of the openings of stories, nats."""
    texts = [json.loads(line)["prompt"] for line in OPENINGS.read_text().splitlines()]
    ids = [run.workspace.tokenizer.encode_prompt(text) for text in texts]
    tokens, valid = pad_right(ids, max(map(len, ids)), 0)
    mix = None if bank is None else np.ones((1, 1), np.float32)
    total, count = scoring.sequence_logps(run.workspace.backbone.policies(bank, mix), tokens, valid, 1)
    return float(total.sum() / count.sum())


def trained(tmp_path, base, **changes):
    """What training on 64 pairs of two users costs, in nats per token of plain text, for each entry."""
    texts = [json.loads(line)["prompt"] for line in OPENINGS.read_text().splitlines()][:64]
    records = [
        {
            "prompt": f"{text} something",
            "user_id": f"u{i % 2}",
            "chosen": f" {answers[0]}",
            "rejected": f" {answers[1]}",
        }
        for i, text in enumerate(texts)
        for answers in [(SHORT, LONG) if i % 2 else (LONG, SHORT)]
    ]
    config = tiny.catalogue("pdpo").get_config("records")
    config.update_from_flattened_dict({"model.path": str(base), "preference.steps": 20, "preference.batch_size": 8})
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    config.preference.data.path = tiny_users.write_records(tmp_path / "pairs.jsonl", records)
    config.preference.models = {"pooled": {"kind": "uniform"}}
    config.update_from_flattened_dict({"data.max_prompt": 256, "data.max_completion": 64, "data.packing": "share"})
    config.stages = ("preference",)
    folder = tiny.run(tmp_path / "run", config)
    run = tiny.start(folder, config)
    bank = tiny_users.trained_of(run, "pooled", tiny_users.pairs_of(run)).trainable["bank"]
    return likelihood(run) - likelihood(run, bank)


@pytest.mark.slow
@pytest.mark.real_data
def test_a_pretrained_model_keeps_its_likelihood_of_plain_text(tmp_path, shared):
    assert abs(trained(tmp_path, shared / "models" / "stories260K")) < 0.05


@pytest.mark.slow
@pytest.mark.real_data
def test_rates_for_models_from_scratch_ruin_it_and_are_named(tmp_path, shared, caplog):
    rate = {"preference__optimizer__learning_rate": 3e-2}
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert trained(tmp_path, shared / "models" / "stories260K", **rate) > 0.5
    assert "preference.optimizer.learning_rate=0.03 suits small models from scratch" in caplog.text
    assert "--config.preference.optimizer.learning_rate=5e-05 is usual" in caplog.text


@pytest.mark.parametrize(
    "spec", ["pdpo:records", "soups:hf", "moc:stories", "llama:pdpo_8b", "llama:soups_8b", "llama:pdpo_70b"]
)
def test_configs_for_pretrained_models_have_their_settings(spec, caplog):
    name, _, variant = spec.partition(":")
    config = tiny.catalogue(name).get_config(variant)
    config.model.path = "somewhere"
    settings = stages.read(config).settings
    assert settings.data.chat is None
    assert (settings.data.long_prompt, settings.data.long_completion) == ("truncate_left", "truncate")
    assert settings.data.max_prompt >= 256 and settings.data.max_completion >= 128
    with caplog.at_level(logging.WARNING, logger="absl"):
        configs.warn_of_rates(settings)
        assert not caplog.text
        toy = tiny.catalogue("soups").get_config()
        toy.model.path = "somewhere"
        configs.warn_of_rates(stages.read(toy).settings)
    for stage in ("sft", "reward", "policy"):
        assert f"{stage}.optimizer.learning_rate=" in caplog.text
