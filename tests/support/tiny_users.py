"""The catalogue's P-DPO, small enough to run whole in a test."""

import dataclasses
import json

import jax

from pjrlhf.algorithms.pdpo import Preference
from pjrlhf.algorithms.pdpo_settings import PreferenceSettings
from pjrlhf.data import synthetic
from pjrlhf.feedback.pairs import read_pairs
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.models.huggingface import save_params
from pjrlhf.protocols.trained import Trained
from support import tiny

# As the soups, but for the base: its training, the longest part, only has to give answers that differ.
SHARED = {key: value for key, value in tiny.TINY.items() if key.split(".")[0] in ("model", "adapter", "data", "sft")}
TINY = SHARED | {
    "checkpoint_every": 0,
    "log_every": 1,
    "sample_rows": 64,
    "data.packing": "share",  # fewer shapes, fewer programs than joined rows
    "data.heldout_fraction": 0.25,  # new people have pairs on both sides
    "population.users": 4,
    "population.new_users": 2,
    "population.personas": ("P2A", "P2B"),  # short or long, on which answers of a bad base differ too
    "population.fractions": (0.75, 0.25),
    "population.pairs_per_user": 32,
    "population.heldout_pairs_per_user": 16,
    "population.new_pairs_per_user": 40,
    "preference.steps": 6,
    "preference.batch_size": 8,
    "preference.optimizer.warmup_steps": 1,
    "evaluate_users.resamples": 50,
    "evaluate_users.generate_for": 0,  # see test_evaluate_users.py
    "evaluate_users.cold_start": (0, 2),
    "evaluate_users.cold_start_models": ("individualized",),
    "evaluate_users.cold_start_steps": 3,
}


def settings(variant="synthetic", **changes):
    """The tiny config; `changes` name keys with __ for the dots."""
    config = tiny.catalogue("pdpo").get_config(variant)
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    models = changes.pop("preference.models", None)
    config.update_from_flattened_dict({key: x for key, x in TINY.items() if variant == "synthetic" or key[:3] != "sft"})
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    if variant != "synthetic" and not config.preference.new_user_fraction:
        config.evaluate_users.cold_start = ()  # there is nobody to meet
    if models is not None:
        config.preference.models = type(config)(models)
        section = config.evaluate_users
        section.cold_start_models = tuple(name for name in section.cold_start_models if name in models)
    return config


def pairs_of(run, **texts):
    """The comparisons of a run, by the settings of its section `preference`."""
    return read_pairs(run, run.section(PreferenceSettings), **texts)


def entry_of(run, name, **objective):
    """An entry of `preference.models`, with changes of its objective."""
    entry = run.section(PreferenceSettings).entry(name)
    return dataclasses.replace(entry, objective=entry.objective.replace(**objective))


def method_of(run, entry, pairs, **options):
    """The training of an entry, by itself or by its name."""
    entry = entry_of(run, entry) if isinstance(entry, str) else entry
    return Preference(entry, pairs, run.devices, run.workspace.backbone, run.streams, **options)


def trained_of(run, name, pairs):
    """A trained entry."""
    return Trained(run, entry_of(run, name), pairs)


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def save_base(folder, vocab_size=0, max_length=40, write_tokenizer=synthetic.write_tokenizer):
    """Writes a random model with the tokenizer of the synthetic environment, or another one (and as many entries as the
    former, if not more); returns its Hugging Face folder.
    """
    write_tokenizer(folder / "tokenizer")
    config = ModelConfig(
        vocab_size=max(vocab_size, len(synthetic.vocabulary())),
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_length=max_length,
    )
    params = init_params(Decoder(config), jax.random.key(0))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    save_params(folder / "model", config, params, tokenizer_folder=folder / "tokenizer", token_ids=ids)
    return folder / "model"
