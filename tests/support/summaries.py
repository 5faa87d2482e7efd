"""Summaries for reports, of soups and of user models, with names that are no harmless text."""

import math

import numpy as np

from pjrlhf.evaluation import plots_users
from pjrlhf.evaluation.users import cold_start_curve, rate_of_people, user_accuracy
from pjrlhf.evaluation.winrate import win_rate

METHODS = ("Soups", "Prompted", "Base")
COMBOS = ("P1A+P2A", "P1A+P2B")
RATE = win_rate(np.array([1, 1, 1, -1, 0]), resamples=50)
TABLE = {a: {b: RATE for b in METHODS if b != a} for a in METHODS}
WEIGHTS = np.linspace(0, 1, 3)
SUMMARY = {
    "title": "Soups & <b>spoons</b>",
    "config": {"model": {"layers": 2}, "seed": 0, "lr": 1e-3, "empty": {}},
    "preferences": {"P1A": "Use <i>easy</i> words."},
    "stage_seconds": {"sft": 1.5, "policy": 75.0},
    "total_seconds": 76.5,
    "reward_models": {p: {"accuracy": 0.9, "pairs": 64, "mean": math.nan, "std": 1.0} for p in ("P1A", "P1B")},
    "ingredients": {
        p: {"win_rate_vs_base": RATE, "kl": 1.25, "length": 7.0, "score": np.float32(0.5), "base_score": None}
        for p in ("P1A", "P1B")
    },
    "win_rate": TABLE,
    "win_rate_average": {method: RATE for method in METHODS},
    "combos": {combo: TABLE for combo in COMBOS},
    "sweep": {
        "expertise": {
            "low": "P1A",
            "high": "P1B",
            "weights": WEIGHTS,
            "scores": {"P1A": 1 - WEIGHTS, "P1B": WEIGHTS**2},
            "length": [5, 6, 7],
            "spearman": {"P1A": -1.0, "P1B": 1.0},
            "chord_gap": {"P1B": {"mean": -0.25, "min": -0.25, "max": -0.25}},
        }
    },
    "position_consistency": 0.98,
    "notes": ["A note."],
}
PEOPLE = {"ann": "short", "bob": "long & <i>wordy</i>", "<u>eve</u>": "short"}
ACCURACY = user_accuracy(np.array([1, -1, 1, 1, 1.0]), list("aabbe"), resamples=50)
ACCURACY["users"] = {
    user: {"accuracy": right, "pairs": 2, "group": PEOPLE[user]}
    for user, right in zip(PEOPLE, (0.5, 1.0, 1.0), strict=True)
}
MODELS = ("pooled", "one <b>each</b>")
USER_MODELS = {
    "accuracy": {model: ACCURACY | {"generic": 0.4321, "majority": 0.75, "minority": 1.0} for model in MODELS},
    "ceiling": {"majority_fraction": 0.6789},
    "gain": {MODELS[1]: {"against": "pooled", "mean": 0.0777, "low": 0.0123, "high": 0.15, "users": 3}},
    "choices": {model: {"mean": 0.6161, "low": 0.5, "high": 0.7, "chance": 0.25, "questions": 9} for model in MODELS},
    "grid": {
        "pooled": {"seen_user_seen_prompt": 0.9876, "unseen_user_seen_prompt": None},
        MODELS[1]: dict.fromkeys(plots_users.CELLS, ACCURACY),
    },
    "length_matched": {model: ACCURACY | {"mean": 0.5432, "max_difference": 0.0975} for model in MODELS},
    "by_people": {
        model: {"comparisons": {"0": {"mean": 0.3131, "low": 0.2, "high": 0.4, "users": 2}, "4-7": {"mean": 0.5}}}
        for model in MODELS
    },
    "changed_minds": {model: {"all": cold_start_curve({0: [0.1313, 0.1313], 4: [0.5, 0.6]})} for model in MODELS},
    "context": {
        model: {
            "own": {"mean": 0.8484, "low": 0.8, "high": 0.9},
            "nothing": {"mean": 0.5},
            "turned": 0.7272,
        }
        for model in MODELS
    },
    "cold_start": {model: cold_start_curve({0: [0.5, 0.75], 2: [0.8, 0.6], 10: [1, 1]}) for model in MODELS},
    "embedding": {
        model: {"users": list(PEOPLE), "groups": list(PEOPLE.values()), "x": np.arange(3.0), "y": np.ones(3)}
        for model in MODELS
    },
    "people_win_rate": {
        MODELS[1]: {
            "against": "pooled",
            **rate_of_people([1, 1, -1, 0], ["ann", "bob", "cleo", "cleo"]),
            "groups": {"short": rate_of_people([1, 1, 0], ["ann", "bob", "bob"]), "bob long & <i>wordy</i>": {}},
        }
    },
    "generation": {
        model: {
            user: {"group": group, "length": 10.0 * i, "score": {"P3A": 0.25 * i, "P3B": math.nan}}
            for i, (user, group) in enumerate(PEOPLE.items(), 1)
        }
        for model in MODELS
    },
}
