"""Shared test set-up: eight CPU devices, a compilation cache, and the optional folder of real data."""

import fcntl
import gc
import os
import pathlib
import shutil
import sys
from importlib import metadata

# Most of the time of the tests goes into compiling programs that run once: compile fast rather than well.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # Known to these; a later jaxlib may not know them, and would stop. A program of a test is too small to be worth
        # splitting into parts that are compiled side by side.
        *(
            ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
            if metadata.version("jaxlib") < "0.11"
            else []
        ),
    ]
)

import jax
import jaxtyping
import pytest
import support.typechecker

# Modules of array functions, whose annotated types and shapes are checked where PJRLHF_TEST_SHAPES is set.
# This takes a fifth of the time of the tests.
CHECKED = ("merging", "models", "objectives", "parallel", "rollout", "training")
if os.environ.get("PJRLHF_TEST_SHAPES"):
    jaxtyping.install_import_hook([f"pjrlhf.{name}" for name in CHECKED], f"{support.typechecker.__name__}.check")

# Tracing makes objects by the million, and hardly a cycle: a look for cycles after every 700 took 7 % of the time.
gc.set_threshold(20_000, 10, 10)

ROOT = pathlib.Path(__file__).resolve().parent.parent

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", os.environ.get("PJRLHF_TEST_CACHE", str(ROOT / ".pytest_cache" / "jax")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real data and models; tests that ask for it are skipped where it is absent."""
    folder = pathlib.Path(os.environ.get("PJRLHF_TEST_DATA", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder (set PJRLHF_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A temporary folder that all workers of this test session share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def once(root):
    """Makes a folder once per test session: the worker that asks first makes it, the others wait for it."""

    def make(name, build):
        folder, done = root / name, root / f"{name}.done"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # half of it, from a worker that failed
                build(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session", autouse=True)
def cache_folder(root):
    """Where runs keep what depends on content alone: not in the cache folder of whoever runs the tests."""
    folder = root / "cache"
    from pjrlhf.runtime.workspace import Workspace

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "cache_folder", property(lambda workspace: folder))
        yield folder


@pytest.fixture(scope="session")
def finished(once):
    """The folder of a finished run of `tiny.settings()`; not to be changed."""
    from support import tiny

    return once("finished", lambda folder: tiny.run(folder, tiny.settings()))


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="session")
def people(once, cache_folder):
    """The folder of a finished run of `tiny_users.settings()`; not to be changed."""
    from support import tiny, tiny_users

    return once("people", lambda folder: tiny.run(folder, tiny_users.settings()))


@pytest.fixture(scope="session")
def hub_model(once):
    """The folder of a tiny random model with its tokenizer, as one on the hub; not to be changed."""
    from support import tiny_users

    return once("hub_model", tiny_users.save_base) / "model"


@pytest.fixture(scope="session")
def family(once, cache_folder):
    """The folder of a finished run of `tiny_family.settings()`; not to be changed."""
    from support import tiny, tiny_family

    return once("family", lambda folder: tiny.run(folder, tiny_family.settings()))


@pytest.fixture
def ended(monkeypatch, capsys):
    """(exit code, lines on stderr) of the program called with some arguments; in this process, with flags of its own,
    as a process each would take minutes in all. Where the flags are right, `main` reads the config and ends.
    """
    from absl import flags

    from pjrlhf import main
    from pjrlhf.pipeline import stages

    monkeypatch.chdir(ROOT)

    def call(*arguments):
        values = flags.FlagValues()
        main.define(values)
        monkeypatch.setattr(main, "FLAGS", values)

        def start(_, flags_parser):
            flags_parser(["main", *arguments])
            stages.read(values.config)
            raise SystemExit(0)

        monkeypatch.setattr(main.app, "run", start)
        monkeypatch.setattr(sys, "argv", ["main", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main.run()
        return stopped.value.code, capsys.readouterr().err.splitlines()

    return call
