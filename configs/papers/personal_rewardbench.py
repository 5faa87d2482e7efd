"""PersonalRewardBench (SynthesizeMe, arXiv 2506.05598): what people of Chatbot Arena or of PRISM prefer, by reward
models that know the person, against one for all.

    python -m pjrlhf.main --config=configs/papers/personal_rewardbench.py
    python -m pjrlhf.main --config=configs/papers/personal_rewardbench.py:prism

Variants: arena (131 people; the default), prism (723 people).

Published accuracies with Llama 3.1 8B, %, arena and prism (table of P-GenRM, arXiv 2602.12116): one Bradley-Terry model
67.21 and 63.27, the same with SynthesizeMe's text about the person 69.72 and 62.74, GPO 57.87 and 57.29, VPL 58.12 and
58.25, PAL 57.31 and 56.74, P-GenRM 72.68 and 65.32 (75.92 and 68.06 with more computation per comparison).

What differs from the paper: docs/papers.md.
"""

import ml_collections

from pjrlhf import config, papers
from pjrlhf.errors import UserError

SETS = {
    "arena": ("MichaelR207/chatbot_arena_personalized_0125", 131),
    "prism": ("MichaelR207/prism_personalized_0125", 723),
}


def get_config(variant: str = "arena") -> ml_collections.ConfigDict:
    if variant not in SETS:
        raise UserError(f"configs/papers/personal_rewardbench.py:{variant}: unknown variant; use arena or prism")
    path, people = SETS[variant]
    c = config.base()
    c.title = f"PersonalRewardBench: {people} people of {'Chatbot Arena' if variant == 'arena' else 'PRISM'}"
    c.stages = ("preference", "evaluate_users")
    config.users(c)
    papers.base_model(c, "meta-llama/Llama-3.1-8B-Instruct")  # P-GenRM: Llama 3.1 8B
    with c.ignore_type():
        pairs = {"kind": "personal_rewardbench", "path": path}
        c.preference.data = ml_collections.ConfigDict({**pairs, "part": "train"})
        c.preference.heldout_data = ml_collections.ConfigDict({**pairs, "part": "test"})
        personal = {"kind": "individualized", "tokens": 10}
        c.preference.models = ml_collections.ConfigDict(
            {"pooled": {"kind": "uniform"}, "individualized": personal, "permuted": {**personal, "permuted": True}}
        )
    # The paper names no rates of its reward models that were available; these are those of P-RM in arXiv 2502.19158.
    c.adapter.update({"rank": 16, "alpha": 32.0})
    c.preference.update({"head": "reward", "alpha": 0.5, "batch_size": 32, "epochs": 1.0})
    c.preference.optimizer.update({"learning_rate": 3e-5, "schedule": "cosine"})
    c.data.update({"max_prompt": 1024, "max_completion": 512})
    c.evaluate_users.update({"generate_for": 0, "cold_start": ()})  # reward models answer nothing
    c.aot.users = people
    return c
