"""New people: how many comparisons it takes to serve someone the model has never met, and someone who changes their
mind.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.feedback.pairs import Pairs
from pjrlhf.protocols.trained import Trained
from pjrlhf.serving.people.fit import fit_rows
from pjrlhf.training.progress import progress
from pjrlhf.types import Params

PART = "new_users"
# How a row is fitted after a change of mind, see `fit_changed_minds`.
WAYS = ("all", "latest", "new", "continued")
Cell = Sequence[tuple[int, bool]]  # what one row is fitted to: (row of the table, whether its answers are exchanged)


def fit_new_users(trained: Trained, counts: Sequence[int], steps: int, learning_rate: float) -> dict[int, list[float]]:
    """Accuracy of each new person's held-out pairs after fitting only their own row on k comparisons, for each k.

    Everything else is frozen and the row starts as the generic user's. People and values of k are fitted side by side:
    each has a row of its own in one table, and no row's gradient depends on another.

    Raises:
      UserError: nobody has enough comparisons.
    """
    people = _people(trained, max(counts))
    cells = [[(i, False) for i in rows[False][:k]] for rows in people.values() for k in counts]
    fitted = _fitted(trained, cells, steps, learning_rate)
    found: dict[int, list[float]] = {}
    for place, k in enumerate(counts):
        first = [place + 1 + len(counts) * n if k else 0 for n in range(len(people))]
        found[k] = [float((margins > 0).mean()) for margins in _margins(trained, people, fitted, first)]
    return found


def fit_changed_minds(
    trained: Trained, before: int, counts: Sequence[int], steps: int, learning_rate: float
) -> dict[str, dict[int, list[float]]]:
    """Accuracy by the new preference of each new person who gave `before` comparisons, then prefers all that they
    disliked, and gives k more, for each k.

    It is measured on their held-out pairs, turned round. Four ways to fit the row: to "all" comparisons, as the server
    does; to the "latest" `before`; to the "new" ones alone; or "continued", from the row of the old ones on the new
    ones alone.

    Returns:
      {way: {k: [accuracy in [0, 1] of each person]}}

    Raises:
      UserError: nobody has enough comparisons.
    """
    people = _people(trained, before + max(counts))
    cells: list[Cell] = []
    for way in WAYS:
        for rows in people.values():
            old, later = rows[False][:before], rows[False][before:]
            for k in counts:
                new = [(i, True) for i in later[:k]]
                kept = {"all": old, "latest": old[k:]}.get(way, [])
                cells.append([*((i, False) for i in kept), *(new[-before:] if way == "latest" else new)])
    old_cells = [[(i, False) for i in rows[False][:before]] for rows in people.values()]
    old_rows = _fitted(trained, old_cells, steps, learning_rate)
    # The rows of the last way start from those of the old comparisons, all others from the generic user.
    continued = [1 + n for n in range(len(people)) for _ in counts]
    start = np.array([0] * (1 + (len(WAYS) - 1) * len(continued)) + continued)
    fitted = _fitted(trained, cells, steps, learning_rate, jax.tree.map(lambda x: x[start], old_rows))
    found: dict[str, dict[int, list[float]]] = {way: {} for way in WAYS}
    for w, way in enumerate(WAYS):
        for place, k in enumerate(counts):
            rows = [1 + place + len(counts) * (n + len(people) * w) for n in range(len(people))]
            margins = _margins(trained, people, fitted, rows)
            found[way][k] = [float((each < 0).mean()) for each in margins]
    return found


def _people(trained: Trained, most: int) -> dict[str, dict[bool, list[int]]]:
    """New person -> whether held out -> rows of their pairs, of those with at least `most` comparisons to fit."""
    people: dict[str, dict[bool, list[int]]] = {}
    for i, example in enumerate(trained.pairs.tables[PART].examples):
        people.setdefault(str(example.user_id), {False: [], True: []})[bool(example.held_out)].append(i)
    people = {user: rows for user, rows in people.items() if len(rows[False]) >= most and rows[True]}
    if not people:
        raise UserError(f"cold start: no new user has {most} comparisons and others to test on; ask for fewer")
    return people


def _fitted(
    trained: Trained, cells: Sequence[Cell], steps: int, learning_rate: float, start: Params | None = None
) -> Params:
    """A table with a row for the comparisons of each cell after row 0, from `start`, or from the generic user's."""
    pairs, size = trained.pairs, trained.entry.batch_size
    table = trained.trainable["users"]["table"]
    rows = start or jax.tree.map(lambda x: jnp.repeat(x[:1], len(cells) + 1, axis=0), table)
    prepared, nobody = [], np.zeros(len(pairs.tables[PART]), np.int32)
    for turned in (False, True):
        # Every cell's pairs, one after another, in the table of cells.
        fit = [(i, cell + 1) for cell, rows in enumerate(cells) for i, other in rows if other == turned]
        source = _turned(pairs) if turned and fit else pairs
        for first in range(0, len(fit), size):
            part = fit[first : first + size]
            padded = part + [part[0]] * (size - len(part))
            asked = [source.tables[PART][i] for i, _ in padded]
            batch = source.collate(PART, nobody, asked, trained.users.num_tokens)
            batch = batch.replace(local=np.array([cell for _, cell in padded], np.int32))
            # The mean over each person's own pairs, so that a step is as long for 1 comparison as for 16.
            weight = np.array([1.0 / len(cells[cell - 1]) for _, cell in padded], np.float32)
            prepared.append((batch, weight * (np.arange(size) < len(part))))
    with progress(f"evaluate_users: rows of new people by {trained.entry.name}", steps) as bar:
        return fit_rows(
            trained.users,
            trained.entry.objective,
            trained.backbone,
            trained.trainable,
            rows,
            prepared,
            steps,
            learning_rate,
            lambda step: bar.update(step, {}),
        )


def _turned(pairs: Pairs) -> Pairs:
    """The pairs of new people with both answers exchanged."""
    table, swap = pairs.tables[PART], {"prompt": "prompt", "chosen": "rejected", "rejected": "chosen"}
    examples = tuple(dataclasses.replace(e, chosen=e.rejected, rejected=e.chosen) for e in table.examples)
    tokens, masks = ({swap[name]: items for name, items in columns.items()} for columns in (table.tokens, table.masks))
    turned = dataclasses.replace(table, examples=examples, tokens=tokens, masks=masks)
    return Pairs({PART: turned}, pairs.registry, {PART: pairs.reference[PART][:, ::-1]}, pairs.text)


def _margins(
    trained: Trained, people: Mapping[str, Mapping[bool, Sequence[int]]], fitted: Params, rows: Sequence[int]
) -> list[np.ndarray]:
    """Margins of every person's held-out pairs as a row of `fitted` sees them, one row for each person."""
    users = np.zeros(len(trained.pairs.tables[PART]), np.int32)
    held = [found[True] for found in people.values()]
    for mine, row in zip(held, rows, strict=True):
        users[list(mine)] = row
    params = {**trained.trainable, "users": {**trained.trainable["users"], "table": fitted}}
    margins = trained.margins(PART, users, [i for mine in held for i in mine], params)
    return np.split(margins, np.cumsum([len(mine) for mine in held])[:-1])
