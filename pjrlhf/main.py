"""Starts a run: `python -m pjrlhf.main --config=configs/soups.py --workdir=runs/mine --config.seed=1`."""

import importlib.machinery
import importlib.util
import inspect
import json
import os
import pathlib
import re
import sys
import traceback
from typing import Any, cast

from absl import app, flags, logging
from absl.logging import converter
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from pjrlhf.errors import UserError
from pjrlhf.paths import user_cache

FLAGS = flags.FLAGS
# Settings that may change between two runs in one run directory, because training does not depend on them.
FREE = (
    *("log_every", "loggers", "profile", "aot", "checkpoint_every", "max_to_keep", "keep_best"),
    *("title", "seeds", "stages", "methods", "evaluate", "evaluate_users", "evaluate_front", "merge"),
)


class _ConfigFile(flags.ArgumentParser):
    """Reads a config file, and checks the names of all settings on the command line."""

    def parse(self, argument: str) -> ConfigDict:
        from pjrlhf.config import complete

        config = read_file(argument)
        complete(config)
        for arg in sys.argv[1:]:
            if found := re.match(r"--?(?:no)?config\.([^=]+)", arg):
                check_key(config, found[1])
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


def read_file(spec: str) -> ConfigDict:
    """The config that `get_config` of a config file returns.

    Args:
      spec: path of the file, optionally with :variant, the argument of `get_config`.

    Raises:
      UserError: no such file, an error in the file, or a result that is not a ConfigDict.
    """
    path, _, variant = spec.partition(":")
    if not os.path.isfile(path):
        raise UserError(f"--config: no file {path!r}; check the path, for example --config=configs/soups.py")
    loader = importlib.machinery.SourceFileLoader("config_file", path)
    module_spec = importlib.util.spec_from_file_location("config_file", path, loader=loader)
    assert module_spec, path  # always present with a loader
    module = importlib.util.module_from_spec(module_spec)
    try:
        loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError(f"{path}: has no function get_config; define one that returns a ConfigDict")
        arguments = [variant] if variant else []
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError:
            remedy = f"leave out :{variant}" if variant else f"name one as {path}:VARIANT"
            raise UserError(f"{path}: get_config {'has no' if variant else 'needs a'} variant; {remedy}") from None
        config = get_config(*arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        raise UserError(f"{_place(error, path)}: {reason}; correct the config file") from error
    if not isinstance(config, ConfigDict):
        what = "nothing" if config is None else f"a {type(config).__name__}"
        raise UserError(f"{path}: get_config returns {what}; return an ml_collections.ConfigDict")
    return ConfigDict(cast(Any, config)) if isinstance(config, FrozenConfigDict) else config


def _place(error: BaseException, path: str) -> str:
    """The config file, with the line of the error where it is known."""
    if isinstance(error, SyntaxError):
        return path  # the message names the line
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{path} line {lines[-1]}" if lines else path


def check_key(config: Any, key: str) -> None:
    """Checks that a config has the setting of a flag.

    Args:
      key: dotted, without "config.".

    Raises:
      UserError: the config has no such setting or section.
    """
    from pjrlhf.config import RunSettings
    from pjrlhf.settings import unknown_key

    done = "--config"
    for part in key.split("."):
        if "[" in part:
            return  # an index; the flag itself reports its errors
        if not isinstance(config, ConfigDict):
            raise UserError(f"--config.{key}: {done} is a value, not a section; set {done}")
        done = f"{done}.{part}"
        if part not in config:
            if done == f"--config.{part}" and part in RunSettings.__dataclass_fields__:
                raise UserError(f"{done}: this config has no section {part}; add it to the file, or use another config")
            raise UserError(unknown_key(done, list(config)))
        config = config[part]


def compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that later runs start fast."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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
        rest = FLAGS(argv)
    except SystemExit:
        sys.exit(0)  # --help, which absl ends with an error code
    except UserError:
        raise
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config."):
            raise UserError("--config: not given; for example --config=configs/soups.py") from None
        raise UserError(f"{error}; --help lists them, and settings of the config start with --config.") from None
    except (flags.Error, TypeError, ValueError, LookupError, AttributeError, SyntaxError, RecursionError) as error:
        if isinstance(error.__context__, UserError):  # an error of the config file that absl wraps
            raise error.__context__ from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{reason}; check the flags") from None
    if FLAGS.config is None:
        raise UserError("--config: not given; for example --config=configs/soups.py")
    if len(rest) > 1:
        raise UserError(f"{rest[1]}: not a flag; settings of the config start with --config.")
    return rest


def main(_: list[str]) -> None:
    """Runs the config of the flags, and prints the tables of its report."""
    # At this level, libraries log their internals; users need the messages of this package only.
    logging.get_absl_handler().addFilter(lambda r: r.levelno > converter.STANDARD_INFO or "pjrlhf" in r.pathname)
    from pjrlhf.pipeline import seeds, stages

    config = FLAGS.config
    plan = stages.read(config)  # reports errors in the config before anything else happens
    compilation_cache()
    if FLAGS.aot:
        from pjrlhf.aot import plan as aot

        aot.report(config, FLAGS.aot)
        return
    from pjrlhf.parallel import processes

    processes.initialize(FLAGS.distributed, FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    from pjrlhf.training.workdir import Workdir

    workdir = Workdir(FLAGS.workdir or default_workdir(config_flags.get_config_filename(FLAGS["config"])))
    workdir.write_config(plan.to_dict(), ignore=FREE)
    (seeds if plan.settings.seeds else stages).run(config, workdir)
    summary = workdir.path / "report" / "summary.json"
    if summary.is_file() and processes.is_process_zero():
        from pjrlhf.evaluation.report import print_tables

        print_tables(json.loads(summary.read_text(encoding="utf-8")))
        print(f"report: {summary.with_name('index.html')}")


def leave(code: int) -> None:
    """Ends this process with an exit code.

    One of several processes ends at once: a normal exit would wait for the others, and they may wait for this one.
    """
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run() -> None:
    """The entry point. A UserError ends in one line instead of a traceback."""
    try:
        app.run(main, flags_parser=parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(2)
    except SystemExit as stop:
        # Stopped by a signal: the message says how to resume, and the code is that of the shell.
        if isinstance(stop.code, int) and stop.code > 128:
            print(stop, file=sys.stderr)
        raise
    except Exception:
        traceback.print_exc()
        leave(1)


if __name__ == "__main__":
    run()
