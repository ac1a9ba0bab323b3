"""A lock of a folder: a lease file that its holder renews.

File locks of the operating system do not work across hosts on a mounted bucket, and a plain lock file
outlives a host that dies. A lease is a small file with the identity of its holder and a counter, which
the holder increments every few seconds. The lease of a process of this machine that has ended is taken
over at once; any other lease is taken over after its counter has not changed for a minute.
"""

import contextlib
import datetime
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from typing import Any

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError


class FolderLock:
    """Locks a folder for this process; a context manager.

    Args:
      folder: created if it does not exist.
      field: the option that names it, for errors.
      renew_seconds: time between two renewals.
      stale_seconds: a lease of another machine that was not renewed for this time is taken over.
    """

    def __init__(self, folder: str | os.PathLike, field: str, renew_seconds: float = 10.0, stale_seconds: float = 60.0):
        self._folder, self._path, self._field = str(folder), pathlib.Path(folder) / files.LEASE, field
        self._renew_seconds, self._stale_seconds = renew_seconds, stale_seconds
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._lease: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "started": started,
            "renewals": 0,
        }
        self._released, self._lost_to = threading.Event(), None
        self._renewer = threading.Thread(target=self._renew, name="folder-lock", daemon=True)

    def __enter__(self) -> "FolderLock":
        """Takes the lease. Raises InputError if another process holds it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._path.open("x") as file:
                json.dump(self._lease, file)
        except FileExistsError:
            self._take_over()
        for part in self._path.parent.glob(files.PART_PATTERN):
            # Left by a process that was killed.
            part.unlink(missing_ok=True)
        self._renewer.start()
        return self

    def __exit__(self, *_):
        self._released.set()
        self._renewer.join()
        if self._is_ours(files.read_json(self._path)):
            self._path.unlink(missing_ok=True)

    def require_held(self) -> None:
        """Raises RuntimeError if another process has taken over the lease, which can follow a long suspension."""
        if self._lost_to is not None:
            raise RuntimeError(f"{self._folder} was taken over by {_holder(self._lost_to)}: this process was suspended")

    def _take_over(self) -> None:
        """Replaces a lease whose holder has ended. Raises InputError if its holder still runs."""
        lease = files.read_json(self._path)
        if not _has_ended(lease):
            if _is_here(lease):
                self._refuse(lease)
            self._wait_until_stale(lease)
        files.write_json(self._path, self._lease)
        # Of several processes that take over together, the last one to write holds the lease.
        time.sleep(min(0.2, self._renew_seconds))
        latest = files.read_json(self._path)
        if not self._is_ours(latest):
            self._refuse(latest)

    def _wait_until_stale(self, lease: Any) -> None:
        print(
            f"{self._folder}: waiting up to {self._stale_seconds:.0f} s to see whether {_holder(lease)} still runs",
            flush=True,
        )
        end = time.monotonic() + self._stale_seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, self._stale_seconds / 10))
            latest = files.read_json(self._path)
            if latest is None and not self._path.exists():
                return
            if latest is not None and latest != lease:
                self._refuse(latest)

    def _refuse(self, holder: Any) -> None:
        raise InputError(self._field, self._folder, f"is in use by {_holder(holder)}; stop it or use another folder")

    def _renew(self) -> None:
        """Renews the lease until it is released or lost."""
        while not self._released.wait(self._renew_seconds):
            latest = files.read_json(self._path)
            if latest is not None and not self._is_ours(latest):
                self._lost_to = latest
                return
            self._lease["renewals"] += 1
            # If the disk is full or unreachable, the next renewal may succeed.
            with contextlib.suppress(OSError):
                files.write_json(self._path, self._lease)

    def _is_ours(self, lease: Any) -> bool:
        return isinstance(lease, dict) and lease.get("token") == self._lease["token"]


def _holder(lease: Any) -> str:
    """The holder of a lease, for messages."""
    if not isinstance(lease, dict):
        return "another process"
    return f"process {lease.get('pid')} on {lease.get('host')} (since {lease.get('started')})"


def _is_here(lease: Any) -> bool:
    """Whether the holder is, or was, a process of this machine (and of its process namespace)."""
    return isinstance(lease, dict) and lease.get("machine") == _machine() is not None


def _has_ended(lease: Any) -> bool:
    """Whether the holder is known to have ended: its process number is free, or that of another process."""
    return _is_here(lease) and _process_start(lease.get("pid")) != lease.get("process_start")


def _machine() -> str | None:
    """Identity of this machine since its boot, and of the process namespace; None if it is unknown."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process_start(pid: Any) -> str | None:
    """Start of a process of this machine, in clock ticks since boot; None if there is no such process."""
    try:
        # The name, in parentheses, may contain spaces.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
