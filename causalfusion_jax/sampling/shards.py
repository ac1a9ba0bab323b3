"""Samples on their way to disk: one file for each batch, joined when all are there.

A folder of samples holds samples.npz, grid.png (of videos also clips.gif) and request.json, which says how they were
made and is written last. Until then its `parts` hold the same request and the batches that
are done, so that any process, now or after an interruption, can make the others.
"""

import contextlib
import io
import pathlib
import shutil
from typing import Any

import numpy as np

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import require
from causalfusion_jax.common.npz import NpzWriter
from causalfusion_jax.common.pictures import frames_in_rows, make_grid, save_gif, save_png

GRID_IMAGES = 100
GIF_COLUMNS = 10


class SampleFolder:
    """A folder of samples, complete or not.

    Args:
      folder: where they go.
      request: how they are made, as plain values; `labels` are those of all images.
      batch_size: images of a part.
    """

    def __init__(self, folder: pathlib.Path, request: dict[str, Any], batch_size: int):
        self._folder, self._request, self._batch_size = folder, request, batch_size
        self._parts = folder / "parts"
        self.num = len(request["labels"])

    @property
    def num_parts(self) -> int:
        """Batches in all."""
        return -(-self.num // self._batch_size)

    def check(self) -> None:
        """Raises InputError where the folder holds samples of another request, or anything else."""
        if self._is_new():
            return
        there = [files.read_json(folder / "request.json") for folder in (self._folder, self._parts)]
        found = next((request for request in there if request is not None), None)
        allowed = "exists with other content; give a new or empty folder"
        if found is not None and found != self._request:
            names = [name for name, value in self._request.items() if found.get(name, self) != value]
            allowed = f"exists with other content: samples of another request ({', '.join(names) or 'more settings'})"
            allowed += "; give a new or empty folder"
        require(found == self._request, "--out", str(self._folder), allowed)

    def _is_new(self) -> bool:
        """Whether nothing is there, or no more than the folder of parts of a process that ended before its request."""
        entries = [path for path in self._folder.iterdir()] if self._folder.is_dir() else []
        return files.is_new(self._folder) or (entries == [self._parts] and files.is_new(self._parts))

    @property
    def is_done(self) -> bool:
        """Whether everything is there."""
        files_there = all((self._folder / name).is_file() for name in ("samples.npz", "grid.png"))
        return files_there and files.read_json(self._folder / "request.json") == self._request

    def claim(self) -> None:
        """Makes the folder this request's. Raises InputError as `check` does."""
        self.check()
        if self._is_new():
            # At once with its request: hosts that do not know of each other may look at any moment.
            # Refused where another host was first, or where the folder is a mount point.
            with contextlib.suppress(OSError):
                files.write_folder(self._folder, lambda folder: self._put_request(folder / "parts"))
            self.check()
        self._put_request(self._parts)

    def _put_request(self, parts: pathlib.Path) -> None:
        parts.mkdir(parents=True, exist_ok=True)
        if files.read_json(parts / "request.json") is None:
            files.write_json(parts / "request.json", self._request)

    def missing(self, host: int = 0, hosts: int = 1) -> list[int]:
        """Batches that are not there yet, of those that fall to one of several hosts."""
        return [index for index in range(host, self.num_parts, hosts) if not self._part(index).is_file()]

    def _part(self, index: int) -> pathlib.Path:
        return self._parts / f"{index:06d}.npy"

    def write(self, index: int, images: np.ndarray) -> None:
        """Keeps a batch, whole or not at all."""
        # Through memory: numpy's own errors of writing do not say why.
        content = io.BytesIO()
        np.save(content, images)
        with files.replacing(self._part(index)) as part:
            part.write_bytes(content.getbuffer())

    def join(self, columns: int) -> None:
        """Writes samples.npz and the grid of all parts, one part in memory at a time, and lets go of the parts.

        Args:
          columns: images in a row of the grid.
        """
        first = np.load(self._part(0), mmap_mode="r")
        labels = np.array(self._request["labels"], np.int32)
        shown = []
        with NpzWriter(self._folder / "samples.npz") as writer:
            with writer.rows("arr_0", (self.num, *first.shape[1:]), first.dtype) as write:
                for index in range(self.num_parts):
                    part = np.load(self._part(index))
                    write(part)
                    shown += list(part[: GRID_IMAGES - len(shown)])
            writer.array("arr_1", labels)
            if "prompts" in self._request:
                writer.array("prompts", np.array(self._request["prompts"]))
        save_png(self._folder / "grid.png", make_grid(*frames_in_rows(np.stack(shown), columns)))
        if first.ndim == 5:
            save_gif(self._folder / "clips.gif", np.stack(shown), GIF_COLUMNS)
        files.write_json(self._folder / "request.json", self._request)
        self.tidy()

    def tidy(self) -> None:
        """Removes the parts of a folder that is done."""
        shutil.rmtree(self._parts, ignore_errors=True)
