"""Merges finished models: one folder from Hugging Face folders and LoRA folders, by a weighted sum or a relative of it.
No training.

    python -m pjrlhf.main --config=configs/merge.py --workdir=/tmp/merge \
        --config.merge.base=BASE --config.merge.ingredients="('EXPERT', 'CONCISE')" --config.merge.weights="(0.7, 0.3)"

Hardware: any CPU; memory for one shard of the output (2 GiB) and the adapters, and for methods other than sums about
three float32 copies of the largest tensor per ingredient. Time: that of reading every ingredient and writing the output
once.
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config():
    return ml_collections.ConfigDict(
        {
            "stages": ("merge",),
            "merge": {
                # Hugging Face folder the ingredients were trained from. LoRA ingredients need it (except for "concat").
                # With it the result is base + sum_i w_i (theta_i - base); without it the weights must sum to 1.
                "base": placeholder(str),
                # Folders: full models (config.json) and LoRA adapters in PEFT layout (adapter_config.json).
                "ingredients": (),
                # One number per ingredient; may be negative, need not sum to 1 where there is a base.
                "weights": (),
                # "delta": exact weighted sum of updates, a dense model. "factors": averages LoRA's two factors on their
                # own, to compare with published soups. "concat": exact too, written as one LoRA adapter whose rank is
                # the sum of the ranks.
                "space": "delta",
                # How the ingredients become one, with tau_i = theta_i - base; all but "linear" only in space "delta":
                # "linear": the weighted sum above.
                # "task_arithmetic": base + scale * sum_i w_i tau_i.
                # "ties": of each tensor of tau_i the `density` of largest magnitude; where signs disagree, the weighted
                #   majority's; their weighted mean. Then as task arithmetic.
                # "dare_linear", "dare_ties": each entry of tau_i with probability `density`, the rest of its tensor
                #   scaled up to the L1 norm it had; a weighted sum, for "dare_ties" of the majority's sign only.
                # "slerp": along the arc between two ingredients, tensor by tensor; two weights that sum to 1.
                # "model_stock": base + t * mean(tau_i), t from the angles between the tau_i of a tensor; equal weights.
                # All but "linear" and "slerp" need a base.
                "method": "linear",
                # In (0, 1]; "ties", "dare_linear" and "dare_ties" need it.
                "density": placeholder(float),
                # Of "task_arithmetic", "ties", "dare_linear" and "dare_ties"; 1 where not set.
                "scale": placeholder(float),
                # Of the draws of "dare_linear" and "dare_ties"; 0 where not set.
                "seed": placeholder(int),
                # Must be new or empty; <workdir>/export/soup where not set.
                "output": placeholder(str),
                # Of the written weights: "float32", "bfloat16", "float16"; that of the base (or of the first
                # ingredient) where not set, float32 for "concat".
                "dtype": placeholder(str),
            },
        }
    )
