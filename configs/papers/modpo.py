"""MODPO (arXiv 2310.03708) on BeaverTails: helpful and harmless answers from the two verdicts of PKU-SafeRLHF-10K,
against soups of DPO policies.

    python -m pjrlhf.main --config=configs/papers/modpo.py --config.model.path=FOLDER \\
        --config.judge.helpful.path=REWARD --config.judge.harmless.path=COST

docs/papers.md says how to prepare the three folders, and what differs from the paper.

Published: figures without a table of this task; MODPO's front is at least that of MORLHF, in 4.0 +- 0.1 and 9.4 +- 0.2
GPU hours on the paper's two tasks, where MORLHF takes 13.8 +- 0.7 and 34.0 +- 0.5.
"""

import ml_collections

from pjrlhf import config, papers

# "code" in this file: ZHZisZZ/modpo at 2e2df20, scripts/modpo/beavertails.
DATA = {"kind": "pku_saferlhf", "path": "PKU-Alignment/PKU-SafeRLHF-10K"}
BEAVER = {"kind": "classifier", "template": "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{answer}"}
POINTS = ((0.0, 1.0), (0.1, 0.9), (0.5, 0.5), (0.9, 0.1), (1.0, 0.0))  # code: w of 0.1, 0.5 and 0.9, and the ends


def get_config() -> ml_collections.ConfigDict:
    c = config.base()
    config.front(c, ("helpful", "harmless"))
    c.title = "MODPO on BeaverTails"
    c.stages = ("reward", "methods", "evaluate_front")
    papers.base_model(c, "PKU-Alignment/alpaca-7b-reproduced")  # code
    with c.ignore_type():
        c.preferences = ml_collections.ConfigDict(
            {name: {"dimension": name, "sentence": f"{name}.", "label": name} for name in c.objectives}
        )
        c.data.prompts, c.reward.data = ml_collections.ConfigDict(DATA), ml_collections.ConfigDict(DATA)
        # Code, utils/score.py: answers are scored by models that no policy is trained on.
        c.judge = ml_collections.ConfigDict(
            {
                "helpful": {**BEAVER, "path": "PKU-Alignment/beaver-7b-v1.0-reward", "dtype": "bfloat16"},
                "harmless": {**BEAVER, "path": "PKU-Alignment/beaver-7b-v1.0-cost", "dtype": "bfloat16"},
            }
        )
    c.data.update({"max_prompt": 128, "max_completion": 384, "max_bad_fraction": 0.1})  # code: 512 tokens in all
    c.data.prompt_buckets = (64,)
    # Code, run.sh: LoRA on attention alone with alpha 1.
    c.adapter.update({"rank": 64, "alpha": 1.0, "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")})
    # Code, run.sh: 6 pairs on each of 8 GPUs, two steps of gradients, three epochs, for margins and policies alike.
    rate = {"learning_rate": 5e-4, "schedule": "cosine", "weight_decay": 0.05}
    for section in (c.reward, c.modpo):
        section.update({"epochs": 3.0, "batch_size": 96, "accumulation_steps": 12})
        section.optimizer.update(rate)
    c.modpo.beta = 0.1  # code
    config.family(c, "modpo", "dpo_soups")
    with c.ignore_type():
        c.methods.modpo.preferences = ml_collections.ConfigDict({"kind": "fixed", "points": POINTS})
    c.evaluate_front.points = POINTS
    c.evaluate_front.unseen = False
    return c
