"""Numbers and tables as text; a dash for what is no number."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.table
import rich.text

from pjrlhf.terminal import visible

MISSING = "\N{EN DASH}"
# A number alone, or a mapping with mean (or another key), low and high.
Estimate = float | Mapping[str, Any] | None
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # columns, rows


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
    if minutes >= 60:
        return f"{int(minutes // 60)} h {int(minutes % 60)} min"
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


def terminal_console() -> rich.console.Console:
    """A console for tables; where the output is no terminal, tables are as wide as their text."""
    console = rich.console.Console()
    return console if console.is_terminal else rich.console.Console(width=10_000)


def without_empty(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The table without columns that have no value; the first column stays."""
    kept = [i for i in range(len(columns)) if not i or any(row[i] not in ("", MISSING) for row in rows)]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def print_table(
    console: rich.console.Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Prints rows of text, the first column to the left; a table without rows not at all.

    A table wider than the console comes in parts, each with the first column, so that no word is cut.
    """
    if not rows:
        return
    columns = [visible(column) for column in columns]
    rows = [[visible(text, keep="\n") for text in row] for row in rows]
    for i, (part, cells) in enumerate(_side_by_side(*without_empty(columns, rows), console.width)):
        # As a line of its own: the title of a table would be broken where the table is narrow.
        console.print(rich.text.Text(visible(f"{title}, continued" if i else title), style="bold"))
        table = rich.table.Table()
        for k, column in enumerate(part):
            table.add_column(rich.text.Text(column), justify="right" if k else "left")
        for row in cells:
            table.add_row(*(rich.text.Text(text) for text in row))
        console.print(table)


def _side_by_side(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[Table]:
    """The table in as many parts as the width asks for, so that no word breaks; each part has the first column."""
    parts, used = [[0]], _needed(columns, rows, 0)
    for i in range(1, len(columns)):
        needed = _needed(columns, rows, i)
        if used + needed >= width and len(parts[-1]) > 1:
            parts.append([0])
            used = _needed(columns, rows, 0)
        parts[-1].append(i)
        used += needed
    for part in parts:
        yield [columns[i] for i in part], [[row[i] for i in part] for row in rows]


def _needed(columns: Sequence[str], rows: Sequence[Sequence[str]], i: int) -> int:
    """The least width of a column: its longest word, and the frame."""
    return 3 + max(rich.text.Text(word).cell_len for row in [columns, *rows] for word in row[i].split() or [""])
