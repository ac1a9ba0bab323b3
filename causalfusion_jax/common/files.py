"""Files: atomic writes, checksums, and retries of reads."""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from causalfusion_jax.common.errors import InputError

T = TypeVar("T")

RETRY_PAUSES = (1.0, 4.0)
"""Seconds before each retry of a failed read: mounted buckets have temporary errors."""

LEASE = "lease.json"
"""The file by which a process holds a folder; see `lock`."""

PART_PATTERN = ".*.part"
"""Files that are being written, or that a killed process left incomplete."""

Description = dict[str, dict[str, Any]]
"""Size and SHA-256 of every file of a folder, by relative path."""

_THREADS = 8
"""Files that are hashed at a time; hashing and reading release the interpreter lock."""


def describe_file(path: pathlib.Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def names(folder: pathlib.Path) -> list[str]:
    """Relative paths of all files below `folder`, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def describe(folder: pathlib.Path, listed: Iterable[str] | None = None) -> Description:
    """Size and SHA-256 of the `listed` files (default: all files) below `folder`."""
    listed = names(folder) if listed is None else list(listed)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(listed, pool.map(lambda name: describe_file(folder / name), listed), strict=True))


def difference(folder: pathlib.Path, expected: Description) -> str | None:
    """How the files of `folder` differ from their description; None if they match."""
    for name, described in expected.items():
        path = folder / name
        if not path.is_file():
            return f"file {name} is missing"
        if path.stat().st_size != described["bytes"]:
            return f"file {name} has {path.stat().st_size} bytes instead of {described['bytes']}"
    actual = describe(folder, expected)
    return next((f"file {name} has another checksum" for name in expected if actual[name] != expected[name]), None)


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file; None if it is missing or invalid."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None


def read_lines(field: str, path: pathlib.Path) -> list[str]:
    """The lines of a UTF-8 text file, which end with LF or CRLF only.

    `str.splitlines` also splits at U+2028, NEL and form feeds, which captions and names may contain.

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
    """Whether the system failed to read; OSErrors of decoders have no errno."""
    return isinstance(error, OSError) and error.errno is not None


def retry_io(read: Callable[[], T]) -> T:
    """`read()`, tried again after each of RETRY_PAUSES if it raises an I/O error that may be temporary.

    Raises the last error of `read`, or its first one if the file is missing or forbidden.
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


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""Errors of a disk that is full, limited, broken or read-only."""


def disk_error(error: BaseException) -> int | None:
    """The errno of an error that the disk caused; None for other errors.

    Libraries (TensorStore, ArrayRecord) raise errors of other types with the message of the system.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in DISK_ERRORS else None
    return next((number for number in DISK_ERRORS if os.strerror(number) in str(error)), None)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Gives disk errors raised inside the name `path`, since errors of writes have none, or a temporary one.

    Raises:
      OSError: with `errno` and `filename`, even if a library raised an error of another type.
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
    """Removes an incomplete last line, which a kill can leave."""
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
    """Creates `folder` with what `fill(path)` writes, whole or not at all; it may exist if it is empty."""
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
