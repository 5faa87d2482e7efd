"""Rewarded Soups (arXiv 2306.04488): PPO trains a LoRA per reward model, and their weights are interpolated; against
MORL, which trains a policy per preference.

    python -m pjrlhf.main --config=configs/papers/rewarded_soups.py
    python -m pjrlhf.main --config=configs/papers/rewarded_soups.py:reddit --config.data.prompts.path=FOLDER
    python -m pjrlhf.main --config=configs/papers/rewarded_soups.py:assistant

Variants: news (the default), reddit, assistant (four reward models). FOLDER holds the raw comparisons of
summarize_from_feedback. Some of the reward models run in torch (`pip install -e '.[torch]'`).

Published for news, from the soup that is all faithful to the one that is all summary (README of the authors): summary
0.984, 1.109, 1.197, 1.285, 1.394, 1.459, 1.513, 1.569, 1.653, 1.728, 1.781; faithful minus hallucinated -0.788 at the
first, -1.080 in the middle, -1.526 at the last. The soups lie on or above the line between the ends.

What differs from the paper: docs/papers.md.
"""

import ml_collections

from pjrlhf import config, papers
from pjrlhf.errors import UserError

# "code" in this file: alexrame/rewardedsoups at 1f4aef4, the scripts of the authors.
PROMPTS = {
    # Code, tasks/summary.py: its training prompts are the split test, the larger one.
    "news": {"kind": "pjrlhf.papers:news", "path": "argilla/news-summary", "name": "comparisons", "split": "test"},
    "reddit": {"kind": "pjrlhf.papers:posts", "path": ""},
    "assistant": {"kind": "hh_rlhf", "path": "Anthropic/hh-rlhf"},
}
# Code, utils/args_utils.py.
REWARDS = {
    "news": ("summary", "faithful"),
    "reddit": ("summary", "faithful"),
    "assistant": ("deberta_large", "electra", "deberta_base_v2", "deberta_base"),
}


def get_config(variant: str = "news") -> ml_collections.ConfigDict:
    if variant not in PROMPTS:
        raise UserError(f"configs/papers/rewarded_soups.py:{variant}: unknown variant; use one of {', '.join(PROMPTS)}")
    c = config.base()
    c.title = f"Rewarded Soups: {variant}"
    # Code, README: the policy is rewarded by the difference of the two scores of this model.
    papers.rewarded_by(c, *REWARDS[variant], faithful={"activation": "log_odds"})
    papers.base_model(c, "huggyllama/llama-7b")  # code: LLaMA 7B with the adapter alpaca-lora
    c.adapter.update({"rank": 16, "alpha": 16.0, "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")})  # code
    with c.ignore_type():
        c.data.prompts = ml_collections.ConfigDict(PROMPTS[variant])
    c.data.update({"max_prompt": 512, "max_completion": 32})  # code: answers of 16 to 32 tokens
    c.data.completion_buckets = ()
    # Code, args_utils.py: PPO with 128 answers a step in minibatches of 4, one epoch over the prompts.
    c.policy.update({"steps": 150, "rollouts": 128, "scale": "raw"})
    c.policy.optimizer.update({"learning_rate": 1.41e-5, "schedule": "constant"})
    c.policy.ppo.update({"epochs": 4, "minibatches": 32, "policies_at_once": 1})  # TRL of 2023: 4 passes
    c.policy.kl.update({"coefficient": 0.2, "target": 6.0})  # code; TRL's target
    c.policy.experience.missing_eos_penalty = 0.0
    config.family(c, "rsoups", "morl")
    # Three policies of MORL, or two for four rewards: eleven or more at once would take several pods. Our choice.
    pair = len(REWARDS[variant]) == 2
    grid = tuple((round(i / 10, 1), round(1 - i / 10, 1)) for i in range(11))  # code: 11 interpolations
    with c.ignore_type():
        c.methods.morl.preferences.points = grid[3:8:2] if pair else ((0.25,) * 4, (0.5, 0.5, 0.0, 0.0))
        c.evaluate_front.points = grid if pair else "subsets"
    for entry in c.methods.values():
        entry.rollouts = c.policy.rollouts
    return c
