"""MORL: PPO trains one policy for every preference, on the weighted sum of the rewards. It is the expensive upper
baseline of the papers on soups (arXiv 2306.04488, 2310.11564), compared with RLHF on equal weights, one policy for all.

    python -m pjrlhf.main --config=configs/morl.py

Eleven policies train in one program; `preferences.points` of the entry `morl` sets their weights.

Time: about 4 minutes on 2 CPU cores. Results: docs/results/morl.md.
"""

import ml_collections

from pjrlhf import config


def get_config() -> ml_collections.ConfigDict:
    c = config.base()
    c.title = "MORL: a policy for each preference"
    config.front(c, ("P2A", "P2B"))
    config.family(c, "rlhf", "morl")
    return c
