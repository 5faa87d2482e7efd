"""P-DPO (P-RLHF, arXiv 2402.05133): ten people of conflicting taste, one policy that knows them apart.

    python -m pjrlhf.main --config=configs/pdpo.py

trains pooled DPO, individualized and cluster user models and the permuted-id control on the same comparisons with the
same budget. Your own preference records with a `user_id` column, on any Hugging Face Llama:

    python -m pjrlhf.main --config=configs/pdpo.py:records --config.model.path=FOLDER \
        --config.preference.data.path=FILE.jsonl

Built-in world, 2 CPU cores: about 2 minutes, compilation included; figures in BUILD_NOTES.md.
"""

import ml_collections

from pjrlhf import config


def get_config(variant: str = "world") -> ml_collections.ConfigDict:
    c = config.base()
    c.title = "P-DPO with ten people of the built-in world"
    c.stages = ("sft", "population", "preference", "evaluate_users")

    # The built-in people: everybody has one taste and labels pairs of the base's answers by it.
    c.population = {
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
    elif variant != "world":
        raise ValueError(f"configs/pdpo.py:{variant}: unknown variant; use configs/pdpo.py or configs/pdpo.py:records")
    return c
