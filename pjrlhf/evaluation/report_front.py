"""The tables of several methods on one front, for the page and the terminal; `report` describes what they read."""

import itertools
from collections.abc import Mapping
from typing import Any

import rich.console

from pjrlhf.evaluation import pareto, plots, plots_front
from pjrlhf.evaluation.formats import Table, duration, estimate, mean_of, number, print_table, without_empty


def page(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What report_front.html reads beside the summary."""
    return {"front_tables": tables(summary), "drawing": plots_front.drawing(summary)}


def tables(summary: Mapping[str, Any]) -> dict[str, Table]:
    """The tables front, unseen, scales and scaling; without rows where the summary has nothing to tell."""
    methods, columns = summary.get("methods") or {}, _columns(summary)
    unseen = {method: one["unseen"] for method, one in methods.items() if one.get("unseen")}
    headings = ["method", *(one["heading"] for one in columns.values())]
    rows = [[*_metrics(method, one, columns), *_cost(one)] for method, one in methods.items()]
    found = {
        "front": ([*headings, "samples", "time"], rows),
        "unseen": (headings, [_metrics(method, one, columns) for method, one in unseen.items()]),
        "scales": _scales(summary.get("front") or {}),
        "scaling": _scaling(summary.get("scaling") or {}),
    }
    return {name: without_empty(*table) for name, table in found.items()}


def _columns(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that have a column, as `pareto.described`; where the summary does not say, those registered."""
    metrics = (summary.get("front") or {}).get("metrics") or pareto.described(pareto.chosen_metrics())
    return {name: one for name, one in metrics.items() if one["heading"]}


def _metrics(method: str, one: Mapping[str, Any], columns: Mapping[str, Any]) -> list[str]:
    return [method, *(estimate(one.get(key), how["digits"], how["scale"]) for key, how in columns.items())]


def _cost(one: Mapping[str, Any]) -> list[str]:
    """Samples and time; of several seeds the means alone, for how far they differ says little about a method."""
    samples, seconds = (mean_of(one.get(key)).get("mean") for key in ("samples", "seconds"))
    return [number(samples, 0), duration(seconds)]


def _scales(front: Mapping[str, Any]) -> Table:
    columns = ([number(value) for value in front.get(key) or []] for key in ("low", "high", "reference"))
    rows = itertools.zip_longest(front.get("objectives") or [], *columns, fillvalue=number(None))
    return ["objective", "score that counts as 0", "score that counts as 1", "reference"], list(rows)


def _scaling(scaling: Mapping[str, Any]) -> Table:
    methods, rates = scaling.get("methods") or {}, scaling.get("win_rate") or {}
    against = plots.opponents(rates)
    rows = []
    for method in dict.fromkeys([*methods, *rates]):
        one, row = methods.get(method) or {}, rates.get(method, {})
        won = [estimate(row.get(opponent), 1, 100, "rate") for opponent in against]
        trained = estimate(one.get("ingredients_trained"), 1)
        rows.append([method, *_cost(one), trained, *won])
    return ["method", "samples", "time", "ingredients trained", *(f"% won against {name}" for name in against)], rows


def print_fronts(console: rich.console.Console, summary: Mapping[str, Any]) -> None:
    """The tables of fronts and of added preferences in the terminal, and the findings."""
    found = tables(summary)
    new = (summary.get("scaling") or {}).get("new") or []
    titles = {
        "front": "Fronts",
        "unseen": "Fronts, preferences never trained on",
        "scaling": ": ".join(["Adding preferences", *filter(None, [", ".join(new)])]),
    }
    for name, title in titles.items():
        print_table(console, title, *found[name])
    print_table(console, "Findings", ["finding"], [[claim] for claim in summary.get("claims") or []])
