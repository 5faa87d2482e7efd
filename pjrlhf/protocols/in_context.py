"""Entries that read what is written of a person's comparisons: how well they serve a new person after k comparisons,
which costs no step, and whether they read them at all.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from pjrlhf.algorithms.pdpo_settings import PreferenceSettings
from pjrlhf.evaluation.users import user_accuracy
from pjrlhf.feedback.history import History
from pjrlhf.feedback.pairs import Pairs, References, tables_of
from pjrlhf.protocols.trained import Trained

NEW = "new_users"


def reads(trained: Trained) -> History:
    """What an entry reads; ValueError where it reads nothing."""
    if trained.entry.users.read is None:
        raise ValueError(f"entry {trained.entry.name!r} reads no comparisons; give one that does")
    return trained.entry.users.read


def told(trained: Trained, part: str, **changes: Any) -> Trained:
    """The same entry on the prompts of one part, after another text.

    Args:
      changes: to fields of `feedback.history.History`.
    """
    run, settings = trained.run, trained.run.section(PreferenceSettings)
    history = dataclasses.replace(reads(trained), **changes)
    user_text = trained.entry.users.user_text
    parts = trained.pairs.parts
    tables = tables_of(run, settings, parts=parts, user_text=user_text, history=history, only=(part,))
    rows = run.devices.even(2 * settings.batch_size)
    reference = References(lambda name: run.reference(tables[name], rows))
    return trained.reading(Pairs(tables, trained.pairs.registry, reference, run.text, parts))


def new_people(trained: Trained, counts: Sequence[int]) -> dict[int, list[float]]:
    """Accuracy on each new person's held-out pairs after reading k of their comparisons, for each k: no parameter
    changes. A writer that reads no comparisons gives the same for all k.
    """
    found: dict[int, list[float]] = {}
    for k in counts:
        if found and not reads(trained).writer.reads:
            found[k] = next(iter(found.values()))
            continue
        # With the k of training the entry has these prompts, and perhaps their margins, already.
        _, margins, names = _margins(trained if k == reads(trained).count else told(trained, NEW, count=k), NEW)
        found[k] = [float((margins[names == name] > 0).mean()) for name in np.unique(names)]
    return found


def controls(trained: Trained, part: str, *, resamples: int, seed: int) -> dict[str, Any]:
    """What the text before the prompts of a part does.

    Returns:
      {"own", "others", "nothing"}: accuracy after the person's own text, after that of one other person, and after
        none, each {"mean", "low", "high"}; and, of a writer that reads comparisons, "flipped": the same after their
        labels were exchanged, and "turned": the fraction of all predictions that this turned around.
    """
    ways: dict[str, dict[str, Any]] = {"own": {}, "others": {"others": True}}
    if reads(trained).writer.reads:
        ways |= {"nothing": {"count": 0}, "flipped": {"flipped": True}}
    found: dict[str, Any] = {}
    hits: dict[str, dict[str, bool]] = {}
    for way, changes in ways.items():
        # The entry itself reads the person's own text, and its margins may be known already.
        places, margins, names = _margins(told(trained, part, **changes) if changes else trained, part)
        hits[way] = dict(zip(places, (margins > 0).tolist(), strict=True))
        accuracy = user_accuracy(margins, names, resamples=resamples, seed=seed)
        found[way] = {key: accuracy[key] for key in ("mean", "low", "high")}
    if "flipped" in hits:
        both = hits["own"].keys() & hits["flipped"].keys()  # what has no room after one text may have after another
        found["turned"] = float(np.mean([hits["own"][place] != hits["flipped"][place] for place in both]))
    return found


def _margins(trained: Trained, part: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(places of records, their margins, names of their people) of held-out pairs of a part."""
    examples = trained.pairs.tables[part].examples
    rows = [i for i, example in enumerate(examples) if part != NEW or example.held_out]
    margins = trained.margins(part, trained.pairs.users(part), rows)
    return [examples[i].where for i in rows], margins, np.array([str(examples[i].user_id) for i in rows])
