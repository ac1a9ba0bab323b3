"""Files written whole, and known by their checksums."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from causalfusion_jax.errors import InputError

T = TypeVar("T")

RETRY_PAUSES = (1.0, 4.0)
"""Seconds to wait before a failed read is tried again: mounted buckets have errors that pass."""

LEASE = "lease.json"
"""The file by which a process holds a folder; see `lock`."""

PART_PATTERN = ".*.part"
"""Files that are being written, or that a killed process left so."""

Description = dict[str, dict[str, Any]]
"""Size and SHA-256 of every file of a folder, by relative path."""


def describe_file(path: pathlib.Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def describe(folder: pathlib.Path) -> Description:
    """Size and SHA-256 of every file below `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): describe_file(path) for path in paths}


def difference(folder: pathlib.Path, expected: Description) -> str | None:
    """How the files of `folder` differ from what was described; None where they do not."""
    actual = describe(folder)
    for name, described in expected.items():
        if name not in actual:
            return f"file {name} is missing"
        if actual[name]["bytes"] != described["bytes"]:
            return f"file {name} has {actual[name]['bytes']} bytes instead of {described['bytes']}"
        if actual[name] != described:
            return f"file {name} has another checksum"
    return None


def read_json(path: pathlib.Path) -> Any:
    """What a JSON file holds; None where there is none, or a broken one."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None


def read_lines(field: str, path: pathlib.Path) -> list[str]:
    """The lines of a UTF-8 text file, ended by line feeds (or CRLF) alone.

    `str.splitlines` also splits at U+2028, NEL and form feeds, which captions and names may hold.

    Raises:
      InputError: it is not UTF-8; `field` names the option.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(field, str(path), f"must be text in UTF-8 ({error})") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def is_io_error(error: BaseException) -> bool:
    """Whether the system failed to read, rather than a decoder to understand (whose OSErrors have no errno)."""
    return isinstance(error, OSError) and error.errno is not None


def retry_io(read: Callable[[], T]) -> T:
    """`read()`, tried again after each of RETRY_PAUSES where an I/O error may pass.

    Raises what `read` raises; the last time, or at once for a file that is missing or forbidden.
    """
    for pause in RETRY_PAUSES:
        try:
            return read()
        except OSError as error:
            permanent = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
            if not is_io_error(error) or isinstance(error, permanent):
                raise
        time.sleep(pause)
    return read()


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    # Of a name of its own: another process may be writing the same file.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def is_new(folder: pathlib.Path) -> bool:
    """Whether `folder` does not exist or is empty but for a lease and unfinished files."""
    return not folder.exists() or (
        folder.is_dir() and all(path.name == LEASE or path.match(PART_PATTERN) for path in folder.iterdir())
    )


def require_new(field: str, folder: pathlib.Path) -> None:
    """Raises InputError unless `folder` does not exist or is empty."""
    if not is_new(folder):
        raise InputError(field, str(folder), "exists with other content; give a new or empty folder")


def write_folder(folder: pathlib.Path, fill: Callable[[pathlib.Path], None]) -> None:
    """Makes a new or empty `folder` appear whole, with what `fill(path)` writes, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        part.chmod(0o755)
        fill(part)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
