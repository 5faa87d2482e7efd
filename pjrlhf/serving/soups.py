"""Soups that a server saves under names of their own."""

import json
from collections.abc import Sequence

from pjrlhf.data.records import RecordError, from_json, plain
from pjrlhf.errors import UserError
from pjrlhf.paths import local
from pjrlhf.serving.catalogue import parse_mix
from pjrlhf.settings import shown

EXAMPLE = json.dumps({"calm": {"P1A": 0.7, "P3A": 0.3}})


def read_soups(items: Sequence[str]) -> dict[str, dict[str, float]]:
    """Name -> weights by name of ingredient.

    Args:
      items: each is "NAME=INGREDIENT=WEIGHT,..." or a JSON file with an object of such objects.

    Raises:
      UserError: another form, a file that cannot be read, or a name that comes twice.
    """
    found: dict[str, dict[str, float]] = {}
    for item in items:
        name, equals, mix = item.partition("=")
        new = {name: _parsed(name, mix)} if equals else _of_file(item)
        for one in new:
            if one in found:
                raise UserError(f"--soups: {shown(one)} comes twice; give each soup a name of its own")
        found |= new
    return found


def _parsed(name: str, mix: str) -> dict[str, float]:
    try:
        return parse_mix(mix)
    except UserError as problem:
        raise UserError(f"--soups: {shown(name)}: {problem}") from problem


def _of_file(path: str) -> dict[str, dict[str, float]]:
    file = local(path)
    try:
        value = plain(from_json(file.read_bytes(), strict=True))
    except OSError as problem:
        hint = "name a JSON file, or write NAME=INGREDIENT=WEIGHT,..."
        raise UserError(f"--soups: {file}: {problem.strerror or problem}; {hint}") from problem
    except RecordError as problem:
        raise UserError(f"--soups: {file}: {problem}; write {EXAMPLE}") from problem
    right = isinstance(value, dict) and all(
        isinstance(mix, dict) and all(type(weight) in (int, float) for weight in mix.values()) for mix in value.values()
    )
    if not right:
        raise UserError(f"--soups: {file}: is no object of soups; write {EXAMPLE}")
    return value
