"""Several processes (hosts) as one program: how they start, agree and stop."""

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
"""Bytes broadcast at a time: each device holds a copy meanwhile."""


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    multihost: bool = False,
) -> None:
    """Joins the processes of a job; call before anything else touches a device.

    What is not given is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; with `multihost`, the rest from the cluster's metadata (Cloud TPU, GKE,
    Slurm, Open MPI). Where nothing is given anywhere, this process runs alone.

    Args:
      coordinator_address: HOST:PORT of process 0.
      num_processes, process_id: how many there are, and which this one is.
      multihost: ask the cluster.

    Raises:
      InputError: some of the three are given, not all, and `multihost` is not.
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
            require(value is not None, f"--{name}", value, f"is needed beside {', '.join(known)}; or give --multihost")
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
    """Whether this is the process that prints and writes what all have in common."""
    return jax.process_index() == 0


def on_primary(run: Callable[[], T], default: T = None) -> T:
    """`run()` on process 0, its result on all.

    An error on process 0 ends the others too, rather than leave them waiting.

    Args:
      run: returns plain values, as of JSON.
      default: what None stands for.
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
            raise RuntimeError("process 0 could not go on; its message says why")
    return default if result is None else result


def _broadcast_json(value):
    """Process 0's plain values on all processes; floats keep every bit."""
    return json.loads(_broadcast_bytes(json.dumps(value).encode(), 0))


def _broadcast_bytes(data: bytes, source: int) -> bytes:
    """The bytes of process `source` on all processes."""
    is_source = jax.process_index() == source
    length, parts = int(_broadcast(np.int32(len(data)), is_source)), []
    for start in range(0, length, BROADCAST_BYTES):
        part = np.zeros(min(BROADCAST_BYTES, length - start), np.uint8)
        if is_source:
            part[:] = np.frombuffer(data, np.uint8, len(part), start)
        parts.append(_broadcast(part, is_source).tobytes())
    return b"".join(parts)


def _broadcast(values: np.ndarray, is_source: bool) -> np.ndarray:
    # jax's own helpers read devices implicitly; here that is intentional.
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.broadcast_one_to_all(values, is_source=is_source))


def _gather(values, tiled: bool) -> np.ndarray:
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(values, tiled=tiled))


def from_each(arrays: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of every process, in the order of the processes, on all of them; every bit is kept.

    Args:
      arrays: this process's, by name; shapes need not be alike. At most 2 GB in all.
    """
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    for source in range(jax.process_count()):
        # One at a time, so that a host never holds those of all.
        data = packed.getvalue() if jax.process_count() == 1 else _broadcast_bytes(packed.getvalue(), source)
        with np.load(io.BytesIO(data)) as found:
            yield dict(found)


@contextlib.contextmanager
def held_folder(folder: str | pathlib.Path, field: str) -> Iterator[FolderLock | None]:
    """Keeps other jobs out of `folder`; process 0 holds it for all (None on the others).

    Args:
      folder: made if it does not exist.
      field: the option that names it, for errors.

    Raises:
      InputError: another job is at work there.
    """
    with contextlib.ExitStack() as stack:
        locks = []
        on_primary(lambda: locks.append(stack.enter_context(FolderLock(folder, field))), None)
        yield locks[0] if locks else None


def wait_for_all(name: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        with jax.transfer_guard("allow"):
            multihost_utils.sync_global_devices(name)


def should_stop(poll: int, received: bool) -> bool:
    """Whether all processes stop at this poll.

    Args:
      poll: its number, which counts up by one from poll to poll, alike on all processes.
      received: whether this process, running alone, was told to stop. With several processes the
        runtime notices SIGTERM on any of them and picks a poll that none has reached yet.
    """
    if jax.process_count() == 1:
        return received
    return multihost_utils.reached_preemption_sync_point(poll)


def everywhere(x: jax.Array) -> np.ndarray:
    """The whole of a global array, on every process."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(jax.device_get(x))
    return _gather(x, tiled=True)


def own_rows(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a global array that lie on this process's devices.

    Args:
      x: [num, ...], not split along other axes than the first.

    Returns:
      Row numbers, ascending, int [rows], and these rows, [rows, ...].
    """
    parts = {shard.index[0].indices(x.shape[0])[:2]: shard.data for shard in x.addressable_shards}
    bounds = sorted(parts)
    values = jax.device_get([parts[bound] for bound in bounds])
    return np.concatenate([np.arange(*bound) for bound in bounds]), np.concatenate(values)


def total(number: int) -> int:
    """The sum of a number of every process."""
    if jax.process_count() == 1:
        return number
    return int(_gather(np.array(number), tiled=False).sum())
