"""Several processes (hosts) as one program: how they start, agree and stop."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from causalfusion_jax.errors import require
from causalfusion_jax.lock import FolderLock

T = TypeVar("T")


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


def on_primary(run: Callable[[], T], default: T) -> T:
    """`run()` on process 0, its result (a number, or None for `default`) on all.

    An error on process 0 ends the others too, rather than leave them waiting.
    """
    if jax.process_count() == 1:
        return run()
    error, result = None, default
    if is_primary():
        try:
            result = run()
        except Exception as raised:
            error = raised
    failed, has_result, number = multihost_utils.broadcast_one_to_all(
        np.array([error is not None, result is not None, result or 0], np.int64)
    )
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("process 0 could not go on; its message says why")
    return int(number) if has_result else None


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
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def total(number: int) -> int:
    """The sum of a number of every process."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.array(number)).sum())
