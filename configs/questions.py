"""Questions that the reviewers of P-RLHF (arXiv 2402.05133) asked, on the synthetic environment.

Simple baselines at the same budget, and people who change their mind:

    python -m pjrlhf.main --config=configs/questions.py

fine-tunes an adapter for each of ten people ("per_user") beside P-DPO's models and controls, all with the same pairs
and steps. Then every new person gives eight comparisons, changes their mind, and gives up to sixteen more. The same
with as many parameters in all adapters together as the others have in one:

    python -m pjrlhf.main --config=configs/questions.py:same_parameters

Comparisons of the person as text before the prompt, in place of a user model:

    python -m pjrlhf.main --config=configs/questions.py:history

What people say about themselves contradicts their comparisons, for a quarter of the people:

    python -m pjrlhf.main --config=configs/questions.py:contradicting --config.population.contradicting=0.25

Ten thousand people with 1 to 8 comparisons each, and a table with a million rows, of which a thousand are taken:

    python -m pjrlhf.main --config=configs/questions.py:many
    python -m pjrlhf.main --config=configs/questions.py:million

Results: docs/results/questions.md.
"""

import ml_collections

from pjrlhf import config
from pjrlhf.errors import UserError
from pjrlhf.feedback.population import PopulationSettings
from pjrlhf.settings import to_config

INDIVIDUALIZED = {"kind": "individualized", "tokens": 4}


def get_config(variant: str = "baselines") -> ml_collections.ConfigDict:
    c = config.base()
    c.stages = ("sft", "population", "preference", "evaluate_users")
    c.population = to_config(PopulationSettings())
    config.users(c)
    c.evaluate_users.generate_for = 0
    variants = {"baselines": baselines, "same_parameters": same_parameters, "contradicting": contradicting}
    variants |= {"history": history, "many": many, "million": million}
    if variant not in variants:
        names = ", ".join(f":{name}" for name in variants)
        raise UserError(f"configs/questions.py:{variant}: unknown variant; use one of {names}")
    variants[variant](c)
    return c


def _models(c: ml_collections.ConfigDict, **models: dict) -> None:
    with c.ignore_type():
        c.preference.models = ml_collections.ConfigDict(models)


def baselines(c: ml_collections.ConfigDict) -> None:
    c.title = "Baselines of personalisation, and people who change their mind"
    _models(c, **c.preference.models.to_dict(), per_user={"kind": "adapters"})
    c.evaluate_users.update({"changed_after": 8, "cold_start": (0, 1, 4, 16)})


def same_parameters(c: ml_collections.ConfigDict) -> None:
    c.title = "Fine-tuning per user with the parameters of one adapter"
    _models(c, pooled={"kind": "uniform"}, per_user={"kind": "adapters"})
    c.adapter.update({"rank": 1, "alpha": 2.0})  # eleven adapters, the scale of rank 8
    c.evaluate_users.cold_start = ()
    c.evaluate_users.cold_start_models = ()


def history(c: ml_collections.ConfigDict) -> None:
    c.title = "Comparisons of the person before the prompt"
    # Nothing but places tells chosen and rejected answers apart: the language has no other words.
    writer = {"kind": "fewshot", "template": "{prompt} {chosen} {rejected}"}
    before = {"kind": "uniform", "history": 2, "writer": writer}
    _models(c, pooled={"kind": "uniform"}, history=before, permuted={**before, "permuted": True})
    c.data.update({"max_prompt": 100, "prompt_buckets": (12, 24, 48), "long_prompt": "truncate_left"})
    c.evaluate_users.update({"cold_start": (), "cold_start_models": ()})


def contradicting(c: ml_collections.ConfigDict) -> None:
    c.title = "People whose comparisons contradict what they say about themselves"
    text = {"user_text": True}
    _models(
        c,
        pooled={"kind": "uniform"},
        individualized=INDIVIDUALIZED,
        text={"kind": "uniform", **text},
        both={**INDIVIDUALIZED, **text},
        permuted={**INDIVIDUALIZED, **text, "permuted": True},
    )
    c.population.update({"users": 20, "pairs_per_user": 160, "heldout_pairs_per_user": 48, "contradicting": 0.25})
    c.population.fractions = (0.5, 0.5)
    c.data.update({"max_prompt": 36, "prompt_buckets": (12, 24)})
    c.evaluate_users.cold_start_models = ("individualized", "both")


def many(c: ml_collections.ConfigDict) -> None:
    c.title = "Ten thousand people with few comparisons each"
    _models(
        c,
        pooled={"kind": "uniform"},
        individualized=INDIVIDUALIZED,
        cluster={"kind": "cluster", "tokens": 4, "clusters": 2, "warm_start": 0.5},
        permuted={**INDIVIDUALIZED, "permuted": True},
    )
    c.population.update({"users": 10_000, "pool": 2000, "pairs_in_turn": (1, 2, 4, 8)})
    c.population.heldout_pairs_per_user = 2
    # Nobody has many comparisons, so that the rows of people take all of them and longer steps.
    c.preference.update({"mixture": "dropout", "alpha": 1.0, "epochs": 1.0, "batch_size": 128})
    c.preference.user_optimizer.learning_rate = 0.1
    c.evaluate_users.update({"cold_start": (), "cold_start_models": ()})


def million(c: ml_collections.ConfigDict) -> None:
    many(c)
    c.title = "A table with a million rows"
    _models(
        c,
        individualized={"kind": "individualized", "tokens": 1},
        cluster={"kind": "cluster", "tokens": 4, "clusters": 2},
    )
    c.population.users = 1000
    c.preference.rows = 10**6
    c.checkpoint_every = 0
