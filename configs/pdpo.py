"""P-DPO and P-RM (P-RLHF, arXiv 2402.05133): one policy for users with conflicting preferences.

    python -m pjrlhf.main --config=configs/pdpo.py

trains pooled DPO, individualized and cluster user models, and a control with permuted user ids, on the same comparisons
with the same budget. `--config.preference.head=reward` trains reward models in place of policies.

Users as soups of given policies, with weights learned from their comparisons:

    python -m pjrlhf.main --config=configs/pdpo.py:soup

One policy for everybody that reads a person's comparisons, or what is written of them, before the prompt
(docs/user_models.md#what-stands-before-the-prompt):

    python -m pjrlhf.main --config=configs/pdpo.py:context

Your own preference records with a column `user_id` (and `user_text`, for entries with user_text=True), on a Hugging
Face model:

    python -m pjrlhf.main --config=configs/pdpo.py:records --config.model.path=FOLDER \
        --config.preference.data.path=FILE.jsonl

Real answers and real users, with a small model trained from scratch. The files are in $PJRLHF_TEST_DATA (../shared by
default), in data/alpaca_eval, data/llmfao and data/prefeval:

    python -m pjrlhf.main --config=configs/pdpo.py:style_pairs --config.population.users=40
    python -m pjrlhf.main --config=configs/pdpo.py:llmfao --config.preference.split=prompt
    python -m pjrlhf.main --config=configs/pdpo.py:prefeval

:style_pairs is the paper's experiment with conflicting length preferences, :llmfao has the votes of a crowd, and
:prefeval has users who each state one preference.

Time on 2 CPU cores: about 4 minutes for the synthetic environment, 6 for :soup, and 20 to 35 for the others, 8 of them
for the base. Results: docs/results/pdpo.md.
"""

import ml_collections

from pjrlhf import config, real_data
from pjrlhf.errors import UserError
from pjrlhf.feedback.population import PopulationSettings
from pjrlhf.settings import to_config


def get_config(variant: str = "synthetic") -> ml_collections.ConfigDict:
    c = config.base()
    c.title = "P-DPO with ten users of the synthetic environment"
    c.stages = ("sft", "population", "preference", "evaluate_users")

    c.population = to_config(PopulationSettings())
    config.users(c)
    variants = {"synthetic": None, "soup": soup, "records": records, "style_pairs": style_pairs, "llmfao": llmfao}
    variants |= {"prefeval": prefeval, "context": context}
    if variant not in variants:
        names = ", ".join(f":{name}" for name, change in variants.items() if change)
        raise UserError(f"configs/pdpo.py:{variant}: unknown variant; use configs/pdpo.py alone or with {names}")
    if variants[variant]:
        variants[variant](c)
    return c


def soup(c: ml_collections.ConfigDict) -> None:
    """Four personas, one PPO policy for each, and user models that are soup weights of these policies."""
    c.title = "Learned soup weights with twelve users of the synthetic environment"
    c.stages = ("sft", "comparisons", "reward", "policy", "population", "preference", "evaluate_users")
    config.policies(c)
    c.objectives = ("P2A", "P2B", "P3A", "P3B")
    c.population.update({"users": 12, "new_users": 12, "personas": c.objectives, "fractions": (0.25, 0.25, 0.25, 0.25)})
    c.preference.bank = "policy"
    individualized = c.preference.models.individualized.to_dict()
    with c.ignore_type():
        c.preference.models = ml_collections.ConfigDict(
            {"pooled": {"kind": "uniform"}, "soup": {"kind": "soup"}, "individualized": individualized}
        )
        c.preference.models["permuted"] = {"kind": "soup", "permuted": True}
    c.evaluate_users.cold_start_models = ("soup", "individualized")


def context(c: ml_collections.ConfigDict) -> None:
    """People of two personas, as many of each: without knowing the person nothing can be told."""
    c.title = "What is written of a person's comparisons, before the prompt"
    c.population.update({"users": 40, "new_users": 20, "fractions": (0.5, 0.5), "pool": 1500})
    c.population.update({"pairs_per_user": 128, "heldout_pairs_per_user": 16, "new_pairs_per_user": 40})
    # Words of the synthetic language; it has none for "preferred".
    good, bad = "do", "not"
    template = "{prompt} {first_verdict} {first} {second_verdict} {second}"
    fewshot = {
        "kind": "uniform",
        "history": 4,
        "varied": True,
        "writer": {"kind": "fewshot", "template": template, "verdicts": (good, bad)},
    }
    hindsight = {**fewshot, "writer": {"kind": "hindsight", "good": good, "bad": bad}}
    attributes = {"kind": "uniform", "history": 8, "writer": {"kind": "attributes", "most": 1}}
    with c.ignore_type():
        c.preference.models = ml_collections.ConfigDict(
            {
                "pooled": {"kind": "uniform"},
                "fewshot": fewshot,
                "hindsight": hindsight,
                "attributes": attributes,
                "fewshot_permuted": {**fewshot, "permuted": True},
                "attributes_permuted": {**attributes, "permuted": True},
                "individualized": {"kind": "individualized", "tokens": 4},
            }
        )
    c.data.update({"max_prompt": 384, "long_prompt": "truncate_left", "packing": "pack"})
    c.data.prompt_buckets = (12, 24, 96)
    c.model.max_length = 512
    read = ("fewshot", "hindsight", "attributes", "fewshot_permuted", "attributes_permuted")
    c.evaluate_users.update({"generate_for": 0, "cold_start": (0, 1, 2, 4, 8)})
    c.evaluate_users.cold_start_models = (*read, "individualized")


def records(c: ml_collections.ConfigDict) -> None:
    c.title = "P-DPO on your records"
    c.stages = ("preference", "evaluate_users")
    config.pretrained(c)
    c.evaluate_users.update({"cold_start": (), "grid_pairs": 100})
    real_data.source(c.preference, kind="jsonl", path="")


def _small_base(c: ml_collections.ConfigDict) -> None:
    """A model from scratch, and training for it."""
    real_data.small_base(c, steps=1000, completion=128)
    c.adapter.update({"rank": 16, "alpha": 32.0})
    c.preference.update({"mixture": "dropout", "batch_size": 16, "steps": 260})
    # Per token, because the summed log-ratio of a long answer mostly measures the distance from the reference.
    c.preference.update({"loss": "sigmoid_norm", "beta": 10.0})
    c.preference.alpha = 1.0  # 0.5 also trains the generic user, and needs about twice the steps
    c.preference.optimizer.learning_rate = 2.5e-3
    c.preference.user_optimizer.learning_rate = 0.03
    for model in ("individualized", "cluster", "permuted"):
        c.preference.models[model].tokens = 10
    c.evaluate_users.update({"grid_pairs": 100, "generate_for": 0, "cold_start": ()})


def style_pairs(c: ml_collections.ConfigDict) -> None:
    """Users who want longer or shorter answers, with real answers that a rule judges by length."""
    _small_base(c)
    pairs = real_data.style_pairs()
    personas = ("longer", "shorter")
    c.title = "P-DPO with users who want longer or shorter answers"
    with c.ignore_type():
        c.preferences = ml_collections.ConfigDict({name: {"dimension": "length", "sentence": ""} for name in personas})
        c.judge = ml_collections.ConfigDict({name: name for name in personas})
    real_data.prompts(c, **pairs)
    real_data.source(c.population, **pairs, columns={"chosen": "concise", "rejected": "verbose"})
    c.objectives = personas
    c.population.update({"personas": personas, "pairs_per_user": 320, "heldout_pairs_per_user": 60})
    c.population.new_pairs_per_user = 40
    c.population.whole_answers = 1  # the lengths of two truncated answers cannot be compared
    for model in ("individualized", "permuted"):
        c.preference.models[model].zero_offset = False  # users who start with different tokens separate sooner
    c.evaluate_users.update({"generate_for": 8, "max_new_tokens": 256})


def llmfao(c: ml_collections.ConfigDict) -> None:
    """Votes of real users on answers of real models."""
    _small_base(c)
    c.title = "P-DPO on the votes of real users"
    c.stages = ("sft", "preference", "evaluate_users")
    votes = real_data.crowd_votes(least=50)
    real_data.prompts(c, **votes)
    real_data.source(c.preference, **votes)
    c.data.max_bad_fraction = 0.12  # one in ten votes is on a pair with an empty answer
    c.preference.update({"split": "pair", "steps": 210})
    c.preference.optimizer.learning_rate = 1e-3
    c.preference.models.cluster.clusters = 4
    c.preference.models["reward_pooled"] = {"kind": "uniform", "head": "reward", "loss": "sigmoid"}
    reward = {"kind": "individualized", "tokens": 10, "head": "reward", "loss": "sigmoid"}
    c.preference.models["reward"] = reward
    c.evaluate_users.surface = True


def prefeval(c: ml_collections.ConfigDict) -> None:
    """Users who each state one preference, and four answers, one of which respects it."""
    _small_base(c)
    c.title = "A user model that reads what users say about themselves"
    c.stages = ("sft", "preference", "evaluate_users")
    choices = {"kind": "choices", "path": real_data.folder("prefeval"), "options": "classification_task_options"}
    real_data.prompts(c, **choices)
    with c.ignore_type():
        c.preference.models = ml_collections.ConfigDict(
            {
                "pooled": {"kind": "uniform"},
                "text": {"kind": "uniform", "user_text": True},
                "permuted": {"kind": "uniform", "user_text": True, "permuted": True},
            }
        )
    real_data.source(c.preference, **choices)
    c.data.update({"max_prompt": 96, "prompt_buckets": (48,), "max_completion": 64})
    c.preference.steps = 120
