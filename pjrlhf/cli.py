"""The command `pjrlhf`. Its verbs import the package only when they run, so that --help is fast."""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pjrlhf.terminal import Arguments

if TYPE_CHECKING:
    from pjrlhf.serving.catalogue import Catalogue

VERBS = {
    "train": "run a config: pjrlhf train --config=soups --workdir=runs/mine --config.seed=1",
    "merge": "merge models or adapters into one folder: pjrlhf merge A B --weights 0.7 0.3 --base BASE --output OUT",
    "serve": "answer over HTTP, each request with its own soup or person: pjrlhf serve --run runs/soups",
    "generate": 'answer on the terminal: pjrlhf generate --run runs/soups --mix P1A=0.7,P3A=0.3 "what is rain ?"',
    "users": "the people of a run: pjrlhf users list --run runs/pdpo; also show, add, update, remove, export, import",
    "export": "a soup or a person for other programs: pjrlhf export --run runs/soups --for peft --mix P1A=0.7,P3A=0.3 "
    "--output FOLDER",
    "data": "what a source of records holds, and records as the model reads them: pjrlhf data show prism path=FOLDER",
    "push": "upload an exported folder to the Hugging Face hub, with a model card: pjrlhf push FOLDER USER/NAME",
    "report": "print the tables of a finished run: pjrlhf report runs/soups",
}
QUANTIZE = ("", "int8", "nf4")
EXPORTS = ("peft", "merged", "vocabulary", "gguf", "mergekit")
EXPORTS_HELP = (
    "peft: one LoRA adapter that vLLM, SGLang and PEFT read, of every ingredient without --mix; merged: a full model; "
    "vocabulary: a full model whose vocabulary holds the user tokens of every person; gguf: one adapter per ingredient "
    "for llama.cpp; mergekit: one full model per ingredient and recipes"
)


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point of the console script.

    Args:
      argv: the arguments; those of the process where None.
    """
    from pjrlhf import __version__
    from pjrlhf.terminal import quiet_libraries

    quiet_libraries()
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Arguments(
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
        functions = {
            "merge": _merge,
            "push": _push,
            "serve": _serve,
            "generate": _generate,
            "report": _report,
            "users": _users,
            "data": _data,
            "export": _export,
        }
        functions[verb](arguments[1:])


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
    parser = Arguments(prog="pjrlhf merge", description="Merges models or LoRA adapters into one folder.")
    parser.add_argument("ingredients", nargs="+", metavar="FOLDER", help=helps["ingredients"])
    parser.add_argument("--weights", nargs="+", type=float, required=True, metavar="W", help=helps["weights"])
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--base", metavar="FOLDER", help=helps["base"])
    parser.add_argument("--space", choices=SPACES, help=helps["space"])
    parser.add_argument("--method", choices=tuple(METHOD_OPTIONS), help=helps["method"])
    for name, kind in (("density", float), ("scale", float), ("seed", int), ("dtype", str), ("tokenizer", str)):
        parser.add_argument(f"--{name}", type=kind, help=helps[name])
    parser.add_argument("--push", metavar="USER/NAME", help=helps["push"])
    parser.add_argument("--private", action="store_true", help=helps["private"])
    given = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    with _one_line():
        with _flags_of("merge", [key for key in helps if key != "ingredients"]), progress("merge", 1):
            manifest = merge(parse(MergeSettings, given, "merge"))
        print(f"merged model: {visible(manifest['output'])}")
        if "pushed" in manifest:
            print(f"pushed to {visible(manifest['pushed'])}")


def _push(arguments: Sequence[str]) -> None:
    parser = Arguments(
        prog="pjrlhf push", description="Uploads a merged model, an adapter or a base of a run to the Hugging Face hub."
    )
    parser.add_argument("folder", metavar="FOLDER", help="such as runs/soups/policy/ingredients/P1A")
    parser.add_argument("repo", metavar="USER/NAME", help="made where there is none")
    parser.add_argument("--private", action="store_true", help="whether a new repository is private")
    given = parser.parse_args(arguments)
    with _one_line():
        from pjrlhf.export.push import check_push, push
        from pjrlhf.terminal import visible
        from pjrlhf.training.progress import progress

        check_push(given.repo)
        with progress(f"pushing {given.folder}", 1):
            found = push(pathlib.Path(os.path.expanduser(given.folder)), given.repo, given.private)
        print(f"pushed to {visible(found)}")


def _serve(arguments: Sequence[str]) -> None:
    from pjrlhf.serving.settings import EngineSettings, ServerSettings
    from pjrlhf.settings import fields_of, parse, rule_of

    parser = Arguments(
        prog="pjrlhf serve",
        description="Serves a run, or a model with adapters, with the API of OpenAI. Where the environment variable "
        "PJRLHF_API_KEY is set, requests must bring it.",
    )
    _add_source(parser)
    parser.add_argument(
        "--mesh", metavar="AXIS=N,...", default="", help="devices, such as data=2,tensor=4; default one device"
    )
    _add_soups(parser, "which are models")
    classes = ServerSettings, EngineSettings
    for cls in classes:
        for name, (_, field) in fields_of(cls).items():
            flag, default = f"--{name.replace('_', '-')}", f"; default {field.default}" if field.default != "" else ""
            help, metavar = f"{rule_of(field).help}{default}", "TEXT" if isinstance(field.default, str) else "N"
            if isinstance(field.default, bool):
                parser.add_argument(flag, action="store_true", help=rule_of(field).help)
            else:
                kind = type(field.default)
                parser.add_argument(flag, type=kind, default=field.default, metavar=metavar, help=help)
    given = parser.parse_args(arguments)
    with _one_line("context", "mesh", "soups", "questions"):
        values = {cls: {name: getattr(given, name) for name in fields_of(cls)} for cls in classes}
        with _flags_of("serve", [name for cls in classes for name in values[cls]]):
            server = parse(ServerSettings, values[ServerSettings], "serve")
            engine = parse(EngineSettings, values[EngineSettings], "serve")
        # Nothing is to be finished yet, and process 1 of a container would ignore the signal.
        signal.signal(signal.SIGTERM, lambda *_: (os.write(2, b"stopped by SIGTERM\n"), os._exit(0)))
        with _needs("serve"):
            from pjrlhf.serving.running import serve
        from pjrlhf.feedback.served import with_teller
        from pjrlhf.main import leave_now

        serve(with_teller(_source(parser, given, given.mesh)), server, engine)
        leave_now(0)  # a normal end waits for programs that are compiled in the background, which nobody uses any more


def _generate(arguments: Sequence[str]) -> None:
    parser = Arguments(prog="pjrlhf generate", description="Prints the answers of one soup or person.")
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    _add_source(parser)
    _add_soups(parser, "for --mix")
    parser.add_argument(
        "--mix",
        metavar="NAME=WEIGHT,...",
        help="weights of the ingredients, or the name of one or of a soup; the base where not given",
    )
    parser.add_argument("--user", metavar="NAME", help="who asks, for a user model")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="of an answer; default 64, or what the context leaves"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling where below 1")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    given = parser.parse_args(arguments)
    with _one_line("mix", "soups"):
        from pjrlhf.errors import UserError
        from pjrlhf.feedback.served import with_teller
        from pjrlhf.serving.catalogue import parse_mix
        from pjrlhf.terminal import visible
        from pjrlhf.training.progress import progress

        mix = None if given.mix is None or "=" not in given.mix else parse_mix(given.mix)
        with progress("reading the model", 1):
            catalogue = with_teller(_source(parser, given))
        if given.user is not None and catalogue.people is None:
            raise UserError("--user: these models know no people; leave it out, or name a user model with --entry")
        if given.user is not None:
            catalogue = _with_stored(catalogue)
        voice = catalogue.voice(given.mix if mix is None else None, mix, given.user)
        if given.user is not None and not voice.known:
            who = "the generic user" if voice.personal else voice.model
            print(f"{visible(given.user)} is unknown: {who} answers", file=sys.stderr)
        tokens: Any = voice.user_tokens
        try:
            with progress("compiling and answering", 1):
                answers = catalogue.model.generate(
                    [catalogue.told(voice, catalogue.asked(question)) for question in given.questions],
                    catalogue.bank,
                    voice.mix,
                    max_new_tokens=given.max_tokens,
                    temperature=given.temperature,
                    top_p=given.top_p,
                    seed=given.seed,
                    user_tokens=None if tokens is None else tokens[None].repeat(len(given.questions), axis=0),
                )
        except UserError as error:  # arguments are flags here
            flags = {"max_new_tokens": "--max-tokens", "temperature": "--temperature", "top_p": "--top-p"}
            name, *rest = str(error).split(" ", 1)
            raise UserError(" ".join([flags.get(name, name), *rest])) from error
        for answer in answers:
            print(visible(answer, keep="\n\t"))


def _users(arguments: Sequence[str]) -> None:
    from pjrlhf.serving.people.commands import parser_of, users

    given = parser_of().parse_args(arguments)
    flags = ("mix", "comparisons") if given.verb in ("add", "update") else ()
    with _one_line(*flags), _needs("serve"):
        users(given, _keep_programs)


def _keep_programs() -> None:
    from pjrlhf.runtime.devices import compilation_cache

    compilation_cache()


def _data(arguments: Sequence[str]) -> None:
    from pjrlhf.config import complete
    from pjrlhf.config_files import load_config, shipped_configs
    from pjrlhf.pipeline.data_command import names_config, parser_of, show

    given = parser_of().parse_args(arguments)
    with _one_line():
        is_config = names_config(given.spec, given.settings, shipped_configs())
        config = load_config(given.spec) if is_config else None
        if config is not None:
            complete(config)
        show(given, config)


def _export(arguments: Sequence[str]) -> None:
    parser = Arguments(
        prog="pjrlhf export",
        description="Writes a soup, a person or every ingredient for other programs.",
    )
    _add_source(parser)
    parser.add_argument("--for", dest="kind", choices=EXPORTS, help=EXPORTS_HELP)
    parser.add_argument("--output", metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--check", metavar="URL", help="write nothing: compare the log-probs of a server with ours")
    parser.add_argument("--served-as", metavar="NAME", help="of --check: the name of the model on the server")
    parser.add_argument("--tolerance", type=float, metavar="NATS", help="of --check; default 0.05")
    parser.add_argument("--mix", metavar="NAME=WEIGHT,...", help="weights of the ingredients")
    parser.add_argument("--user", metavar="NAME", help="a person of a user model")
    parser.add_argument(
        "--people",
        default="",
        metavar="URL",
        help="the store of people; if empty, that in $PJRLHF_PEOPLE, else people.sqlite in RUN",
    )
    parser.add_argument("--rank", type=int, metavar="R", help="of peft: the nearest adapter of this rank, by SVD")
    parser.add_argument("--save-dtype", choices=("float32", "bfloat16", "float16"), help="of full models")
    parser.add_argument("--keep-adapter", action="store_true", help="of vocabulary: do not merge the adapter")
    parser.add_argument("--push", default="", metavar="USER/NAME", help="upload the folder to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="whether a new repository is private")
    given = parser.parse_args(arguments)
    if given.check is not None:
        written = given.kind, given.output, given.rank, given.save_dtype, given.keep_adapter or None, given.push or None
        if written != (None,) * len(written):
            parser.error("--check writes nothing: leave out --for, --output and what goes with them")
        _check_server(parser, given)
        return
    if (given.served_as, given.tolerance) != (None, None):
        parser.error("--served-as and --tolerance go with --check")
    if given.kind is None or given.output is None:
        parser.error("name --for and --output, or --check")
    with _one_line("mix"):
        from pjrlhf.export.command import Wish, export, output_folder
        from pjrlhf.export.push import check_push
        from pjrlhf.export.soup import Source
        from pjrlhf.serving.catalogue import parse_mix
        from pjrlhf.terminal import visible

        output = output_folder(given.output)
        mix = None if given.mix is None else parse_mix(given.mix)
        if given.push:
            check_push(given.push)
        catalogue, members = _with_members(_source(parser, given), given.people)
        places = _ingredients(parser, given) or {name: f"{given.run}/{name}" for name in catalogue.names}
        wish = Wish(
            kind=given.kind,
            output=output,
            mix=mix,
            user=given.user,
            rank=given.rank,
            dtype=given.save_dtype,
            keep_adapter=given.keep_adapter,
        )
        for line in export(Source(catalogue, places, members), wish, given.push, given.private):
            print(visible(line))


def _with_members(catalogue: "Catalogue", url: str) -> tuple["Catalogue", tuple[str, ...]]:
    """The catalogue with the people of its store, if it has one, and the names of all people."""
    from pjrlhf.serving.catalogue import People

    if not isinstance(catalogue.people, People):
        return catalogue, ()
    trained = [name for name in catalogue.people.registry.names if name is not None]
    found = _with_stored(catalogue, url)
    members: Any = found.people
    if found is catalogue:
        return catalogue, tuple(trained)
    later = [str(person.name) for person in members.store.people() if person.name is not None]
    return found, tuple(name for name in dict.fromkeys([*trained, *later]) if members.knows(name))


def _with_stored(catalogue: "Catalogue", url: str = "") -> "Catalogue":
    """The catalogue with the people of its store; as it is where there is none, and the extra is not needed."""
    from pjrlhf.serving.people.address import is_kept

    if not is_kept(catalogue.run, url):
        return catalogue
    with _needs("serve"):
        from pjrlhf.serving.people.members import open_members
    return open_members(catalogue, url)


def _check_server(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Exit code 1 where the log-probs of a server differ by more than the tolerance."""
    with _one_line("mix"):
        from pjrlhf.export.check import TOLERANCE, Server, check, check_tolerance
        from pjrlhf.export.soup import Source
        from pjrlhf.serving.catalogue import parse_mix
        from pjrlhf.terminal import visible

        tolerance = TOLERANCE if given.tolerance is None else given.tolerance
        check_tolerance(tolerance)
        server = Server.at(given.check)
        mix = None if given.mix is None else parse_mix(given.mix)
        catalogue, members = _with_members(_source(parser, given), given.people)
        source = Source(catalogue, {}, members)
        lines, good = check(server, source, mix, given.user, given.served_as, tolerance)
        for line in lines:
            print(visible(line))
    if not good:
        sys.exit(1)


def _add_source(parser: argparse.ArgumentParser) -> None:
    """What to serve."""
    parser.add_argument("--run", metavar="RUN", help="the run directory, such as runs/soups")
    parser.add_argument("--entry", metavar="NAME", help="of methods or of a section models, where the run has several")
    parser.add_argument("--model", metavar="FOLDER", help="a base, its folder or name on the hub, in place of --run")
    parser.add_argument(
        "--ingredients",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FOLDER",
        help="LoRA adapters in PEFT layout, for --model",
    )
    dtypes = "float32", "bfloat16"
    parser.add_argument("--dtype", choices=dtypes, help="of --model; default float32. A run has its own")
    parser.add_argument("--quantize", choices=QUANTIZE, help="of --model. A run has its own")


def _add_soups(parser: argparse.ArgumentParser, use: str) -> None:
    parser.add_argument(
        "--soups",
        nargs="+",
        action="extend",
        default=[],
        metavar="SOUP",
        help=f"soups with names of their own, {use}: NAME=INGREDIENT=WEIGHT,..., or a JSON file of them",
    )


def _check_mix(names: Sequence[str], soups: Sequence[str], mix: str | None) -> None:
    """What --mix names or weighs, before any weights are read."""
    from pjrlhf.errors import UserError
    from pjrlhf.serving.catalogue import checked_mix, parse_mix

    known = *names, *soups
    if mix is not None and "=" in mix:
        checked_mix(parse_mix(mix), names)
    elif mix is not None and mix not in known:
        hint = f"name one of {', '.join(known)}, or write NAME=WEIGHT,NAME=WEIGHT" if known else "leave it out"
        raise UserError(f"mix: {mix!r} is no ingredient and no soup of --soups; {hint}")


def _source(parser: argparse.ArgumentParser, given: argparse.Namespace, mesh: str = "") -> "Catalogue":
    if (given.run is None) == (given.model is None):
        parser.error("name one of --run and --model")
    if given.run is not None and given.ingredients:
        parser.error("--ingredients go with --model")
    if given.run is not None and (given.dtype, given.quantize) != (None, None):
        parser.error("--dtype and --quantize go with --model; a run has those it was trained with")
    if given.model is not None and given.entry is not None:
        parser.error("--entry goes with --run")
    ingredients = _ingredients(parser, given)
    from pjrlhf.settings import check_names

    check_names("--ingredients", ingredients)
    soups = {}
    if getattr(given, "soups", None):
        from pjrlhf.serving.soups import read_soups

        soups = read_soups(given.soups)
    names: Sequence[str] | None = tuple(ingredients)
    if given.model is None:
        from pjrlhf.serving.people.trained import entry_of

        names = entry_of(str(given.run), given.entry).names
    if names:  # without any, each command has an error of its own
        from pjrlhf.serving.catalogue import check_soups

        check_soups(soups, names)
        _check_mix(names, tuple(soups), getattr(given, "mix", None))
    from pjrlhf.runtime.devices import compilation_cache
    from pjrlhf.serving.opening import open_folders, open_run, parse_mesh

    compilation_cache()
    devices = parse_mesh(mesh)
    if given.model is not None:
        dtype, quantize = given.dtype or "float32", given.quantize or ""
        found = open_folders(given.model, ingredients, dtype, quantize, devices)
    else:
        found = open_run(str(given.run), given.entry, devices)
    return dataclasses.replace(found, soups=soups)


def _ingredients(parser: argparse.ArgumentParser, given: argparse.Namespace) -> dict[str, str]:
    """Name -> folder of the adapters of --ingredients."""
    found: dict[str, str] = {}
    for part in ",".join(given.ingredients).split(",") if given.ingredients else []:
        name, equals, folder = part.partition("=")
        if not (name and equals and folder) or name in found:
            parser.error(f"--ingredients {part}: write NAME=FOLDER, each name once")
        found[name] = folder
    return found


@contextlib.contextmanager
def _flags_of(section: str, names: Sequence[str]) -> Iterator[None]:
    """Settings of a section are flags here, and a UserError names them so."""
    from pjrlhf.errors import UserError

    try:
        yield
    except UserError as error:
        keys = rf"\b{section}\.({'|'.join(names)})\b"
        raise UserError(re.sub(keys, lambda found: f"--{found[1].replace('_', '-')}", str(error))) from error


@contextlib.contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Turns the lack of an extra's library into a UserError."""
    from pjrlhf.errors import UserError
    from pjrlhf.paths import install

    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name}: is not installed; {install(extra)}") from error


def _report(arguments: Sequence[str]) -> None:
    parser = Arguments(prog="pjrlhf report", description="Prints the tables of a finished run.")
    parser.add_argument("run", metavar="RUN", help="the run directory, such as runs/soups")
    folder = pathlib.Path(os.path.expanduser(parser.parse_args(arguments).run)) / "report"
    with _one_line():
        from pjrlhf.errors import UserError
        from pjrlhf.evaluation.report import print_summary
        from pjrlhf.terminal import visible

        remedy = f"delete {visible(folder.parent / 'manifest.json')} and run its config again"
        try:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{folder}: no summary.json; name the directory of a run whose stage of evaluation has ended"
            ) from None
        except NotADirectoryError:
            raise UserError(f"{folder.parent}: is a file; name the run directory of a finished run") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{folder}/summary.json: cannot be read ({error}); {remedy}") from error
        print_summary(folder / "summary.json", summary, remedy)
        print(f"report: {visible(folder / 'index.html')}")


@contextlib.contextmanager
def _one_line(*flags: str) -> Iterator[None]:
    """Turns a UserError into one line on stderr and exit code 2.

    Args:
      flags: what a message may start with that is a flag here; the message then names the flag.
    """
    from pjrlhf.errors import UserError
    from pjrlhf.terminal import print_error

    try:
        yield
    except UserError as error:
        print_error(
            UserError(re.sub(r"^(\w+):", lambda found: f"--{found[0]}" if found[1] in flags else found[0], str(error)))
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
