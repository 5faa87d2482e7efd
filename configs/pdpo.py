"""P-DPO (P-RLHF, arXiv 2402.05133): ten people of conflicting taste, one policy that knows them apart.

    python -m pjrlhf.main --config=configs/pdpo.py

trains pooled DPO, individualized and cluster user models and the permuted-id control on the same comparisons with the
same budget. Your own preference records with a `user_id` column, on any Hugging Face Llama:

    python -m pjrlhf.main --config=configs/pdpo.py:records --config.model.path=FOLDER \
        --config.preference.data.path=FILE.jsonl

The conflicting-length experiment of the paper on real answers, with a small model trained from scratch on others
($PJRLHF_TEST_DATA, ../shared by default, holds data/alpaca_eval/{style_pairs,responses}.jsonl.gz with the columns
`prompt`, `concise`, `verbose` and `prompt`, `response`):

    python -m pjrlhf.main --config=configs/pdpo.py:style_pairs --config.population.users=40

Built-in world, 2 CPU cores: about 2 minutes, compilation included; figures in BUILD_NOTES.md.
"""

import os

import ml_collections

from pjrlhf import config


def get_config(variant: str = "world") -> ml_collections.ConfigDict:
    c = config.base()
    c.title = "P-DPO with ten people of the built-in world"
    c.stages = ("sft", "population", "preference", "evaluate_users")

    # The built-in people: everybody has one taste and labels pairs of answers by it.
    c.population = {
        "data": "base",  # two answers of the base, or a source of pairs: {"kind": "jsonl", ..., "columns": {...}}
        "users": 10,
        "new_users": 10,
        "tastes": ("P3A", "P3B"),
        "shares": (0.7, 0.3),
        "pairs_per_user": 160,
        "heldout_pairs_per_user": 64,
        "new_pairs_per_user": 96,
    }
    c.preference = {
        "data": "population",  # "population", or a source of preference records with `user_id`
        "heldout_share": 0.2,  # of the prompts, where the data are your own
        "models": {
            "pooled": {"kind": "uniform"},
            "individualized": {"kind": "individualized", "tokens": 4},
            # The first half of the steps trains vectors of everybody's own, whose k-means are the centres.
            "cluster": {"kind": "cluster", "tokens": 4, "clusters": 2, "warm_start": 0.5},
            "permuted": {"kind": "individualized", "tokens": 4, "permuted": True},
        },
        "bank": "",  # for models of kind soup: bank.safetensors of a stage policy on the same base
        "loss": "sigmoid",  # see objectives/preference.py
        "beta": 0.1,
        "alpha": 0.5,  # share of the user-specific term; the rest trains the generic user
        "mixture": "exact",  # exact: every pair twice; dropout: once, half the cost
        "label_smoothing": 0.0,
        "sft_weight": 0.0,
        "steps": 100,
        "batch_size": 32,  # pairs
        "optimizer": {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 5},
        "user_optimizer": {"learning_rate": 3e-2, "schedule": "cosine"},
    }
    c.evaluate_users = {
        "resamples": 2000,
        "generate_for": 4,  # held-out prompts answered as every user; 0 skips generation
        "cold_start": (0, 1, 2, 4, 8, 16),  # comparisons a new person gives; () skips it
        "cold_start_models": ("individualized", "cluster"),
        "cold_start_steps": 20,
        "cold_start_learning_rate": 0.1,
    }
    if variant == "records":
        c.title = "P-DPO on your records"
        c.stages = ("preference", "evaluate_users")
        c.data.chat = False
        c.data.max_prompt, c.data.max_completion = 128, 128
        c.evaluate_users.cold_start = ()
        with c.ignore_type():
            c.preference.data = ml_collections.ConfigDict({"kind": "jsonl", "path": ""})
    elif variant == "style_pairs":
        style_pairs(c)
    elif variant != "world":
        raise ValueError(
            f"configs/pdpo.py:{variant}: unknown variant; use configs/pdpo.py, or after it :records or :style_pairs"
        )
    return c


def style_pairs(c: ml_collections.ConfigDict) -> None:
    """People who want longer and people who want shorter answers, on real answers that no judge has to read."""
    folder = f"{os.environ.get('PJRLHF_TEST_DATA', '../shared')}/data/alpaca_eval"
    pairs = {"kind": "jsonl", "path": f"{folder}/style_pairs.jsonl.gz"}
    tastes = ("longer", "shorter")
    c.title = "P-DPO with ten people who want longer or shorter answers"
    with c.ignore_type():
        c.preferences = ml_collections.ConfigDict({name: {"dimension": "length", "sentence": ""} for name in tastes})
        c.judge = ml_collections.ConfigDict({name: name for name in tastes})
        c.data.prompts = ml_collections.ConfigDict(pairs)
        c.data.columns = ml_collections.ConfigDict({"completion": "response"})
        c.sft.data = ml_collections.ConfigDict({"kind": "jsonl", "path": f"{folder}/responses.jsonl.gz"})
        c.population.data = ml_collections.ConfigDict(
            {**pairs, "columns": {"chosen": "concise", "rejected": "verbose"}}
        )
        c.model.tokenizer = ml_collections.ConfigDict({"kind": "bpe", "vocab_size": 2048, "texts": 5000})
    c.objectives = tastes
    c.model.update({"hidden_size": 96, "intermediate_size": 256, "max_length": 192})
    c.adapter.rank = 0  # so small a model learns faster with all its parameters
    # What does not fit is left out: most answers of the files are longer.
    c.data.update({"max_prompt": 48, "prompt_buckets": (), "max_completion": 128, "max_bad_share": 0.95})
    c.sft.update({"steps": 300, "batch_size": 16})
    c.sft.optimizer.learning_rate = 3e-3
    c.population.update({"tastes": tastes, "pairs_per_user": 150, "heldout_pairs_per_user": 60})
    c.population.new_pairs_per_user = 40
    c.preference.update({"mixture": "dropout", "batch_size": 16, "steps": 120})
    c.preference.alpha = 1.0  # 0.5 trains the generic user besides and takes about twice the steps
    c.preference.optimizer.learning_rate = 1e-3
    c.preference.user_optimizer.learning_rate = 0.1
    for model in ("individualized", "cluster", "permuted"):
        c.preference.models[model].tokens = 10
    c.evaluate_users.update({"generate_for": 8, "cold_start": ()})  # new people take minutes: (0, 4, 16)
