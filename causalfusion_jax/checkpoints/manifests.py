"""Manifests: checksums of the files of a checkpoint, which decide whether a step is complete and intact.

Orbax restores a flipped bit silently. Therefore every process, after a step is committed, lists the
size and SHA-256 of the files that it wrote itself in `manifests/STEP/PROCESS.json`, with the number of
processes and a checksum of the list itself. No process reads the files of another one or waits for it.

A step is *complete* when the parts of all processes exist. If one is missing, the step was
*interrupted*: the storage is fine, but a process ended while it saved or deleted the step. A complete
step whose files differ from its manifest is *damaged*.
"""

import contextlib
import hashlib
import json
import pathlib
import re
from typing import Any

from causalfusion_jax.common import files

_WRITER = re.compile(r"(?:^|/)ocdbt\.process_(\d+)/")


def writer(name: str) -> int:
    """The process that wrote a file of a step, from its relative path: Orbax has a folder for each; 0 otherwise."""
    match = _WRITER.search(name)
    return int(match[1]) if match else 0


def _checksum(content: dict[str, Any]) -> str:
    """Checksum of a part itself: a flipped bit in its number of processes would hide files from the verification."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(part: pathlib.Path) -> dict[str, Any]:
    """Reads a part of a manifest. Raises OSError or ValueError if it is missing or damaged."""
    content = json.loads(part.read_text())
    if not isinstance(content, dict) or content.pop("sha256", None) != _checksum(content):
        raise ValueError(f"{part.name} has another checksum")
    return content


def manifest_path(workdir: str | pathlib.Path, step: int) -> pathlib.Path:
    """The manifest of process 0, which exists once a step is saved; older versions wrote one for all processes."""
    folder = pathlib.Path(workdir) / "manifests"
    one_file = folder / f"{step}.json"
    return one_file if one_file.is_file() else folder / str(step) / "0.json"


class Manifests:
    """The manifests of one run.

    Args:
      workdir: the folder of the run.
    """

    def __init__(self, workdir: pathlib.Path):
        self.folder = workdir / "manifests"

    def _one_file(self, step: int) -> pathlib.Path:
        """The manifest that older versions wrote for all processes."""
        return self.folder / f"{step}.json"

    def _parts(self, step: int) -> list[pathlib.Path] | None:
        """The parts of the manifest of a step; None if some are missing."""
        if self._one_file(step).is_file():
            return [self._one_file(step)]
        folder = self.folder / str(step)
        first = folder / "0.json"
        if not first.is_file():
            return None
        try:
            count = _read(first)["processes"]
        except (OSError, ValueError):
            # Complete but damaged: `expected` raises an error.
            count = 1
        parts = [folder / f"{process}.json" for process in range(count)]
        return parts if all(part.is_file() for part in parts) else None

    def is_complete(self, step: int) -> bool:
        """Whether every process has written its part."""
        return self._parts(step) is not None

    def expected(self, step: int) -> files.Description:
        """The expected files of a complete step.

        Raises:
          OSError, ValueError: a part cannot be read.
        """
        expected = {}
        for part in self._parts(step) or ():
            is_old = part == self._one_file(step)
            listed = json.loads(part.read_text()) if is_old else _read(part)["files"]
            if not isinstance(listed, dict):
                raise ValueError(f"{part.name} is not a manifest")
            expected |= listed
        return expected

    def write_part(self, step: int, process: int, processes: int, described: files.Description) -> None:
        """Writes the part of one of `processes` processes, whole or not at all."""
        folder = self.folder / str(step)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"processes": processes, "files": described}
        files.write_json(folder / f"{process}.json", content | {"sha256": _checksum(content)})

    def remove(self, step: int) -> None:
        """Makes a step incomplete: it is so as soon as the first file is removed, whenever a kill follows."""
        self._one_file(step).unlink(missing_ok=True)
        folder = self.folder / str(step)
        if folder.is_dir():
            for part in sorted(folder.iterdir()):
                part.unlink()
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()

    def fingerprint(self, step: int) -> str:
        """One checksum of all files of a complete step."""
        digest = hashlib.sha256()
        for part in self._parts(step) or ():
            digest.update(part.read_bytes())
        return digest.hexdigest()
