"""Steerability of one policy for all preference weights: how rewards become one, times how preferences share an update.

    python -m pjrlhf.main --config=configs/steerability.py --config.seeds="(0, 1, 2)"

Every entry of `methods` is one policy for all weights p of two conflicting objectives, short answers and answers that
tell everything. The entries differ in three ways:

* The reward of an answer: the weighted sum ("linear"), or the smooth Tchebycheff distance to the ideal point ("smooth",
  arXiv 2402.19078), which also reaches concave parts of a front.
* What p an update sees: rows with one of four trained p each, whose gradients are averaged ("independent"); the same
  rows, with the gradients of the four p weighed by their min-norm weights ("min_norm"); or rows with a random p between
  two of the four ("interpolated").
* What tells the policy p: a tally in its prompt ("words"), or the weights of two adapters ("mix").

The evaluated p between the four are never trained on but by "interpolated". Time per seed on one of two shared CPU
cores: 12 minutes. Results: docs/results/steerability.md.
"""

import ml_collections

from pjrlhf import config

TRAINED = [[0.0, 1.0], [0.4, 0.6], [0.8, 0.2], [1.0, 0.0]]
SMOOTHING = 0.1  # of rewards from 0 to 1: the smooth form is at most 0.07 below the exact one


def get_config() -> ml_collections.ConfigDict:
    c = config.base()
    c.title = "Steerability: reward x combination of preferences"
    config.front(c, ("P2A", "P2B"))
    config.family(c, "sum")
    words = c.methods.sum.to_dict()
    mix = {"mix": "weights"}
    rewards = {
        "linear": ({"kind": "sum"}, {"kind": "min_norm", "heads": "per_preference"}),
        "smooth": tuple(
            {"kind": "tchebycheff", "smoothing": SMOOTHING, "across": across} for across in ("mean", "min_norm")
        ),
    }
    entries = {}
    for place, told in (("words", words), ("mix", mix)):
        for reward, (mean, min_norm) in rewards.items():
            for way, kind, rule in (
                ("independent", "grid", mean),
                ("min_norm", "grid", min_norm),
                ("interpolated", "between", mean),
            ):
                preferences = {"kind": kind, "points": TRAINED}
                entries[f"{reward}_{way}_{place}"] = {**told, "preferences": preferences, "combine": rule}
    with c.ignore_type():
        c.methods = ml_collections.ConfigDict(entries)
    return c
