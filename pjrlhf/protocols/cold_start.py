"""New people: how many comparisons it takes to serve someone the model has never met."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.protocols.trained import Trained
from pjrlhf.serving.people.fit import fit_rows
from pjrlhf.training.progress import progress


def fit_new_users(trained: Trained, counts: Sequence[int], steps: int, learning_rate: float) -> dict[int, list[float]]:
    """Accuracy of each new person's held-out pairs after fitting only their own row on k comparisons, for each k.

    Everything else is frozen and the row starts as the generic user's. People and values of k are fitted side by side:
    each has a row of its own in one table, and no row's gradient depends on another.

    Raises:
      UserError: nobody has enough comparisons.
    """
    pairs, entry, backbone = trained.pairs, trained.entry, trained.backbone
    table = pairs.tables["new_users"]
    people: dict[str, dict[bool, list[int]]] = {}
    for i, example in enumerate(table.examples):
        people.setdefault(str(example.user_id), {False: [], True: []})[bool(example.extra["held_out"])].append(i)
    people = {user: rows for user, rows in people.items() if len(rows[False]) >= max(counts) and rows[True]}
    if not people:
        raise UserError(f"cold start: no new user has {max(counts)} comparisons and others to test on; ask for fewer")
    cells = [(user, k) for user in people for k in counts]
    params = trained.trainable["users"]
    rows = jax.tree.map(lambda x: jnp.repeat(x[:1], len(cells) + 1, axis=0), params["table"])
    # Every cell's k pairs, one after another, in the table of cells.
    fit = [(i, cell + 1) for cell, (user, k) in enumerate(cells) for i in people[user][False][:k]]
    size, prepared, nobody = entry.batch_size, [], np.zeros(len(table), np.int32)
    for start in range(0, len(fit), size):
        part = fit[start : start + size]
        padded = part + [part[0]] * (size - len(part))
        batch = pairs.collate("new_users", nobody, [table[i] for i, _ in padded], trained.users.num_tokens)
        batch = batch.replace(local=np.array([cell for _, cell in padded], np.int32))
        # The mean over each person's own pairs, so that a step is as long for 1 comparison as for 16.
        weight = np.array([1.0 / cells[cell - 1][1] for _, cell in padded], np.float32)
        prepared.append((batch, weight * (np.arange(size) < len(part))))
    with progress(f"evaluate_users: rows of new people by {entry.name}", steps) as bar:
        rows = fit_rows(
            trained.users,
            entry.objective,
            backbone,
            trained.trainable,
            rows,
            prepared,
            steps,
            learning_rate,
            lambda step: bar.update(step, {}),
        )

    fitted = {**trained.trainable, "users": {**params, "table": rows}}
    found: dict[int, list[float]] = {k: [] for k in counts}
    for cell, (user, k) in enumerate(cells):
        users = np.full(len(table), cell + 1 if k else 0, np.int32)
        margins = trained.margins("new_users", users, people[user][True], fitted)
        found[k].append(float((margins > 0).mean()))
    return found
