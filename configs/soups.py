"""Personalized Soups (arXiv 2310.11564): PPO trains one policy per preference, and every user gets a weighted merge.

The synthetic environment, trained from scratch:

    python -m pjrlhf.main --config=configs/soups.py

A Hugging Face model, with the dimensions length and dialogue, judged by rules:

    python -m pjrlhf.main --config=configs/soups.py:hf --config.model.path=FOLDER

An instruction-tuned model, with the six preferences of the paper, rewarded by functions instead of reward models
(`pip install -e '.[readability,sentiment]'`):

    python -m pjrlhf.main --config=configs/soups.py:instruct --config.model.path=FOLDER

The scaling experiment: two more styles in the synthetic environment, 16 personas in place of 8:

    python -m pjrlhf.main --config=configs/soups.py:styles

Time for the synthetic environment: 5 to 6 minutes on 2 CPU cores. Results: docs/results/soups.md.
"""

import ml_collections

from pjrlhf import config, papers
from pjrlhf.errors import UserError
from pjrlhf.protocols.soups import SoupsSettings
from pjrlhf.settings import to_config


def get_config(variant: str = "synthetic") -> ml_collections.ConfigDict:
    c = config.base()
    c.title = "Personalized Soups on the synthetic environment"
    c.stages = ("sft", "comparisons", "reward", "policy", "methods", "evaluate")
    config.policies(c)
    # Prompted-MORL samples as many answers as all six ingredients.
    pmorl = {"preferences": {"kind": "combinations"}, "prompt_preference": "always", "rollouts": 96}
    c.methods = {"pmorl": pmorl}
    c.general = "helpful"  # the general reward of the RLHF baseline; "" leaves the baseline out
    c.prompt_preference = "half"
    c.evaluate = to_config(SoupsSettings())
    if variant == "hf":
        huggingface(c)
    elif variant == "instruct":
        instruct(c)
    elif variant == "styles":
        styles(c)
    elif variant != "synthetic":
        known = ", ".join(f"configs/soups.py{name}" for name in ("", ":hf", ":instruct", ":styles"))
        raise UserError(f"configs/soups.py:{variant}: unknown variant; use one of {known}")
    return c


def styles(c: ml_collections.ConfigDict) -> None:
    """The scaling experiment of the paper: two more styles give 2 x 2 x 4 = 16 personas."""
    c.title = "Two more styles: from 8 to 16 personas"
    c.preferences = c.model.tokenizer = "synthetic16"
    papers.later_styles(c, "P3C", "P3D")


def huggingface(c: ml_collections.ConfigDict) -> None:
    """Length and dialogue, with a story model without instruction tuning. Prompts are the openings of stories."""
    c.title = "Personalized Soups on a Hugging Face model"
    c.stages = ("comparisons", "reward", "policy", "evaluate")
    del c.methods["pmorl"]  # the model does not follow instructions
    dimensions = {"short": "length", "long": "length", "dialogue": "speech", "plain": "speech"}
    with c.ignore_type():  # mappings replace names
        c.preferences = ml_collections.ConfigDict(
            {name: {"dimension": dimension, "sentence": ""} for name, dimension in dimensions.items()}
        )
        c.judge = ml_collections.ConfigDict({name: name for name in dimensions})
        c.data.prompts = ml_collections.ConfigDict(
            {"kind": "jsonl", "path": config.beside(__file__, "story_openings.jsonl")}
        )
    c.objectives = tuple(dimensions)
    c.general = ""
    c.prompt_preference = "never"
    config.pretrained(c)
    c.policy.rollouts = 32
    c.policy.kl.coefficient = 0.05
    c.data.update({"max_prompt": 256, "max_completion": 128})
    c.comparisons.pairs = 512
    c.reward.steps = 120
    c.policy.steps = 40
    c.sample_rows = 128
    c.evaluate.prompted = ()


def instruct(c: ml_collections.ConfigDict) -> None:
    """The six preferences of the paper: the school grade that a text takes, its length, and its sentiment."""
    c.title = "Personalized Soups on an instruction-tuned model, rewarded by functions"
    c.stages = ("reward", "policy", "evaluate")  # reward measures the scale of the functions on answers of the base
    del c.methods["pmorl"]
    c.preferences = "paper"
    scorers = {"P1A": "-grade", "P1B": "grade", "P2A": "short", "P2B": "long", "P3A": "sentiment", "P3B": "-sentiment"}
    with c.ignore_type():
        c.rewards = ml_collections.ConfigDict(
            {name: {"kind": "scorer", "scorer": spec} for name, spec in scorers.items()}
        )
        c.data.prompts = ml_collections.ConfigDict(
            {"kind": "jsonl", "path": config.beside(__file__, "instructions.jsonl")}
        )
    c.judge = "rewards"
    c.general = ""
    config.pretrained(c)
    # Four answers to each prompt are each other's baseline; a value head would have to be learned first.
    c.policy.experience.update({"estimator": "rloo", "samples_per_prompt": 4})
    c.policy.ppo.update({"epochs": 1, "minibatches": 1})
    c.policy.optimizer.learning_rate = 2e-4
    c.policy.rollouts = 16
    c.policy.kl.coefficient = 0.05
    c.data.update({"max_prompt": 128, "max_completion": 64})
    c.reward.calibration_samples = 64
    c.policy.steps = 40
    c.evaluate.update({"sweep_points": 5, "sweep_samples": 1})
