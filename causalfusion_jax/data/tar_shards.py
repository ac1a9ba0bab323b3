"""Tar shards in WebDataset's layout: members KEY.jpg|png, KEY.cls (or KEY.json), KEY.txt.

The headers of all shards are read once; the offset of every image is then kept in an index
beside them, from which examples are read.
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
from causalfusion_jax.data.image_files import IMAGE_SUFFIXES, ImageFormat
from causalfusion_jax.data.records import SourceFiles, record_error
from causalfusion_jax.data.source import DataSettings, SourceKind
from causalfusion_jax.data.tfds_source import data_set_class_names

INDEX = "index.npz"
CLASSES = "classes.txt"
MAX_IDLE_FILES = 64
"""Shards that a process keeps open besides those being read: systems often allow 1,024 open files."""
_COLUMNS = ("name", "shard", "offset", "size", "label", "caption_offset", "caption_size")


class TarSource:
    """The examples of all *.tar of a folder, in the order of their names.

    KEY.cls holds the label as a number; without it KEY.json's "label" does. KEY.txt holds the
    caption. `classes.txt` in the folder, if present, names the classes, one a line.

    Args:
      root: the folder.
      image_size: side in pixels; images are scaled and cropped at the centre.
      channels: 1 (grey) or 3 (RGB).
      num_classes: labels are in 0..num_classes-1.
      captions: examples have "caption" too.

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

    def listing(self) -> SourceFiles:
        """The shards, and names, offsets, sizes and labels of all their images."""
        columns = {name: hashlib.sha256(column.tobytes()).hexdigest() for name, column in self.index.items()}
        return SourceFiles(self.root, self.shards, [columns])

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
        """Bytes of a shard. Raises OSError, or ValueError if it ends before them."""
        content = files.retry_io(lambda: self._files.read(shard, offset, size))
        if len(content) != size:
            raise ValueError(f"{len(content)} of {size} bytes")
        return content


class _OpenFiles:
    """Reads parts of many files and keeps few of them open. Thread-safe; a pickled copy has none open.

    Args:
      paths: the files.
      max_idle: files kept open while no thread reads them.
    """

    def __init__(self, paths: list[pathlib.Path], max_idle: int):
        self.paths, self.max_idle = paths, max_idle
        # (number of the file, descriptor), least recently used first; files being read are not in it.
        self._idle: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def __reduce__(self):
        return type(self), (self.paths, self.max_idle)

    def __del__(self):
        for _, descriptor in self._idle:
            os.close(descriptor)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset` on, fewer if it ends before. Raises OSError."""
        with self._borrowed(number) as descriptor:
            return os.pread(descriptor, size, offset)

    @contextlib.contextmanager
    def _borrowed(self, number: int) -> Iterator[int]:
        """A descriptor that no other thread uses or closes meanwhile."""
        with self._lock:
            index = next((i for i, (idle, _) in enumerate(self._idle) if idle == number), None)
            descriptor = None if index is None else self._idle.pop(index)[1]
        if descriptor is None:
            descriptor = os.open(self.paths[number], os.O_RDONLY)
        try:
            yield descriptor
        except BaseException:
            os.close(descriptor)
            raise
        with self._lock:
            self._idle.append((number, descriptor))
            surplus = self._idle.pop(0)[1] if len(self._idle) > self.max_idle else None
        if surplus is not None:
            os.close(surplus)


def class_names(root: pathlib.Path) -> tuple[str, ...]:
    """Names of the classes from `classes.txt`; () without one."""
    path = root / CLASSES
    return tuple(files.read_lines("data.path", path)) if path.is_file() else ()


def _open_index(root: pathlib.Path, shards: list[pathlib.Path]) -> dict[str, np.ndarray]:
    """Shard, offset and label of every image; read from the stored index if it is of the same shards, else built."""
    shards_key = json.dumps([[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in shards])
    path = root / INDEX
    index = _read_index(path, shards_key)
    if index is not None:
        return index
    rows = [row for number, shard in enumerate(shards) for row in _walk(number, shard)]
    types = ("S", np.int32, np.int64, np.int64, np.int64, np.int64, np.int64)
    index = {
        name: np.array([row[i] for row in rows], kind)
        for i, (name, kind) in enumerate(zip(_COLUMNS, types, strict=True))
    }
    # If it cannot be stored (a read-only folder, a full disk), the headers are read each time.
    with contextlib.suppress(OSError):
        _store_index(path, shards_key, index)
    return index


def _read_index(path: pathlib.Path, shards_key: str) -> dict[str, np.ndarray] | None:
    """The stored index; None if there is none, it is damaged, or it is of other shards than `shards_key`."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in _COLUMNS} if str(stored["shards"]) == shards_key else None
    except Exception:  # a damaged zip archive raises many kinds; a new index is made in any case
        return None


def _store_index(path: pathlib.Path, shards_key: str, index: dict[str, np.ndarray]) -> None:
    """Writes the index atomically; several hosts may do so at once. Raises OSError."""
    handle, part = tempfile.mkstemp(".part", f".{INDEX}.", path.parent)
    try:
        with open(handle, "wb") as file:
            np.savez(file, shards=shards_key, **index)
        os.chmod(part, 0o644)
        os.replace(part, path)
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
                sample = samples.setdefault(f"{folder}/{stem}", {})
                extent = (member.offset_data, member.size)
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    sample["image"] = (member.name, *extent)
                elif suffix == "txt":
                    sample["caption"] = extent
                elif suffix in ("cls", "json"):
                    sample[suffix] = shard.extractfile(member).read()
    except (tarfile.TarError, OSError) as error:
        raise InputError("data.path", str(path), f"not a readable tar file ({error})") from None
    rows = []
    for sample in samples.values():
        if "image" in sample:
            name, offset, size = sample["image"]
            rows.append((name.encode(), number, offset, size, _label(path, sample), *sample.get("caption", (-1, -1))))
    return rows


def _label(path: pathlib.Path, sample: dict[str, Any]) -> int:
    """The label in the .cls or .json of an image; -1 without one."""
    try:
        if "cls" in sample:
            return int(sample["cls"])
        return int(json.loads(sample["json"])["label"]) if "json" in sample else -1
    except (ValueError, KeyError, TypeError):
        raise InputError("data.path", f"{path}/{sample['image'][0]}", "its .cls or .json holds no label") from None


def _class_names(settings: DataSettings) -> tuple[str, ...]:
    names = class_names(pathlib.Path(settings.path)) if settings.path else ()
    return names or data_set_class_names(settings)


TAR = SourceKind(
    name="tar",
    summary="tar shards in WebDataset's layout in `path`",
    open=lambda settings, captions: TarSource(
        settings.path, settings.image_size, settings.channels, settings.num_classes, captions
    ),
    fixed={"image_width": 0, "frames": 1},
    needs_path=True,
    class_names=_class_names,
    has_captions=True,
    encodable=True,
)
