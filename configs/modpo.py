"""MODPO (arXiv 2310.03708): DPO for every preference with the rewards of the other objectives as margins, compared with
soups of policies that DPO trains on one objective each. Comparisons are the only data.

    python -m pjrlhf.main --config=configs/modpo.py

Time: about 3 minutes on 2 CPU cores. Results: docs/results/modpo.md.
"""

import ml_collections

from pjrlhf import config


def get_config() -> ml_collections.ConfigDict:
    c = config.base()
    c.title = "MODPO and soups of DPO policies"
    config.front(c, ("P2A", "P2B"))
    config.family(c, "modpo", "dpo_soups")
    return c
