"""The figures of the report: matplotlib, no display, colours safe for colour blindness (Okabe and Ito)."""

import collections
import contextlib
import io
import itertools
import json
import math
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from pjrlhf.terminal import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7E5BB0", "#7A7A7A")
GREY = "#9aa5b1"
_MARKERS = "os^Dv"
LINE = 0.3  # inches of a line of a legend
_CURVES = {"scores": "reward", "kl": "KL from the reference"}
_THEMES = {
    "light": {"ink": "#1f2933", "ground": "#ffffff", "edge": "#c3cad2", "grid": "#e9edf1"},
    "dark": {"ink": "#dfe5ea", "ground": "#1b2128", "edge": "#4a5561", "grid": "#2c343d"},
}
_LETTERS = 24  # of a name in a figure
SMALL_SCREEN, READABLE = 500, 10  # pixels: width of a figure there, and of text to be read


def mark(i: int) -> tuple[str, str]:
    """(colour, marker) of the i-th of many models."""
    return COLOURS[i % len(COLOURS)], _MARKERS[i // len(COLOURS) % len(_MARKERS)]


class Picture(NamedTuple):
    """A figure as PNG files for a light and for a dark page, and what it shows."""

    light: bytes
    dark: bytes
    caption: str


def _style(ink: str, ground: str, edge: str, grid: str) -> dict[str, Any]:
    return {
        "axes.axisbelow": True,
        "axes.edgecolor": edge,
        "axes.facecolor": ground,
        "axes.formatter.useoffset": False,
        "axes.grid": True,
        "axes.labelcolor": ink,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": "medium",
        "axes.titleweight": "bold",
        "figure.facecolor": ground,
        "legend.fontsize": "medium",
        "grid.color": grid,
        "legend.frameon": False,
        "savefig.facecolor": ground,
        "text.color": ink,
        "text.parse_math": False,  # names may hold a dollar sign
        "xtick.color": ink,
        "ytick.color": ink,
    }


def ink() -> str:
    """The colour of text in the theme that is drawn."""
    import matplotlib

    return matplotlib.rcParams["text.color"]


def label(name: object) -> str:
    """A name of people, models or criteria as text of a figure: no control characters, and not too long."""
    text = visible(name)
    text = text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}…"
    # Matplotlib leaves out of a legend what starts with an underscore.
    return f"\N{WORD JOINER}{text}" if text.startswith("_") else text


def legend_columns(labels: Iterable[str], letters: int = 75) -> int:
    """How many names of a legend stand side by side above or below a figure of so many letters."""
    return max(1, min(6, letters // (6 + max(map(len, labels), default=0))))


def span(low: float, high: float, least: float, bounds: tuple[float, float] | None = None) -> tuple[float, float]:
    """An axis from `low` to `high`, made wider to `least` around the middle, so that noise does not fill it.

    Args:
      bounds: that the axis does not leave for the sake of its width.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return bounds or (0.0, least)
    missing = max(least - (high - low), 0.0)
    low, high = low - missing / 2, high + missing / 2
    if bounds:
        low, high = max(low - max(high - bounds[1], 0), bounds[0]), min(high + max(bounds[0] - low, 0), bounds[1])
    return low, high


def percent_axis(set_limits: Callable[[float, float], object], limits: tuple[float, float]) -> None:
    """Gives an axis of percentages 40 points at least, within 0 and 100 and a little more for markers."""
    set_limits(*span(*limits, 40.0, (min(-2.0, limits[0]), max(102.0, limits[1]))))


def figures(summary: Mapping[str, Any], metrics: str | pathlib.Path | None = None) -> dict[str, Picture]:
    """Pictures by name, one for each of win_rate, ingredients, sweep and training that there is something to draw for.

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


def draw(makers: Mapping[str, Callable[[], "tuple[Figure, str] | None"]]) -> dict[str, Picture]:
    """Pictures by name of the figures and captions that the functions make; None makes no picture."""
    import matplotlib

    drawn: dict[str, dict[str, Any]] = {name: {} for name in makers}
    for theme, colours in _THEMES.items():
        with matplotlib.rc_context(rc=cast(Any, _style(**colours))), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in a script that the font lacks
            for name, make in makers.items():
                if made := make():
                    drawn[name] |= {theme: _png(made[0]), "caption": made[1]}
    return {name: Picture(**one) for name, one in drawn.items() if one}


def new_figure(width: float, height: float, rows: int, columns: int) -> "tuple[Figure, np.ndarray]":
    """(figure of inches, axes [rows, columns]). Text is so large that it stays readable on small screens; it is
    to have no size of its own below that.
    """
    # A bare Figure draws with Agg and needs neither pyplot's global state nor a display.
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["font.size"] = max(11.0, READABLE * 72 * width / SMALL_SCREEN)  # `draw` restores it
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
        range(len(rates)), rate, height=0.62, color=COLOURS[0], xerr=errors, error_kw={"ecolor": ink(), "capsize": 3}
    )
    axis.axvline(50, color=GREY, linestyle="--", linewidth=1)
    axis.set(xlim=(0, 100), xlabel="win rate, %", title=title)
    axis.set_yticks(range(len(rates)), [label(name) for name in rates])
    axis.grid(False, axis="y")
    axis.invert_yaxis()


def _win_rate(table: Mapping[str, Any], average: Mapping[str, Any]) -> "tuple[Figure, str] | None":
    # Two methods have one comparison: the page's table says it all.
    panels = [name for name, drawn in (("average", average), ("table", len(table) > 2)) if drawn]
    if not panels:
        return None
    figure, axes = new_figure(4.4 * len(panels), 1.4 + 0.42 * max(len(table), len(average)), 1, len(panels))
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
                        j, i, f"{rate:.0f}", ha="center", va="center", color="white" if abs(rate - 50) > 30 else ink()
                    )
        axis.set(title="Row against column, % won", yticks=range(len(table)))
        axis.set_yticklabels([label(name) for name in table])
        axis.set_xticks(range(len(columns)), [label(name) for name in columns], rotation=30, ha="right")
        axis.grid(False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    said = {"average": "against all others with its interval", "table": "pair by pair"}
    return figure, f"Win rate of each method: {', and '.join(said[name] for name in panels)}."


def opponents(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Columns of a {method: {opponent: rate}} table: the methods in their own order, then whoever has no row."""
    named = dict.fromkeys(opponent for row in table.values() for opponent in row)
    return [name for name in table if name in named] + [name for name in named if name not in table]


def _diverging() -> "Colormap":
    """Orange for losing, the ground half way, blue for winning."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("won", (COLOURS[1], matplotlib.rcParams["axes.facecolor"], COLOURS[0]))


def _ingredients(ingredients: Mapping[str, Any]) -> "tuple[Figure, str] | None":
    rates = {name: one["win_rate_vs_base"] for name, one in ingredients.items() if one.get("win_rate_vs_base")}
    kl = {name: one["kl"] for name, one in ingredients.items() if one.get("kl") is not None}
    panels = [part for part in (rates, kl) if part]
    if not panels:
        return None
    figure, axes = new_figure(4.4 * len(panels), 1.3 + 0.36 * len(ingredients), 1, len(panels))
    if rates:
        _rate_bars(axes[0, 0], rates, "On its own criterion, against the base")
    if kl:
        axis = axes[0, -1]
        axis.barh(range(len(kl)), list(kl.values()), height=0.62, color=COLOURS[4])
        axis.set(xlabel="KL from the base, nats per answer", title="Distance travelled")
        axis.set_yticks(range(len(kl)), [label(name) for name in kl])
        axis.set_xlim(0, max(*kl.values(), 0.1) * 1.05)
        axis.grid(False, axis="y")
        axis.invert_yaxis()
    said = (["Each ingredient against the base"] if rates else []) + (["how far each moved from it"] if kl else [])
    return figure, f"{', and '.join(said)}."


def _sweep(sweep: Mapping[str, Any]) -> "tuple[Figure, str] | None":
    """One row per dimension, one column per end: its score against the weight, and the straight line between the ends.

    Scores of different criteria need not have a common unit, so each has a panel of its own.
    """
    sweep = {name: one for name, one in sweep.items() if one.get("weights") and one.get("scores")}
    if not sweep:
        return None
    shown = {}
    for dimension, one in sweep.items():
        ends = [name for name in (one.get("low"), one.get("high")) if name in one["scores"]]
        shown[dimension] = ends or list(one["scores"])
    columns = max(map(len, shown.values()))
    figure, axes = new_figure(max(3.4 * columns, 4.6), 2.6 * len(sweep) + 0.2, len(sweep), columns)
    for row, (dimension, one) in zip(axes, sweep.items(), strict=True):
        weights = np.array(one["weights"], np.float64)
        order = np.argsort(weights)
        for axis, colour, name in zip(row, itertools.cycle(COLOURS), shown[dimension], strict=False):
            scores = np.array([number_or_nan(score) for score in one["scores"][name]])[order]
            axis.plot(weights[order], scores, "o-", color=colour, markersize=4)
            axis.plot(weights[order[[0, -1]]], scores[[0, -1]], "--", color=colour, linewidth=1, alpha=0.7)
            axis.set_ylabel(f"score of {label(name)}")
            low, high = axis.get_ylim()
            axis.set_ylim(*span(low, high, 0.1 * max(1.0, float(np.nanmax(np.abs(scores), initial=0.0)))))
            named = one.get("low") and one.get("high")
            axis.set_xlabel(f"weight of {label(one['high'])},\nrest {label(one['low'])}" if named else "weight")
        for axis in row[len(shown[dimension]) :]:
            axis.set_visible(False)
        row[0].set_title(label(dimension))
    return figure, "Score against weight; dashed, the straight line between the ends."


def _training(curves: Mapping[tuple[str, str, str], Mapping[str, np.ndarray]]) -> "tuple[Figure, str] | None":
    """One row per stage, reward beside KL, one line per policy."""
    if not curves:
        return None
    stages = list(dict.fromkeys(stage for stage, _, _ in curves))
    figure, axes = new_figure(7.0, 2.9 * len(stages) + 0.5, len(stages), 2)
    names = list(dict.fromkeys(name for lines in curves.values() for name in lines))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    for (stage, quantity, unit), lines in curves.items():
        axis = axes[stages.index(stage), int(quantity == "kl")]
        for name, points in lines.items():
            axis.plot(*points, color=colours[name], linewidth=1.4)
        axis.set(title=f"{label(stage)}:\n{_CURVES[quantity]}", xlabel=unit)
    for axis in axes.ravel():
        axis.set_visible(axis.has_data())
    if len(names) > 1:
        handles = [axes[0, 0].plot([], [], color=colours[name])[0] for name in names]
        columns = legend_columns(map(label, names), 50)
        figure.legend(handles, list(map(label, names)), loc="outside lower center", ncols=columns)
    shown = {quantity for _, quantity, _ in curves}
    said = [text for name, text in (("scores", "mean reward"), ("kl", "KL from the reference")) if name in shown]
    return figure, f"{' and '.join(said).capitalize() if 'scores' in shown else said[0]} as training went on."


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
    for line in pathlib.Path(path).read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # damaged, such as the last line of a killed run
            record = json.loads(line)
            if isinstance(record, dict) and {"stage", "step"} <= record.keys():
                yield record
