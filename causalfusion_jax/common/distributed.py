"""Several processes (hosts) as one program: start, communication and stop."""

import contextlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from causalfusion_jax.common.errors import require
from causalfusion_jax.common.lock import FolderLock

T = TypeVar("T")
BROADCAST_BYTES = 64 * 2**20
"""Bytes broadcast at a time, of which each device holds a copy."""


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    multihost: bool = False,
) -> None:
    """Connects the processes of a job; must be called before jax uses a device.

    Defaults are the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, and with `multihost` the metadata of the cluster (Cloud TPU, GKE, Slurm, Open
    MPI). If nothing is given, this process runs alone.

    Args:
      coordinator_address: HOST:PORT of process 0.
      num_processes: number of processes.
      process_id: index of this process.
      multihost: take from the cluster what is not given.

    Raises:
      InputError: some of the three are given, but not all of them, and `multihost` is not.
    """
    given = {
        "coordinator_address": coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _number("num_processes", num_processes, "JAX_NUM_PROCESSES"),
        "process_id": _number("process_id", process_id, "JAX_PROCESS_ID"),
    }
    known = {name: value for name, value in given.items() if value is not None}
    if not known and not multihost:
        return
    if not multihost:
        for name, value in given.items():
            require(value is not None, f"--{name}", value, f"is needed with {', '.join(known)}; or give --multihost")
        count, number = given["num_processes"], given["process_id"]
        require(count >= 1, "--num_processes", count, "must be >= 1")
        require(0 <= number < count, "--process_id", number, f"must be in 0..{count - 1}")
    jax.distributed.initialize(**known)


def _number(name: str, value: int | None, variable: str) -> int | None:
    if value is not None or variable not in os.environ:
        return value
    text = os.environ[variable]
    require(text.isdigit(), f"--{name}", text, f"{variable} must be a number")
    return int(text)


def is_primary() -> bool:
    """Whether this is process 0, which prints and writes for all processes."""
    return jax.process_index() == 0


def on_primary(run: Callable[[], T], default: T = None) -> T:
    """Runs `run()` on process 0 and returns its result on all processes; collective.

    An error on process 0 raises an error on the other processes too, so that they do not wait.

    Args:
      run: returns plain values that JSON can represent.
      default: returned instead of None.
    """
    error, result = None, None
    if is_primary():
        try:
            result = run()
        except Exception as raised:
            if jax.process_count() == 1:
                raise
            error = raised
    if jax.process_count() > 1:
        failed, result = _broadcast_json([error is not None, None if error else result])
        if error is not None:
            raise error
        if failed:
            raise RuntimeError("process 0 failed; see its message")
    return default if result is None else result


def _broadcast_json(value):
    """The plain values of process 0 on all processes; floats are exact."""
    return json.loads(_broadcast_bytes(json.dumps(value).encode(), 0))


def _broadcast_bytes(data: bytes, source: int) -> bytes:
    """The bytes of process `source`, on all processes."""
    is_source = jax.process_index() == source
    length, parts = int(_broadcast(np.int32(len(data)), is_source)), []
    for start in range(0, length, BROADCAST_BYTES):
        part = np.zeros(min(BROADCAST_BYTES, length - start), np.uint8)
        if is_source:
            part[:] = np.frombuffer(data, np.uint8, len(part), start)
        parts.append(_broadcast(part, is_source).tobytes())
    return b"".join(parts)


def _broadcast(values: np.ndarray, is_source: bool) -> np.ndarray:
    # These transfers are intentional; the helpers of jax read devices implicitly.
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.broadcast_one_to_all(values, is_source=is_source))


def _gather(values, tiled: bool) -> np.ndarray:
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(values, tiled=tiled))


def from_each(arrays: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Yields the arrays of each process in turn, on all processes; collective.

    Args:
      arrays: arrays of this process by name, at most 2 GB in all; shapes may differ between processes.
    """
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    for source in range(jax.process_count()):
        # One process at a time, so that a host never holds the arrays of all.
        data = packed.getvalue() if jax.process_count() == 1 else _broadcast_bytes(packed.getvalue(), source)
        with np.load(io.BytesIO(data)) as loaded:
            yield dict(loaded)


@contextlib.contextmanager
def held_folder(folder: str | pathlib.Path, field: str) -> Iterator[FolderLock | None]:
    """Locks `folder` against other jobs. Process 0 holds the lock; the value is None on other processes.

    Args:
      folder: created if it does not exist.
      field: the option that names it, for errors.

    Raises:
      InputError: another job holds the lock.
    """
    with contextlib.ExitStack() as stack:
        locks = []
        on_primary(lambda: locks.append(stack.enter_context(FolderLock(folder, field))), None)
        yield locks[0] if locks else None


def wait_for_all(name: str) -> None:
    """Waits until every process has called this."""
    if jax.process_count() > 1:
        with jax.transfer_guard("allow"):
            multihost_utils.sync_global_devices(name)


def should_stop(poll: int, received: bool) -> bool:
    """Whether all processes stop at this poll.

    Args:
      poll: number of the poll; it increases by one from poll to poll, on all processes.
      received: whether this process received a signal; used if it is the only one. With several
        processes the runtime of jax watches SIGTERM on all of them, and chooses a poll that none has reached yet.
    """
    if jax.process_count() == 1:
        return received
    return multihost_utils.reached_preemption_sync_point(poll)


def everywhere(x: jax.Array) -> np.ndarray:
    """All of a global array, on every process; collective unless this process has all of it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(jax.device_get(x))
    return _gather(x, tiled=True)


def own_rows(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a global array that are on the devices of this process.

    Args:
      x: [num, ...], split along the first axis only.

    Returns:
      Indices of the rows in ascending order, int [rows], and the rows, [rows, ...].
    """
    parts = {shard.index[0].indices(x.shape[0])[:2]: shard.data for shard in x.addressable_shards}
    bounds = sorted(parts)
    values = jax.device_get([parts[bound] for bound in bounds])
    return np.concatenate([np.arange(*bound) for bound in bounds]), np.concatenate(values)


def total(number: int) -> int:
    """Sum of `number` over all processes; collective."""
    if jax.process_count() == 1:
        return number
    return int(_gather(np.array(number), tiled=False).sum())
