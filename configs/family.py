"""All multi-objective methods on the synthetic environment, with one base, one set of comparisons and reward models,
and one budget of samples.

    python -m pjrlhf.main --config=configs/family.py
    python -m pjrlhf.main --config=configs/family.py:three
    python -m pjrlhf.main --config=configs/family.py:ablation

Two objectives conflict: short answers, and answers that tell everything. `:three` adds kind answers. Every method is an
entry of `methods`, with settings of the stages policy, modpo and ric (`pjrlhf.config.family`). `:ablation` compares
variants of MOC with the same preference prompts: the weighted sum alone, the control reward alone, equal weights in
place of min-norm weights, and others.

`--config.seeds="(0, 1, 2)"` runs one seed after the other and reports means with intervals.

Time per seed on one CPU core: 7 minutes with two objectives, 8 with three, 12 for the ablation. On two cores, run two
of them side by side, each on its own core (`taskset -c 0`, `taskset -c 1`). Results: docs/results/family.md.
"""

import ml_collections

from pjrlhf import config
from pjrlhf.errors import UserError

ABLATION = ("moc", "moc_equal", "moc_small_control", "moc_per_reward", "moc_per_preference", "moc_hinge", "moc_mixed")
RULES = ("control", "sum", "mgda", "tchebycheff", "gdpo", "pama")
# The other two multiples of 1/5 are held out: training never states them in a prompt.
HELD_OUT = ((0.0, 1.0), (0.4, 0.6), (0.8, 0.2), (1.0, 0.0))


def get_config(variant: str = "two") -> ml_collections.ConfigDict:
    c = config.base()
    c.title = f"The multi-objective family with {variant} objectives of the synthetic environment"
    if variant == "two":
        config.front(c, ("P2A", "P2B"))
        config.family(c)
    elif variant == "three":
        config.front(c, ("P2A", "P2B", "P3A"))
        config.family(c)
    elif variant == "ablation":
        c.title = "MOC and its parts on the synthetic environment"
        config.front(c, ("P2A", "P2B"))
        config.family(c, *ABLATION, *RULES)
        with c.ignore_type():
            held_out = {**c.methods.moc.to_dict(), "preferences": {"kind": "grid", "points": HELD_OUT}}
            c.methods["moc_held_out"] = ml_collections.ConfigDict(held_out)
    else:
        raise UserError(f"configs/family.py:{variant}: unknown variant; use two, three or ablation")
    return c
