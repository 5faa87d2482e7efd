"""Registries: names, entries from other code, and mistakes in one line."""

import re
import sys

import pytest

from pjrlhf.errors import UserError
from pjrlhf.registry import Registry


def colours(**accept):
    registry = Registry("colour", **accept)
    for name in ("red", "green", "blue"):
        registry.register(name)(name.upper())
    return registry


def test_a_registered_entry_is_found_by_its_name_and_returned_unchanged():
    registry = Registry("function")

    @registry.register("double")
    def double(x):
        return 2 * x

    assert registry.get("double") is registry["double"] is double
    assert list(colours()) == ["red", "green", "blue"] and len(colours()) == 3 and "red" in colours()


def test_a_name_belongs_to_one_entry():
    with pytest.raises(ValueError, match="colour 'red' is registered already"):
        colours().register("red")("scarlet")


def test_entries_of_other_code(tmp_path, monkeypatch):
    (tmp_path / "package_of_colours").mkdir()
    file = tmp_path / "package_of_colours" / "warm.py"
    file.write_text("orange = ['ORANGE']\nyellow = ['YELLOW']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert colours().get("package_of_colours.warm:orange") == ["ORANGE"]
    found = colours().get(f"{file}:orange")
    assert found == ["ORANGE"]
    assert colours().get("package_of_colours/warm.py:orange") is found  # a file is loaded once


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gren", "colour 'gren': unknown; did you mean green? Otherwise choose one of red, green, blue, or name"),
        ("xyz", "colour 'xyz': unknown; choose one of red, green, blue, or name your own as package.module:name"),
        ("", "colour '': unknown; choose one of"),
        ("json:", "cannot be read; write package.module:name or path/to/file.py:name"),
        (":dumps", "cannot be read"),
        ("json:dump s", "cannot be read"),
        ("no_such_package.module:x", "no module no_such_package; install it"),
        ("json.no_such_module:x", "no module json.no_such_module; install it"),
        ("json:dumbs", "json has no dumbs; did you mean"),
        ("no/such/file.py:x", "no file no/such/file.py; check the path"),
        ("FOLDER/broken.py:x", "broken.py cannot be imported (NameError: name 'nothing' is not defined); correct"),
        ("FOLDER/needs.py:x", "needs.py cannot be imported (ModuleNotFoundError: No module named 'no_such_thing')"),
        ("FOLDER/script.py:x", "script.py cannot be imported (SystemExit: 0); correct"),
    ],
)
def test_mistakes_are_one_line(spec, message, tmp_path):
    (tmp_path / "broken.py").write_text("x = nothing\n")
    (tmp_path / "needs.py").write_text("import no_such_thing\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    for _ in range(2):  # a module that failed is not half there the second time
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            colours().get(spec.replace("FOLDER", str(tmp_path)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", [[], {}, None, 3])
def test_what_is_no_text_is_no_name(spec):
    assert spec not in colours()
    with pytest.raises(UserError, match="unknown; choose one of"):
        colours().get(spec)


def test_what_an_entry_is_made_of():
    def accept(thing):
        if not isinstance(thing, str):
            raise ValueError("is not a text")
        return [thing]

    registry = colours(accept=accept)
    assert registry.get("red") == ["RED"]
    assert registry.get("json.decoder:__name__") == ["json.decoder"]
    with pytest.raises(UserError, match="colour 'json:dumps': is not a text"):
        registry.get("json:dumps")
    with pytest.raises(ValueError, match="is not a text"):
        registry.register("black")(0)
