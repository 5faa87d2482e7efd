"""Makes losses.json beside this file: pairwise preference losses from their published definitions, in float64 numpy.

    python tests/golden/make_losses.py

The definitions are written with probabilities, as the papers print them, and so share nothing with the stable forms
under test. Gradients are central differences.
"""

import json
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
PAIRS = 12
STEP = 1e-5


def probability(h):
    return 1 / (1 + np.exp(-h))


def dpo(w, l, o):
    """arXiv 2305.18290 eq. 7; with an offset arXiv 2402.10571; with flipped labels Mitchell 2023."""
    p = probability(o["beta"] * (w - l) - o.get("margin", 0))
    e = o.get("label_smoothing", 0)
    return -(1 - e) * np.log(p) - e * np.log(1 - p)


def robust(w, l, o):
    """arXiv 2403.00409: ((1 - e) L - e L of the flipped pair) / (1 - 2 e)."""
    p = probability(o["beta"] * (w - l) - o.get("margin", 0))
    e = o["label_smoothing"]
    return ((1 - e) * -np.log(p) - e * -np.log(1 - p)) / (1 - 2 * e)


def ipo(w, l, o):
    """arXiv 2310.12036 eq. 17."""
    return (w - l - 0.5 / o["beta"]) ** 2


def hinge(w, l, o):
    """arXiv 2305.10425 eq. 1 on log-ratios."""
    return np.maximum(0, 1 + o.get("margin", 0) - o["beta"] * (w - l))


def apo_zero(w, l, o):
    """arXiv 2408.06266 eq. 7: -s(r_w) + s(r_l), plus 1."""
    return 1 - probability(o["beta"] * w) + probability(o["beta"] * l)


def apo_down(w, l, o):
    """arXiv 2408.06266 eq. 8: s(r_w) - s(r_w - r_l), plus 1."""
    return 1 + probability(o["beta"] * w) - probability(o["beta"] * (w - l))


def bco(w, l, o):
    """arXiv 2404.04656: a classifier that says "desirable" with probability s(r - delta)."""
    yes, no = (probability(o["beta"] * x - o.get("delta", 0)) for x in (w, l))
    return -np.log(yes) - np.log(1 - no)


def per_token(loss):
    return lambda w, l, o: loss(w / o["chosen_length"], l / o["rejected_length"], o)


LOSSES = {
    "sigmoid": dpo,
    "robust": robust,
    "ipo": ipo,
    "ipo_norm": per_token(ipo),
    "hinge": hinge,
    "sigmoid_norm": per_token(dpo),
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "bco_pair": bco,
}
CASES = [
    ("sigmoid", {"beta": 0.1}),
    ("sigmoid", {"beta": 0.5, "margin": True}),
    ("sigmoid", {"beta": 0.1, "label_smoothing": 0.2}),
    ("robust", {"beta": 0.1, "label_smoothing": 0.2}),
    ("robust", {"beta": 0.3, "label_smoothing": 0.1, "margin": True}),
    ("ipo", {"beta": 0.1}),
    ("ipo_norm", {"beta": 0.4}),
    ("hinge", {"beta": 0.1}),
    ("hinge", {"beta": 0.1, "margin": True}),
    ("sigmoid_norm", {"beta": 5.0}),
    ("sigmoid_norm", {"beta": 2.0, "margin": True}),
    ("apo_zero", {"beta": 0.1}),
    ("apo_down", {"beta": 0.1}),
    ("bco_pair", {"beta": 0.1}),
    ("bco_pair", {"beta": 0.1, "delta": -0.7}),
]


def main():
    rng = np.random.default_rng(0)
    inputs = {name: -rng.gamma(8.0, 5.0, PAIRS) for name in ("ref_chosen", "ref_rejected")}
    inputs |= {name: inputs["ref_" + name] + rng.normal(0.0, 12.0, PAIRS) for name in ("chosen", "rejected")}
    # float32 values, so that the reader starts from the same numbers
    inputs = {name: x.astype(np.float32).astype(np.float64) for name, x in inputs.items()}
    lengths = {name: rng.integers(1, 40, PAIRS).astype(float) for name in ("chosen_length", "rejected_length")}
    margin = rng.uniform(0.0, 2.0, PAIRS).astype(np.float32).astype(np.float64)
    w, l = (inputs[name] - inputs["ref_" + name] for name in ("chosen", "rejected"))
    cases = []
    for kind, options in CASES:
        values = options | lengths | ({"margin": margin} if "margin" in options else {})
        loss = LOSSES[kind]
        cases.append(
            {
                "kind": kind,
                "options": options,
                "losses": loss(w, l, values).tolist(),
                "chosen_gradient": ((loss(w + STEP, l, values) - loss(w - STEP, l, values)) / (2 * STEP)).tolist(),
                "rejected_gradient": ((loss(w, l + STEP, values) - loss(w, l - STEP, values)) / (2 * STEP)).tolist(),
            }
        )
    arrays = {name: x.tolist() for name, x in (inputs | lengths | {"margin": margin}).items()}
    (HERE / "losses.json").write_text(json.dumps({"inputs": arrays, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
