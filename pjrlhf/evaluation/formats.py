"""Numbers and tables as text; a dash for what is no number."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table
import rich.text

MISSING = "\N{EN DASH}"
# A number alone, or a mapping with mean (or another key), low and high.
Estimate = float | Mapping[str, Any] | None


def percent(fraction: float | None) -> str:
    return MISSING if not isinstance(fraction, int | float) else f"{100 * fraction:.1f}"


def interval(rate: Mapping[str, Any] | None) -> str:
    """The interval of a rate in percent, "52.1 to 62.0"."""
    if not rate or rate.get("low") is None or rate.get("high") is None:
        return ""
    return f"{percent(rate['low'])} to {percent(rate['high'])}"


def number(value: float | None, digits: int = 2) -> str:
    if not isinstance(value, int | float):
        return MISSING
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def duration(seconds: float | None) -> str:
    if not isinstance(seconds, int | float):
        return MISSING
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)} min {rest:.0f} s" if minutes else f"{rest:.1f} s"


def cell(rate: Mapping[str, Any] | None, key: str = "rate") -> str:
    """`rate[key]` in percent, in a second line its interval, for a terminal table."""
    if not rate or rate.get(key) is None:
        return MISSING
    if rate.get("low") is None or rate.get("high") is None:
        return percent(rate[key])
    return f"{percent(rate[key])}\n{100 * rate['low']:.0f}-{100 * rate['high']:.0f}"


def estimate(value: Estimate, digits: int = 2, scale: float = 1, key: str = "mean") -> str:
    """A number, or `key` of a mapping and its interval in brackets: "0.71", "0.71 (0.69-0.74)"."""
    one = mean_of(value, key)
    middle, low, high = (None if one.get(part) is None else scale * one[part] for part in (key, "low", "high"))
    if middle is None or low is None or high is None:
        return number(middle, digits)
    return f"{number(middle, digits)} ({number(low, digits)}{' to ' if low < 0 else '-'}{number(high, digits)})"


def mean_of(value: Estimate, key: str = "mean") -> dict[str, Any]:
    """An estimate as a mapping with `key`, and low and high if it has an interval."""
    return dict(value) if isinstance(value, Mapping) else {key: value}


def print_table(
    console: rich.console.Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Prints rows of text, the first column to the left; a table without rows not at all."""
    if not rows:
        return
    table = rich.table.Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(rich.text.Text(column), justify="right" if i else "left")
    for row in rows:
        table.add_row(*(rich.text.Text(text) for text in row))
    console.print(table)
