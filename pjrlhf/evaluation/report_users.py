"""The tables of user models, for the page and the terminal; `report` describes what they read."""

import collections
import statistics
from collections.abc import Mapping
from typing import Any

import rich.console
import rich.text

from pjrlhf.evaluation import plots_users
from pjrlhf.evaluation.formats import Table, cell, interval, mean_of, number, percent, print_table
from pjrlhf.evaluation.plots_users import CELLS
from pjrlhf.evaluation.users import paired_gain


def page(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What report_users.html reads beside the summary."""
    group, answers = _answers(summary)
    return {
        "personas": plots_users.personas(summary),
        "answers_by": group,
        "answers_of": answers,
        "answers_note": _of_answers(summary),
        "score_names": _score_names(answers),
        "cells": plots_users.cells_of(summary.get("grid") or {}),
        "accuracy_parts": {key: name for key, name in _PARTS.items() if _some(summary.get("accuracy") or {}, key)},
        "gained": _some(summary.get("gain") or {}, "mean"),
        "cards": cards(summary),
        "nothing_personal": nothing_personal(summary),
        "like_length": plots_users.of_like_length(summary),
        "like_length_note": _like_length(summary),
        "counts": _counts(summary.get("cold_start") or {}),
        "role_play": _role_play(summary.get("role_play") or {}),
        "tables": {
            "by-people": _by_people(summary),
            "changed-minds": _changed_minds(summary),
            "context": _context(summary),
            "people-win-rate": _people_win_rate(summary),
        },
    }


_PEOPLE = 12  # at most, each with a row for every model
ROLE_PLAY = "Own answers against those of the base, by a judge in the place of each person"
_PARTS = {
    "micro": "over pairs, %",
    "generic": "generic user",
    "majority": "majority persona",
    "minority": "minority personas",
    "worst_decile": "worst 10 % of people",
    "worst": "worst person",
}


def _some(table: Mapping[str, Any], key: str) -> bool:
    """Whether some row has a number of that name."""
    return any((row or {}).get(key) is not None for row in table.values())


def cards(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The numbers at the top of the page: {"number", "text"}.

    Where models that know people compete with one that does not, the first number is how much better the best of them
    is; else it is the accuracy of the best model that was trained.
    """
    accuracy = {name: one for name, one in (summary.get("accuracy") or {}).items() if _mean(one) is not None}
    controls = summary.get("controls") or ()
    gains = {name: one for name, one in (summary.get("gain") or {}).items() if _mean(one) is not None}
    gains = {name: one for name, one in gains.items() if name not in controls and name in accuracy} or gains
    found = []
    if gains:
        best = max(gains, key=lambda name: gains[name]["mean"])
        gain = gains[best]
        sign = "+" if gain["mean"] > 0 else ""
        text = f"accuracy of {best} over {gain.get('against')}, person by person, {number(gain.get('users'))} people"
        found.append({"number": f"{sign}{percent(gain['mean'])} points", "text": _with_interval(text, gain)})
    else:
        trained = {
            name: one
            for name, one in accuracy.items()
            if name not in ("base", "base_told", "base_told_others", *controls)
        } or accuracy
        if not trained:
            return []
        best = max(trained, key=lambda name: trained[name]["mean"])
    for name in dict.fromkeys([best, *((gains[best].get("against"),) if gains else ())]):
        if one := accuracy.get(name):
            text = f"accuracy of {name}, mean over {len(one.get('users') or {})} people"
            found.append({"number": f"{percent(one['mean'])} %", "text": _with_interval(text, one)})
    generic = (accuracy.get(best) or {}).get("generic")
    if generic is not None and generic != accuracy[best]["mean"]:
        found.append({"number": f"{percent(generic)} %", "text": f"accuracy of {best} when not told who is asking"})
    return found


NOTHING_PERSONAL = (
    "No sign that anything personal was learned: no user model is more accurate than the model that does not know "
    "people, nor, by more than chance, than permuted ids where there are some. Train for"
)
UNDECIDED = (
    "These people are too few to tell whether anything personal was learned: every interval of a gain over the model "
    "that does not know people, and over permuted ids where there are some, holds 0. Evaluate more people, or train for"
)
_MORE = (
    " more steps and, where the base is a small one from scratch, with larger learning rates; docs/start/your_own.md "
    "has values."
)


def nothing_personal(summary: Mapping[str, Any]) -> str:
    """What to say and do where no user model differs from the model that does not know people, nor from a control with
    permuted ids: each interval holds 0. Empty where one does.
    """
    controls, accuracy = summary.get("controls") or (), summary.get("accuracy") or {}
    gains = {
        name: gain
        for name, gain in (summary.get("gain") or {}).items()
        if name not in (*controls, "surface_personal") and _mean(gain) is not None
    }
    compared = list(gains.values())
    for name in gains:
        for control in controls:
            people = [_accuracies(accuracy.get(model)) for model in (name, control)]
            if people[0].keys() & people[1].keys():
                compared.append(paired_gain(*people))
    if not gains or any(_differs(gain) for gain in compared):
        return ""
    # An interval over a few people holds 0 also where the model tells all of them apart.
    undecided = any(gain["mean"] > 0 for gain in gains.values())
    return (UNDECIDED if undecided else NOTHING_PERSONAL) + _MORE


def _accuracies(one: Mapping[str, Any] | None) -> dict[str, Any]:
    """The people of a model whose accuracy is known."""
    people = (one or {}).get("users") or {}
    return {user: seen for user, seen in people.items() if seen.get("accuracy") is not None}


def _differs(gain: Mapping[str, Any]) -> bool:
    """Whether the interval of a gain excludes 0; without an interval, whether the gain is not 0."""
    low, high = (gain["mean"] if gain.get(end) is None else gain[end] for end in ("low", "high"))
    return low > 0 or high < 0


def _mean(one: Mapping[str, Any] | None) -> float | None:
    return (one or {}).get("mean")


def _with_interval(text: str, one: Mapping[str, Any]) -> str:
    return f"{text} ({interval(one)})" if interval(one) else text


def print_users(console: rich.console.Console, summary: Mapping[str, Any]) -> None:
    """The tables of user models in the terminal, where the summary has them."""
    accuracy, matched = summary.get("accuracy") or {}, plots_users.of_like_length(summary)
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
    if note := _like_length(summary):
        console.print(rich.text.Text(f"like length: {note}"))

    rows = [
        [model, one.get("against") or "", cell(one, "mean"), number(one.get("users"))]
        for model, one in (summary.get("gain") or {}).items()
    ]
    print_table(console, "Gain, person by person, points", ["model", "over", "mean", "people"], rows)

    if note := nothing_personal(summary):
        console.print(rich.text.Text(note))

    rows = [
        [model, cell(one, "mean"), percent(one.get("chance")), number(one.get("questions"))]
        for model, one in (summary.get("choices") or {}).items()
    ]
    print_table(console, "Questions answered right, %", ["model", "right", "by guessing", "questions"], rows)

    rows = [
        [model, *(cell(mean_of(table.get(key)), "mean") for key in CELLS)]
        for model, table in (summary.get("grid") or {}).items()
    ]
    print_table(console, "Accuracy by what was known, %", ["model", *CELLS.values()], rows)

    curves = summary.get("cold_start") or {}
    counts = _counts(curves)
    rows = [[model, *(cell(curve.get(k), "mean") for k in counts)] for model, curve in curves.items()]
    print_table(console, "Accuracy on new people by number of their comparisons, %", ["model", *counts], rows)

    tables = _by_people(summary) | _changed_minds(summary) | _context(summary) | _people_win_rate(summary)
    for title, table in tables.items():
        print_table(console, title, *table)

    group, answers = _answers(summary)
    scores = _score_names(answers)
    rows = [
        [
            model,
            name if group else "",
            number(one["people"]) if group != "person" else "",
            number(one["length"], 1),
            *(number(one["score"].get(s)) for s in scores),
        ]
        for model, table in answers.items()
        for name, one in table.items()
    ]
    print_table(console, ROLE_PLAY, *_role_play(summary.get("role_play") or {}))
    title = f"Answers by {group}" if group else "Answers to all people"
    if note := _of_answers(summary):
        title += f". {note}"
    print_table(console, title, ["model", group, "people", "mean length", *scores], rows)


def _like_length(summary: Mapping[str, Any]) -> str:
    """What the accuracy on pairs of like length rests on, and whether that is too little; empty without such pairs."""
    bases = dict.fromkeys(
        (len(one.get("users") or {}), one.get("pairs"), one.get("max_difference"))
        for one in (summary.get("length_matched") or {}).values()
    )
    notes = [
        f"people {people}, pairs {number(pairs)}, lengths differ by at most {percent(difference)} %"
        for people, pairs, difference in bases
    ]
    if len(plots_users.of_like_length(summary)) < len(summary.get("length_matched") or {}):
        most = f"{100 * plots_users.LIKE_LENGTH:.0f} %"
        notes.append(f"too few pairs of like length where there is one person, or lengths differ by more than {most}")
    return "; ".join(notes)


_DIFFERENCES = {
    "comparisons": "Accuracy by the number of a person's comparisons in training, %",
    "stated": "Accuracy by whether comparisons agree with what people say about themselves, %",
}


def _by_people(summary: Mapping[str, Any]) -> dict[str, Table]:
    """Title -> accuracy of different kinds of people, where there are several."""
    tables: dict[str, Table] = {}
    for key, title in _DIFFERENCES.items():
        found = {model: one[key] for model, one in (summary.get("by_people") or {}).items() if one.get(key)}
        kinds = list(dict.fromkeys(kind for one in found.values() for kind in one))
        if len(kinds) > 1:
            rows = [[model, *(cell(one.get(kind), "mean") for kind in kinds)] for model, one in found.items()]
            tables[title] = ["model", *kinds], rows
    return tables


def _changed_minds(summary: Mapping[str, Any]) -> dict[str, Table]:
    """Title -> accuracy of people who change their mind, where the summary has it."""
    models = summary.get("changed_minds") or {}
    curves = {(model, way): curve for model, ways in models.items() for way, curve in ways.items()}
    counts = _counts(curves)
    rows = [[model, way, *(cell(curve.get(k), "mean") for k in counts)] for (model, way), curve in curves.items()]
    title = "Accuracy by the new preference, by number of comparisons after a change of mind, %"
    return {title: (["model", "fitted to", *counts], rows)} if rows else {}


_TEXTS = {
    "own": "the person's",
    "others": "somebody else's",
    "nothing": "none",
    "flipped": "labels reversed",
}


def _context(summary: Mapping[str, Any]) -> dict[str, Table]:
    """Title -> accuracy after different texts before the same prompts, of models that read them."""
    models = summary.get("context") or {}
    rows = [
        [model, *(cell(one.get(way), "mean") for way in _TEXTS), percent(one.get("turned"))]
        for model, one in models.items()
    ]
    title = "Accuracy by the text before the prompt, %"
    return {title: (["model", *_TEXTS.values(), "predictions turned by it"], rows)} if rows else {}


def _people_win_rate(summary: Mapping[str, Any]) -> dict[str, Table]:
    """Title -> how often people prefer their own answers to those of the pooled policy, beside the gain in accuracy."""
    models, gains = summary.get("people_win_rate") or {}, summary.get("gain") or {}
    personas = list(dict.fromkeys(name for one in models.values() for name in one.get("groups") or {}))
    columns = ["model", "against", "answers preferred, ties half", *personas, "ties", "gain in accuracy, points"]
    rows = [
        [
            model,
            one.get("against") or "",
            cell(one, "mean"),
            *(cell((one.get("groups") or {}).get(name), "mean") for name in personas),
            percent(one.get("ties")),
            cell(gains.get(model), "mean"),
        ]
        for model, one in models.items()
    ]
    title = "Win rate of the answers to each person, by the person's own rule, %"
    return {title: (columns, rows)} if rows else {}


def _role_play(models: Mapping[str, Any]) -> Table:
    """How often people prefer their own answers to those of the base, as a judge in their place says."""
    columns = ["model", "preferred, %", "95% interval", "mean over people, %", "95% interval of the mean"]
    columns += ["comparisons", "ties", "without verdict", "people"]
    rows = []
    for model, one in models.items():
        mean = one.get("person_mean") or {}
        rates = percent(one.get("rate")), interval(one), percent(mean.get("mean")), interval(mean)
        counts = (number(one.get(key)) for key in ("n", "ties", "unjudged", "people"))
        rows.append([model, *rates, *counts])
    return columns, rows


def _of_answers(summary: Mapping[str, Any]) -> str:
    """How many answers a person's figures are means of, and why they differ by chance; empty where nobody counted."""
    people = (one for table in (summary.get("generation") or {}).values() for one in table.values())
    counts = sorted({one["answers"] for one in people if one.get("answers") is not None})
    if not counts:
        return ""
    many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"Answers per person: {many}. Each is sampled by itself, so answers to people differ by chance also where a "
        "model does not know them"
    )


def _answers(summary: Mapping[str, Any]) -> tuple[str, dict[str, dict[str, dict[str, Any]]]]:
    """(what people are grouped by, {model: {group: {"people", "length", "shortest", "longest", "score": {name: x}}}}),
    means over the people of a group: a persona; a person where nobody has a persona; all people, as "", where these are
    more than a table shows.
    """
    generation = summary.get("generation") or {}
    by = "persona" if plots_users.personas(summary) else "person"
    if by == "person" and max(map(len, generation.values()), default=0) > _PEOPLE:
        by = ""
    found = collections.defaultdict(dict)
    for model, people in generation.items():
        groups = collections.defaultdict(list)
        for user, one in people.items():
            groups[user if by == "person" else one.get("group") or "all"].append(one)
        for group, ones in groups.items():
            lengths = [one["length"] for one in ones if one.get("length") is not None]
            scores = collections.defaultdict(list)
            for one in ones:
                for name, score in (one.get("score") or {}).items():
                    if score is not None:
                        scores[name].append(score)
            found[model][group] = {
                "people": len(ones),
                "length": statistics.fmean(lengths) if lengths else None,
                "shortest": min(lengths, default=None),
                "longest": max(lengths, default=None),
                "score": {name: statistics.fmean(values) for name, values in scores.items()},
            }
    return by, found


def _score_names(answers: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for table in answers.values() for one in table.values() for name in one["score"]))


def _counts(curves: Mapping[Any, Mapping[str, Any]]) -> list[str]:
    """The numbers of comparisons of all cold-start curves, rising."""
    return sorted({k for curve in curves.values() for k in curve}, key=float)
