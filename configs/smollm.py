"""The experiments of the papers on a real instruction-tuned model, sized for SmolLM2-135M-Instruct on two CPU cores.

    python -m pjrlhf.main --config=configs/smollm.py:soups --config.model.path=FOLDER

FOLDER is any Hugging Face folder or name on the hub, such as HuggingFaceTB/SmolLM2-135M-Instruct. The variants:

    soups        the paper's six preferences, six policies, eight kinds of people (arXiv 2310.11564), rewarded by rules:
                 the school grade that a text takes for expertise, the number of words for informativeness, sentiment
                 (VADER) for style; against the base, preference prompting and Prompted-MORL
                 (`pip install -e '.[readability,sentiment]'`)
    front        two of these objectives, sentiment and brevity: prompting, rsoups, clp, moc, ric and mod
    front3       three: with a low school grade
    pdpo_length  ten people who want longer or shorter answers, the conflict of P-RLHF's experiment on TL;DR
                 (arXiv 2402.05133)
    pdpo_votes   the votes of a crowd
    pdpo_text    what people say about themselves
    hh           helpful and harmless of HH-RLHF as two users (needs the hub, or a folder with its files:
                 `--config.preference.data.path=FOLDER`)

The rules measure surface: a long word makes a text "expert", a friendly word makes it "friendly". They stand for the AI
judge of the paper, which is an option (`docs/judges.md`).

Prompts are those of AlpacaEval, and the data of the other variants are in $PJRLHF_TEST_DATA (../shared by default), in
data/alpaca_eval, data/llmfao and data/prefeval. Results and times: docs/results/smollm.md.
"""

import pathlib

import ml_collections

from pjrlhf import config, real_data
from pjrlhf.errors import UserError
from pjrlhf.registry import load

# Beside the rules of the six preferences (configs/soups.py:instruct).
RULES = {"friendly": "sentiment", "brief": "short", "simple": "-grade"}
LABELS = {"friendly": "friendly.", "brief": "brief.", "simple": "simple."}


def get_config(variant: str = "soups") -> ml_collections.ConfigDict:
    variants = {
        "soups": soups,
        "front": lambda: front("friendly", "brief"),
        "front3": lambda: front("friendly", "brief", "simple"),
        "pdpo_length": pdpo_length,
        "pdpo_votes": pdpo_votes,
        "pdpo_text": pdpo_text,
        "hh": hh,
    }
    if variant not in variants:
        known = ", ".join(f":{name}" for name in variants)
        raise UserError(f"configs/smollm.py:{variant}: unknown variant; use one of {known}")
    return variants[variant]()


def _of(file: str, variant: str) -> ml_collections.ConfigDict:
    """The config of a file beside this one."""
    make = load(f"{pathlib.Path(__file__).with_name(file)}:get_config", "config")
    return make(variant)  # pyright: ignore[reportCallIssue]


def _alpaca_prompts(c: ml_collections.ConfigDict) -> None:
    real_data.prompts(c, **real_data.style_pairs())
    c.data.update({"max_prompt": 96, "max_completion": 48, "heldout_fraction": 0.03})  # 24 of 805 prompts
    with c.ignore_type():
        c.data.prompt_buckets, c.data.completion_buckets = (48,), ()


def soups() -> ml_collections.ConfigDict:
    """Six policies of 160 answers each, and Prompted-MORL on as many as all of them."""
    c = _of("soups.py", "instruct")
    c.title = "Personalized Soups on a real model, rewarded by rules"
    _alpaca_prompts(c)
    c.stages = ("reward", "policy", "methods", "evaluate")
    c.prompt_preference = "never"
    _critic_free(c)
    c.policy.update({"rollouts": 8, "steps": 20})
    c.policy.ppo.policies_at_once = 1  # six at once take 16 GB
    pmorl = {"preferences": {"kind": "combinations"}, "prompt_preference": "always"}
    with c.ignore_type():
        c.methods = ml_collections.ConfigDict({"pmorl": {**pmorl, "rollouts": 48, "ppo": {"accumulation_steps": 6}}})
    c.data.heldout_fraction = 0.02  # 16 prompts
    c.reward.calibration_samples = 96
    c.evaluate.update({"prompted": (), "sweep_points": 5, "sweep_samples": 1})
    return c


def front(*objectives: str) -> ml_collections.ConfigDict:
    """Every method trains on 640 answers, or 624 with three objectives; half of them steer nothing."""
    c = config.base()
    c.title = f"Methods on one front, {' against '.join(objectives)}, on a real model"
    config.front(c, objectives)
    c.stages = ("reward", "methods", "evaluate_front")  # reward measures the scale of the rules
    c.judge = "rewards"
    with c.ignore_type():
        c.preferences = ml_collections.ConfigDict(
            {name: {"dimension": name, "sentence": LABELS[name], "label": name} for name in objectives}
        )
        c.rewards = ml_collections.ConfigDict({name: {"kind": "scorer", "scorer": RULES[name]} for name in objectives})
    config.pretrained(c)
    _alpaca_prompts(c)
    _critic_free(c)
    c.policy.update({"rollouts": 8 * len(objectives), "steps": 80 // len(objectives)})
    c.data.heldout_fraction = 0.02  # 16 prompts
    c.reward.calibration_samples = 96
    c.ric.update({"samples": 240, "steps": 40, "online_steps": 20, "batch_size": 8})
    c.ric.optimizer.learning_rate = 1e-3
    config.family(c, "prompting", "rsoups", "clp", "moc", "ric", "mod")
    return c


def _critic_free(c: ml_collections.ConfigDict) -> None:
    """Four answers to each prompt are each other's baseline, in one update per rollout. Smaller steps steer nothing."""
    c.policy.experience.update({"estimator": "rloo", "samples_per_prompt": 4})
    c.policy.experience.missing_eos_penalty = 0.0  # most answers are longer than the limit
    c.policy.ppo.update({"epochs": 1, "minibatches": 1})
    c.policy.optimizer.learning_rate = 1e-3
    c.policy.kl.coefficient = 0.02


def _pairs(variant: str, title: str, steps: int) -> ml_collections.ConfigDict:
    """An experiment of configs/pdpo.py without its small base."""
    c = _of("pdpo.py", variant)
    c.title = title
    c.stages = tuple(stage for stage in c.stages if stage != "sft")
    c.model = config.base().model
    c.adapter = config.base().adapter
    config.pretrained(c)
    with c.ignore_type():
        c.data.prompt_buckets, c.data.completion_buckets = (48,), (48,)
    c.data.update({"max_prompt": 96, "max_completion": 96})
    # A few hundred pairs have to do: larger steps than those of the literature.
    c.preference.optimizer.learning_rate = 3e-4
    c.preference.user_optimizer.learning_rate = 1e-2
    c.preference.update({"batch_size": 8, "steps": steps})
    return c


def pdpo_length() -> ml_collections.ConfigDict:
    c = _pairs("style_pairs", "P-DPO with people who want longer or shorter answers, on a real model", 80)
    c.population.update({"pairs_per_user": 64, "heldout_pairs_per_user": 24, "new_pairs_per_user": 24})
    del c.preference.models["cluster"]
    c.evaluate_users.update({"generate_for": 4, "max_new_tokens": 96, "grid_pairs": 60})
    return c


def pdpo_votes() -> ml_collections.ConfigDict:
    c = _pairs("llmfao", "P-DPO on the votes of real people, on a real model", 60)
    for name in ("cluster", "reward", "reward_pooled"):
        del c.preference.models[name]
    c.preference.update({"max_pairs": 800, "max_heldout_pairs": 400})
    return c


def pdpo_text() -> ml_collections.ConfigDict:
    c = _pairs("prefeval", "What people say about themselves, read by a real model", 60)
    c.data.update({"max_prompt": 128, "max_completion": 64})
    with c.ignore_type():
        c.data.prompt_buckets, c.data.completion_buckets = (64, 96), (32,)
    c.preference.update({"max_pairs": 480, "max_heldout_pairs": 300})
    return c


def hh() -> ml_collections.ConfigDict:
    """Two people: one who chose the helpful answers of the set, and one who chose the harmless ones."""
    c = _pairs("records", "P-DPO with the two conflicting objectives of HH-RLHF as users, on a real model", 60)
    real_data.source(c.preference, kind="hh_rlhf", path="Anthropic/hh-rlhf", objective_as_user=True)
    with c.ignore_type():
        c.data.prompt_buckets = (64, 128)
    c.data.update({"max_prompt": 192, "long_prompt": "truncate_left", "long_completion": "truncate"})
    c.preference.update({"max_pairs": 800, "max_heldout_pairs": 400})
    del c.preference.models["cluster"]
    return c
