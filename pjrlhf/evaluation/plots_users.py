"""The figures of user models: accuracy over people, new people, the map of people and the answers they get."""

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pjrlhf.evaluation.formats import Estimate, mean_of
from pjrlhf.evaluation.plots import (
    COLOURS,
    GREY,
    LINE,
    Picture,
    draw,
    ink,
    label,
    legend_columns,
    mark,
    new_figure,
    number_or_nan,
    percent_axis,
    span,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELLS = {
    "seen_user_seen_prompt": "known people, known prompts",
    "seen_user_unseen_prompt": "known people, new prompts",
    "unseen_user_seen_prompt": "new people, known prompts",
    "unseen_user_unseen_prompt": "new people, new prompts",
}
# Personas start at another colour than models, because no figure shows both.
_PERSONA_COLOURS = (*COLOURS[2:], *COLOURS[:2])
_PARTS = {
    "generic": ("generic user", "D"),
    "majority": ("majority persona", "^"),
    "minority": ("minority personas", "v"),
    "worst_decile": ("worst 10 % of people", "X"),
}
_PLACES = 12  # room for people in a row, so that a few do not fill it
_CEILING = "ceiling without the person"
_NAMED = 45  # people whose names fit under an axis


def figures(summary: Mapping[str, Any]) -> dict[str, Picture]:
    """Pictures by name: accuracy, people, grid, cold_start, embedding and generation, each where there is something.

    Args:
      summary: as described in `report`, with None where a number is missing.
    """
    accuracy, ceiling = summary.get("accuracy") or {}, (summary.get("ceiling") or {}).get("majority_fraction")
    people = personas(summary)
    each = {
        model: {user: seen.get("accuracy") for user, seen in (one.get("users") or {}).items()}
        for model, one in accuracy.items()
    }
    lengths = {
        model: {user: seen.get("length") for user, seen in users.items()}
        for model, users in (summary.get("generation") or {}).items()
    }
    return draw(
        {
            "accuracy": lambda: _accuracy(accuracy, of_like_length(summary), ceiling),
            "people": lambda: _strips(each, people, ceiling),
            "grid": lambda: _grid(summary.get("grid") or {}),
            "cold_start": lambda: _cold_start(summary.get("cold_start") or {}, ceiling),
            "embedding": lambda: _embedding(summary.get("embedding") or {}),
            "generation": lambda: _strips(lengths, people, bars=True),
        }
    )


LIKE_LENGTH = 0.3  # the quarter of pairs that is kept may differ by so much, of the longer answer


def of_like_length(summary: Mapping[str, Any]) -> dict[str, Any]:
    """`length_matched` of the models whose pairs are of like length and of more than one person."""
    return {
        model: one
        for model, one in (summary.get("length_matched") or {}).items()
        if len(one.get("users") or {}) > 1 and number_or_nan(one.get("max_difference")) <= LIKE_LENGTH
    }


def personas(summary: Mapping[str, Any]) -> dict[str, str]:
    """{user: persona} from wherever the summary names it."""
    found = {}
    for section in ("accuracy", "generation"):
        for one in (summary.get(section) or {}).values():
            users = one.get("users") or {} if section == "accuracy" else one
            found |= {user: seen["group"] for user, seen in users.items() if seen.get("group")}
    return found


def _estimates(values: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    """Means [N] in percent and error bars [2, N] of fractions, nan where one is missing."""
    mean, low, high = (
        np.array([100 * number_or_nan(mean_of(value).get(key)) for value in values]) for key in ("mean", "low", "high")
    )
    # A BCa interval may leave its own estimate outside; an error bar cannot.
    return mean, np.nan_to_num(np.maximum([mean - low, high - mean], 0))


def _accuracy(
    accuracy: Mapping[str, Any], matched: Mapping[str, Any], ceiling: float | None
) -> "tuple[Figure, str] | None":
    """One row per model: the mean over people with its interval, its parts, and below it the pairs of like length."""
    models = list(dict.fromkeys([*accuracy, *matched]))
    if not models:
        return None
    figure, axes = new_figure(8.4, 1.3 + 0.55 * len(models), 1, 1)
    axis, rows = axes[0, 0], np.arange(len(models))
    style = {"linestyle": "none", "marker": "o", "markersize": 8, "capsize": 3, "zorder": 3}
    for name, part, shift, fill in (
        ("all pairs", accuracy, 0.0, None),
        ("pairs of like length", matched, 0.26, "white"),
    ):
        mean, errors = _estimates([part.get(model) or {} for model in models])
        if not np.isnan(mean).all():
            axis.errorbar(mean, rows + shift, xerr=errors, color=COLOURS[0], markerfacecolor=fill, label=name, **style)
    for key, colour in zip(_PARTS, (COLOURS[7], COLOURS[2], COLOURS[4], COLOURS[1]), strict=True):
        name, marker = _PARTS[key]
        fractions = np.array([100 * number_or_nan((accuracy.get(model) or {}).get(key)) for model in models])
        if not np.isnan(fractions).all():
            axis.scatter(fractions, rows - 0.24, s=42, marker=marker, color=colour, label=name, zorder=3)
    if ceiling is not None:
        axis.axvline(100 * ceiling, color=ink(), linestyle="--", linewidth=1.2, label=_CEILING)
    axis.set_yticks(rows, [label(model) for model in models])
    axis.set(ylim=(len(models) - 0.45, -0.55), xlabel="accuracy, %")
    percent_axis(axis.set_xlim, axis.get_xlim())
    axis.grid(False, axis="y")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    parts = (
        ", and parts of them" if any((accuracy.get(model) or {}).get(key) for model in models for key in _PARTS) else ""
    )
    dashed = f"; dashed, the {_CEILING}" if ceiling is not None else ""
    return figure, f"Mean over people with its interval{parts}{dashed}."


def _by_persona(values: Mapping[str, Mapping[str, Any]], people: Mapping[str, str]) -> dict[str, list[str]]:
    """{persona: users}, the most common persona first, its users by rising mean over the models."""
    seen = collections.defaultdict(list)
    for users in values.values():
        for user, value in users.items():
            if value is not None:
                seen[user].append(value)
    found = collections.defaultdict(list)
    for user in sorted(seen, key=lambda user: (np.mean(seen[user]), user)):
        found[people.get(user, "")].append(user)
    return dict(sorted(found.items(), key=lambda item: (not item[0], -len(item[1]), item[0])))


def _strips(
    values: Mapping[str, Mapping[str, Any]],
    people: Mapping[str, str],
    ceiling: float | None = None,
    *,
    bars: bool = False,
) -> "tuple[Figure, str] | None":
    """One row per model with the same people in the same order: dots of accuracies, or bars of lengths."""
    groups = _by_persona(values, people)
    if not groups:
        return None
    models = [model for model, users in values.items() if any(value is not None for value in users.values())]
    order = [user for users in groups.values() for user in users]
    named, scale = len(order) <= _NAMED, 1 if bars else 100
    figure, axes = new_figure(8.4, 1.0 + 1.35 * len(models) + 0.4 * named, len(models), 1)
    top = 1.08 * scale * max((value for users in values.values() for value in users.values() if value), default=1)
    for axis, model in zip(axes[:, 0], models, strict=True):
        start = 0
        for colour, (persona, users) in _coloured(groups):
            y = scale * np.array([number_or_nan(values[model].get(user)) for user in users])
            x = start + np.arange(len(users))
            if bars:
                axis.bar(x, y, width=0.8, color=colour, label=label(persona))
            else:
                axis.plot(
                    x, y, "o", color=colour, label=label(persona), markersize=max(2.0, min(6.5, 330 / len(order)))
                )
            if not np.isnan(y).all():
                axis.plot(
                    [start - 0.4, x[-1] + 0.4], [np.nanmean(y)] * 2, color=ink() if bars else colour, linewidth=1.2
                )
            start += len(users)
        if ceiling is not None:
            axis.axhline(100 * ceiling, color=ink(), linestyle="--", linewidth=1.2, label=_CEILING)
        axis.set(
            title=label(model),
            xlim=(-0.8, max(len(order), _PLACES) - 0.2),
            ylim=(0, top) if bars else (-5, 105),
            xticks=[],
        )
        axis.grid(False, axis="x")
    if named:
        axes[-1, 0].set_xticks(range(len(order)), [label(user) for user in order], rotation=90, fontsize="small")
    figure.supylabel("mean length of an answer" if bars else "accuracy, %", fontsize="medium")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if any(labels):
        figure.legend(handles, labels, loc="outside upper right", ncols=legend_columns(labels))
    what = "Mean length of the answers to each person" if bars else "One dot per person"
    by = ", grouped and coloured by persona" if any(groups) else ""
    means = "means of the personas" if any(groups) else "means"
    end = f"; dashed, the {_CEILING}" if ceiling is not None else ""
    return figure, f"{what}{by}, at the same place in every row; the lines are the {means}{end}."


def _coloured(groups: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, Any]]]:
    """(colour, (persona, ...)); people without a persona are grey."""
    for i, (persona, part) in enumerate(groups.items()):
        yield (_PERSONA_COLOURS[i % len(_PERSONA_COLOURS)] if persona else GREY), (persona, part)


def _grid(grid: Mapping[str, Any]) -> "tuple[Figure, str] | None":
    grid, cells = {model: table for model, table in grid.items() if table}, cells_of(grid)
    if not cells:
        return None
    figure, axes = new_figure(8.4, 3.4, 1, 1)
    axis, step, drawn = axes[0, 0], 0.7 / len(grid), False
    style: dict[str, Any] = {"linestyle": "none", "marker": "o", "capsize": 3}
    for i, (model, table) in enumerate(grid.items()):
        mean, errors = _estimates([table.get(key) for key in cells])
        drawn |= bool(errors.any())
        x = np.arange(len(cells)) + (i - (len(grid) - 1) / 2) * step
        axis.errorbar(x, mean, yerr=errors, color=COLOURS[i % len(COLOURS)], label=label(model), **style)
    axis.set_xticks(range(len(cells)), [name.replace(", ", ",\n") for name in cells.values()])
    axis.set(ylabel="accuracy, %", xlim=(-0.6, len(cells) - 0.4))
    percent_axis(axis.set_ylim, axis.get_ylim())
    axis.grid(False, axis="x")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, f"Accuracy by what was known{'; bars are 95 % intervals' if drawn else ''}."


def cells_of(grid: Mapping[str, Any]) -> dict[str, str]:
    """Those of `CELLS` that some model has a number for."""
    return {
        key: name
        for key, name in CELLS.items()
        if any(mean_of(table.get(key)).get("mean") is not None for table in grid.values())
    }


def _cold_start(curves: Mapping[str, Any], ceiling: float | None) -> "tuple[Figure, str] | None":
    """Accuracy on new people against the number of their comparisons, spaced like log(1 + k)."""
    curves = {model: curve for model, curve in curves.items() if curve}
    if not curves:
        return None
    few = len(curves) <= len(COLOURS)  # more intervals hide each other; the table has them
    figure, axes = new_figure(8.4, max(3.6, 0.5 + LINE * len(curves)), 1, 1)
    axis, counts, drawn = axes[0, 0], set(), False
    for i, (model, curve) in enumerate(curves.items()):
        curve = sorted((float(k), fraction) for k, fraction in curve.items())
        x, (mean, errors) = np.array([k for k, _ in curve]), _estimates([fraction for _, fraction in curve])
        colour, marker = mark(i)
        axis.plot(x, mean, marker=marker, color=colour, markersize=5, label=label(model))
        if few:
            axis.fill_between(x, mean - errors[0], mean + errors[1], color=colour, alpha=0.15, linewidth=0)
        counts |= set(x)
        drawn |= few and bool(errors.any())
    if ceiling is not None:
        axis.axhline(100 * ceiling, color=ink(), linestyle="--", linewidth=1.2, label=_CEILING)
    axis.set_xscale("function", functions=(np.log1p, np.expm1))
    axis.set_xticks(sorted(counts), [f"{k:g}" for k in sorted(counts)])
    axis.set_xlim(*np.expm1([np.log1p(min(counts)) - 0.1, np.log1p(max(counts)) + 0.1]))
    axis.set(xlabel="comparisons a new person has given", ylabel="accuracy, %")
    percent_axis(axis.set_ylim, axis.get_ylim())
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    shaded = "; shaded, 95 % intervals over people" if drawn else ""
    dashed = f"; dashed, the {_CEILING}" if ceiling is not None else ""
    return figure, f"Accuracy on new people by the number of their comparisons{shaded}{dashed}."


def _embedding(maps: Mapping[str, Any]) -> "tuple[Figure, str] | None":
    maps = {model: one for model, one in maps.items() if one.get("x") and one.get("y")}
    if not maps:
        return None
    columns = min(3, len(maps))
    rows = math.ceil(len(maps) / columns)
    figure, axes = new_figure(3.45 * max(columns, 2), 3.4 * rows + 0.3, rows, columns)
    groups = collections.Counter(persona or "" for one in maps.values() for persona in one.get("groups") or [])
    groups = dict(sorted(groups.items(), key=lambda item: (not item[0], -item[1], item[0])))
    colours = {persona: colour for colour, (persona, _) in _coloured(groups)}
    for axis, (model, one) in zip(axes.flat, maps.items(), strict=False):
        x, y = (np.array([number_or_nan(value) for value in one[name]]) for name in ("x", "y"))
        own = np.array([persona or "" for persona in one.get("groups") or [""] * len(x)])
        for persona in [name for name in (groups or {"": 0}) if (own == name).any()]:
            chosen = own == persona
            axis.scatter(x[chosen], y[chosen], s=34, color=colours.get(persona, GREY), alpha=0.8, linewidth=0)
        axis.margins(0.12)
        if np.isfinite(x).any() and np.isfinite(y).any():  # people who are alike up to rounding stay together
            ends = (span(np.nanmin(one), np.nanmax(one), 1e-3) for one in (x, y))
            axis.update_datalim(list(zip(*ends, strict=True)))
            axis.autoscale_view()
        axis.set_aspect("equal", "datalim")  # distances mean the same along both axes
        axis.set_title(label(model))
    for axis in axes.flat[len(maps) :]:
        axis.set_visible(False)
    if any(groups):
        figure.legend(
            [axes[0, 0].scatter([], [], color=colour) for colour in colours.values()],
            [label(persona) or "unknown" for persona in colours],
            loc="outside upper right",
            ncols=legend_columns(map(label, colours)),
        )
    return figure, f"One dot per person{', coloured by persona' if any(groups) else ''}."
