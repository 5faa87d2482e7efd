"""The multi-objective family on one world: one base, one set of comparisons and reward models, one budget of samples.

    python -m pjrlhf.main --config=configs/family.py
    python -m pjrlhf.main --config=configs/family.py:three

Two conflicting objectives (short answers, answers that tell everything), or with `:three` kindness besides. Every
method is an entry of `methods`, all are settings of the stages policy, modpo and ric; see `pjrlhf.config.methods`.
`:ablation` takes MOC apart: the same policy on the weighted sum alone, on the control reward alone, and with equal
weights in place of min-norm ones.

`--config.seeds="(0, 1, 2)"` runs one seed after the other and reports means with intervals. One seed, 2 CPU cores:
figures and times in BUILD_NOTES.md.
"""

import ml_collections

from pjrlhf import config

TWO, THREE = ("P2A", "P2B"), ("P2A", "P2B", "P3A")


def get_config(variant: str = "two") -> ml_collections.ConfigDict:
    if variant not in ("two", "three", "ablation"):
        raise ValueError(f"configs/family.py:{variant}: unknown variant; use two, three or ablation")
    c = config.base()
    c.title = f"The multi-objective family, {'three' if variant == 'three' else 'two'} objectives of the built-in world"
    config.front(c, THREE if variant == "three" else TWO)
    family = config.methods(c.objectives)
    if variant == "ablation":
        c.title = "MOC and its parts on the built-in world"
        moc = family["moc"]
        family = {
            "moc": moc,
            "moc_equal": {**moc, "combine": {"kind": "min_norm", "weights": "equal"}},
            "moc_per_reward": {**moc, "combine": {"kind": "min_norm", "heads": "per_reward+control"}},
            "moc_hinge": {**moc, "combine": {"kind": "min_norm", "sided": "hinge", "target": "max"}},
            "control_only": {**moc, "combine": {"kind": "min_norm", "heads": "control"}},
            "sum_only": {**moc, "combine": {"kind": "sum"}},
            "mgda": {**moc, "combine": {"kind": "min_norm", "heads": "per_reward"}},
            "tchebycheff": {**moc, "combine": {"kind": "tchebycheff"}},
            "gdpo": {**moc, "combine": {"kind": "gdpo"}},
            "pama": {**moc, "combine": {"kind": "pama"}},
        }
    with c.ignore_type():
        c.methods = ml_collections.ConfigDict(family)
    return c
