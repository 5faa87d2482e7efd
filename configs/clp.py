"""Conditional language policies (CLP, arXiv 2407.15762): an adapter per objective, mixed by preference weights that are
drawn anew for every answer in training, so that the mixtures themselves are trained; beside it Rewarded Soups (arXiv
2306.04488), whose adapters train apart and are mixed afterwards.

    python -m pjrlhf.main --config=configs/clp.py

This is full-CLP with LoRA, by PPO. 2 CPU cores: about 2 minutes; figures in docs/results/clp.md.
"""

import ml_collections

from pjrlhf import config


def get_config() -> ml_collections.ConfigDict:
    c = config.base()
    c.title = "CLP: mixtures of adapters that train together"
    config.front(c, ("P2A", "P2B"))
    config.family(c, "clp", "rsoups")
    return c
