"""Preference records from four other formats: votes on pairs of answers, multiple-choice questions, several answers to
a prompt, and people's ratings of statements.
"""

import csv
import io
import itertools
import pathlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from absl import logging

from pjrlhf.data.records import RecordError, from_json, name_of, plain
from pjrlhf.errors import UserError
from pjrlhf.paths import local, read_errors
from pjrlhf.settings import shown

# Default names of the columns of votes and pairs.
VOTES = {
    "pair": "id",  # in both files
    "prompt": "prompt",
    "left": "left",
    "right": "right",
    "user": "worker",
    "winner": "winner",  # "left", "right" or a word for a tie
}
CHOICES = {
    "prompt": "question",
    "options": "options",  # the first is the one that respects the preference
    "user_text": "preference",
}

ANSWERS = {"prompt": "prompt", "completion": "completion"}
ANSWER_PAIRS = 4  # of a prompt
RATINGS = {"user": "user_id", "ratings": "ratings", "text": "text"}
PAGE, RATED_PAIRS = 30, 16  # statements of a page, and pairs of a person on it


TIES = ("tie", "ties", "draw", "equal", "same", "both", "neither", "none")  # words for a tie, beside `ties`


def read_votes(spec: Mapping[str, Any], key: str = "data") -> dict[int, dict[str, Any] | RecordError]:
    """Joins the votes in a CSV file with the pairs in a JSONL file.

    Ties, and users with fewer than `min_votes` other votes, are left out and counted in the log. Words of verdicts may
    be in any case.

    Args:
      spec: `path` of the pairs, `votes` of the CSV file, `min_votes` (1 by default), `ties` (more words for a tie), and
        column names that differ from `VOTES`.
      key: dotted key of `spec` in the config, for messages.

    Returns:
      Number of a vote in its file, from 1 -> a TRL preference record with `user_id`; or a `RecordError` for a vote with
      an unknown verdict, or on a pair that is unknown or stands several times.

    Raises:
      UserError: a file or column is missing.
    """
    names = {ours: spec.get(ours) or name for ours, name in VOTES.items()}
    pairs_file, votes_file = _file(spec, "path", key), _file(spec, "votes", key)
    pairs: dict[str, dict[str, Any]] = {}
    several = set()
    for _, row in _rows(pairs_file, names, ("pair", "prompt", "left", "right"), key):
        if isinstance(row, RecordError):
            raise UserError(f"{pairs_file}: {row}; correct it")
        try:
            name = name_of(row[names["pair"]], names["pair"])
        except RecordError as error:
            raise UserError(f"{pairs_file}: {error}; correct it") from error
        if row != pairs.setdefault(name, row):
            several.add(name)
    further, least = spec.get("ties") or (), spec.get("min_votes") or 1
    if not isinstance(least, int):
        raise UserError(f"{key}.min_votes: {least!r} is not a whole number; set --config.{key}.min_votes=1")
    words = {word.strip().lower() for word in (*TIES, *((further,) if isinstance(further, str) else further))}
    found: dict[int, dict[str, Any] | RecordError] = {}
    ties = 0
    for number, row in _rows(votes_file, names, ("pair", "user", "winner"), key):
        if isinstance(row, RecordError):
            found[number] = row
            continue
        try:
            name, user = (name_of(row[names[ours]], names[ours]) for ours in ("pair", "user"))
        except RecordError as error:
            found[number] = error
            continue
        winner = str(row[names["winner"]]).strip().lower()
        if name not in pairs:
            found[number] = RecordError("unknown pair", f"{shown(name)} is not in {pairs_file}")
        elif name in several:
            found[number] = RecordError(
                "ambiguous pair", f"{shown(name)} stands in {pairs_file} with different answers"
            )
        elif winner in words:
            ties += 1
        elif winner not in ("left", "right"):
            known = ", ".join(("left", "right", *sorted(words)))
            found[number] = RecordError("unknown verdict", f"{shown(row[names['winner']])} is not one of {known}")
        else:
            sides = ("left", "right") if winner == "left" else ("right", "left")
            chosen, rejected = (pairs[name][names[side]] for side in sides)
            record = {"prompt": pairs[name][names["prompt"]], "chosen": chosen, "rejected": rejected}
            found[number] = {**record, "user_id": user}
    good = {number: record for number, record in found.items() if not isinstance(record, RecordError)}
    counts = Counter(record["user_id"] for record in good.values())
    few = {user for user, count in counts.items() if count < least}
    left_out = {number for number, record in good.items() if record["user_id"] in few}
    logging.info(
        "%s: %d votes of %d users; left out %d ties, and %d votes of %d users with fewer than %s",
        *(votes_file.name, len(good) - len(left_out), len(counts) - len(few), ties, len(left_out), len(few)),
        least,
    )
    return {number: record for number, record in found.items() if number not in left_out}


def read_choices(spec: Mapping[str, Any], key: str = "data") -> list[dict[str, Any] | RecordError]:
    """Pairs from multiple-choice questions: the first option is chosen over each other one.

    Args:
      spec: `path` of a JSON file or of a folder with JSON files, and column names that differ from `CHOICES`.
      key: dotted key of `spec` in the config, for messages.

    Returns:
      TRL preference records with `user_text`. Every question is a user: `user_id` and `question` are
      "<file> <number>". `group` is the name of the file. A question with fewer than two options is a `RecordError`.

    Raises:
      UserError: a file or column is missing.
    """
    names = {ours: spec.get(ours) or name for ours, name in CHOICES.items()}
    path = local(_required(spec, "path", key))
    files = sorted(path.glob("*.json")) if path.is_dir() else [_file(spec, "path", key)]
    if not files:
        raise UserError(f"{path}: a folder without .json files; set --config.{key}.path to a folder that has some")
    records: list[dict[str, Any] | RecordError] = []
    for file in files:
        for number, row in _rows(file, names, tuple(CHOICES), key):
            if isinstance(row, RecordError):
                records.append(RecordError(row.reason, f"{file} record {number}: {row}"))
                continue
            options, who = row[names["options"]], f"{file.stem} {number - 1}"
            if not isinstance(options, list) or len(options) < 2:
                what = f"{file} record {number}: {names['options']} is not a list of two or more options"
                records.append(RecordError("not a question", what))
                continue
            shared = {"prompt": row[names["prompt"]], "user_text": row[names["user_text"]], "user_id": who}
            shared |= {"question": who, "group": file.stem}
            records += [{**shared, "chosen": options[0], "rejected": option} for option in options[1:]]
    return records


def _required(spec: Mapping[str, Any], name: str, key: str) -> str:
    if not spec.get(name):
        raise UserError(f"data kind {spec['kind']!r}: needs {name!r}; set --config.{key}.{name}")
    return str(spec[name])


class Located(Protocol):
    """Records that know their places in a file, such as `sources.Source`."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Mapping[str, Any]: ...

    def where(self, i: int) -> str: ...


def answer_pairs(source: Located, spec: Mapping[str, Any], key: str = "data") -> list[dict[str, Any]]:
    """Pairs of different answers to the same prompt, for people who say which one is better (`population.data`).

    Args:
      source: completion records.
      spec: `pairs` of a prompt (at most; 4 by default), and column names that differ from `ANSWERS`. The pairs of a
        prompt are drawn without replacement, and depend on the prompt and the number of its answers alone.
      key: dotted key of `spec` in the config, for messages.

    Returns:
      TRL preference records, whose "chosen" is the answer that stands first in the file.

    Raises:
      UserError: a record cannot be read or lacks a column, or no prompt has two answers.
    """
    names = {ours: spec.get(ours) or name for ours, name in ANSWERS.items()}
    most = _positive(spec, "pairs", ANSWER_PAIRS, key)
    answers: dict[str, dict[str, None]] = {}
    for i in range(len(source)):
        where = source.where(i)
        try:
            row = source[i]
        except RecordError as error:
            raise UserError(f"{where}: {error}; correct it") from error
        texts = [row.get(names[ours]) for ours in ANSWERS]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{where}: has no texts {names['prompt']!r} and {names['completion']!r}; correct it, or "
                f"name your columns with --config.{key}.prompt and --config.{key}.completion"
            )
        prompt, answer = map(str, texts)
        if answer.strip():
            answers.setdefault(prompt, {})[answer] = None
    records = []
    for prompt, found in answers.items():
        pairs = list(itertools.combinations(found, 2))
        drawn = random.Random(f"{prompt} {len(found)}").sample(range(len(pairs)), min(most, len(pairs)))
        records += [{"prompt": prompt, "chosen": pairs[i][0], "rejected": pairs[i][1]} for i in sorted(drawn)]
    if not records:
        raise UserError(f"{source.name}: no prompt has two different answers; give a file with several answers to each")
    return records


def rated_pairs(spec: Mapping[str, Any], key: str = "data") -> list[dict[str, Any] | RecordError]:
    """Pairs of statements of which a person rates one higher than the other.

    Statements are compared on pages of consecutive ones, which are the `group` of a record: where a split is by group,
    no statement is on both sides of it. Which pairs a person compares depends on their name and the page alone.

    Args:
      spec: `path` of the people, with one list of ratings each, in the order of the statements in `statements`; 0 or
        null is no rating. `prompt` is what the statements answer. `page` (30 by default) statements are compared with
        each other, and at most `pairs` (16) of a page by one person. Also column names that differ from `RATINGS`.
      key: dotted key of `spec` in the config, for messages.

    Returns:
      TRL preference records with `user_id` and `group`; a `RecordError` for a person whose ratings cannot be read.

    Raises:
      UserError: a file or column is missing.
    """
    names = {ours: spec.get(ours) or name for ours, name in RATINGS.items()}
    page, most = (_positive(spec, name, other, key) for name, other in (("page", PAGE), ("pairs", RATED_PAIRS)))
    prompt, people = _required(spec, "prompt", key), _file(spec, "path", key)
    texts: list[str] = []
    for number, row in _rows(_file(spec, "statements", key), names, ("text",), key):
        if isinstance(row, RecordError) or not isinstance(row[names["text"]], str):
            raise UserError(f"{spec['statements']} record {number}: has no text {names['text']!r}; correct it")
        texts.append(row[names["text"]])
    records: list[dict[str, Any] | RecordError] = []
    for number, row in _rows(people, names, ("user", "ratings"), key):
        if isinstance(row, RecordError):
            records.append(row)
            continue
        user, ratings = row[names["user"]], row[names["ratings"]]
        numbers = isinstance(ratings, list) and all(x is None or type(x) in (int, float) for x in ratings)
        if not numbers or len(ratings) != len(texts):
            what = f"{people} record {number}: {names['ratings']} is no list of {len(texts)} numbers"
            records.append(RecordError("bad ratings", what))
            continue
        for start in range(0, len(texts), page):
            rated = [i for i in range(start, min(start + page, len(texts))) if ratings[i]]
            pairs = [(i, j) for i, j in itertools.permutations(rated, 2) if ratings[i] > ratings[j]]
            shared = {"prompt": prompt, "user_id": user, "group": f"page {start // page + 1}"}
            for i, j in random.Random(f"{user} {start}").sample(pairs, min(most, len(pairs))):
                records.append({**shared, "chosen": texts[i], "rejected": texts[j]})
    return records


def _positive(spec: Mapping[str, Any], name: str, default: int, key: str) -> int:
    value = spec.get(name) or default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(
            f"{key}.{name}: {shown(value)} is not a whole number above 0; set --config.{key}.{name}={default}"
        )
    return value


def _file(spec: Mapping[str, Any], name: str, key: str) -> pathlib.Path:
    path = local(_required(spec, name, key))
    if path.is_dir():
        raise UserError(f"{path}: is a folder; set --config.{key}.{name} to a file in it")
    if not path.is_file():
        raise UserError(f"{path}: no such file; set --config.{key}.{name} to a file that exists")
    return path


def _rows(
    path: pathlib.Path, names: Mapping[str, str], needed: tuple[str, ...], key: str
) -> Iterator[tuple[int, dict[str, Any] | RecordError]]:
    """(number from 1, record) of a .csv, .jsonl or .json file; a `RecordError` for a record that cannot be read.

    Raises:
      UserError: the file cannot be read, or its first record lacks one of the `needed` columns.
    """
    for number, row in enumerate(_parsed(path), 1):
        if isinstance(row, RecordError):
            yield number, row
            continue
        missing = [name for name in needed if not isinstance(row, dict) or row.get(names[name]) is None]
        if missing:
            found = shown(sorted(map(str, row))) if isinstance(row, dict) else type(row).__name__
            where, column = f"{path} record {number}", names[missing[0]]
            if number == 1:
                raise UserError(
                    f"{where}: no column {column!r} (found {found}); give its name with "
                    f"--config.{key}.{missing[0]}=<yours>"
                )
            yield number, RecordError(f"missing {column}", f"found {found}")
            continue
        yield number, row


def _parsed(path: pathlib.Path) -> Sequence[Any]:
    """The records of a file; a `RecordError` for a line that is not JSON."""
    with read_errors(path):
        content = path.read_bytes()
    if path.suffix == ".jsonl":
        return [_record(line) for line in content.split(b"\n") if line.strip()]
    try:
        if path.suffix == ".csv":
            rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig")))
            columns = rows.fieldnames or ()
            if repeated := [name for name in columns if columns.count(name) > 1]:
                raise ValueError(f"two columns are called {repeated[0]!r}")
            return list(rows)
        found = plain(from_json(content))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); correct it") from error
    if not isinstance(found, list):
        raise UserError(f"{path}: holds a {type(found).__name__}, not a list of records; write them as [{{...}}, ...]")
    return found


def _record(line: bytes) -> Any:
    try:
        return plain(from_json(line))
    except RecordError as error:
        return error
