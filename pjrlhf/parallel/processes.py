"""Multi-process runs (JAX's multi-controller SPMD): start-up, writing files on one process, and host copies.

Every process runs every stage with the same host values; device arrays span all processes. Process 0 alone writes
files, and the others wait until they are written.
"""

import functools
import json
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from pjrlhf.errors import UserError
from pjrlhf.types import Array, Tree

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

MODES = ("auto", "on", "off")
PIECE = 2**26  # bytes that processes exchange at once: they pass through the memory of every device
HEARTBEAT_SECONDS = 30  # a process silent for this long counts as dead, which ends the job


def is_multiprocess(environment: Mapping[str, str]) -> bool:
    """Whether the environment variables announce several processes: those of Open MPI, SLURM, a Cloud TPU slice, an
    indexed Kubernetes job, or JAX itself.
    """
    steps = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or "1"
    return (
        int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or (int(steps) > 1 and "SLURM_PROCID" in environment)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
        or "JAX_COORDINATOR_ADDRESS" in environment
    )


def initialize(mode: str = "auto", coordinator: str = "", count: int = 0, index: int = -1) -> None:
    """Connects to the other processes of this run. Call it before anything queries JAX for devices.

    Args:
      mode: "on", "off", or "auto", which is on if `is_multiprocess` says so or `coordinator` is given.
      coordinator: "host:port" of process 0; JAX detects it on Cloud TPU, SLURM and Open MPI.
      count, index: number of processes, and the index of this one; detected likewise. On Kubernetes all three come from
        the environment variables JAX_COORDINATOR_ADDRESS, PJRLHF_PROCESS_COUNT and JOB_COMPLETION_INDEX.

    Raises:
      UserError: an unknown mode, or the processes do not find each other.
    """
    if mode not in MODES:
        raise UserError(f"--distributed={mode}: unknown; choose one of {', '.join(MODES)}")
    if mode == "off" or (mode == "auto" and not coordinator and not is_multiprocess(os.environ)):
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
    """Whether this is process 0, which writes the shared files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has called it. `name` appears in error messages."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def on_process_zero(write: Callable[P, T]) -> Callable[P, T | None]:
    """Decorates `write` to run on process 0 only; the other processes wait for it and get None."""

    @functools.wraps(write)
    def once(*args: P.args, **kwargs: P.kwargs) -> T | None:
        result = write(*args, **kwargs) if is_process_zero() else None
        barrier(getattr(write, "__qualname__", repr(write)))
        return result

    return once


def broadcast_from_zero(values: np.ndarray) -> np.ndarray:
    """The values of process 0 on every process. All must call it, with arrays of the same shape and dtype."""
    return values if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(values))


def json_from_zero(make: Callable[[], T]) -> T:
    """What `make` returns on process 0, JSON values, on every process. All must call it."""
    if jax.process_count() == 1:
        return make()
    text = json.dumps(make()).encode() if is_process_zero() else b""
    size = int(broadcast_from_zero(np.array(len(text))))
    buffer = np.zeros(size, np.uint8)
    if is_process_zero():
        buffer[:] = np.frombuffer(text, np.uint8)
    return json.loads(broadcast_from_zero(buffer).tobytes())


def in_shares(items: Sequence[T], work: Callable[[Sequence[T]], list[R]]) -> list[R]:
    """`work(items)`, a result for every item that depends on this item alone: each process works on a share of the
    items and gets the results of the others. All must call it, with the same items; results are pickled.

    Raises:
      UserError: `work` raised it on some process; all raise that of the first item.
    """
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return work(items)
    own = items[len(items) * index // count : len(items) * (index + 1) // count]
    try:
        found = work(own) if len(own) else []
    except UserError as error:  # the others wait for this share
        found = error
    found = [pickle.loads(share) for share in _from_all(pickle.dumps(found))]
    for share in found:
        if isinstance(share, UserError):
            raise share
    return [result for share in found for result in share]


def _from_all(data: bytes) -> list[bytes]:
    """The bytes of every process, in the order of the processes."""
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    pieces = []
    for start in range(0, int(sizes.max()), PIECE):
        buffer = np.zeros(min(PIECE, int(sizes.max()) - start), np.uint8)
        part = np.frombuffer(data[start : start + PIECE], np.uint8)
        buffer[: len(part)] = part
        pieces.append(np.asarray(multihost_utils.process_allgather(buffer)))
    whole = np.concatenate(pieces, axis=1)
    return [row[:size].tobytes() for row, size in zip(whole, sizes, strict=True)]


def on_all_processes(flag: bool) -> bool:
    """Whether `flag` is true on every process. All must call it."""
    return flag if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.array(flag))))


def to_host(tree: Tree) -> Tree:
    """Whole numpy copies of all arrays on every process, whatever their sharding. All processes must call it."""

    def one(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return x

    return jax.device_get(jax.tree.map(one, tree))


def to_devices(x: Array | np.ndarray, sharding: jax.sharding.Sharding) -> Array:
    """Places `x` by `sharding`. If it spans several processes, all pass the same `x` and each places its shards."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and (jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or x.committed):
        return jax.jit(lambda y: y, out_shardings=sharding)(x)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
