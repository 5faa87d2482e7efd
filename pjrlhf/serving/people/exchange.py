"""A person as JSON: for lists, and to take along to another server."""

import datetime
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.serving.people.members import Members
from pjrlhf.serving.people.rows import checked_name, checked_row
from pjrlhf.serving.people.store import Person, Taken, Unknown, unknown
from pjrlhf.settings import shown
from pjrlhf.types import Json

FORMAT = 1
LIMIT = 1000  # people of a list


def describe(members: Members, name: str) -> dict[str, Json]:
    """A person for a client.

    Raises:
      Unknown: no such person.
    """
    return _described(members, _person(members, name), fits=True)


def _person(members: Members, name: str) -> Person:
    if not members.knows(name):
        raise unknown(name)
    return members.store.person(name) or Person(name=name)


def _described(members: Members, person: Person, fits: bool) -> dict[str, Json]:
    name = str(person.name)
    known = members.table.read(person, fits)
    mix = None if known is None else known.output[1]
    found: dict[str, Json] = {
        "object": "user",
        "id": name,
        "known": True,
        "trained": _is_trained(members, person),
        "comparisons": person.comparisons,
        "mix": None if mix is None else dict(zip(members.names, mix.tolist(), strict=True)),
        "stated": person.stated,
    }
    for field in ("created", "updated"):
        moment = getattr(person, field)
        found[field] = None if moment is None else int(moment.replace(tzinfo=datetime.UTC).timestamp())
    return found


def listed(members: Members, limit: int = LIMIT, after: str | None = None) -> dict[str, Json]:
    """A page of all people: those of the trained user model, then those who came later.

    Args:
      limit: people of the page.
      after: the last one of the page before.

    Raises:
      Unknown: nobody is called `after`.
    """
    stored = {str(person.name): person for person in members.store.people()}
    names = list(dict.fromkeys([*members.table.trained_names(), *stored]))
    if after is not None and after not in names:
        raise Unknown(f"after: nobody is called {shown(after)}; give the last id of the page before")
    start = 0 if after is None else names.index(after) + 1
    page = names[start : start + limit]
    found = [members.store.person(name) if name in stored else Person(name=name) for name in page]
    data = [_described(members, person, fits=False) for person in found if person is not None and person.name]
    return {"object": "list", "data": data, "has_more": start + len(page) < len(names)}


def exported(members: Members, name: str) -> dict[str, Json]:
    """All that is kept of a person, and what it belongs to; `imported` reads it.

    Raises:
      Unknown: no such person.
    """
    person = _person(members, name)
    comparisons = members.store.comparisons(name)[1] if person.version else []
    has_start = _is_trained(members, person) or person.start is not None
    return {
        "object": "user.export",
        "format": FORMAT,
        "id": name,
        "comparisons": comparisons,
        "mix": person.stated,
        "row": _listed(members.table.row(name)),
        "start": _listed(members.table.start_of(person)) if has_start else None,
        "model": members.table.fingerprint,
        "kind": members.model.kind,
    }


def imported(members: Members, body: Mapping[str, Json], name: object = None) -> str:
    """Adds a person who was exported, here or from another server; returns the name.

    A row of this model is taken as it is. Of another model only comparisons and stated weights are of use: the row is
    fitted to them.

    Args:
      name: a new one, or None.

    Raises:
      Taken: the name is taken.
      UserError: no export, or one that has nothing but a row of another model.
    """
    if body.get("object") != "user.export" or body.get("format") != FORMAT:
        raise UserError("object: is no export of a person; give what GET /v1/users/ID/export or users export returns")
    name = checked_name(body.get("id") if name is None else name)
    if members.knows(name):
        raise Taken(f"id: {shown(name)} is taken; choose another, or delete that person first")
    comparisons, mix = body.get("comparisons") or [], body.get("mix")
    own = body.get("model") == members.table.fingerprint
    read = members.read(comparisons) if comparisons else []
    stated = None
    if mix is not None and members.model.mixes:
        stated = members.check_mix(mix)
    if not own and not read and stated is None:
        raise UserError(
            f"model: {shown(name)} has a row of another model ({shown(body.get('model'))}, here "
            f"{members.table.fingerprint}) and no comparisons to fit it again; export comparisons too, or add the "
            "person with new ones"
        )
    rows = {field: _row(members, body.get(field), field) if own else None for field in ("row", "start")}
    members.take(name, read, stated, rows["row"], rows["start"])
    return name


def _is_trained(members: Members, person: Person) -> bool:
    return not person.forgotten and members.table.is_trained(str(person.name))


def _listed(row: Mapping[str, Any]) -> dict[str, Json]:
    return {key: np.asarray(x).tolist() for key, x in flax.traverse_util.flatten_dict(dict(row), sep="/").items()}


def _row(members: Members, value: Json, field: str) -> dict[str, Any] | None:
    if value is None:
        return None
    like: dict[str, Any] = dict(flax.traverse_util.flatten_dict(members.table.generic_row, sep="/"))
    try:
        if not isinstance(value, Mapping):
            raise TypeError("no object of arrays")
        found = checked_row({key: np.asarray(x, np.float32) for key, x in value.items()}, like)
    except (TypeError, ValueError, OverflowError) as error:
        shapes = {key: np.shape(leaf) for key, leaf in like.items()}
        raise UserError(f"{field}: is no row of this model ({shapes}); give it as it was exported") from error
    return flax.traverse_util.unflatten_dict(found, sep="/")
