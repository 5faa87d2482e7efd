"""Random streams by name: no two of them draw the same numbers."""

import itertools
import pathlib
import re

import jax
import pytest

from pjrlhf.runtime.streams import STREAMS, UNNAMED, Streams, number_of

PACKAGE = pathlib.Path(__file__).parents[2] / "pjrlhf"
NAMES = [*STREAMS, "my_package/answers", "my_package/state"]
PARTS = [(), (0,), (1,), (0, 0), (0, 1), (1, 0)]


def test_every_stream_has_a_number_of_its_own():
    assert len(set(STREAMS.values())) == len(STREAMS)
    assert all(0 <= number < UNNAMED for number in STREAMS.values())
    assert UNNAMED <= number_of("my_package/answers") < 2**32
    assert number_of("my_package/answers") != number_of("my_package/state")


def first_draws(seed):
    """(kind of generator, name, indices) -> what is drawn first."""
    streams = Streams(seed)
    for name, part in itertools.product(NAMES, PARTS):
        yield ("jax", name, part), tuple(jax.random.key_data(streams.key(name, *part)).tolist())
        yield ("numpy", name, part), int(streams.numpy(name, *part).integers(2**62))
    for name in NAMES:
        yield ("python", name, ()), streams.python(name).getrandbits(62)


def test_no_two_streams_coincide_for_names_parts_and_seeds():
    """A list of numbers does not coincide by chance, so that any coincidence is one of streams."""
    draws = [(seed, *pair) for seed in (0, 1) for pair in first_draws(seed)]
    owners = {}
    for seed, owner, drawn in draws:
        # NumPy pads entropy with zeros, so that (seed, number) and (seed, number, 0) are one generator.
        if owner[0] == "numpy" and owner[2][-1:] == (0,):
            continue
        assert drawn not in owners, f"{owners[drawn]} and {(seed, *owner)}"
        owners[drawn] = (seed, *owner)
    assert len(owners) > 500


def test_a_stream_is_the_same_whenever_it_is_asked_for():
    assert dict(first_draws(3)) == dict(first_draws(3))


def sources():
    return {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py") if path.name != "streams.py"}


@pytest.mark.parametrize("name", STREAMS)
def test_every_stream_of_the_table_is_used(name):
    assert any(f'"{name}"' in text for text in sources().values()), "nothing draws from it"


def test_every_stream_that_is_used_is_in_the_table():
    pattern = re.compile(r'streams\.(?:key|numpy|python)\("([^"]+)"')
    used = {name for text in sources().values() for name in pattern.findall(text)}
    assert len(used) > 20 and used <= set(STREAMS)
