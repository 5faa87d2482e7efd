"""The multi-objective family on one world: one base, one set of comparisons and reward models, one budget of samples.

    python -m pjrlhf.main --config=configs/family.py
    python -m pjrlhf.main --config=configs/family.py:three
    python -m pjrlhf.main --config=configs/family.py:ablation

Two conflicting objectives (short answers, answers that tell everything), or with `:three` kindness besides. Every
method is an entry of `methods`: settings of the stages policy, modpo and ric, see `pjrlhf.config.family`. `:ablation`
takes MOC apart: on the weighted sum alone, the control reward alone, with equal weights in place of min-norm ones, and
so on, all told the same preferences in the same words.

`--config.seeds="(0, 1, 2)"` runs one seed after the other and reports means with intervals. One CPU core: 7 minutes a
seed with two objectives, 8 with three, 12 the ablation; on two cores run two of them side by side, each on its own
(`taskset -c 0`, `taskset -c 1`). Figures in docs/results/family.md.
"""

import ml_collections

from pjrlhf import config
from pjrlhf.errors import UserError

ABLATION = ("moc", "moc_equal", "moc_small_control", "moc_per_reward", "moc_per_preference", "moc_hinge", "moc_mixed")
RULES = ("control", "sum", "mgda", "tchebycheff", "gdpo", "pama")
# Fifths, two of them left out in training: the words for these were never read before.
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
