"""What a report says of reward models of people: their four parts, controls and costs, for the page and the terminal;
`report` describes what these tables read.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.console

from pjrlhf.evaluation.formats import Table, estimate, number, percent, print_table, without_empty
from pjrlhf.evaluation.plots import LINE, Picture, draw, label, mark, new_figure, number_or_nan, percent_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"slots": "What each user model is", "controls": "Controls and costs"}


def page(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What report_user_models.html reads beside the summary."""
    return {"user_model_tables": {TITLES[name]: table for name, table in tables(summary).items() if table[1]}}


def tables(summary: Mapping[str, Any]) -> dict[str, Table]:
    """The tables of `TITLES`; without rows where the summary has nothing to tell."""
    models = summary.get("user_models") or {}
    found = {"slots": _slots(models), "controls": _controls(models)}
    return {name: without_empty(*table) for name, table in found.items()}


def _slots(models: Mapping[str, Any]) -> Table:
    keys = ("kind", "source", "state", "injection", "objective")
    return ["model", *keys], [[name, *(str(one.get(key) or "") for key in keys)] for name, one in models.items()]


def _controls(models: Mapping[str, Any]) -> Table:
    columns = ["model", "gain on new people, points", "predictions turned, %", "accuracy on reversed labels, %"]
    columns += ["calibration error, points", "seeds, %", "bytes", "milliseconds", "training, s", "KL, nats"]
    columns += ["active units, %", "spread of weights"]
    rows = []
    for name, one in models.items():
        gain, flip = one.get("new_gain") or {}, one.get("flip") or {}
        known = [
            estimate(gain, 1, 100) if gain else "",
            percent(flip.get("flipped")),
            percent(flip.get("accuracy")),
            percent(one.get("ece")),
            " ".join(percent(seed) for seed in one.get("seeds") or ()),
            number(one.get("bytes"), 0),
            number(one.get("milliseconds")),
            number(one.get("seconds"), 1),
            number(one["kl"]) if one.get("kl") is not None else "",
            percent(one["active_units"]) if one.get("active_units") is not None else "",
            number(one["spread"]) if one.get("spread") is not None else "",
        ]
        rows.append([name, *known])
    return columns, rows


def print_user_models(console: rich.console.Console, summary: Mapping[str, Any]) -> None:
    """The tables in the terminal, where the summary has them."""
    for name, (columns, rows) in tables(summary).items():
        print_table(console, TITLES[name], columns, rows)


def figures(summary: Mapping[str, Any]) -> dict[str, Picture]:
    """The picture cost: accuracy on new people against what a person costs, where there is something to draw.

    Args:
      summary: as described in `report`, with None where a number is missing.
    """
    return draw({"cost": lambda: _cost(summary.get("user_models") or {}, summary.get("cold_start") or {})})


def _cost(models: Mapping[str, Any], curves: Mapping[str, Any]) -> "tuple[Figure, str] | None":
    points = {}
    for name, one in models.items():
        curve = curves.get(name) or {}
        if curve:
            last = curve[max(curve, key=float)]
            costs = [number_or_nan(one.get(key)) for key in ("milliseconds", "bytes")]
            points[name] = (*costs, 100 * number_or_nan(last.get("mean")))
    if not points or np.isnan(np.array(list(points.values()))).all():
        return None
    figure, axes = new_figure(8.4, max(4.2, 0.5 + LINE * len(points)), 1, 2)
    names = ("milliseconds to know a new person", "bytes of a person")
    for column, (axis, what) in enumerate(zip(axes[0], names, strict=True)):
        for i, (name, point) in enumerate(points.items()):
            colour, marker = mark(i)
            axis.scatter([point[column]], [point[2]], label=label(name), zorder=3, color=colour, marker=marker, s=60)
        axis.set_xscale("log" if column == 0 else "symlog")
        ticks = _ticks([point[column] for point in points.values()])
        axis.set_xticks(ticks, [f"{tick / 1000:g}k" if tick >= 1000 else f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set(xlabel=what, ylabel="accuracy, %" if column == 0 else "")
        percent_axis(axis.set_ylim, axis.get_ylim())
    axes[0, 1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, "Accuracy on new people after most comparisons, against what a person costs."


def _ticks(values: list[float]) -> list[float]:
    """0 where it is there, and the powers of ten that hold all other numbers, below 10 only where 0 is not there."""
    positive = [value for value in values if 0 < value < np.inf]
    if not positive:
        return [0.0]
    low, high = (int(bound) for bound in (np.floor(np.log10(min(positive))), np.ceil(np.log10(max(positive)))))
    zero = 0.0 in values
    return [0.0] * zero + [10.0**power for power in range(max(low, 1) if zero else low, high + 1)]
