"""Personalized Soups (arXiv 2310.11564): AI feedback, a reward model and a PPO policy per preference, and soups of
these policies for 8 combinations of preferences, or 16 with two styles that come later.

    python -m pjrlhf.main --config=configs/papers/personalized_soups.py
    python -m pjrlhf.main --config=configs/papers/personalized_soups.py:sixteen

Variants: eight (the default), sixteen. The server of the judge is `comparisons.judge.base_url` and
`evaluate.judge.base_url`; its key is in OPENAI_API_KEY.

Published, as win rates averaged over opponents and combinations: Personalized Soups 55.23 by GPT-4, where it is best;
Prompted-MORL 58.70 by people, where that is best; with 16 combinations Personalized Soups wins 59.06 against
Prompted-MORL.

What differs from the paper, and how to prepare Tulu: docs/papers.md.
"""

import ml_collections

from pjrlhf import config, papers
from pjrlhf.data.preferences import PAPER16
from pjrlhf.errors import UserError
from pjrlhf.protocols.soups import SoupsSettings
from pjrlhf.settings import to_config

# "code" in this file: joeljang/RLPHF at 452d719, the scripts of the authors.


def get_config(variant: str = "eight") -> ml_collections.ConfigDict:
    if variant not in ("eight", "sixteen"):
        raise UserError(f"configs/papers/personalized_soups.py:{variant}: unknown variant; use eight or sixteen")
    c = config.base()
    c.title = "Personalized Soups on Tulu 7B"
    c.stages = ("comparisons", "reward", "policy", "methods", "evaluate")
    config.policies(c)
    c.evaluate = to_config(SoupsSettings())
    papers.base_model(c, "TheBloke/tulu-7B-fp16")  # paper, section 4: Tulu 7B
    c.general = "helpful"  # the reward of the RLHF baseline
    c.prompt_preference = "half"  # code: policies with and without the sentence of their preference
    prompts_and_feedback(c)
    reward_and_policy(c)
    c.preferences = "paper"
    if variant == "sixteen":
        c.title = "Personalized Soups on Tulu 7B: from 8 to 16 combinations"
        c.preferences = "paper16"
        papers.later_styles(c, "P3C", "P3D")
    # Ours: what the report says of each policy alone, and while weights move, are ratings by the judge.
    criteria = {name: found.sentence for name, found in PAPER16.items() if name in c.objectives}
    criteria |= {c.general: "The response helps the person."} if c.general else {}
    with c.ignore_type():
        c.judge = ml_collections.ConfigDict(
            {name: {**_judge("gpt-4-0314", 0.0, 512), "kind": "judge", "criterion": x} for name, x in criteria.items()}
        )
    c.evaluate.update({"sweep_points": 5, "sweep_samples": 1})
    return c


def prompts_and_feedback(c: ml_collections.ConfigDict) -> None:
    with c.ignore_type():
        # Paper, section 4: 10,000 prompts of GPT4-Alpaca, for feedback and for PPO.
        c.data.prompts = ml_collections.ConfigDict(
            {"kind": "pjrlhf.papers:instructions", "path": "vicgalle/alpaca-gpt4", "split": "train[:10050]"}
        )
        # Paper, section 4: answers of Tulu 30B.
        c.comparisons.sampler = ml_collections.ConfigDict({"kind": "model", "path": "TheBloke/tulu-30B-fp16"})
        c.comparisons.judge = _judge("gpt-4-0613", 1.0, 250)  # code: the annotator of AlpacaFarm
        c.evaluate.judge = _judge("gpt-4-0314", 0.1, 512)  # code, gpt4_evaluate: one criterion a call, ties allowed
    c.data.heldout_fraction = 0.005  # 50 prompts, as many as the paper evaluates on
    c.data.update({"max_prompt": 512, "max_completion": 512})  # code: 512 tokens of an answer
    c.comparisons.pairs = 10_000  # paper: two answers to each prompt
    c.temperature = 1.0  # code, of the answers that are compared


def _judge(model: str, temperature: float, max_tokens: int) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "kind": "chat",
            "model": model,
            "base_url": "https://api.openai.com/v1",
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
    )


def reward_and_policy(c: ml_collections.ConfigDict) -> None:
    c.adapter.update({"rank": 16, "alpha": 32.0})  # code, of the policies
    # Code, training_reward_model.py: one epoch, two pairs on each of four GPUs.
    c.reward.update({"epochs": 1.0, "batch_size": 8})
    c.reward.optimizer.update({"learning_rate": 2e-5, "schedule": "linear", "weight_decay": 1e-3})
    # Code, rlhf.py: 16 answers a step, of which every pass makes one update; scores are scaled and normalized.
    c.policy.update({"steps": 625, "rollouts": 16, "scale": "std"})
    c.policy.ppo.update({"epochs": 8, "minibatches": 1, "accumulation_steps": 8, "policies_at_once": 1})
    c.policy.optimizer.update({"learning_rate": 1.4e-5, "schedule": "constant"})
    # TRL of October 2023, the defaults of its PPOConfig.
    c.policy.kl.update({"coefficient": 0.2, "target": 6.0, "horizon": 10_000})
    c.policy.experience.missing_eos_penalty = 0.0
    # Ours: Prompted-MORL samples as many answers as all six ingredients.
    pmorl = {"preferences": {"kind": "combinations"}, "prompt_preference": "always", "rollouts": 96}
    with c.ignore_type():
        c.methods = ml_collections.ConfigDict({"pmorl": pmorl})
