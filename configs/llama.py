"""Llama 3.1 on a pod: P-DPO, and Personalized Soups with three objectives, with LoRA on a frozen base in bfloat16.

    python -m pjrlhf.main --config=configs/llama.py:pdpo_8b --aot=v5e:4x4
    python -m pjrlhf.main --config=configs/llama.py:pdpo_8b --config.model.path=FOLDER \\
        --config.preference.data.path=pairs.jsonl

Variants: pdpo_8b and soups_8b for v5e-16, v5p-16 and larger; pdpo_70b and soups_70b for v5p-128, v6e-256 and larger.

The first command is a dry run that needs neither TPUs nor weights: it compiles every step for these chips and reports
memory and time. Results: docs/results/llama.md. The second command trains on your records. For soups, give prompts
(`data.prompts.path`) and comparisons with an `objective` (`reward.data.path`).
"""

import ml_collections

from pjrlhf import config
from pjrlhf.errors import UserError

SIZES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_layers": 80, "num_heads": 64},
}
SHAPE = {"num_kv_heads": 8, "vocab_size": 128256, "max_length": 131072, "tie_embeddings": False, "rope_theta": 500000.0}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192}


def get_config(variant: str = "pdpo_8b") -> ml_collections.ConfigDict:
    method, _, size = variant.partition("_")
    if method not in ("pdpo", "soups") or size not in SIZES:
        raise UserError(f"configs/llama.py:{variant}: unknown variant; use pdpo_8b, soups_8b, pdpo_70b or soups_70b")
    c = config.base()
    c.title = f"{'P-DPO' if method == 'pdpo' else 'Personalized Soups'} with Llama 3.1 {size.upper()}"
    c.model.update({**SIZES[size], **SHAPE, "dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full"})
    c.adapter.update({"rank": 16, "alpha": 32.0})
    # fsdp alone splits the 8B model. For the 70B model, a pod has more chips than a batch has rows.
    c.mesh = {"data": 1, "fsdp": -1, "tensor": 1 if size == "8b" else 4}
    with c.ignore_type():
        c.model.rope_scaling = ml_collections.ConfigDict(SCALING)
        c.data.prompt_buckets, c.data.completion_buckets = (128, 256), (128, 256)
    c.data.update({"max_prompt": 512, "max_completion": 512, "long_prompt": "truncate_left"})
    pdpo(c) if method == "pdpo" else soups(c)
    c.data.long_completion = "truncate"
    if size == "70b":  # v6e-256 has 64 groups of four chips, and a minibatch needs a row for each
        if method == "pdpo":
            c.preference.batch_size = 64
        else:
            c.policy.rollouts = 128
    return c


def pdpo(c: ml_collections.ConfigDict) -> None:
    """Ten user tokens per user and 32 pairs per step; reference log-probs are computed once."""
    c.stages = ("preference", "evaluate_users")
    config.users(c)
    with c.ignore_type():
        c.preference.data = ml_collections.ConfigDict({"kind": "jsonl", "path": ""})
        c.preference.models = ml_collections.ConfigDict(
            {
                "pooled": {"kind": "uniform"},
                "individualized": {"kind": "individualized", "tokens": 10},
                "cluster": {"kind": "cluster", "tokens": 10, "clusters": 8, "warm_start": 0.5},
            }
        )
    c.preference.update({"steps": 2000, "mixture": "dropout"})
    c.preference.optimizer.learning_rate = 5e-5
    c.preference.user_optimizer.learning_rate = 1e-3
    c.evaluate_users.cold_start = ()


def soups(c: ml_collections.ConfigDict) -> None:
    """Three policies and three reward models in one program, 32 answers per policy and step."""
    c.stages = ("reward", "policy")
    config.policies(c)
    c.preferences, c.objectives = "paper", ("P1A", "P2A", "P3A")
    c.prompt_preference = "half"
    with c.ignore_type():
        c.data.prompts = ml_collections.ConfigDict({"kind": "jsonl", "path": ""})
        c.reward.data = ml_collections.ConfigDict({"kind": "jsonl", "path": ""})
    c.reward.update({"steps": 1000, "batch_size": 16})
    c.reward.optimizer.learning_rate = 1e-4
    c.policy.update({"steps": 500, "rollouts": 32})
    c.policy.optimizer.learning_rate = 2e-5
