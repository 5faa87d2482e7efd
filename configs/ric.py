"""Rewards-in-Context (RiC, arXiv 2402.10207): supervised fine-tuning on answers whose prompt states their rewards, then
online rounds on the best answers of the policy. At evaluation, preference weights become the rewards in the prompt.

    python -m pjrlhf.main --config=configs/ric.py

Prompts state rewards as a tally of words, because the language of the synthetic environment has no digits. For other
models use `--config.ric.prompt_format.form=numbers`.

Time: about 2 minutes on 2 CPU cores. Results: docs/results/ric.md.
"""

import ml_collections

from pjrlhf import config


def get_config() -> ml_collections.ConfigDict:
    c = config.base()
    c.title = "Rewards-in-Context"
    config.front(c, ("P2A", "P2B"))
    config.family(c, "ric")
    return c
