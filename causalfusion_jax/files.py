"""Files written whole, and known by their checksums."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from causalfusion_jax.errors import InputError

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


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""Errors of a disk that is full, limited, broken or read-only: of the machine, not of the program."""


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Has an OSError raised inside name `path`: those of writes name no file, or one under another name."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def replacing(path: pathlib.Path, shared: bool = False) -> Iterator[pathlib.Path]:
    """The path of a file to write, which becomes `path` at the end: whole, on disk, or not at all.

    Args:
      path: the file; what it held is replaced.
      shared: other processes may write it at the same time.

    Raises:
      OSError: it names `path`.
    """
    owner = f".{uuid.uuid4().hex}" if shared else ""
    part = path.with_name(f".{path.name}{owner}.part")
    try:
        with writing(path):
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    with replacing(path, shared=True) as part, part.open("w") as file:
        json.dump(content, file, indent=1)


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
