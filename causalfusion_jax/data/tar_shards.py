"""Tar shards in WebDataset's layout: members KEY.jpg|png, KEY.cls (or KEY.json), KEY.txt.

All shards are walked once, header by header; where every image lies is then kept in an index
beside them, so that examples are read by offset.
"""

import io
import json
import os
import pathlib
import tarfile
from typing import Any

import numpy as np

from causalfusion_jax.data.sources import IMAGE_SUFFIXES, CorruptRecord, ImageFormat
from causalfusion_jax.errors import InputError, require

INDEX = "index.npz"
CLASSES = "classes.txt"
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
            0 <= low and high < num_classes, "data.num_classes", num_classes,
            f"labels of {root} are {low}..{high}" if low >= 0 else f"{self.name(int(labels.argmin()))} has no label",
        )
        if captions:
            sizes = self.index["caption_size"]
            require(bool((sizes >= 0).all()), "data.path", self.name(int(sizes.argmin())), "has no caption (.txt)")
        self._files: dict[int, int] = {}

    def __getstate__(self):
        return self.__dict__ | {"_files": {}}

    def __len__(self) -> int:
        return len(self.index["label"])

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
            raise CorruptRecord("data", name, f"not a readable record ({error})") from None
        example = {"image": self.format.decode(name, io.BytesIO(image)), "label": np.int32(row["label"])}
        return example | {"caption": text} if self.captions else example

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self._files:
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        found = os.pread(self._files[shard], size, offset)
        if len(found) != size:
            raise OSError(f"{len(found)} of {size} bytes")
        return found


def class_names(root: pathlib.Path) -> tuple[str, ...]:
    """What the shards' classes are called; () where nothing says so."""
    path = root / CLASSES
    return tuple(path.read_text().splitlines()) if path.is_file() else ()


def _open_index(root: pathlib.Path, shards: list[pathlib.Path]) -> dict[str, np.ndarray]:
    """Where every image lies; built where no index of these very shards is kept."""
    seen = json.dumps([[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in shards])
    kept = root / INDEX
    try:
        with np.load(kept, allow_pickle=False) as stored:
            if str(stored["shards"]) == seen:
                return {name: stored[name] for name in _COLUMNS}
    except (OSError, ValueError, KeyError):
        pass
    rows = [row for number, path in enumerate(shards) for row in _walk(number, path)]
    types = ("S", np.int32, np.int64, np.int64, np.int64, np.int64, np.int64)
    index = {
        name: np.array([row[i] for row in rows], kind)
        for i, (name, kind) in enumerate(zip(_COLUMNS, types, strict=True))
    }
    if os.access(root, os.W_OK):  # a folder that is read only is walked each time
        part = root / f".{INDEX}.{os.getpid()}"
        with part.open("wb") as file:
            np.savez(file, shards=seen, **index)
        part.replace(kept)
    return index


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
