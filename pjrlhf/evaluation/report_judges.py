"""What a report says of its judges, for the page and the terminal; `report` describes what these tables read."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.console

from pjrlhf.evaluation.formats import Table, interval, number, percent, print_table, without_empty

TITLES = {
    "judges": "Judges",
    "win_rate_by_judge": "Win rate against the base, by judge",
    "agreement": "Agreement of judges",
    "length_controlled": "Win rate against the base, at equal lengths",
}


def page(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What report_judges.html reads beside the summary."""
    found = {TITLES[name]: table for name, table in tables(summary).items() if table[1]}
    return {"judge_tables": found, "judge_columns": {name for columns, _ in found.values() for name in columns}}


def tables(summary: Mapping[str, Any]) -> dict[str, Table]:
    """The tables of `TITLES`; without rows where the summary has nothing to tell."""
    found = {
        "judges": _judges(summary.get("judges") or []),
        "win_rate_by_judge": _by_judge(summary.get("win_rate_by_judge") or {}),
        "agreement": _agreement(summary.get("agreement") or []),
        "length_controlled": _lengths(summary.get("length_controlled") or {}),
    }
    return {name: without_empty(*table) for name, table in found.items()}


def _judges(judges: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["judge", "comparisons", "without verdict", "same in both orders, %", "asked twice: same, %"]
    columns += ["position bias", "requests", "unreadable", "cost"]
    rows = []
    for one in judges:
        asked, judged = one.get("asked"), one.get("judged")
        missing = asked - judged if isinstance(asked, int) and isinstance(judged, int) else None
        rates = percent(one.get("consistency")), percent((one.get("self_consistency") or {}).get("agreement"))
        bias = one.get("position_bias")
        signed = f"{bias:+.2f}" if isinstance(bias, int | float) else number(None)
        counts = number(one.get("requests")), number(one.get("failures")), number(one.get("cost") or None)
        rows.append([str(one.get("name")), number(asked), number(missing), *rates, signed, *counts])
    return columns, rows


def _by_judge(judges: Mapping[str, Any]) -> Table:
    methods = list(dict.fromkeys(method for rates in judges.values() for method in rates))
    columns = ["policy", *(f"{name}, %" for name in judges)]
    rows = [[method, *(_with_interval(rates.get(method), "rate") for rates in judges.values())] for method in methods]
    return columns, rows


def _with_interval(rate: Mapping[str, Any] | None, key: str) -> str:
    """A rate in percent with its interval, "57.0 (52.1 to 62.0)"."""
    limits = interval(rate)
    return percent((rate or {}).get(key)) + (f" ({limits})" if limits else "")


def _agreement(pairs: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["criterion", "judge", "other judge", "comparisons", "equal, %", "Cohen's kappa"]
    rows = [
        [
            str(one.get("criterion")),
            *map(str, one.get("judges") or ("", "")),
            number(one.get("n")),
            percent(one.get("agreement")),
            number(one.get("kappa")),
        ]
        for one in pairs
    ]
    return columns, rows


def _lengths(criteria: Mapping[str, Any]) -> Table:
    columns = ["criterion", "policy", "win rate, %", "at equal lengths, %", "form", "effect of length", "characters"]
    columns += ["of the base", "comparisons"]
    rows = [
        [
            criterion,
            policy,
            percent(one.get("rate")),
            _with_interval(one, "controlled"),
            str(one.get("form") or ""),
            number(one.get("length_effect")),
            *(number(one.get(key), 0) for key in ("length", "base_length")),
            number(one.get("n")),
        ]
        for criterion, policies in criteria.items()
        for policy, one in policies.items()
    ]
    return columns, rows


def print_judges(console: rich.console.Console, summary: Mapping[str, Any]) -> None:
    """The tables in the terminal."""
    for name, table in tables(summary).items():
        print_table(console, TITLES[name], *table)
