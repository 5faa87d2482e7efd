"""Starts a run: `python -m pjrlhf.main --config=configs/soups.py --workdir=runs/mine --config.seed=1`."""

import ast
import contextlib
import functools
import inspect
import os
import pathlib
import re
import signal
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from typing import Any, NoReturn, get_type_hints

from absl import app, flags, logging
from absl.logging import converter
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from pjrlhf.config_files import load_config
from pjrlhf.errors import UserError, ending_signals, reason_of, stopped_by
from pjrlhf.paths import expand
from pjrlhf.terminal import SafeRecords, line, print_error, quiet_libraries, visible

FLAGS = flags.FLAGS
CLEANUP_SECONDS = 10.0  # at most, between a signal and the end


class _ConfigFile(flags.ArgumentParser):
    """Reads a config file, and checks the names of all settings on the command line."""

    def parse(self, argument: str) -> ConfigDict:
        from pjrlhf.config import complete

        config = load_config(argument)
        complete(config)
        for arg in sys.argv[1:]:
            if found := re.match(r"--?(?:no)?config\.([^=]+)", arg):
                reach(config, found[1])
        return config.lock()


def define(values: flags.FlagValues) -> None:
    """Adds the flags of this program."""
    config_flags.DEFINE_config_file(
        "config", None, "What to run: a config file, optionally with :variant.", flag_values=values
    )
    values["config"].parser = _ConfigFile()
    for name, default, text in (
        ("workdir", None, "Run directory; runs/<name of the config> by default."),
        ("aot", "", "Compile for these TPUs, such as v5e:4x4, and run nothing. No TPU is needed."),
        ("distributed", "auto", "Whether this is one of several processes: on, off, or auto."),
        ("coordinator", "", "host:port of process 0, where the environment does not give it."),
    ):
        flags.DEFINE_string(name, default, text, flag_values=values)
    for name, default, text in (
        ("num_processes", 0, "Number of processes, where the environment does not give it."),
        ("process_id", -1, "Number of this process, where the environment does not give it."),
    ):
        flags.DEFINE_integer(name, default, text, flag_values=values)


define(FLAGS)


def reach(config: ConfigDict, key: str) -> None:
    """Checks that a config has the setting of a flag. A section whose keys a config chooses gets the key.

    Args:
      key: dotted, without "config.".

    Raises:
      UserError: the config has no such setting or section.
    """
    from pjrlhf.config import RunSettings
    from pjrlhf.settings import RENAMED, UnknownKey, is_open

    if "[" in key:
        return  # an index; the flag itself reports its errors
    parts, section = key.split("."), config
    for i, part in enumerate(parts):
        above, place = ".".join(parts[:i]), ".".join(parts[: i + 1])
        if not isinstance(section, ConfigDict):
            raise UserError(f"--config.{key}: --config.{above} is a value, not a section; set --config.{above}")
        last, choosable = i == len(parts) - 1, is_open(RunSettings, place)
        if part not in section:
            if not above and part in RunSettings.__dataclass_fields__:
                raise UserError(
                    f"--config.{part}: this config has no section {part}; add it to the file, or use another config"
                )
            if not choosable or not above:
                raise UnknownKey(f"--config.{place}", section, _same_name(config, part, above))
            if i > 1 and parts[0] in ("methods", "preference") and (new := RENAMED.get(part)):
                raise UnknownKey(f"--config.{place}", [new])
            with section.ignore_type():
                section[part] = placeholder(object) if last else ConfigDict()
        elif choosable and not last and not isinstance(section[part], ConfigDict):
            with section.ignore_type():  # a name, such as that of the synthetic prompts, in place of a section
                section[part] = ConfigDict()
        section = section[part]


def _same_name(config: ConfigDict, name: str, above: str) -> list[str]:
    """The flags of settings called `name` in other sections of a config."""

    def found(section: ConfigDict, prefix: str) -> Iterator[str]:
        for key, value in section.items():
            if isinstance(value, ConfigDict):
                yield from found(value, f"{prefix}{key}.")
            elif key == name and prefix != f"{above}.":
                yield f"--config.{prefix}{key}"

    return list(found(config, "")) if above else []


def settings_help(spec: str) -> Iterator[str]:
    """Lines that describe the settings of a config file: flag with its value in the file, help, limits, default."""
    from pjrlhf.config import RunSettings, complete
    from pjrlhf.settings import fields_of, nested_class, rule_of

    config, hints = load_config(spec), get_type_hints(RunSettings)
    complete(config)
    yield f"Settings of {visible(spec)}, with their values there. Set one with its flag."
    found = {key: field for key, (_, field) in fields_of(RunSettings).items() if key.partition(".")[0] in config}
    sections = dict.fromkeys("" if "." not in key else key.partition(".")[0] for key in found)
    for section in sections:
        if section:
            cls = nested_class(hints[section])
            yield f"\n{section}: {(inspect.getdoc(cls) or '').splitlines()[0]}"
        for key, field in found.items():
            if key.rpartition(".")[0].partition(".")[0] != section:
                continue
            value, rule = functools.reduce(_get, key.split("."), config), rule_of(field)
            value = value.to_dict() if isinstance(value, ConfigDict) else value
            default = field.default_factory() if callable(field.default_factory) else field.default
            limits = rule.describe() or " | ".join(str(choice) or '""' for choice in rule.allowed)
            notes = [rule.help, limits, "" if value == default else f"default {visible(repr(default))}"]
            yield f"  --config.{key}={visible(repr(value))}"
            yield f"      {' - '.join(filter(None, notes))}"


def _get(section: Any, key: str) -> Any:
    return section.get(key) if isinstance(section, ConfigDict) else None


def default_workdir(config_path: str) -> str:
    """The run directory of a config: configs/soups.py:hf -> runs/soups-hf."""
    path, _, variant = config_path.partition(":")
    name = pathlib.Path(path).stem
    return str(pathlib.Path("runs") / (f"{name}-{variant}" if variant else name))


def parse(argv: list[str]) -> list[str]:
    """Reads the flags and the config file.

    Raises:
      UserError: a flag or the config file is wrong or missing.
    """
    try:
        asked = {arg.lstrip("-") for arg in argv if arg.startswith("-")} & {"help", "h", "helpfull", "helpshort", "?"}
        configs = [arg.partition("=")[2] for arg in argv if re.match(r"--?config=.", arg)]
        if asked and configs:
            print("\n".join(settings_help(configs[-1])))
            sys.exit(0)
        rest = FLAGS(argv)
    except SystemExit:
        sys.exit(0)  # --help, which absl ends with an error code
    except UserError:
        raise
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config."):
            raise UserError("--config: not given; for example --config=soups") from None
        raise UserError(f"{error}; --help lists them, and settings of the config start with --config.") from None
    except (flags.Error, TypeError, ValueError, LookupError, AttributeError, SyntaxError, RecursionError) as error:
        if isinstance(error.__context__, UserError):  # an error of the config file that absl wraps
            raise error.__context__ from None
        if refused := _refused(str(error)):
            raise refused from None
        reason = reason_of(error)
        raise UserError(f"{reason}; check the flags") from None
    if FLAGS.config is None:
        raise UserError("--config: not given; for example --config=soups")
    if len(rest) > 1:
        raise UserError(f"{rest[1]}: not a flag; settings of the config start with --config.")
    return rest


def _refused(message: str) -> UserError | None:
    """The error for a value of the wrong type, as a config file with this value would get it.

    Args:
      message: of absl: "flag --NAME=VALUE: REASON".
    """
    from pjrlhf.config import RunSettings
    from pjrlhf.settings import Rule, checked, fields_of, rule_of, shown

    found = re.match(r"flag --([^=]+)=(.*?): ", message, re.DOTALL)
    if not found or found[1] not in FLAGS:
        return None
    flag, value = found.groups()
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        value = ast.literal_eval(value)
    key, parser, settings = flag.removeprefix("config."), FLAGS[flag].parser, fields_of(RunSettings)
    name = key if key != flag else f"--{flag}"
    kinds = {flags.IntegerParser: int, flags.FloatParser: float, flags.BooleanParser: bool}
    kind = next((kind for cls, kind in kinds.items() if isinstance(parser, cls)), None)
    if key != flag and key in settings:
        hint, rule = settings[key][0], rule_of(settings[key][1])
    elif kind is not None:
        hint, rule = kind, Rule()
    elif isinstance(functools.reduce(_get, key.split("."), FLAGS["config"].value), ConfigDict):
        return UserError(f"{name}: {shown(value)} is not a section of settings; set --config.{key}.KEY")
    else:
        return None
    try:
        checked(name, value, hint, rule)
    except UserError as error:
        return error
    return None


def main(_: list[str]) -> None:
    """Runs the config of the flags, and prints the tables of its report."""
    handler = logging.get_absl_handler()
    # At this level, libraries log their internals; users need the messages of this package only.
    handler.addFilter(lambda r: r.levelno > converter.STANDARD_INFO or "pjrlhf" in r.pathname)
    handler.addFilter(SafeRecords())
    from pjrlhf.pipeline import seeds, stages

    config = FLAGS.config
    plan = stages.read(config)  # reports errors in the config before anything else happens
    if FLAGS.aot:  # programs for devices that are not here cannot be read from a cache
        from pjrlhf.aot import plan as aot

        aot.report(config, FLAGS.aot)
        return
    from pjrlhf.parallel import processes

    processes.initialize(FLAGS.distributed, FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    from pjrlhf.training.workdir import Workdir, read_object, refuse_inside_run

    path = expand(FLAGS.workdir or default_workdir(config_flags.get_config_filename(FLAGS["config"])))
    refuse_inside_run(path)
    workdir = Workdir(path)
    (seeds if plan.settings.seeds else stages).run(config, workdir)
    summary = workdir.path / "report" / "summary.json"
    if summary.is_file() and processes.is_process_zero():
        from pjrlhf.evaluation.report import print_summary

        remedy = f"delete {workdir.path / 'manifest.json'}, and the stages write it again"
        print_summary(summary, read_object(summary, remedy), remedy)
        print(f"report: {visible(summary.with_name('index.html'))}")
    elif processes.is_process_zero():
        print(f"finished: {visible(workdir.path)}")


def leave(code: int) -> None:
    """Ends this process with an exit code.

    One of several processes ends at once: a normal exit would wait for the others, and they may wait for this one. So
    does one with threads of libraries, which may wait for a write that has failed.
    """
    others = (thread for thread in threading.enumerate() if thread is not threading.main_thread())
    if is_distributed() or any(not thread.daemon for thread in others):
        leave_now(code)
    sys.exit(code)


def is_distributed() -> bool:
    """Whether this is one of several processes."""
    jax = sys.modules.get("jax")
    return bool(jax and jax.distributed.is_initialized())


def leave_now(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def interruptible(advice: str = "") -> Iterator[None]:
    """Ends this process with one line and exit code 128 + number where a signal stops the block, after its cleaning up.

    Args:
      advice: ends the line.
    """

    def end() -> NoReturn:
        print(f"{stopped_by(received[0])}{advice}", file=sys.stderr)
        leave_now(128 + received[0])

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        received.append(number)
        if _is_importing(frame):
            end()  # an exception inside the import of compiled code can crash
        # Libraries may swallow the interrupt, or wait for ever.
        deadline = threading.Timer(CLEANUP_SECONDS, end)
        deadline.daemon = True
        deadline.start()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in ending_signals()}
    unraisable, sys.unraisablehook = sys.unraisablehook, lambda one: received or unraisable(one)
    try:
        yield
    except BaseException:
        # Libraries turn an interrupt inside their calls into errors of their own. What they still run at a normal exit
        # can crash.
        if received:
            end()
        raise
    finally:
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_importing(frame: types.FrameType | None) -> bool:
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def run() -> None:
    """The entry point. A UserError and a signal end in one line instead of a traceback."""
    quiet_libraries()
    try:
        with interruptible("; the same command goes on from what is saved"):
            app.run(main, flags_parser=parse)
    except UserError as error:
        print_error(error)
        leave(2)
    except SystemExit as stop:
        # Stopped by a signal: the message says how to resume, and the code is that of the shell.
        if isinstance(stop.code, int) and stop.code > 128:
            print(line(stop), file=sys.stderr)
            if not is_distributed():
                leave(stop.code)
        raise
    except Exception as error:
        if not (type(error).__name__ == "JaxRuntimeError" and str(error).startswith("RESOURCE_EXHAUSTED")):
            traceback.print_exc()
            leave(1)
        from pjrlhf.training.performance import SMALLER

        reason = str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
        print_error(UserError(f"a program needs more memory than the device has ({reason}); {SMALLER}"))
        leave(2)


if __name__ == "__main__":
    run()
