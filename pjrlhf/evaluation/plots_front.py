"""Fronts of several methods: the figure of control, and the front as a drawing for the page.

Shapes: N objectives, n points of a method.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pjrlhf.evaluation.pareto import non_dominated
from pjrlhf.evaluation.plots import COLOURS, Picture, draw, label, legend_columns, new_figure, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_KINDS = {"dominated": "dominated", "unseen": "not trained on"}
_PAIRS, _COLUMNS = 6, 2  # pairs of objectives that are drawn, panels of a figure beside each other
_LEGEND = 60  # letters beside each other in a legend
_SPAN = 0.2  # least width of an axis of rewards, whose scale is that of the base
_NAME = 24  # letters of a method in a legend; longer names would leave no room for the panels


def figures(summary: Mapping[str, Any]) -> dict[str, Picture]:
    """Pictures by name: control, if there is something to draw.

    Args:
      summary: as described in `report`, with None where a number is missing.
    """
    found = _fronts(summary)
    return draw({"control": lambda: _control(_objectives(summary, found), found)})


def _fronts(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The points of each method that has any, and how it is drawn wherever it is.

    Returns:
      {method: {"weights", "rewards": float [n, N], "unseen", "dominated": bool [n], "colour", "marker"}}, points in
      order of the first weight, without those that lack a number. The index of a method decides colour and marker.
    """
    found = {}
    for i, (method, one) in enumerate((summary.get("methods") or {}).items()):
        points = one.get("points") or {}
        weights, rewards = points.get("weights") or [], points.get("rewards") or []
        unseen = points.get("unseen") or [False] * len(weights)
        rows = [row for row in zip(weights, rewards, unseen, strict=True) if None not in (*row[0], *row[1])]
        if rows:
            rows.sort(key=lambda row: row[0])
            weights, rewards, unseen = (np.array(part) for part in zip(*rows, strict=True))
            colour, again = COLOURS[i % len(COLOURS)], i // len(COLOURS)
            found[method] = {
                "weights": weights.astype(float),
                "rewards": rewards.astype(float),
                "unseen": unseen.astype(bool),
                "dominated": ~non_dominated(rewards),
                "colour": _mix(colour, "#000000", 0.45) if again else colour,
                "marker": _MARKERS[i % len(_MARKERS)],
            }
    return found


def _objectives(summary: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Names [N] of the objectives, numbers where the summary has none."""
    count = max((one["rewards"].shape[1] for one in found.values()), default=0)
    return (summary.get("front") or {}).get("objectives") or [f"objective {k + 1}" for k in range(count)]


def _pairs(names: list[str]) -> list[tuple[int, int]]:
    """The pairs of objectives that get a panel."""
    return list(itertools.combinations(range(len(names)), 2))[:_PAIRS]


def _mix(colour: str, other: str, fraction: float) -> str:
    """`colour` with a fraction of `other`, all "#rrggbb"."""
    a, b = (np.array([int(one[i : i + 2], 16) for i in (1, 3, 5)]) for one in (colour, other))
    return "#" + "".join(f"{value:02x}" for value in np.rint(a + fraction * (b - a)).astype(int))


def _panels(count: int, found: Mapping[str, Any]) -> "tuple[Figure, list[Axes]]":
    """(figure, the axes of `count` panels), with room below for a legend of all methods."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(_COLUMNS, count)
    rows = math.ceil(count / columns)
    lines = math.ceil(len(found) / legend_columns(map(_short, found), _LEGEND))
    height = (4.2 if count == 1 else 2.9) * rows + 0.3 + 0.25 * lines
    figure, axes = new_figure(7.0, height, rows, columns)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.1))
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def _legend(figure: "Figure", axis: "Axes", found: Mapping[str, Any]) -> None:
    """All methods, outside the panels."""
    handles = [
        axis.plot([], [], linestyle="none", markersize=6, marker=one["marker"], color=one["colour"])[0]
        for one in found.values()
    ]
    names = [_short(method) for method in found]
    figure.legend(handles, names, loc="outside lower center", ncols=legend_columns(names, _LEGEND))


def _short(name: str) -> str:
    name = label(name)
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


def _at(reference: list[float | None], a: int, b: int) -> tuple[float, float] | None:
    """The reference in the panel of objectives a and b, if it is known there."""
    x, y = (reference[k] if len(reference) > k else None for k in (a, b))
    return None if x is None or y is None else (x, y)


def _control(names: list[str], found: Mapping[str, Any]) -> "tuple[Figure, str] | None":
    """One panel per objective: reward against its own weight, the mean of the points of one weight."""
    if not found:
        return None
    figure, axes = _panels(len(names), found)
    for k, axis in enumerate(axes):
        for one in found.values():
            # Weights that differ by rounding only are one.
            weights, which = np.unique(np.round(one["weights"][:, k], 6), return_inverse=True)
            rewards = np.bincount(which, one["rewards"][:, k]) / np.bincount(which)
            axis.plot(weights, rewards, marker=one["marker"], color=one["colour"], linewidth=1.2, markersize=4.5)
        axis.set(title=label(names[k]), xlabel="weight", ylabel="reward", xlim=(-0.04, 1.04))
        axis.set_ylim(*span(*axis.get_ylim(), _SPAN))
    _legend(figure, axes[0], found)
    return figure, "Reward of each objective against its own weight, the mean of all points of that weight."


def drawing(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The front as the page draws it, an SVG per pair of objectives, in its pixels; None where there are no points.

    Returns:
      {"width", "height": of a panel, "radius": of a circle,
      "kinds": {class of some circle: its name},
      "panels": [{"corner": (left, top) with the labels, "left", "right", "top", "bottom", "x_label", "y_label",
      "x_ticks", "y_ticks": [(place, number)], "reference": (x, y) or None}],
      "methods": {method: {"colour", "label", "lines": [points of a polyline], of N = 2 alone, "circles": [{"panel":
      its index, "x", "y", "kind": CSS classes, "title"}]}}}.
    """
    found = _fronts(summary)
    names = _objectives(summary, found)
    shown, reference = _pairs(names), (summary.get("front") or {}).get("reference") or []
    if not found or not shown:
        return None
    # About as wide as on a small screen, where text then keeps its size.
    width, height, radius = (440, 330, 4.5) if len(shown) == 1 else (310, 280, 3.5)
    methods = {
        method: {"colour": one["colour"], "label": _short(method), "lines": [], "circles": []}
        for method, one in found.items()
    }
    panels = []
    for i, (a, b) in enumerate(shown):
        marked = _at(reference, a, b)
        everything = np.concatenate(
            [one["rewards"][:, [a, b]] for one in found.values()] + ([[marked]] if marked else [])
        )
        left, right, top, bottom = i * width + 52, (i + 1) * width - 14, 10, height - 46
        x_ticks, x_place = _scale(everything[:, 0], left, right)
        y_ticks, y_place = _scale(everything[:, 1], bottom, top)
        panel = {
            "corner": (i * width, 0),
            "left": left,
            "right": right,
            "top": top,
            "bottom": bottom,
            "x_ticks": x_ticks,
            "y_ticks": y_ticks,
        }
        panel |= {"x_label": f"reward of {names[a]}", "y_label": f"reward of {names[b]}"}
        panels.append(panel | {"reference": (x_place(marked[0]), y_place(marked[1])) if marked else None})
        for method, one in found.items():
            x, y = x_place(one["rewards"][:, a]), y_place(one["rewards"][:, b])
            if len(names) == 2:
                methods[method]["lines"].append(" ".join(f"{x[k]:.1f},{y[k]:.1f}" for k in range(len(x))))
            methods[method]["circles"] += [
                {"panel": i, "x": x[k], "y": y[k]} | mark for k, mark in enumerate(_marks(method, names, one))
            ]
    kinds = {kind: name for kind, name in _KINDS.items() if any(one[kind].any() for one in found.values())}
    size = {"width": width, "height": height, "radius": radius}
    return size | {"kinds": kinds, "panels": panels, "methods": methods}


def _scale(values: np.ndarray, start: float, end: float) -> tuple[list[tuple[float, str]], Callable[[Any], Any]]:
    """([(place, number)] of round ticks around the values, a function from values to places between start and end)."""
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(5).tick_values(*span(values.min(), values.max(), _SPAN))
    place = lambda value: start + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (end - start)  # noqa: E731
    return [(place(tick), f"{tick:g}") for tick in ticks], place


def _marks(method: str, names: list[str], one: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The CSS classes of each point and what it says of itself."""
    for weights, rewards, *kind in zip(*(one[key] for key in ("weights", "rewards", *_KINDS)), strict=True):
        kinds = [name for name, true in zip(_KINDS, kind, strict=True) if true]
        head = ", ".join([method, *(_KINDS[name] for name in kinds)])
        weighed = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(names, weights, strict=True))
        earned = ", ".join(f"{name} {reward:.3f}" for name, reward in zip(names, rewards, strict=True))
        yield {"kind": " ".join(kinds), "title": f"{head}\nweights: {weighed}\nrewards: {earned}"}
