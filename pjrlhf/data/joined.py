"""Preference records from two other formats: votes on pairs of answers, and multiple-choice questions."""

import csv
import io
import json
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging

from pjrlhf.errors import UserError
from pjrlhf.paths import local

# Default names of the columns of votes and pairs.
VOTES = {
    "pair": "id",  # in both files
    "prompt": "prompt",
    "left": "left",
    "right": "right",
    "user": "worker",
    "winner": "winner",  # "left", "right", or anything else for a tie
}
CHOICES = {
    "prompt": "question",
    "options": "options",  # the first is the one that respects the preference
    "user_text": "preference",
}


def read_votes(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Joins the votes in a CSV file with the pairs in a JSONL file.

    Ties, and users with fewer than `min_votes` other votes, are left out and counted in the log.

    Args:
      spec: `path` of the pairs, `votes` of the CSV file, `min_votes` (1 by default), and column names that differ from
        `VOTES`.

    Returns:
      TRL preference records with `user_id`.

    Raises:
      UserError: a file or column is missing, or a vote names an unknown pair.
    """
    names = {key: spec.get(key) or name for key, name in VOTES.items()}
    pairs_file, votes_file = _file(spec, "path"), _file(spec, "votes")
    pairs = {str(row[names["pair"]]): row for row in _rows(pairs_file, names, ("pair", "prompt", "left", "right"))}
    found, ties = [], 0
    for row in _rows(votes_file, names, ("pair", "user", "winner")):
        pair = pairs.get(str(row[names["pair"]]))
        if pair is None:
            raise UserError(f"{votes_file}: a vote on pair {row[names['pair']]!r}, which is not in {pairs_file}")
        if row[names["winner"]] not in ("left", "right"):
            ties += 1
            continue
        sides = ("left", "right") if row[names["winner"]] == "left" else ("right", "left")
        chosen, rejected = (pair[names[side]] for side in sides)
        record = {"prompt": pair[names["prompt"]], "chosen": chosen, "rejected": rejected}
        found.append({**record, "user_id": str(row[names["user"]])})
    counts = Counter(record["user_id"] for record in found)
    few = {user for user, count in counts.items() if count < int(spec.get("min_votes") or 1)}
    kept = [record for record in found if record["user_id"] not in few]
    logging.info(
        "%s: %d votes of %d users; left out %d ties, and %d votes of %d users with fewer than %s",
        *(votes_file.name, len(kept), len(counts) - len(few), ties, len(found) - len(kept), len(few)),
        spec.get("min_votes") or 1,
    )
    return kept


def read_choices(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pairs from multiple-choice questions: the first option is chosen over each other one.

    Args:
      spec: `path` of a JSON file or of a folder with JSON files, and column names that differ from `CHOICES`.

    Returns:
      TRL preference records with `user_text`. Every question is a user: `user_id` and `question` are
      "<file> <number>". `group` is the name of the file.

    Raises:
      UserError: a file or column is missing, or a question has fewer than two options.
    """
    names = {key: spec.get(key) or name for key, name in CHOICES.items()}
    path = local(_required(spec, "path"))
    files = sorted(path.glob("*.json")) if path.is_dir() else [_file(spec, "path")]
    if not files:
        raise UserError(f"{path}: a folder without .json files; name a .json file, or a folder that has some")
    records = []
    for file in files:
        for number, row in enumerate(_rows(file, names, tuple(CHOICES))):
            options, who = row[names["options"]], f"{file.stem} {number}"
            if not isinstance(options, list) or len(options) < 2:
                raise UserError(f"{file} question {number}: {names['options']} is not a list of two or more options")
            shared = {"prompt": row[names["prompt"]], "user_text": row[names["user_text"]], "user_id": who}
            shared |= {"question": who, "group": file.stem}
            records += [{**shared, "chosen": options[0], "rejected": option} for option in options[1:]]
    return records


def _required(spec: Mapping[str, Any], key: str) -> str:
    if not spec.get(key):
        raise UserError(f"data kind {spec['kind']!r}: needs {key!r}; set it in the config")
    return str(spec[key])


def _file(spec: Mapping[str, Any], key: str) -> pathlib.Path:
    path = local(_required(spec, key))
    if not path.is_file():
        raise UserError(f"{path}: no such file; check {key!r} of the data in the config")
    return path


def _rows(path: pathlib.Path, names: Mapping[str, str], needed: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The records of a .csv, .jsonl or .json file.

    Raises:
      UserError: the file cannot be read, or a record lacks one of the `needed` columns.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); correct it") from error
    for number, row in enumerate(rows, 1):
        missing = [names[key] for key in needed if not isinstance(row, dict) or names[key] not in row]
        if missing:
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"{path} record {number}: no column {missing[0]!r} (found {found}); give its name in the config"
            )
        yield row
