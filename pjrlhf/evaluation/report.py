"""The report of an evaluation: summary.json for programs, index.html for people, tables for the terminal.

Layout of `summary` (every section may be absent, every number may be nan or None):

    title                 str
    config                {name: value}, may nest
    run                   {name: text}, how the run was made
    preferences           {preference: the sentence that states it}
    controls              [model], of user models, that are trained to fail
    stage_seconds         {stage: seconds};  total_seconds: float
    reward_models         {preference: {accuracy, pairs, mean, std}}
    ingredients           {preference: {win_rate_vs_base: rate, kl, length, score, base_score}}
    win_rate              {method: {opponent: rate}}, over all combinations
    win_rate_average      {method: rate}, against all others
    combos                {"P1A+P2A+P3A": {method: {opponent: rate}}}
    sweep                 {dimension: {low, high: preference; weights: [of high]; scores: {preference: [...]};
                          length: [...]; spearman: {preference: x}; chord_gap: {preference: {mean, min, max}}}}
    position_consistency  fraction of comparisons judged alike in both orders, where the judge could differ
    judge                 {name, asked, judged; of a language model also position_bias, requests, failures, cost}
    judges                [like `judge`, with self_consistency: the dict of `judge.agreement`], that and further judges
    win_rate_by_judge     {judge: {method: rate}}, against the base, where there are several judges
    agreement             [{criterion, or "all"; judges: [name, name], and the dict of `judge.agreement`}]
    length_controlled     {criterion: {policy: {rate, length, base_length, n, and the fields of
                          `length_control.ControlledRate`}}}, against the base
    notes                 [str]

of several methods on one front, for N objectives, where a metric is a number or, over seeds, {"mean", "low", "high"},

    front                 {objectives: [N] names; reference: [N], of the hypervolume; low, high: [N], the judge's scores
                          that count as 0 and 1; held_out: number of preferences never trained on; seeds: number;
                          metrics: `pareto.described`, all that are registered where it is missing}
    methods               {method: {each metric of `front`; samples, seconds: of training;
                          unseen: the same metrics on preferences never trained on;
                          points: {weights, rewards: [n, N], means over seeds; unseen: [n] bool}}}
    claims                [str], findings in words
    scaling               {new: [preference]; methods: {method: {samples, seconds, ingredients_trained}};
                          win_rate: {method: {opponent: rate, or a number}}}, what it costs to add preferences

and of user models, where `accuracy` is the dict of `users.user_accuracy`:

    accuracy              {model: accuracy and "generic": fraction of the same pairs that the generic user gets right}
    gain                  {model: {against: a model} and the dict of `users.paired_gain`}
    choices               {model: the dict of `users.choice_accuracy`}
    ceiling               {majority_fraction: the best accuracy possible without knowing the person}
    grid                  {model: {"seen_user_seen_prompt", "seen_user_unseen_prompt", "unseen_user_seen_prompt",
                          "unseen_user_unseen_prompt": fraction, or a mapping with mean, low and high}}
    length_matched        {model: the dict of `users.length_matched`}
    cold_start            {model: the dict of `users.cold_start_curve`}
    by_people             {model: {what people differ in: the dict of `users.accuracy_by`}}
    changed_minds         {model: {way to fit a row: the dict of `users.cold_start_curve`}}, by the new preference
    context               {model: {own, others, nothing, flipped: each with mean, low and high; turned}}: after the
                          person's text, somebody else's, none, and that of comparisons with labels reversed, which
                          turns a fraction of the predictions around
    size                  {model: {rows, people, table_bytes, adapter_bytes}}
    embedding             {model: {users, groups: [U] names; x, y: [U]}}, a map of the people
    role_play             {model: a rate against the base over people; person_mean: {mean, low, high}; people: number;
                          users: {user: fraction won}}, by a judge in the place of each person
    user_models           {model: {kind; source, state, injection, objective: its parts; seeds: [accuracy of each]; ece;
                          flip: {flipped, accuracy: of the labels reversed}; bytes, milliseconds: of a new person;
                          seconds, loss: of training; new_gain: like gain, on new people; kl, active_units: of latents;
                          spread: of weights}}
    people_win_rate       {model: {against: a model, the dict of `users.rate_of_people`, and groups: the same of each
                          persona}}, of answers, by the rule that labelled the comparisons of each person
    generation            {model: {user: {group, answers: number; length, score: {name: x}}}}, means over the answers

`rate` is a `winrate.Rate` or a mapping with its fields: rate, rate_half, low, high, wins, losses, ties.
A sample is {combo, prompt, answers: {method: text}} or {model, prompt, answers: {user: text}}; a prompt is a text or a
list of messages.
"""

import base64
import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jinja2
import rich.console

from pjrlhf.data.messages import Prompt, request_of, said, tools_of
from pjrlhf.data.records import as_json
from pjrlhf.errors import UserError
from pjrlhf.evaluation import (
    plots,
    plots_front,
    plots_users,
    report_front,
    report_judges,
    report_user_models,
    report_users,
)
from pjrlhf.evaluation.formats import (
    cell,
    duration,
    interval,
    mean_of,
    number,
    percent,
    print_table,
    terminal_console,
)
from pjrlhf.paths import atomic_write


def write_report(
    folder: str | pathlib.Path,
    summary: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]] = (),
    metrics: str | pathlib.Path | None = None,
) -> pathlib.Path:
    """Writes summary.json, one PNG per figure and the self-contained index.html into `folder`.

    Args:
      folder: made if absent.
      summary: see the module docstring.
      samples: answers to show beside each other.
      metrics: metrics.jsonl of the run, for training curves.

    Returns:
      The path of index.html. Each file is replaced whole: a reader never sees half of one.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    summary = as_json(summary)
    _write(folder / "summary.json", (json.dumps(summary, indent=1, allow_nan=False) + "\n").encode())
    pictures = plots.figures(summary, metrics) | plots_front.figures(summary) | plots_users.figures(summary)
    pictures |= report_user_models.figures(summary)
    for name, picture in pictures.items():
        _write(folder / f"{name}.png", picture.light)
    page = _template().render(
        summary=summary,
        samples=[{**as_json(one), "tools": tools_of(one.get("prompt"))} for one in samples],
        pictures=pictures,
        config=flatten(summary.get("config") or {}),
        opponents=plots.opponents,
        by_combo=_by_combo(summary.get("combos") or {}),
        **report_front.page(summary),
        **report_judges.page(summary),
        **report_users.page(summary),
        **report_user_models.page(summary),
    )
    _write(folder / "index.html", page.encode())
    return folder / "index.html"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted names."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def turns(prompt: Prompt | None) -> list[tuple[str, str]]:
    """(role, what it says) of every message of a conversation; nothing for a text or a single message of the user."""
    if not prompt or isinstance(prompt, str) or (len(prompt) == 1 and prompt[0]["role"] == "user"):
        return []
    return [(message["role"], said(message)) for message in prompt]


def request(prompt: Prompt | None) -> str:
    """The text that a prompt wants answered."""
    return request_of(prompt) if prompt else ""


def _by_combo(combos: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """{combo: {method: rate}} against all opponents together, from the counts."""
    return {combo: {method: _pooled(row.values()) for method, row in table.items()} for combo, table in combos.items()}


def _pooled(rates: Collection[Mapping[str, Any]]) -> dict[str, Any]:
    total = {key: sum(rate.get(key) or 0 for rate in rates) for key in ("wins", "losses", "ties")}
    decided = total["wins"] + total["losses"]
    return total | {"rate": total["wins"] / decided if decided else None}


def _write(path: pathlib.Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write_bytes(content)


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    filters = (percent, number, duration, interval, mean_of, turns, request)
    environment.filters |= {function.__name__: function for function in filters}
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return environment.get_template("report.html")


def print_summary(path: pathlib.Path, summary: Any, remedy: str) -> None:
    """The closing tables of the run whose summary.json this is, whatever it holds.

    Raises:
      UserError: it is no summary of a run; the message ends with `remedy`.
    """
    console = terminal_console()
    try:
        with console.capture() as captured:  # all of it or nothing
            print_tables(summary, console)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise UserError(f"{path}: is no summary of a run ({type(error).__name__}: {error}); {remedy}") from error
    print(captured.get(), end="")


def print_tables(summary: Mapping[str, Any], console: rich.console.Console | None = None) -> None:
    """The closing tables of a run, from win rates to fronts, user models and time, where the summary has them."""
    console = console or terminal_console()
    summary = as_json(summary)
    average, pairs = summary.get("win_rate_average") or {}, summary.get("win_rate") or {}
    against = plots.opponents(pairs)
    rows = [
        [method, cell(average.get(method)), *(cell(pairs.get(method, {}).get(opponent)) for opponent in against)]
        for method in dict.fromkeys([*average, *pairs])
    ]
    print_table(console, "Win rate, % (95% interval)", ["method", "all others", *against], rows)

    reward_models, ingredients = summary.get("reward_models") or {}, summary.get("ingredients") or {}
    rows = []
    for name in dict.fromkeys([*ingredients, *reward_models]):
        one, model = ingredients.get(name, {}), reward_models.get(name, {})
        rate = cell(one.get("win_rate_vs_base"))
        rows.append([name, rate, percent(model.get("accuracy")), number(one.get("kl")), number(one.get("length"), 1)])
    print_table(
        console, "Ingredients", ["preference", "win rate vs base", "reward model, %", "KL, nats", "length"], rows
    )

    rows = [
        [dimension, name, number(value), number((one.get("chord_gap") or {}).get(name, {}).get("mean"), 3)]
        for dimension, one in (summary.get("sweep") or {}).items()
        for name, value in (one.get("spearman") or {}).items()
    ]
    print_table(console, "Sweep between opposites", ["dimension", "score", "Spearman", "above the line"], rows)
    report_judges.print_judges(console, summary)
    report_front.print_fronts(console, summary)
    report_users.print_users(console, summary)
    report_user_models.print_user_models(console, summary)

    seconds = summary.get("stage_seconds") or {}
    rows = [[stage, duration(value)] for stage, value in seconds.items()]
    if rows and summary.get("total_seconds") is not None:
        rows.append(["total", duration(summary["total_seconds"])])
    print_table(console, "Time", ["stage", "time"], rows)
