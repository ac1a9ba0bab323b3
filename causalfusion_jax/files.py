"""Files written whole, and known by their checksums."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable
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
