"""Shared test set-up: eight CPU devices, a compilation cache, and the optional folder of real data."""

import os
import pathlib
from importlib import metadata

# Most of the time of the tests goes into compiling programs that run once: compile fast rather than well.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # Known to these; a later jaxlib may not know it, and would stop.
        *(["--xla_cpu_use_fusion_emitters=false"] if metadata.version("jaxlib") < "0.11" else []),
    ]
)

import jax
import pytest

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
