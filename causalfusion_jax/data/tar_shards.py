"""Tar shards in WebDataset's layout: members KEY.jpg|png, KEY.cls (or KEY.json), KEY.txt.

All shards are walked once, header by header; where every image lies is then kept in an index
beside them, so that examples are read by offset.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.data.sources import IMAGE_SUFFIXES, ImageFormat, Listing, record_error

INDEX = "index.npz"
CLASSES = "classes.txt"
MAX_IDLE_FILES = 64
"""Shards that a process keeps open beside those being read: systems often allow 1,024 open files."""
_COLUMNS = ("name", "shard", "offset", "size", "label", "caption_offset", "caption_size")


class TarSource:
    """The examples of all *.tar of a folder, in the order of their names.

    KEY.cls holds the label as a number; without it KEY.json's "label" does. KEY.txt holds the
    caption. `classes.txt` in the folder, if there is one, names the classes, one a line.

    Args:
      root: the folder.
      image_size: side in pixels; images are scaled and cropped at the centre.
      channels: 1 (grey) or 3 (RGB).
      num_classes: labels are in 0..num_classes-1.
      captions: give "caption" too.

    Raises:
      InputError: no such folder, no shards or images in it, a broken shard, an image without
        label (or caption), or labels of more classes.
    """

    def __init__(self, root: str, image_size: int, channels: int, num_classes: int, captions: bool = False):
        self.root, self.format, self.captions = pathlib.Path(root), ImageFormat(image_size, channels), captions
        self.num_classes, self.class_names = num_classes, class_names(self.root)
        require(self.root.is_dir(), "data.path", root, "must be a folder of *.tar shards")
        self.shards = sorted(self.root.glob("*.tar"))
        require(bool(self.shards), "data.path", root, "holds no *.tar shards")
        self.index = _open_index(self.root, self.shards)
        labels = self.index["label"]
        require(len(labels) > 0, "data.path", root, f"its shards hold no images ({', '.join(IMAGE_SUFFIXES)})")
        low, high = int(labels.min()), int(labels.max())
        require(
            low >= 0 and high < num_classes,
            "data.num_classes",
            num_classes,
            f"labels of {root} are {low}..{high}" if low >= 0 else f"{self.name(int(labels.argmin()))} has no label",
        )
        if captions:
            sizes = self.index["caption_size"]
            require(bool((sizes >= 0).all()), "data.path", self.name(int(sizes.argmin())), "has no caption (.txt)")
        self._files = _OpenFiles(self.shards, MAX_IDLE_FILES)

    def __len__(self) -> int:
        return len(self.index["label"])

    def listing(self) -> Listing:
        """The shards, and names, places, sizes and labels of all their images."""
        columns = {name: hashlib.sha256(column.tobytes()).hexdigest() for name, column in self.index.items()}
        return Listing(self.root, self.shards, [columns])

    def name(self, index: int) -> str:
        """Shard and member of an image."""
        return f"{self.shards[self.index['shard'][index]]}/{self.index['name'][index].decode()}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {name: column[index] for name, column in self.index.items()}
        name = self.name(index)
        try:
            image = self._read(row["shard"], row["offset"], row["size"])
            caption = self._read(row["shard"], row["caption_offset"], row["caption_size"]) if self.captions else b""
            text = caption.decode().strip()
        except (OSError, ValueError) as error:
            raise record_error("data", name, error) from None
        example = {"image": self.format.decode(name, io.BytesIO(image)), "label": np.int32(row["label"])}
        return example | {"caption": text} if self.captions else example

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard. Raises OSError, or ValueError where it ends before them."""
        found = files.retry_io(lambda: self._files.read(shard, offset, size))
        if len(found) != size:
            raise ValueError(f"{len(found)} of {size} bytes")
        return found


class _OpenFiles:
    """Reads parts of many files, of which few stay open. For several threads; pickled, none is open.

    Args:
      paths: the files.
      max_idle: files kept open that no thread is reading.
    """

    def __init__(self, paths: list[pathlib.Path], max_idle: int):
        self.paths, self.max_idle = paths, max_idle
        # (number of the file, descriptor), the last one used last; one that is being read is not in it.
        self._idle: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def __reduce__(self):
        return type(self), (self.paths, self.max_idle)

    def __del__(self):
        for _, descriptor in self._idle:
            os.close(descriptor)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset` on, fewer where it ends before. Raises OSError."""
        with self._borrowed(number) as descriptor:
            return os.pread(descriptor, size, offset)

    @contextlib.contextmanager
    def _borrowed(self, number: int) -> Iterator[int]:
        """A descriptor that no other thread uses, and none closes, meanwhile."""
        with self._lock:
            place = next((i for i, (kept, _) in enumerate(self._idle) if kept == number), None)
            descriptor = None if place is None else self._idle.pop(place)[1]
        if descriptor is None:
            descriptor = os.open(self.paths[number], os.O_RDONLY)
        try:
            yield descriptor
        except BaseException:
            os.close(descriptor)
            raise
        with self._lock:
            self._idle.append((number, descriptor))
            unwanted = self._idle.pop(0)[1] if len(self._idle) > self.max_idle else None
        if unwanted is not None:
            os.close(unwanted)


def class_names(root: pathlib.Path) -> tuple[str, ...]:
    """What the shards' classes are called; () where nothing says so."""
    path = root / CLASSES
    return tuple(files.read_lines("data.path", path)) if path.is_file() else ()


def _open_index(root: pathlib.Path, shards: list[pathlib.Path]) -> dict[str, np.ndarray]:
    """Where every image lies; built where no index of these very shards is kept."""
    seen = json.dumps([[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in shards])
    kept = root / INDEX
    index = _read_index(kept, seen)
    if index is not None:
        return index
    rows = [row for number, path in enumerate(shards) for row in _walk(number, path)]
    types = ("S", np.int32, np.int64, np.int64, np.int64, np.int64, np.int64)
    index = {
        name: np.array([row[i] for row in rows], kind)
        for i, (name, kind) in enumerate(zip(_COLUMNS, types, strict=True))
    }
    # Where it cannot be kept (a folder that is read only, a full disk), the shards are walked each time.
    with contextlib.suppress(OSError):
        _keep_index(kept, seen, index)
    return index


def _read_index(kept: pathlib.Path, seen: str) -> dict[str, np.ndarray] | None:
    """The index of just the shards `seen`; None where there is none, or a broken one."""
    try:
        with np.load(kept, allow_pickle=False) as stored:
            return {name: stored[name] for name in _COLUMNS} if str(stored["shards"]) == seen else None
    except Exception:  # a damaged zip archive raises many kinds; another index is made in any case
        return None


def _keep_index(kept: pathlib.Path, seen: str, index: dict[str, np.ndarray]) -> None:
    """Writes the index whole or not at all; several hosts may do so at once. Raises OSError."""
    handle, part = tempfile.mkstemp(".part", f".{INDEX}.", kept.parent)
    try:
        with open(handle, "wb") as file:
            np.savez(file, shards=seen, **index)
        os.chmod(part, 0o644)
        os.replace(part, kept)
    except BaseException:
        pathlib.Path(part).unlink(missing_ok=True)
        raise


def _walk(number: int, path: pathlib.Path) -> list[tuple]:
    """A row of the index for each image of a shard, in the order of its members."""
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                found = samples.setdefault(f"{folder}/{stem}", {})
                place = (member.offset_data, member.size)
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    found["image"] = (member.name, *place)
                elif suffix == "txt":
                    found["caption"] = place
                elif suffix in ("cls", "json"):
                    found[suffix] = shard.extractfile(member).read()
    except (tarfile.TarError, OSError) as error:
        raise InputError("data.path", str(path), f"not a readable tar file ({error})") from None
    rows = []
    for found in samples.values():
        if "image" in found:
            name, offset, size = found["image"]
            rows.append((name.encode(), number, offset, size, _label(path, found), *found.get("caption", (-1, -1))))
    return rows


def _label(path: pathlib.Path, found: dict[str, Any]) -> int:
    """The label of an image's neighbours; -1 where they have none."""
    try:
        if "cls" in found:
            return int(found["cls"])
        return int(json.loads(found["json"])["label"]) if "json" in found else -1
    except (ValueError, KeyError, TypeError):
        raise InputError("data.path", f"{path}/{found['image'][0]}", "its .cls or .json holds no label") from None
