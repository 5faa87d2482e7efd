"""Merges finished models: one folder from a weighted sum of Hugging Face folders and LoRA folders. No training.

    python -m pjrlhf.main --config=configs/merge.py --workdir=/tmp/merge \
        --config.merge.base=BASE --config.merge.ingredients="('EXPERT', 'CONCISE')" --config.merge.weights="(0.7, 0.3)"

Hardware: any CPU; memory for one shard of the output (2 GiB) and the adapters. Time: that of reading every ingredient
and writing the output once.
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config():
    return ml_collections.ConfigDict(
        {
            "stages": ("merge",),
            "merge": {
                # Hugging Face folder the ingredients were trained from. LoRA ingredients need it (except for "concat").
                # With it the result is base + sum_i w_i (theta_i - base); without it the weights must sum to 1.
                "base": placeholder(str),
                # Folders: full models (config.json) and LoRA adapters in PEFT layout (adapter_config.json).
                "ingredients": (),
                # One number per ingredient; may be negative, need not sum to 1 where there is a base.
                "weights": (),
                # "delta": exact weighted sum of updates, a dense model. "factors": averages LoRA's two factors on their
                # own, to compare with published soups. "concat": exact too, written as one LoRA adapter whose rank is
                # the sum of the ranks.
                "space": "delta",
                # Must be new or empty; <workdir>/export/soup where not set.
                "output": placeholder(str),
                # Of the written weights: "float32", "bfloat16", "float16"; that of the base (or of the first
                # ingredient) where not set, float32 for "concat".
                "dtype": placeholder(str),
            },
        }
    )
