"""MODPO (arXiv 2310.03708): DPO for each preference with the other objectives' rewards as margins, from comparisons
alone; beside it soups of policies trained by DPO on one objective each.

    python -m pjrlhf.main --config=configs/modpo.py

2 CPU cores: about 3 minutes; figures in docs/results/modpo.md.
"""

import ml_collections

from pjrlhf import config


def get_config() -> ml_collections.ConfigDict:
    c = config.base()
    c.title = "MODPO and soups of DPO policies"
    config.front(c, ("P2A", "P2B"))
    config.family(c, "modpo", "dpo_soups")
    return c
