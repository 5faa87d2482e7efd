"""MORL: one policy retrained by PPO for each preference, on the weighted sum of the rewards; the costly upper
reference of the papers on soups (arXiv 2306.04488, 2310.11564), beside RLHF on equal weights, the same for everybody.

    python -m pjrlhf.main --config=configs/morl.py

Eleven policies train in one program. Other points: entry `morl`, `preferences.points`. 2 CPU cores: about 4 minutes;
figures in docs/results/morl.md.
"""

import ml_collections

from pjrlhf import config


def get_config() -> ml_collections.ConfigDict:
    c = config.base()
    c.title = "MORL: a policy for each preference"
    config.front(c, ("P2A", "P2B"))
    config.family(c, "rlhf", "morl")
    return c
