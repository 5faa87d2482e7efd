"""Reward models of people side by side, on frozen features: one split, one budget, three seeds, all controls.

    python -m pjrlhf.main --config=configs/user_models.py

Sixty people of the synthetic environment, seven in ten of whom want friendly answers and the others unfriendly ones. A
variant where everybody weighs six preferences in their own way:

    python -m pjrlhf.main --config=configs/user_models.py:tastes

Real answers. The files are in $PJRLHF_TEST_DATA (../shared by default), in data/alpaca_eval, data/llmfao and data/papi:

    python -m pjrlhf.main --config=configs/user_models.py:style_pairs
    python -m pjrlhf.main --config=configs/user_models.py:rules
    python -m pjrlhf.main --config=configs/user_models.py:llmfao
    python -m pjrlhf.main --config=configs/user_models.py:statements

:style_pairs has people who want longer or shorter answers. :rules is an oracle in the shape of PersonalLLM (arXiv
2409.20296): answers of real models, and people who weigh the scores of ten rules. :llmfao has the votes of a crowd.
:statements has statements about oneself, and people who say how true each is of them. Their base is a small model
trained from scratch; any other gives its features with --config.model.path=FOLDER
--config.stages="('population', 'user_models')" ("('user_models',)" for the last two).

Your own records with a column `user_id`:

    python -m pjrlhf.main --config=configs/user_models.py:records --config.model.path=FOLDER \
        --config.user_models.data.path=FILE.jsonl

Results: docs/results/user_models.md.
"""

import ml_collections

from pjrlhf import config, real_data
from pjrlhf.errors import UserError
from pjrlhf.feedback.population import PopulationSettings
from pjrlhf.protocols.user_models import UserModelsSettings
from pjrlhf.settings import to_config

# Entries of the table; what is not named is as the class of the user model says.
MODELS = {
    "pooled": {"kind": "pooled"},
    "pooled_mlp": {"kind": "pooled", "hidden": 64, "learning_rate": 3e-3},
    "individual": {"kind": "individual"},
    "lore": {"kind": "lore"},
    "pal": {"kind": "pal"},
    "pref": {"kind": "pref"},
    "pref_active": {"kind": "pref", "active": True},
    "vpl": {"kind": "vpl"},
    "vpl_swap": {"kind": "vpl", "guidance": 0.1},
    "gpo": {"kind": "gpo"},
    "mrm": {"kind": "mrm"},
    "pttt": {"kind": "pttt"},
    "p2p": {"kind": "p2p"},
    "carp": {"kind": "carp"},
    "pplug": {"kind": "pplug"},
    "impchat": {"kind": "impchat"},
    "lore_permuted": {"kind": "lore", "permuted": True},
    "pttt_permuted": {"kind": "pttt", "permuted": True},
}


def get_config(variant: str = "synthetic") -> ml_collections.ConfigDict:
    c = config.base()
    c.title = "Reward models of sixty people of the synthetic environment"
    c.stages = ("sft", "population", "user_models")
    c.population = to_config(PopulationSettings())
    c.population.update({"users": 60, "new_users": 30})
    c.population.update({"pairs_per_user": 60, "heldout_pairs_per_user": 24, "new_pairs_per_user": 80})
    c.user_models = to_config(UserModelsSettings())
    with c.ignore_type():
        c.user_models.models = ml_collections.ConfigDict(MODELS)
    variants = {"synthetic": None, "tastes": tastes, "style_pairs": style_pairs, "rules": rules, "llmfao": llmfao}
    variants |= {"statements": statements, "records": records}
    if variant not in variants:
        names = ", ".join(f":{name}" for name, change in variants.items() if change)
        raise UserError(
            f"configs/user_models.py:{variant}: unknown variant; use configs/user_models.py alone or with {names}"
        )
    if variants[variant]:
        variants[variant](c)
    return c


def tastes(c: ml_collections.ConfigDict) -> None:
    c.title = "Reward models of sixty people who weigh six preferences"
    c.population.personas = c.objectives
    c.population.update({"fractions": (1.0,) * 6, "mixture": 0.3})


def records(c: ml_collections.ConfigDict) -> None:
    c.title = "Reward models of people on your records"
    c.stages = ("user_models",)
    config.pretrained(c)
    real_data.source(c.user_models, kind="jsonl", path="")


def _small_base(c: ml_collections.ConfigDict) -> None:
    """A model from scratch, and entries that take half the time: without variants of others, and with 300 updates."""
    real_data.small_base(c, steps=500, completion=192)
    c.data.completion_buckets = (64, 128)
    models = c.user_models.models
    with c.ignore_type():
        for name in ("pooled_mlp", "pref_active", "vpl_swap"):
            del models[name]
        for name in models:
            models[name].steps = 300


def _people(c: ml_collections.ConfigDict, personas: dict[str, str]) -> None:
    """People who judge answers by these scorers."""
    with c.ignore_type():
        c.preferences = ml_collections.ConfigDict({name: {"dimension": name, "sentence": ""} for name in personas})
        c.judge = ml_collections.ConfigDict(personas)
    c.objectives = c.population.personas = tuple(personas)


def style_pairs(c: ml_collections.ConfigDict) -> None:
    """Users who want longer or shorter answers, with real answers that a rule judges by length."""
    _small_base(c)
    c.title = "Reward models of people who want longer or shorter answers"
    pairs = real_data.style_pairs()
    real_data.prompts(c, **pairs)
    real_data.source(c.population, **pairs, columns={"chosen": "concise", "rejected": "verbose"})
    _people(c, {"longer": "longer", "shorter": "shorter"})
    c.population.whole_answers = 1  # the lengths of two truncated answers cannot be compared


def rules(c: ml_collections.ConfigDict) -> None:
    """People who weigh ten rules, among answers of real models to the same prompts."""
    _small_base(c)
    c.title = "Reward models of people who weigh ten rules"
    answers = {
        "kind": "answers",
        "path": f"{real_data.folder('alpaca_eval')}/responses.jsonl.gz",
        "completion": "response",
    }
    real_data.prompts(c, **answers)
    real_data.source(c.population, **answers, pairs=24)
    _people(
        c,
        {
            "longer": "longer",
            "shorter": "shorter",
            "warm": "sentiment",
            "sober": "-sentiment",
            "learned": "grade",
            "plain": "-grade",
            "direct": "words:you,your,yours,yourself",
            "modest": "words:may,might,could,perhaps,possibly,however,but,although,sorry",
            "numbered": "words:1,2,3,4,5,6,7,8,9,10,first,second,third",
            "dialogue": "dialogue",
        },
    )
    c.population.update({"fractions": (1.0,) * 10, "mixture": 0.1, "whole_answers": 1})


def llmfao(c: ml_collections.ConfigDict) -> None:
    """Votes of real users on answers of real models."""
    _small_base(c)
    c.title = "Reward models of people by their votes"
    c.stages = ("sft", "user_models")
    votes = real_data.crowd_votes(least=30)
    real_data.prompts(c, **votes)
    real_data.source(c.user_models, **votes)
    c.data.max_bad_fraction = 0.12  # one in ten votes is on a pair with an empty answer
    c.user_models.split = "pair"


def statements(c: ml_collections.ConfigDict) -> None:
    """What people say of themselves: the statements of a test are never in training."""
    _small_base(c)
    c.title = "Reward models of people by statements about themselves"
    c.stages = ("sft", "user_models")
    real_data.source(c.user_models, **real_data.statements())
    c.user_models.split = "group"
    c.data.update({"prompt_buckets": (16, 32), "completion_buckets": (32, 64, 128)})
