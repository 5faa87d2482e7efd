"""Merges models or LoRA adapters into one folder, by a weighted sum or another merging method. No training.

    python -m pjrlhf.main --config=configs/merge.py --workdir=/tmp/merge \
        --config.merge.base=BASE --config.merge.ingredients="('EXPERT', 'CONCISE')" --config.merge.weights="(0.7, 0.3)"

Hardware: any CPU. Memory: one shard of the output (2 GiB) and the adapters; methods that are not sums also need about
three float32 copies of the largest tensor per ingredient. Time: reading every ingredient and writing the output once.
"""

import ml_collections

from pjrlhf.export.merge import MergeSettings
from pjrlhf.settings import to_config


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({"stages": ("merge",), "merge": to_config(MergeSettings())})
