"""The tables of user models, for the page and the terminal; `report` describes what they read."""

import collections
import statistics
from collections.abc import Mapping
from typing import Any

import rich.console

from pjrlhf.evaluation import plots_users
from pjrlhf.evaluation.formats import cell, mean_of, number, percent, print_table
from pjrlhf.evaluation.plots_users import CELLS


def page(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What report_users.html reads beside the summary."""
    answers = _by_persona(summary.get("generation") or {})
    return {
        "personas": plots_users.personas(summary),
        "by_persona": answers,
        "score_names": _score_names(answers),
        "cells": CELLS,
        "counts": _counts(summary.get("cold_start") or {}),
    }


def print_users(console: rich.console.Console, summary: Mapping[str, Any]) -> None:
    """The tables of user models in the terminal, where the summary has them."""
    accuracy, matched = summary.get("accuracy") or {}, summary.get("length_matched") or {}
    parts = ("micro", "generic", "worst_decile", "majority", "minority")
    rows = []
    for model in dict.fromkeys([*accuracy, *matched]):
        one = accuracy.get(model) or {}
        fractions = [percent(one.get(part)) for part in parts]
        rows.append([model, cell(one, "mean"), *fractions, cell(matched.get(model), "mean")])
    ceiling = (summary.get("ceiling") or {}).get("majority_fraction")
    title = "Accuracy over people, % (95% interval)"
    if ceiling is not None:
        title += f"; without knowing the person at most {percent(ceiling)}"
    columns = ["model", "mean", "per pair", "generic", "worst 10%", "majority", "minority", "like length"]
    print_table(console, title, columns, rows)

    rows = [
        [model, one.get("against") or "", cell(one, "mean"), number(one.get("users"))]
        for model, one in (summary.get("gain") or {}).items()
    ]
    print_table(console, "Gain, person by person, points", ["model", "over", "mean", "people"], rows)

    rows = [
        [model, cell(one, "mean"), percent(one.get("chance")), number(one.get("questions"))]
        for model, one in (summary.get("choices") or {}).items()
    ]
    print_table(console, "Questions answered right, %", ["model", "right", "by guessing", "questions"], rows)

    rows = [
        [model, *(cell(mean_of(table.get(key)), "mean") for key in CELLS)]
        for model, table in (summary.get("grid") or {}).items()
    ]
    print_table(console, "Accuracy on known and new people and prompts, %", ["model", *CELLS.values()], rows)

    curves = summary.get("cold_start") or {}
    counts = _counts(curves)
    rows = [[model, *(cell(curve.get(k), "mean") for k in counts)] for model, curve in curves.items()]
    print_table(console, "Accuracy on new people by number of their comparisons, %", ["model", *counts], rows)

    tables = _by_persona(summary.get("generation") or {})
    scores = _score_names(tables)
    rows = [
        [
            model,
            persona,
            number(one["people"]),
            number(one["length"], 1),
            *(number(one["score"].get(s)) for s in scores),
        ]
        for model, table in tables.items()
        for persona, one in table.items()
    ]
    print_table(console, "Answers by persona", ["model", "persona", "people", "mean length", *scores], rows)


def _by_persona(generation: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """{model: {persona: {"people", "length", "shortest", "longest", "score": {name: x}}}}, means over people."""
    found = collections.defaultdict(dict)
    for model, people in generation.items():
        personas = collections.defaultdict(list)
        for one in people.values():
            personas[one.get("group") or "all"].append(one)
        for persona, ones in personas.items():
            lengths = [one["length"] for one in ones if one.get("length") is not None]
            scores = collections.defaultdict(list)
            for one in ones:
                for name, score in (one.get("score") or {}).items():
                    if score is not None:
                        scores[name].append(score)
            found[model][persona] = {
                "people": len(ones),
                "length": statistics.fmean(lengths) if lengths else None,
                "shortest": min(lengths, default=None),
                "longest": max(lengths, default=None),
                "score": {name: statistics.fmean(values) for name, values in scores.items()},
            }
    return found


def _score_names(by_persona: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for table in by_persona.values() for one in table.values() for name in one["score"]))


def _counts(curves: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The numbers of comparisons of all cold-start curves, rising."""
    return sorted({k for curve in curves.values() for k in curve}, key=float)
