"""MOC (arXiv 2604.04497) on the tasks of RiC (arXiv 2402.10207): one policy whose prompt states preference weights,
against MORLHF, Rewarded Soups and RiC.

    python -m pjrlhf.main --config=configs/papers/moc.py
    python -m pjrlhf.main --config=configs/papers/moc.py:summary --config.data.prompts.path=FOLDER \\
        --config.sft.data.path=FOLDER

Variants: those of configs/papers/ric.py, whose tasks, base and reward models these are. `configs/moc.py` has smaller
settings of MOC, and `configs/moc.py:classifiers` any chat model with three of the reward models.

Published: abstract alone; the full text was not available. Hypervolume and Kendall's tau between preference weights and
rewards are above those of MORLHF, Rewarded Soups and RiC, with two and three objectives.

What differs from the paper: docs/papers.md.
"""

import ml_collections

from pjrlhf import config, papers


def get_config(variant: str = "assistant") -> ml_collections.ConfigDict:
    c = config.base()
    papers.rewards_in_context(c, variant, "configs/papers/moc.py")
    c.title = c.title.replace("RiC", "MOC")
    # PAMA (arXiv 2508.07768), of the same first author, in the same setting: 32 answers a step. Minibatches are ours.
    c.policy.update({"rollouts": 32, "scale": "quantiles"})  # its control reward compares rewards with weights
    c.policy.ppo.minibatches = 8
    config.family(c, "moc", "rsoups", "morl")
    # What the paper says of its prompts is that they hold the weights; a pretrained model reads numbers.
    c.methods.moc.prompt_format = ml_collections.ConfigDict({"form": "numbers", "decimals": 1})
    del c.methods.moc["optimizer"]
    for name in ("rsoups", "morl"):
        c.methods[name].rollouts = c.policy.rollouts
    return c
