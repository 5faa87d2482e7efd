"""The people in the user models that a run has trained."""

import contextlib
import fcntl
import html
import json
import os
import pathlib
from collections.abc import Iterator

from pjrlhf.models.folders import reading
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.paths import disk_errors
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


def _names(file: pathlib.Path) -> list[str]:
    from safetensors import safe_open

    with reading(file), safe_open(file, framework="np") as opened:
        note = json.loads((opened.metadata() or {}).get("note", "{}"))
    return [name for name in note.get("users", []) if name is not None]


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
