"""The figures of the report: matplotlib, no display, colours safe for colour blindness (Okabe and Ito)."""

import collections
import io
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B4C9A", "#555555")
INK, GREY = "#1f2933", "#9aa5b1"
_CURVES = {"scores": "reward", "kl": "KL from the reference"}
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#c3cad2",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 10,
    "grid.color": "#e9edf1",
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def figures(summary: Mapping[str, Any], metrics: str | pathlib.Path | None = None) -> dict[str, bytes]:
    """PNG files by name, one for each of win_rate, ingredients, sweep and training that there is something to draw for.

    Args:
      summary: as described in `report`, with None where a number is missing.
      metrics: path of a metrics.jsonl for the training curves.
    """
    return draw(
        {
            "win_rate": lambda: _win_rate(summary.get("win_rate") or {}, summary.get("win_rate_average") or {}),
            "ingredients": lambda: _ingredients(summary.get("ingredients") or {}),
            "sweep": lambda: _sweep(summary.get("sweep") or {}),
            "training": lambda: (
                _training(training_curves(metrics)) if metrics and pathlib.Path(metrics).exists() else None
            ),
        }
    )


def draw(makers: Mapping[str, Callable[[], "Figure | None"]]) -> dict[str, bytes]:
    """PNG files by name of the figures that the functions make in the report's style; None makes no file."""
    import matplotlib

    with matplotlib.rc_context(rc=cast(Any, _STYLE)):
        drawn = {name: make() for name, make in makers.items()}
        return {name: _png(figure) for name, figure in drawn.items() if figure is not None}


def new_figure(width: float, height: float, rows: int, columns: int) -> "tuple[Figure, np.ndarray]":
    """(figure of inches, axes [rows, columns])."""
    # A bare Figure draws with Agg and needs neither pyplot's global state nor a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def number_or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _rate_bars(axis: "Axes", rates: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Horizontal bars of win rates in percent with their intervals, the first on top."""
    rate, low, high = (
        np.array([100 * number_or_nan(one.get(key)) for one in rates.values()]) for key in ("rate", "low", "high")
    )
    # A BCa interval may leave its own estimate outside; an error bar cannot.
    errors = np.nan_to_num(np.maximum([rate - low, high - rate], 0))
    axis.barh(
        range(len(rates)), rate, height=0.62, color=COLOURS[0], xerr=errors, error_kw={"ecolor": INK, "capsize": 3}
    )
    axis.axvline(50, color=GREY, linestyle="--", linewidth=1)
    axis.set(xlim=(0, 100), xlabel="win rate, %", title=title, yticks=range(len(rates)), yticklabels=list(rates))
    axis.grid(False, axis="y")
    axis.invert_yaxis()


def _win_rate(table: Mapping[str, Any], average: Mapping[str, Any]) -> "Figure | None":
    # Two methods have one comparison: the page's table says it all.
    panels = [name for name, drawn in (("average", average), ("table", len(table) > 2)) if drawn]
    if not panels:
        return None
    figure, axes = new_figure(5.2 * len(panels), 1.4 + 0.42 * max(len(table), len(average)), 1, len(panels))
    axes = dict(zip(panels, axes[0], strict=True))
    if average:
        _rate_bars(axes["average"], average, "Against all others")
    if "table" in axes:
        axis = axes["table"]
        columns = opponents(table)
        rates = [
            [100 * number_or_nan(row.get(opponent, {}).get("rate")) for opponent in columns] for row in table.values()
        ]
        axis.imshow(np.array(rates), cmap=_diverging(), vmin=0, vmax=100, aspect="auto")
        for i, row in enumerate(rates):
            for j, rate in enumerate(row):
                if not math.isnan(rate):
                    axis.text(
                        j, i, f"{rate:.0f}", ha="center", va="center", color="white" if abs(rate - 50) > 30 else INK
                    )
        axis.set(title="Row against column, % won", yticks=range(len(table)), yticklabels=list(table))
        axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        axis.grid(False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return figure


def opponents(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Columns of a {method: {opponent: rate}} table: the methods in their own order, then whoever has no row."""
    named = dict.fromkeys(opponent for row in table.values() for opponent in row)
    return [name for name in table if name in named] + [name for name in named if name not in table]


def _diverging() -> "Colormap":
    """Orange for losing, white half way, blue for winning."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("won", (COLOURS[1], "#ffffff", COLOURS[0]))


def _ingredients(ingredients: Mapping[str, Any]) -> "Figure | None":
    rates = {name: one["win_rate_vs_base"] for name, one in ingredients.items() if one.get("win_rate_vs_base")}
    kl = {name: one["kl"] for name, one in ingredients.items() if one.get("kl") is not None}
    panels = [part for part in (rates, kl) if part]
    if not panels:
        return None
    figure, axes = new_figure(5.2 * len(panels), 1.3 + 0.36 * len(ingredients), 1, len(panels))
    if rates:
        _rate_bars(axes[0, 0], rates, "On its own criterion, against the base")
    if kl:
        axis = axes[0, -1]
        axis.barh(range(len(kl)), list(kl.values()), height=0.62, color=COLOURS[4])
        axis.set(xlabel="KL from the base, nats per answer", title="Distance travelled")
        axis.set(yticks=range(len(kl)), yticklabels=list(kl))
        axis.grid(False, axis="y")
        axis.invert_yaxis()
    return figure


def _sweep(sweep: Mapping[str, Any]) -> "Figure | None":
    """One column per dimension, one row per end: its score against the weight, and the straight line between the ends.

    Scores of different criteria need not have a common unit, so each has a panel of its own.
    """
    sweep = {name: one for name, one in sweep.items() if one.get("weights") and one.get("scores")}
    if not sweep:
        return None
    shown = {}
    for dimension, one in sweep.items():
        ends = [name for name in (one.get("low"), one.get("high")) if name in one["scores"]]
        shown[dimension] = ends or list(one["scores"])
    rows = max(map(len, shown.values()))
    figure, axes = new_figure(max(3.3 * len(sweep), 4.6), 2.3 * rows + 0.4, rows, len(sweep))
    for column, (dimension, one) in zip(axes.T, sweep.items(), strict=True):
        weights = np.array(one["weights"], np.float64)
        order = np.argsort(weights)
        for axis, colour, name in zip(column, itertools.cycle(COLOURS), shown[dimension], strict=False):
            scores = np.array([number_or_nan(score) for score in one["scores"][name]])[order]
            axis.plot(weights[order], scores, "o-", color=colour, markersize=4)
            axis.plot(weights[order[[0, -1]]], scores[[0, -1]], "--", color=colour, linewidth=1, alpha=0.7)
            axis.set_ylabel(f"score of {name}")
        for axis in column[len(shown[dimension]) :]:
            axis.set_visible(False)
        column[0].set_title(dimension)
        named = one.get("low") and one.get("high")
        column[len(shown[dimension]) - 1].set_xlabel(
            f"weight of {one['high']}, rest {one['low']}" if named else "weight"
        )
    return figure


def _training(curves: Mapping[tuple[str, str, str], Mapping[str, np.ndarray]]) -> "Figure | None":
    """One row per stage, reward beside KL, one line per policy."""
    if not curves:
        return None
    stages = list(dict.fromkeys(stage for stage, _, _ in curves))
    figure, axes = new_figure(10.4, 2.9 * len(stages), len(stages), 2)
    for (stage, quantity, unit), lines in curves.items():
        axis = axes[stages.index(stage), int(quantity == "kl")]
        for i, (name, points) in enumerate(lines.items()):
            axis.plot(*points, color=COLOURS[i % len(COLOURS)], linewidth=1.4, label=name)
        axis.set(title=f"{stage}: {_CURVES[quantity]}", xlabel=unit)
        if len(lines) > 1:
            axis.legend(fontsize=8, ncols=2)
    for axis in axes.ravel():
        axis.set_visible(axis.has_data())
    return figure


def training_curves(path: str | pathlib.Path) -> dict[tuple[str, str, str], dict[str, np.ndarray]]:
    """Reads the curves of `objective/scores[/<name>]` and `objective/kl[/<name>]` from a metrics.jsonl.

    Returns:
      {(stage, "scores" or "kl", unit of x): {name: float [2, N]}}, rows x and y. x is the field `samples` where a line
      has it, else `step`.
    """
    points: dict = collections.defaultdict(lambda: collections.defaultdict(list))
    for record in _records(path):
        unit = "samples" if "samples" in record else "step"
        for key, value in record.items():
            parts = key.split("/")
            if parts[0] == "objective" and parts[1:2] in (["scores"], ["kl"]) and len(parts) <= 3:
                line = points[record["stage"], parts[1], unit][parts[2] if len(parts) == 3 else "all"]
                line.append((record[unit], number_or_nan(value)))
    return {
        place: {name: np.array(line, np.float64).T for name, line in lines.items()} for place, lines in points.items()
    }


def _records(path: str | pathlib.Path) -> Iterator[dict[str, Any]]:
    for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was killed while writing
            continue
