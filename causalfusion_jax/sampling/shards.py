"""A folder of samples: one file for each batch while sampling, joined when all batches are there.

The folder holds samples.npz, grid.png (for videos also clips.gif) and request.json, which
describes the samples and is written last. Until then `parts` holds the same request and the
finished batches, so that any process, now or after an interruption, can add the missing ones.
"""

import contextlib
import io
import pathlib
import shutil
from typing import Any

import numpy as np

from causalfusion_jax.common import files
from causalfusion_jax.common.npz import NpzWriter
from causalfusion_jax.common.pictures import frames_in_rows, make_grid, save_gif, save_png
from causalfusion_jax.common.requests import require_same

GRID_IMAGES = 100
GIF_COLUMNS = 10


class SampleFolder:
    """A folder of samples, complete or not.

    Args:
      folder: the folder.
      request: the values that determine the samples; `labels` has one entry for each image.
      batch_size: images in a part.
    """

    def __init__(self, folder: pathlib.Path, request: dict[str, Any], batch_size: int):
        self._folder, self._request, self._batch_size = folder, request, batch_size
        self._parts = folder / "parts"
        self.num = len(request["labels"])

    @property
    def num_parts(self) -> int:
        """Number of batches."""
        return -(-self.num // self._batch_size)

    def check(self) -> None:
        """Raises InputError if the folder holds samples of another request, or anything else."""
        if self._is_new():
            return
        requests = [files.read_json(folder / "request.json") for folder in (self._folder, self._parts)]
        stored = next((request for request in requests if request is not None), None)
        problem = "exists with other content: samples of another request"
        require_same("--out", self._folder, stored, self._request, problem)

    def _is_new(self) -> bool:
        """Whether the folder is empty but for the empty `parts` of a process that ended before storing its request."""
        entries = list(self._folder.iterdir()) if self._folder.is_dir() else []
        return files.is_new(self._folder) or (entries == [self._parts] and files.is_new(self._parts))

    @property
    def is_done(self) -> bool:
        """Whether the samples of this request are complete."""
        written = all((self._folder / name).is_file() for name in ("samples.npz", "grid.png"))
        return written and files.read_json(self._folder / "request.json") == self._request

    def claim(self) -> None:
        """Stores the request in a new folder. Raises InputError as `check` does."""
        self.check()
        if self._is_new():
            # The folder appears together with its request, as other hosts may look at any moment. This fails
            # if another host was first, or if the folder is a mount point.
            with contextlib.suppress(OSError):
                files.write_folder(self._folder, lambda folder: self._put_request(folder / "parts"))
            self.check()
        self._put_request(self._parts)

    def _put_request(self, parts: pathlib.Path) -> None:
        parts.mkdir(parents=True, exist_ok=True)
        if files.read_json(parts / "request.json") is None:
            files.write_json(parts / "request.json", self._request)

    def missing(self, host: int = 0, hosts: int = 1) -> list[int]:
        """Indices of the batches that are still to be sampled by one of several hosts."""
        return [index for index in range(host, self.num_parts, hosts) if not self._part(index).is_file()]

    def _part(self, index: int) -> pathlib.Path:
        return self._parts / f"{index:06d}.npy"

    def write(self, index: int, images: np.ndarray) -> None:
        """Writes a batch, whole or not at all."""
        # Through memory: numpy's own write errors do not give the reason.
        content = io.BytesIO()
        np.save(content, images)
        with files.replacing(self._part(index)) as part:
            part.write_bytes(content.getbuffer())

    def join(self, columns: int) -> None:
        """Writes samples.npz and the grid from all parts, with one part in memory at a time, and removes the parts.

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
        """Removes the parts of a complete folder."""
        shutil.rmtree(self._parts, ignore_errors=True)
