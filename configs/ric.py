"""Rewards-in-Context (RiC, arXiv 2402.10207): supervised fine-tuning on answers whose prompt states the rewards they
got, then an online round on the policy's own best answers; preference weights become rewards to ask for.

    python -m pjrlhf.main --config=configs/ric.py

Rewards are stated as a tally of words, for the synthetic environment has no digits; where there are,
`--config.ric.prompt_format.form=numbers`. 2 CPU cores: about 2 minutes; figures in docs/results/ric.md.
"""

import ml_collections

from pjrlhf import config


def get_config() -> ml_collections.ConfigDict:
    c = config.base()
    c.title = "Rewards-in-Context"
    config.front(c, ("P2A", "P2B"))
    config.family(c, "ric")
    return c
