"""Merges finished models: one folder from Hugging Face folders and LoRA folders, by a weighted sum or a relative of it.
No training.

    python -m pjrlhf.main --config=configs/merge.py --workdir=/tmp/merge \
        --config.merge.base=BASE --config.merge.ingredients="('EXPERT', 'CONCISE')" --config.merge.weights="(0.7, 0.3)"

Hardware: any CPU; memory for one shard of the output (2 GiB) and the adapters, and for methods other than sums about
three float32 copies of the largest tensor per ingredient. Time: that of reading every ingredient and writing the output
once.
"""

import ml_collections

from pjrlhf.export.merge import MergeSettings
from pjrlhf.settings import to_config


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({"stages": ("merge",), "merge": to_config(MergeSettings())})
