"""Conditional language policies (CLP, arXiv 2407.15762), compared with Rewarded Soups (arXiv 2306.04488).

Both mix one adapter per objective by preference weights. CLP draws the weights for every answer in training, so it
trains the mixtures themselves; Rewarded Soups train every adapter alone and mix afterwards.

    python -m pjrlhf.main --config=configs/clp.py

This is full-CLP with LoRA, trained by PPO. Time: about 2 minutes on 2 CPU cores. Results: docs/results/clp.md.
"""

import ml_collections

from pjrlhf import config


def get_config() -> ml_collections.ConfigDict:
    c = config.base()
    c.title = "CLP: mixtures of adapters that train together"
    config.front(c, ("P2A", "P2B"))
    config.family(c, "clp", "rsoups")
    return c
