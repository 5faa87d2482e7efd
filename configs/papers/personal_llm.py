"""PersonalLLM (arXiv 2409.20296): people who weigh ten reward models each in their own way, and compare eight answers
to every prompt. Reward models that know the person, against one for all.

    python -m pjrlhf.main --config=configs/papers/personal_llm.py
    python -m pjrlhf.main --config=configs/papers/personal_llm.py:llama

Variants: qwen (Qwen2.5 0.5B, 100 people as in P-TTT; the default), llama (Llama 2 7B, eight people as in arXiv
2502.19158).

Published accuracies on held-out pairs, %:
  qwen: one Bradley-Terry model 48.8, in-context pairs 51.1, VPL 50.1, MRM 58.2, P-TTT 61.3 (P-TTT's own table).
  llama: a model per person 58.9 from 1,000 pairs, 66.2 from 3,000, 72.0 from 10,000, 74.3 to 78.8 from 100,000 (logs of
    arXiv 2502.19158).
The paper itself prompts models with examples of other people and has no table of reward models.

What differs from the papers: docs/papers.md.
"""

import ml_collections

from pjrlhf import config, papers
from pjrlhf.errors import UserError

SET = {"kind": "personal_llm", "path": "namkoong-lab/PersonalLLM"}


def get_config(variant: str = "qwen") -> ml_collections.ConfigDict:
    if variant not in ("qwen", "llama"):
        raise UserError(f"configs/papers/personal_llm.py:{variant}: unknown variant; use qwen or llama")
    c = config.base()
    c.stages = ("preference", "evaluate_users")
    config.users(c)
    if variant == "qwen":
        c.title = "PersonalLLM: 100 people, Qwen2.5 0.5B"
        papers.base_model(c, "Qwen/Qwen2.5-0.5B-Instruct")  # P-TTT: Qwen2.5 0.5B
        data = {**SET, "people": 100, "comparisons": 100}  # P-TTT: 10,000 pairs of 100 people
        c.adapter.update({"rank": 16, "alpha": 32.0})  # P-TTT trains all parameters; ours
        c.preference.update({"batch_size": 128, "epochs": 3.0, "new_user_fraction": 0.15})  # P-TTT
        c.preference.optimizer.learning_rate = 1e-4  # P-TTT: 5e-6, of all parameters; ours
    else:
        c.title = "PersonalLLM: eight people, Llama 2 7B"
        papers.base_model(c, "meta-llama/Llama-2-7b-hf")  # arXiv 2502.19158
        data = {**SET, "people": 8, "comparisons": 1250}  # arXiv 2502.19158: eight people; 10,000 pairs of its table
        c.adapter.update({"rank": 16, "alpha": 32.0})  # arXiv 2502.19158
        c.preference.update({"batch_size": 32, "epochs": 1.0})
        c.preference.optimizer.update({"learning_rate": 3e-5, "warmup_steps": 150})  # arXiv 2502.19158, its code
    with c.ignore_type():
        c.preference.data = ml_collections.ConfigDict(data)
        # P-RM (arXiv 2402.05133, section 4.1) with one user token, as arXiv 2502.19158 runs it.
        personal = {"kind": "individualized", "tokens": 1}
        c.preference.models = ml_collections.ConfigDict(
            {"pooled": {"kind": "uniform"}, "individualized": personal, "permuted": {**personal, "permuted": True}}
        )
    c.preference.update({"head": "reward", "alpha": 0.5, "mixture": "exact"})  # arXiv 2502.19158
    c.data.update({"max_prompt": 512, "max_completion": 512})
    c.evaluate_users.generate_for = 0  # reward models answer nothing
    if variant == "llama":
        c.evaluate_users.cold_start = ()  # nobody is new among eight
    c.evaluate_users.cold_start_models = ("individualized",)
    return c
