"""What of a run is served, and the people in the user models that it has trained."""

import contextlib
import dataclasses
import fcntl
import html
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from pjrlhf.errors import UserError
from pjrlhf.models.folders import read_json, reading
from pjrlhf.models.hub import model_file
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.models.users import UserModel
from pjrlhf.paths import disk_errors, local
from pjrlhf.training.workdir import Workdir

FILES = "preference/*/model.safetensors"


def entries_of(run: pathlib.Path) -> tuple[dict[str, pathlib.Path], dict[str, pathlib.Path]]:
    """The banks of policies and the user models that a run has trained: entry -> file."""
    banks = {path.parent.name: path for path in (*run.glob("policy/bank.safetensors"), *run.glob("methods/*/bank.*"))}
    people = {path.parent.name: path for path in sorted(run.glob(FILES))}
    for path in sorted(run.glob("user_models/*/model.safetensors")):
        if path.parent.name not in (*banks, *people):
            people[path.parent.name] = path
    return banks, people


@dataclasses.dataclass(frozen=True)
class Entry:
    """What of a run is served. Its names come from the notes of files: no array is read.

    Attributes:
      run: the run directory.
      config: of the run.
      file: of the bank or the user model.
    """

    run: pathlib.Path
    config: dict[str, Any]
    file: pathlib.Path

    @property
    def is_bank(self) -> bool:
        """Whether it is a bank of policies."""
        return self.file.stem == "bank"

    @property
    def is_reward(self) -> bool:
        """Whether it is a reward model of people."""
        return not self.is_bank and self.file.parent.parent.name == "user_models"

    @property
    def names(self) -> tuple[str, ...] | None:
        """Of the adapters; None where the file does not tell."""
        if self.is_reward:
            return ()
        note = _note(self.file)
        if not self.is_bank:
            if "user_model" not in note or not UserModel(**note["user_model"]).mixes:
                return (self.file.parent.name,)
            source = self.config["preference"]["bank"]
            note = _note(model_file(self.run / "policy" if source == "policy" else source, "bank.safetensors"))
        return tuple(note["adapters"]) if "adapters" in note else None

    @property
    def people(self) -> set[str] | None:
        """Those who are trained; None where nobody can be known: one adapter, or full parameters."""
        if self.is_bank:
            return set() if len(self.names or ()) > 1 and _note(self.file).get("rank") else None
        return set() if self.is_reward else set(_names(self.file))


def entry_of(run: str, entry: str | None = None) -> Entry:
    """What of a run is served, see `opening.open_run`.

    Raises:
      UserError: no run, or nothing of that name or nothing that can answer in it.
    """
    folder = local(run)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; name the run directory of a run that has trained policies")
    config = read_json(folder / "config.json")
    if "stages" not in config:
        raise UserError(f"{folder}: is no run directory; serve a model in Hugging Face layout with --model")
    banks, people = entries_of(folder)
    if not banks and not people:
        raise UserError(
            f"{folder}: has nothing to serve yet; run its stages policy, methods, preference or user_models first"
        )
    if entry is None:
        entry = "policy" if "policy" in banks else next(iter(banks)) if len(banks) == 1 else None
        if entry is None and not banks and len(people) == 1:
            entry = next(iter(people))
    if entry not in (*banks, *people):
        found = ", ".join((*banks, *people))
        reason = "has several user models or methods" if entry is None else f"has no {entry!r}"
        if entry in _planned(config):
            reason = f"has not finished training {entry!r} (the command that trains it goes on)"
        raise UserError(f"{folder}: {reason}; name one with --entry: {found}")
    return Entry(folder, config, banks[entry] if entry in banks else people[entry])


def _planned(config: Mapping[str, Any]) -> set[str]:
    """The entries that the stages of a run train."""
    own = {"preference": "models", "user_models": "models", "methods": ""}
    found = {"policy"} & {*config["stages"]}
    for stage, key in own.items():
        section = config.get(stage) if stage in config["stages"] else None
        found |= {*((section or {}).get(key, {}) if key else section or {})}
    return found


def trained_people(run: pathlib.Path) -> set[str]:
    """Everybody whom a user model of the run knows."""
    return {name for file in sorted(run.glob(FILES)) for name in _names(file)}


def files_with(run: pathlib.Path, name: str) -> list[pathlib.Path]:
    """The records and reports of a run that have a person's name."""
    quoted = {json.dumps(name), json.dumps(name, ensure_ascii=False)}
    cells = {f">{html.escape(name)}<", f">{html.escape(name, quote=False)}<"}
    found = []
    for file in sorted(run.rglob("*")):
        wanted = cells if file.suffix == ".html" else quoted if file.suffix in (".json", ".jsonl") else None
        if wanted and file.is_file():
            with reading(file), open(file, encoding="utf-8", errors="replace") as lines:
                if any(one in line for line in lines for one in wanted):
                    found.append(file)
    return found


def left_in(run: pathlib.Path, name: str) -> str:
    """Which records and reports of a run still have a person's name, and the way out; empty where none has."""
    files = [str(file.relative_to(run)) for file in files_with(run, name)]
    text = f"records and reports of the run still have the name: {', '.join(files)}; delete the run to be rid of them"
    return text if files else ""


def _note(file: pathlib.Path) -> dict[str, Any]:
    """The note of a file, see `models.storage`."""
    from safetensors import safe_open

    with reading(file), safe_open(file, framework="np") as opened:
        return json.loads((opened.metadata() or {}).get("note", "{}"))


def _names(file: pathlib.Path) -> list[str]:
    return [name for name in _note(file).get("users", []) if name is not None]


def forget(run: pathlib.Path, name: str) -> list[pathlib.Path]:
    """Zeroes the row of a person in every user model of a run and frees it for others; returns the files that were
    written anew. Checksums and the run's manifest stay valid.

    Checkpoints of a training keep what they have: they belong to the data that the run was given.

    Raises:
      UserError: a file is damaged or cannot be written, or a training uses the run.
    """
    if name not in trained_people(run):
        return []
    written, workdir = [], Workdir(run)
    with _alone(run), workdir.locked():
        for file in sorted(run.glob(FILES)):
            if name not in _names(file):
                continue
            tree, note = load_tree(file)
            users = dict(tree.get("users", {}))
            registry, table = UserRegistry.from_json(note["users"]).remove_users(users.get("table", {}), [name])
            if table:
                tree["users"] = {**users, "table": table}
            with disk_errors(file):
                save_tree(file, tree, {**note, "users": registry.to_json()})
            workdir.mark_rewritten(file)
            written.append(file)
    return written


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Two processes that delete people write one after the other."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
