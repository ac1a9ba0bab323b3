"""Manifests: the checksums of a checkpoint's files, by which a step is complete and is verified.

Orbax restores a flipped bit silently. So every process, once a step is committed, lists the
size and SHA-256 of the files that it wrote itself in `manifests/STEP/PROCESS.json`, beside the
number of processes and a checksum of the list itself. No process reads what another one wrote,
and none waits for another.

A step is *complete* when the parts of all processes exist. A step without one of them was
*interrupted*: nothing is wrong with the storage, the process ended while it saved or deleted
the step. A complete step whose files differ from its manifest is *damaged*.
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
    """The process that wrote a file of a step, by its relative path: Orbax keeps a folder for each; 0 the rest."""
    found = _WRITER.search(name)
    return int(found[1]) if found else 0


def _checksum(content: dict[str, Any]) -> str:
    """Of a part itself: a flipped bit in its number of processes would leave files out of the verification."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(part: pathlib.Path) -> dict[str, Any]:
    """A part of a manifest. Raises OSError or ValueError where it is not what was written."""
    content = json.loads(part.read_text())
    if not isinstance(content, dict) or content.pop("sha256", None) != _checksum(content):
        raise ValueError(f"{part.name} has another checksum")
    return content


def manifest_path(workdir: str | pathlib.Path, step: int) -> pathlib.Path:
    """The JSON file of process 0 that exists once a step is saved (one file a step in workdirs of older versions)."""
    folder = pathlib.Path(workdir) / "manifests"
    one_file = folder / f"{step}.json"
    return one_file if one_file.is_file() else folder / str(step) / "0.json"


class Manifests:
    """The manifests of one run.

    Args:
      workdir: the run's folder.
    """

    def __init__(self, workdir: pathlib.Path):
        self.folder = workdir / "manifests"

    def _one_file(self, step: int) -> pathlib.Path:
        """The manifest that older versions wrote for all processes."""
        return self.folder / f"{step}.json"

    def _parts(self, step: int) -> list[pathlib.Path] | None:
        """The files of a complete step's manifest; None where some are missing."""
        if self._one_file(step).is_file():
            return [self._one_file(step)]
        folder = self.folder / str(step)
        first = folder / "0.json"
        if not first.is_file():
            return None
        try:
            count = _read(first)["processes"]
        except (OSError, ValueError):
            # Complete but damaged, as `expected` finds.
            count = 1
        parts = [folder / f"{process}.json" for process in range(count)]
        return parts if all(part.is_file() for part in parts) else None

    def is_complete(self, step: int) -> bool:
        """Whether every process has written its part."""
        return self._parts(step) is not None

    def expected(self, step: int) -> files.Description:
        """What the files of a complete step must be.

        Raises:
          OSError, ValueError: a part cannot be read.
        """
        expected = {}
        for part in self._parts(step) or ():
            is_one = part == self._one_file(step)
            listed = json.loads(part.read_text()) if is_one else _read(part)["files"]
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
        """Makes a step incomplete. Once the first file is gone it is, so a kill in between damages nothing."""
        self._one_file(step).unlink(missing_ok=True)
        folder = self.folder / str(step)
        if folder.is_dir():
            for part in sorted(folder.iterdir()):
                part.unlink()
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()

    def fingerprint(self, step: int) -> str:
        """One checksum for all files of a complete step."""
        digest = hashlib.sha256()
        for part in self._parts(step) or ():
            digest.update(part.read_bytes())
        return digest.hexdigest()
