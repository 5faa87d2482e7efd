"""Prompted-MORL (arXiv 2310.11564): PPO trains one policy whose prompt states preferences in sentences, on the mean of
their rewards; compared with the base under the same prompts.

    python -m pjrlhf.main --config=configs/pmorl.py

Sentences do not state weights, so all preference weights with the same set of sentences share one prompt. With the
eight personas of the paper, `configs/soups.py` compares it with soups.

Time: about 2 minutes on 2 CPU cores. Results: docs/results/pmorl.md.
"""

import ml_collections

from pjrlhf import config


def get_config() -> ml_collections.ConfigDict:
    c = config.base()
    c.title = "Prompted-MORL: preferences in sentences"
    config.front(c, ("P2A", "P2B"))
    config.family(c, "prompting", "pmorl")
    return c
