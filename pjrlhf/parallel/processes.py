"""Several processes that run one program (JAX's multi-controller SPMD): start-up, who writes, and host copies.

Every process runs every stage with the same numbers on the host; arrays on devices are shared between them. Files are
written by process 0 alone, and the others go on when they are there.
"""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from pjrlhf.errors import UserError

T = TypeVar("T")

MODES = ("auto", "on", "off")
HEARTBEAT_SECONDS = 30  # a process silent for so long counts as dead, and the job ends


def several(environment: Mapping[str, str]) -> bool:
    """Whether the environment says that this is one of several processes: Open MPI, SLURM, a Cloud TPU slice, a
    Kubernetes job with an index, or JAX's own variable.
    """
    steps = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or "1"
    return (
        int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or (int(steps) > 1 and "SLURM_PROCID" in environment)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
        or "JAX_COORDINATOR_ADDRESS" in environment
    )


def start(mode: str = "auto", coordinator: str = "", count: int = 0, index: int = -1) -> None:
    """Joins the other processes of this run. Call it before anything asks JAX for its devices.

    Args:
      mode: "on" and "off", or "auto": on where the environment says so (see `several`) or `coordinator` is given.
      coordinator: "host:port" of process 0; found by JAX on Cloud TPU, SLURM and Open MPI.
      count, index: number of processes, and which this one is; found in the same way. On Kubernetes the environment
        variables JAX_COORDINATOR_ADDRESS, PJRLHF_PROCESS_COUNT and JOB_COMPLETION_INDEX say so.

    Raises:
      UserError: an unknown mode, or the processes do not find each other.
    """
    if mode not in MODES:
        raise UserError(f"--distributed={mode}: unknown; choose one of {', '.join(MODES)}")
    if mode == "off" or (mode == "auto" and not coordinator and not several(os.environ)):
        return
    count = count or int(os.environ.get("PJRLHF_PROCESS_COUNT", 0))
    if index < 0 and count:
        index = int(os.environ.get("JOB_COMPLETION_INDEX", -1))
    given = {"coordinator_address": coordinator, "num_processes": count, "process_id": index if index >= 0 else None}
    given = {name: value for name, value in given.items() if value or (value == 0 and name == "process_id")}
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the processes of this run did not find each other ({reason}); give every one of them --coordinator, "
            "--num_processes and --process_id, or --distributed=off to run alone"
        ) from error
    logging.info(
        "process %d of %d, %d of %d devices",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )


def is_process_zero() -> bool:
    """Whether this process writes the shared files."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Returns when every process has come here. `name` is for messages."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def on_process_zero(write: Callable[..., T]) -> Callable[..., T | None]:
    """Makes `write` run on process 0 alone; the others wait until it is done, and get None."""

    @functools.wraps(write)
    def once(*args: Any, **kwargs: Any) -> T | None:
        result = write(*args, **kwargs) if is_process_zero() else None
        wait(write.__qualname__)
        return result

    return once


def broadcast_from_zero(values: np.ndarray) -> np.ndarray:
    """The values of process 0, on every process; all must call it, with arrays of one shape and dtype."""
    return values if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(values))


def everywhere(flag: bool) -> bool:
    """Whether `flag` holds on every process; all must call it."""
    return flag if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.array(flag))))


def to_host(tree: Any) -> Any:
    """Numpy copies of all arrays, whole on every process, however they are sharded. All processes must call it."""

    def one(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return x

    return jax.device_get(jax.tree.map(one, tree))


def to_devices(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """`x` placed by `sharding`. Where that names devices of other processes, `x` is the same on all of them and each
    takes its part.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and (jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) or x.committed):
        return jax.jit(lambda y: y, out_shardings=sharding)(x)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
