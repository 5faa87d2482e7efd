"""Prompted-MORL (arXiv 2310.11564): one policy by PPO whose prompt states the preferences in sentences and whose
reward is their mean; beside it the base that is only prompted.

    python -m pjrlhf.main --config=configs/pmorl.py

Sentences cannot say how much, so over a grid of weights there are only as many kinds of answers as sets of sentences.
For the paper's eight kinds of people see `configs/soups.py`, where it stands beside the soups. 2 CPU cores: about 2
minutes; figures in docs/results/pmorl.md.
"""

import ml_collections

from pjrlhf import config


def get_config() -> ml_collections.ConfigDict:
    c = config.base()
    c.title = "Prompted-MORL: preferences in sentences"
    config.front(c, ("P2A", "P2B"))
    config.family(c, "prompting", "pmorl")
    return c
