"""The command `pjrlhf`. Its verbs import the package only when they run, so that --help is fast."""

import argparse
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

VERBS = {
    "train": "run a config: pjrlhf train --config=configs/soups.py --workdir=runs/mine --config.seed=1",
    "merge": "merge models or adapters into one folder: pjrlhf merge A B --weights 0.7 0.3 --base BASE --output OUT",
    "report": "print the tables of a finished run: pjrlhf report runs/soups",
}


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point of the console script.

    Args:
      argv: the arguments; those of the process where None.
    """
    from pjrlhf import __version__
    from pjrlhf.terminal import quiet_libraries

    quiet_libraries()
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="pjrlhf",
        description="Personalized RLHF in JAX.",
        epilog="pjrlhf VERB --help describes a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pjrlhf {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        verbs.add_parser(name, help=text, add_help=False)
    verb = parser.parse_args(arguments[:1]).verb
    if verb == "train":
        _train(arguments[1:])
        return
    from pjrlhf.main import interruptible

    with interruptible():
        {"merge": _merge, "report": _report}[verb](arguments[1:])


def _train(arguments: Sequence[str]) -> None:
    """`python -m pjrlhf.main` with the same flags."""
    from pjrlhf import main as program

    sys.argv = ["pjrlhf train", *arguments]
    program.run()


def _merge(arguments: Sequence[str]) -> None:
    from pjrlhf.export.merge import METHOD_OPTIONS, SPACES, MergeSettings, merge
    from pjrlhf.settings import fields_of, parse, rule_of
    from pjrlhf.terminal import visible
    from pjrlhf.training.progress import progress

    helps = {key: rule_of(field).help for key, (_, field) in fields_of(MergeSettings).items()}
    parser = argparse.ArgumentParser(
        prog="pjrlhf merge", description="Merges models or LoRA adapters into one folder.", allow_abbrev=False
    )
    parser.add_argument("ingredients", nargs="+", metavar="FOLDER", help=helps["ingredients"])
    parser.add_argument("--weights", nargs="+", type=float, required=True, metavar="W", help=helps["weights"])
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--base", metavar="FOLDER", help=helps["base"])
    parser.add_argument("--space", choices=SPACES, help=helps["space"])
    parser.add_argument("--method", choices=tuple(METHOD_OPTIONS), help=helps["method"])
    for name, kind in (("density", float), ("scale", float), ("seed", int), ("dtype", str), ("tokenizer", str)):
        parser.add_argument(f"--{name}", type=kind, help=helps[name])
    given = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    with _one_line():
        with progress("merge", 1):
            manifest = merge(parse(MergeSettings, given, "merge"))
        print(f"merged model: {visible(manifest['output'])}")


def _report(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="pjrlhf report", description="Prints the tables of a finished run.")
    parser.add_argument("run", metavar="RUN", help="the run directory, such as runs/soups")
    folder = pathlib.Path(os.path.expanduser(parser.parse_args(arguments).run)) / "report"
    with _one_line():
        from pjrlhf.errors import UserError
        from pjrlhf.evaluation.report import print_tables
        from pjrlhf.terminal import visible

        try:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{folder}: no summary.json; name the run directory of a finished run") from None
        except NotADirectoryError:
            raise UserError(f"{folder.parent}: is a file; name the run directory of a finished run") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}/summary.json: cannot be read ({error}); run the evaluation again") from error
        print_tables(summary)
        print(f"report: {visible(folder / 'index.html')}")


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Turns a UserError into one line on stderr and exit code 2."""
    from pjrlhf.errors import UserError
    from pjrlhf.terminal import print_error

    try:
        yield
    except UserError as error:
        print_error(error)
        sys.exit(2)
