"""Starts a run: `python -m pjrlhf.main --config=configs/soups.py --workdir=runs/mine --config.seed=1`."""

import json
import os
import pathlib
import re
import sys
import traceback

from absl import app, flags, logging
from absl.logging import converter
from ml_collections import config_flags

from pjrlhf.errors import UserError, missing_key
from pjrlhf.paths import user_cache

FLAGS = flags.FLAGS
# What may change between two runs of one run directory: it does not influence training.
FREE = (
    *("log_every", "loggers", "profile", "aot", "checkpoint_every", "max_to_keep", "keep_best"),
    *("title", "seeds", "stages", "methods", "evaluate", "evaluate_users", "evaluate_front"),
)
_CONFIG = config_flags.DEFINE_config_file("config", None, "What to run: a file of configs/, optionally with :variant.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; runs/<name of the config> where not given.")
_AOT = flags.DEFINE_string("aot", "", "Compile for these TPUs, which need not be here, and run nothing: v5e:4x4.")
_DISTRIBUTED = flags.DEFINE_string("distributed", "auto", "Is this one of several processes: on, off, or auto.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0, where the environment does not say it.")
_COUNT = flags.DEFINE_integer("num_processes", 0, "How many processes, where the environment does not say it.")
_INDEX = flags.DEFINE_integer("process_id", -1, "Which one this is, where the environment does not say it.")


def compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second run starts at once."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def default_workdir(config_path: str) -> str:
    """configs/soups.py:hf -> runs/soups-hf."""
    path, _, variant = config_path.partition(":")
    name = pathlib.Path(path).stem
    return str(pathlib.Path("runs") / (f"{name}-{variant}" if variant else name))


def parse(argv: list[str]) -> list[str]:
    """Reads the flags. Raises UserError where they, or the config file, cannot be understood."""
    try:
        rest = FLAGS(argv)
        if _CONFIG.value is None:
            raise UserError("--config: not given; for example --config=configs/soups.py")
        _ = _CONFIG.value.keys  # a file that is not there is reported by the first look inside
    except SystemExit:
        sys.exit(0)  # --help; for absl that is an error
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config."):
            raise UserError("--config: not given; for example --config=configs/soups.py") from None
        raise UserError(f"{error}; --help lists them, and settings of the config start with --config.") from None
    except (flags.Error, OSError) as error:
        reason = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")
        raise UserError(f"--config: {reason}; check it" if isinstance(error, OSError) else reason) from None
    except (AttributeError, KeyError) as error:
        if not (missing := missing_key(error)):
            raise
        key, near = missing
        given = next((arg for arg in argv if re.match(rf"--config\.(.*\.)?{key}\b", arg)), key)
        hint = f"did you mean {near}?" if near else "see the config file"
        raise UserError(f"{given}: the config has no {key}; {hint}") from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]}: not a flag; settings of the config start with --config.")
    return rest


def main(_: list[str]) -> None:
    # Libraries below report their own bookkeeping at this level; ours is what a user asked for.
    logging.get_absl_handler().addFilter(lambda r: r.levelno > converter.STANDARD_INFO or "pjrlhf" in r.pathname)
    from pjrlhf.pipeline import seeds, stages

    config = _CONFIG.value
    plan = stages.read(config)  # whatever is wrong with it is said before anything else happens
    compilation_cache()
    if _AOT.value:
        from pjrlhf.aot import plan as aot

        aot.report(config, _AOT.value)
        return
    from pjrlhf.parallel import processes

    processes.initialize(_DISTRIBUTED.value, _COORDINATOR.value, _COUNT.value, _INDEX.value)
    from pjrlhf.training.workdir import Workdir

    workdir = Workdir(_WORKDIR.value or default_workdir(config_flags.get_config_filename(FLAGS["config"])))
    workdir.write_config(plan.to_dict(), ignore=FREE)
    (seeds if plan.settings.seeds else stages).run(config, workdir)
    summary = workdir.path / "report" / "summary.json"
    if summary.is_file() and processes.is_process_zero():
        from pjrlhf.evaluation.report import print_tables

        print_tables(json.loads(summary.read_text(encoding="utf-8")))
        print(f"report: {summary.with_name('index.html')}")


def leave(code: int) -> None:
    """Ends this process. One of several goes at once: the usual way out would wait for the others, which may be waiting
    for this one.
    """
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run() -> None:
    """The entry point: a mistake a person can mend ends in one line, not in a traceback."""
    try:
        app.run(main, flags_parser=parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(2)
    except SystemExit as stop:
        # Stopped by a signal: the message says how to go on, the code is the shell's.
        if isinstance(stop.code, int) and stop.code > 128:
            print(stop, file=sys.stderr)
        raise
    except Exception:
        traceback.print_exc()
        leave(1)


if __name__ == "__main__":
    run()
