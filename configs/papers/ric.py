"""Rewards-in-Context (RiC, arXiv 2402.10207) on its tasks Helpful Assistant and Reddit Summary, against MORLHF and
Rewarded Soups, with public reward models.

    python -m pjrlhf.main --config=configs/papers/ric.py
    python -m pjrlhf.main --config=configs/papers/ric.py:summary --config.data.prompts.path=FOLDER \\
        --config.sft.data.path=FOLDER

Variants: assistant (harmless and helpful; the default), humor (humor and helpful), assistant_three, summary (summary
and faithful), summary_three (and deberta). FOLDER holds the raw comparisons of summarize_from_feedback.

Published: figures without a table. RiC's fronts dominate those of MORLHF and Rewarded Soups at about a tenth of the GPU
hours of MORLHF.

What differs from the paper: docs/papers.md.
"""

import ml_collections

from pjrlhf import config, papers


def get_config(variant: str = "assistant") -> ml_collections.ConfigDict:
    c = config.base()
    papers.rewards_in_context(c, variant, "configs/papers/ric.py")
    # Code (YangRui2015/RiC at aee53a6): 20,000 steps of 2 answers on each of 4 GPUs, then two rounds of 20,000 answers
    # and 4,000 steps, of those that reach the 0.7 quantile of a score, with 10,000 of the first ones.
    c.ric.update({"samples": 20_000, "steps": 20_000, "batch_size": 8, "rounds": 2})
    c.ric.update({"online_samples": 20_000, "online_steps": 4_000, "quantile": 0.7, "base_fraction": 0.5})
    c.ric.optimizer.update({"learning_rate": 1.414e-4, "schedule": "linear", "weight_decay": 0.01})
    c.ric.target = "l2"  # code: the map from preference weights to scores
    c.ric.prompt_format.update({"form": "numbers", "decimals": 1})  # code: scores with one decimal
    config.family(c, "ric", "rsoups", "morl")
    if len(c.objectives) > 2:
        # Code, morlhf.py: with three objectives one policy, on equal weights.
        c.methods.morl.preferences.points = "centre"
    for name in ("rsoups", "morl"):
        c.methods[name].rollouts = c.policy.rollouts
    return c
