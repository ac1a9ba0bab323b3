"""One writer at a time in a folder: a lease file that its holder renews.

File locks of the operating system do not reach other hosts through a mounted bucket, and a
plain lock file outlives a host that dies. A lease is a small file with the holder's identity
and a counter, which the holder increments every few seconds. A lease whose holder was a
process of this machine that has ended is taken over at once; any other one is taken over
after its counter stood still for a minute.
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
    """Holds a folder for this process, as a context manager.

    Args:
      folder: made if it does not exist.
      field: the option that names it, for errors.
      renew_seconds: time between two renewals.
      stale_seconds: a lease of another machine that was not renewed for this long is taken over.
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
        """Takes the lease. Raises InputError where another process is at work in the folder."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._path.open("x") as file:
                json.dump(self._lease, file)
        except FileExistsError:
            self._take_over()
        for part in self._path.parent.glob(files.PART_PATTERN):
            # Of a process that was killed.
            part.unlink(missing_ok=True)
        self._renewer.start()
        return self

    def __exit__(self, *_):
        self._released.set()
        self._renewer.join()
        if self._is_ours(files.read_json(self._path)):
            self._path.unlink(missing_ok=True)

    def require_held(self) -> None:
        """Raises RuntimeError where another process has taken the lease over, as after a long suspension."""
        if self._lost_to is not None:
            raise RuntimeError(f"{self._folder} was taken over by {_holder(self._lost_to)}: this process was suspended")

    def _take_over(self) -> None:
        """Replaces a lease whose holder has ended. Raises InputError where its holder is alive."""
        found = files.read_json(self._path)
        if not _has_ended(found):
            if _is_here(found):
                self._refuse(found)
            self._wait_until_stale(found)
        files.write_json(self._path, self._lease)
        # Of several processes that take over together, the last one to write holds the lease.
        time.sleep(min(0.2, self._renew_seconds))
        latest = files.read_json(self._path)
        if not self._is_ours(latest):
            self._refuse(latest)

    def _wait_until_stale(self, found: Any) -> None:
        print(
            f"{self._folder}: waiting up to {self._stale_seconds:.0f} s to see whether {_holder(found)} still runs",
            flush=True,
        )
        end = time.monotonic() + self._stale_seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, self._stale_seconds / 10))
            latest = files.read_json(self._path)
            if latest is None and not self._path.exists():
                return
            if latest is not None and latest != found:
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
            # A full or unreachable disk: the next renewal may succeed.
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
    """Whether the holder runs, or ran, where its process number means something to this process."""
    return isinstance(lease, dict) and lease.get("machine") == _machine() is not None


def _has_ended(lease: Any) -> bool:
    """Whether the holder is known to have ended: its number is free, or has gone to another process."""
    return _is_here(lease) and _process_start(lease.get("pid")) != lease.get("process_start")


def _machine() -> str | None:
    """What identifies this boot of this machine and its process numbers; None where nothing does."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process_start(pid: Any) -> str | None:
    """When a process of this machine started, in clock ticks since boot; None where there is no such process."""
    try:
        # The name, in parentheses, may hold spaces.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
