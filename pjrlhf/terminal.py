"""What may reach a terminal or a log: no control characters, no secrets of addresses, no notices of libraries."""

import argparse
import difflib
import logging as python_logging
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, NoReturn

# Categories of characters that a terminal acts on, or that change the direction of the text around them.
_ACTS = ("Cc", "Cf", "Cs")
_JOINERS = "\u200c\u200d"  # parts of words in some scripts, and of emoji
_LOGIN = re.compile(r"(?<=://)[^/\s'\"@]+(?=@)")
_QUERY = re.compile(r"(?<=[?&#;])([^=&#;?\s'\"]+)=[^&#;\s'\"]*")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+")


def visible(text: object, keep: str = "") -> str:
    r"""`text` with control characters as escapes such as \x1b, except those in `keep`."""
    return "".join(c if c in keep or _is_harmless(c) else c.encode("unicode_escape").decode() for c in str(text))


def _is_harmless(c: str) -> bool:
    return c in _JOINERS or unicodedata.category(c) not in _ACTS


def masked(value: Any) -> Any:
    """A JSON value with logins and values of queries in addresses replaced by ***.

    `s3://key:secret@bucket/x?token=abc` becomes `s3://***@bucket/x?token=***`.
    """
    if isinstance(value, str):
        return _ADDRESS.sub(lambda found: _QUERY.sub(r"\1=***", _LOGIN.sub("***", found[0])), value)
    if isinstance(value, dict):
        return {key: masked(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(masked(one) for one in value)
    return value


def line(text: object) -> str:
    """A message as one line that is safe to print."""
    return visible(masked(" ".join(str(text).split("\n"))))


class SafeRecords(python_logging.Filter):
    """Makes log records safe to print; lines stay lines."""

    def filter(self, record: python_logging.LogRecord) -> bool:
        record.msg, record.args = visible(masked(record.getMessage()), keep="\n\t"), ()
        return True


def print_error(error: object) -> None:
    """Prints a message on stderr, as one line."""
    print(f"error: {line(error)}", file=sys.stderr)


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are one line with the way out; flags are not abbreviated."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        self._given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        print_error(f"{message}; {self._way_out(message)}")
        sys.exit(2)

    def _way_out(self, message: str) -> str:
        parsers = list(self._parsers())
        near: list[str] = []
        if found := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            flags = [flag for parser in parsers for flag in parser._option_string_actions]
            if found[1].startswith("-"):
                near = difflib.get_close_matches(found[1], flags, 1)
            elif "--run" in flags:
                near = [f"--run {found[1]}"]
        elif found := re.match(r"the following arguments are required: (.*)", message):
            near = self._meant(found[1].split(", "))
        elif found := re.search(r"invalid choice: '(.*?)' ", message):
            near = difflib.get_close_matches(found[1], re.findall(r"\w+", message.partition("choose from")[2]), 1)
        return f"did you mean {near[0]}?" if near else f"{self.prog} --help says what there is"

    def _meant(self, required: list[str]) -> list[str]:
        """What was given in place of a required flag: one that is mistyped, or its value alone."""
        flags = [one.partition("=")[0] for one in self._given if one.startswith("-")]
        for flag in flags:
            if flag not in self._option_string_actions and (near := difflib.get_close_matches(flag, required, 1)):
                return near
        if flags or "--run" not in required:
            return []
        return [f"--run {word}" for word in self._given[len(self._get_positional_actions()) :][:1]]

    def _parsers(self) -> Iterator[argparse.ArgumentParser]:
        """The parser and those of its verbs."""
        yield self
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices.values()


def quiet_libraries() -> None:
    """Silences notices of libraries on which a user cannot act. Call it before they are imported."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
