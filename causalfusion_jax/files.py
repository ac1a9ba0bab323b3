"""Files written whole, and known by their checksums."""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from causalfusion_jax.errors import InputError

LEASE = "lease.json"
"""The file by which a process holds a folder; see `lock`."""

PART_PATTERN = ".*.part"
"""Files that are being written, or that a killed process left so."""

Description = dict[str, dict[str, Any]]
"""Size and SHA-256 of every file of a folder, by relative path."""

_THREADS = 8
"""Files hashed at a time; hashing and reading release the interpreter lock."""


def describe_file(path: pathlib.Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def names(folder: pathlib.Path) -> list[str]:
    """Relative paths of all files below `folder`, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def describe(folder: pathlib.Path, of: Iterable[str] | None = None) -> Description:
    """Size and SHA-256 of the files `of` (default: every file) below `folder`; several are read at a time."""
    listed = names(folder) if of is None else list(of)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(listed, pool.map(lambda name: describe_file(folder / name), listed), strict=True))


def difference(folder: pathlib.Path, expected: Description) -> str | None:
    """How the files of `folder` differ from what was described; None where they do not."""
    for name, described in expected.items():
        path = folder / name
        if not path.is_file():
            return f"file {name} is missing"
        if path.stat().st_size != described["bytes"]:
            return f"file {name} has {path.stat().st_size} bytes instead of {described['bytes']}"
    actual = describe(folder, expected)
    return next((f"file {name} has another checksum" for name in expected if actual[name] != expected[name]), None)


def read_json(path: pathlib.Path) -> Any:
    """What a JSON file holds; None where there is none, or a broken one."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""Errors of a disk that is full, limited, broken or read-only: of the machine, not of the program."""


def disk_error(error: BaseException) -> int | None:
    """The errno of an error that the disk is the reason of; None for others.

    Libraries (TensorStore, ArrayRecord) raise errors of other types whose text holds the system's.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in DISK_ERRORS else None
    return next((number for number in DISK_ERRORS if os.strerror(number) in str(error)), None)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Has errors of the disk raised inside name `path`: those of writes name no file, or one under another name.

    Raises:
      OSError: with `errno` and `filename`, also where a library raised something else.
    """
    try:
        yield
    except Exception as error:
        number = disk_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


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
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=1))


def write_text(path: pathlib.Path, content: str) -> None:
    """Writes a text file whole or not at all."""
    with replacing(path, shared=True) as part:
        part.write_text(content)


def drop_torn_line(path: pathlib.Path) -> None:
    """Removes the end of a file of lines that follows its last newline: a line that a kill cut short."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


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
