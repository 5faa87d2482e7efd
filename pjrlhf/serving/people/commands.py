"""The verbs of `pjrlhf users`, in a module that imports quickly."""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pjrlhf.errors import UserError
from pjrlhf.settings import shown
from pjrlhf.terminal import Arguments

if TYPE_CHECKING:
    from pjrlhf.serving.people.members import Members

MOST = 100_000  # comparisons of a person; how many are kept is for the server to say
VERBS = {
    "list": "everybody, and how many comparisons each has given since the run",
    "show": "one person",
    "add": "a new person, from comparisons or stated weights",
    "update": "more comparisons, or other stated weights",
    "remove": "deletes a person, also from the user models of the run",
    "export": "all that is kept of a person, as JSON",
    "import": "adds an exported person",
}


def parser_of() -> argparse.ArgumentParser:
    """The flags."""
    parser = Arguments(
        prog="pjrlhf users",
        description="The people of a run: those of its user models, and those who came later. A server may run on the "
        "same store at the same time.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, text in VERBS.items():
        one = verbs.add_parser(verb, help=text, description=text)
        if verb not in ("list", "import"):
            one.add_argument("name", metavar="NAME", help="of the person")
        if verb == "import":
            one.add_argument("file", metavar="FILE", help="what export wrote; - reads it from the terminal")
            one.add_argument("--name", metavar="NAME", help="another name")
        one.add_argument("--run", required=True, metavar="RUN", help="the run directory, such as runs/pdpo")
        one.add_argument("--entry", metavar="NAME", help="of methods or preference.models, where the run has several")
        one.add_argument("--people", default="", metavar="URL", help="the store; people.sqlite in RUN by default")
        if verb in ("add", "update"):
            one.add_argument(
                "--comparisons", metavar="FILE", help="JSON lines with prompt (or messages), chosen and rejected"
            )
            one.add_argument("--mix", metavar="NAME=WEIGHT,...", help="stated weights, for people who are soups")
        if verb == "export":
            one.add_argument("--output", metavar="FILE", help="where to write it; on the terminal where not given")
    return parser


def users(given: argparse.Namespace, ready: Callable[[], None]) -> None:
    """Does what the flags say.

    Args:
      ready: called before a model is read.

    Raises:
      UserError: no such run or person, or anything else that cannot be done.
    """
    if given.verb == "list":
        _list(given)
    elif given.verb == "remove":
        _remove(given)
    else:
        _with_model(given, ready)


def _run(given: argparse.Namespace) -> pathlib.Path:
    from pjrlhf.paths import local
    from pjrlhf.serving.people.trained import entries_of

    run = local(given.run)
    if not (run / "config.json").is_file():
        raise UserError(f"{run}: no config.json; name the run directory of a run")
    known = [name for some in entries_of(run) for name in some]
    if given.entry not in (None, *known):  # list and remove are about all entries
        raise UserError(f"--entry {shown(given.entry)}: {run} has {', '.join(known) or 'no entry'}; leave it out")
    return run


def _list(given: argparse.Namespace) -> None:
    from pjrlhf.serving.people.address import is_kept
    from pjrlhf.serving.people.trained import trained_people
    from pjrlhf.terminal import visible

    run, stored = _run(given), {}
    trained = trained_people(run)
    if is_kept(run, given.people):  # a run without a store needs no database
        from pjrlhf.serving.people.store import key_of, store_of

        store = store_of(run, given.people, MOST)
        gone, stored = store.forgotten(), {str(person.name): person for person in store.people()}
        trained = {name for name in trained if key_of(name) not in gone}
    for name in dict.fromkeys([*sorted(trained), *stored]):
        count = stored[name].comparisons if name in stored else 0
        gave = f"{count or 'no'} comparison{'s' * (count != 1)}"
        words = f"trained in the run, {gave} since" if name in trained else f"added later, {gave}"
        weights = stored[name].stated if name in stored else None
        stated = ", ".join(f"{one}={weight:g}" for one, weight in (weights or {}).items())
        print(visible(f"{name}: {words}{f', states {stated}' if stated else ''}"))
    if not (trained or stored):
        print("nobody; pjrlhf users add, or the page of a server, adds people", file=sys.stderr)


def _remove(given: argparse.Namespace) -> None:
    from pjrlhf.serving.people.store import Unknown, store_of
    from pjrlhf.serving.people.trained import forget, left_in, trained_people
    from pjrlhf.terminal import visible

    run = _run(given)
    store = store_of(run, given.people, MOST)
    trained = given.name in trained_people(run)
    try:
        store.remove(given.name, trained)
    except Unknown:
        if not trained:  # one who was deleted over HTTP may still be in the files of another copy of the run
            raise _unknown(given) from None
    for file in forget(run, given.name):
        print(f"rewritten: {visible(file)}")
    print(f"removed {visible(given.name)}")
    if text := left_in(run, given.name):
        print(visible(text), file=sys.stderr)


def _with_model(given: argparse.Namespace, ready: Callable[[], None]) -> None:
    body = _read(given.file) if given.verb == "import" else {}
    other: Any = given.name
    name: Any = body.get("id") if other is None else other
    _check_name(given, name)
    learns = given.verb in ("add", "update")
    comparisons = _comparisons(given.comparisons, given.name) if learns and given.comparisons is not None else None

    from pjrlhf.serving.catalogue import parse_mix
    from pjrlhf.serving.opening import open_run
    from pjrlhf.serving.people.exchange import describe, exported, imported
    from pjrlhf.serving.people.members import Members, open_members
    from pjrlhf.serving.people.store import Taken, Unknown
    from pjrlhf.terminal import visible

    mix = parse_mix(given.mix) if learns and given.mix is not None else None
    if given.verb == "update" and comparisons is None and mix is None:
        raise UserError("users update: nothing to update; give --comparisons or --mix")
    ready()
    members = open_members(open_run(given.run, given.entry), given.people, MOST).people
    if not isinstance(members, Members):
        raise UserError(f"{given.run}: its model is the same for everybody; name one that knows people with --entry")
    try:
        if given.verb == "add":
            members.add(given.name, comparisons, mix)
        elif given.verb == "update":
            _update(members, given.name, comparisons, mix)
        elif given.verb == "export":
            text = json.dumps(exported(members, given.name), indent=2)
            if given.output is None:
                print(text)
            else:
                _write(given.output, text)
                print(f"exported to {visible(given.output)}")
            return
        elif given.verb == "import":
            imported(members, body, name)
        print(json.dumps(describe(members, str(name)), indent=2))
    except Unknown:
        raise _unknown(given) from None
    except Taken:
        raise _taken(given, name) from None


def _unknown(given: argparse.Namespace) -> UserError:
    return UserError(f"user {shown(given.name)}: is unknown; see pjrlhf users list --run {given.run}")


def _taken(given: argparse.Namespace, name: object) -> UserError:
    way = "add to it with pjrlhf users update" if given.verb == "add" else "give another one with --name"
    return UserError(f"user {shown(name)}: the name is taken; {way}, or remove that person first")


def _check_name(given: argparse.Namespace, name: object) -> None:
    """Whether the person is there, or not, as the command wants it: the files tell before the model is read."""
    from pjrlhf.serving.people.store import store_of
    from pjrlhf.serving.people.trained import entry_of

    found = entry_of(given.run, given.entry)
    trained = found.people
    if trained is None or not isinstance(name, str):
        return  # what opens the model, or reads the export, says what is wrong
    stored = store_of(found.run, given.people, MOST).version(name)
    known = name in trained if stored is None else stored[1]
    if known and given.verb in ("add", "import"):
        raise _taken(given, name)
    if not known and given.verb not in ("add", "import"):
        raise _unknown(given)


def _update(members: "Members", name: str, comparisons: Any, mix: Any) -> None:
    if mix is not None:
        members.state(name, mix)
    if comparisons is not None:
        members.learn(name, comparisons)


def _comparisons(path: str, name: str) -> list[dict[str, Any]]:
    """The comparisons of a file of records; columns that a comparison does not have are left out."""
    from pjrlhf.serving.people.files import read_comparisons
    from pjrlhf.serving.people.fit import as_json

    found = []
    for example in read_comparisons(path):
        where = example.where
        if example.user_id not in (None, name):
            raise UserError(
                f"{where}: is of user {shown(example.user_id)}, not {shown(name)}; give a file of one person"
            )
        if example.preference not in (None, 1.0):
            raise UserError(
                f"{where}: has a preference of {example.preference:g}, and people learn from plain comparisons; leave "
                "it out, or give a tie as two comparisons, one in each order"
            )
        found.append(as_json(example))
    if not found:
        raise UserError(f"{path}: holds no comparisons; give it one on each line")
    return found


def _read(path: str) -> dict[str, Any]:
    from pjrlhf.data.records import RecordError, from_json, plain

    try:
        text = sys.stdin.buffer.read() if path == "-" else pathlib.Path(path).expanduser().read_bytes()
        found = plain(from_json(text))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a file that users export wrote") from error
    except RecordError as error:
        raise UserError(f"{path}: {error}; name a file that users export wrote") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: is no export of a person; name a file that users export wrote")
    return found


def _write(path: str, text: str) -> None:
    """Only its owner can read it: what people compared is theirs."""
    from pjrlhf.paths import atomic_write, disk_errors

    file = pathlib.Path(path).expanduser()
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(file), atomic_write(file) as temporary:
        temporary.touch(0o600)
        temporary.write_text(text + "\n", encoding="utf-8")
