"""Latents on disk: sharded ArrayRecord files and a manifest, written by `encode`.

A record is the safetensors of one image: `mean` and `std`, bfloat16 [2, (frames,) height, width,
channels], of the autoencoder's Gaussian, not scaled, upright and mirrored left to right;
`label` int32 []; `index` int64 [], its index in the source; `caption` uint8 [bytes], all its
captions in UTF-8, one a line, if they were encoded too.
"""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.data.array_records import read_record
from causalfusion_jax.data.records import CorruptRecord, record_error
from causalfusion_jax.data.source import DataSettings, SourceKind
from causalfusion_jax.data.tfds_source import data_set_class_names

MANIFEST = "manifest.json"
PROGRESS = "progress"
VERSION = 1
WRITER_OPTIONS = "group_size:1,uncompressed"
"""One record a chunk, for random access; noise in bfloat16 does not compress."""


def shard_name(number: int, shards: int) -> str:
    """File name of a shard."""
    return f"latents-{number:05d}-of-{shards:05d}.array_record"


def pack(record: dict[str, np.ndarray]) -> bytes:
    """A record as bytes."""
    return safetensors.numpy.save({name: np.asarray(values, order="C") for name, values in record.items()})


_TYPES = {"BF16": ml_dtypes.bfloat16, "I32": np.int32, "I64": np.int64, "U8": np.uint8}


def unpack(serialized: bytes) -> dict[str, np.ndarray]:
    """The arrays of a record. Raises ValueError or KeyError for other bytes."""
    try:
        arrays = safetensors.deserialize(serialized)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from None
    return {name: np.frombuffer(v["data"], _TYPES[v["dtype"]]).reshape(v["shape"]) for name, v in arrays}


def read_manifest(root: str) -> dict[str, Any]:
    """The manifest of a folder of latents.

    Raises InputError if there is none, `encode` is not finished, or a shard is missing.
    """
    folder = pathlib.Path(root)
    allowed = "is not finished; run causalfusion_jax.encode again to go on with it"
    require(not (folder / PROGRESS).is_dir() or (folder / MANIFEST).is_file(), "data.path", root, allowed)
    require((folder / MANIFEST).is_file(), "data.path", root, "holds no latents; make them by causalfusion_jax.encode")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version = manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("data.path", str(folder / MANIFEST), f"cannot be read: {error}") from None
    require(version == VERSION, "data.path", root, f"holds latents of version {version}; this is version {VERSION}")
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        size = path.stat().st_size if path.is_file() else None
        allowed = f"must have {shard['bytes']} bytes, has {'none' if size is None else size}; encode again"
        require(size == shard["bytes"], "data.path", str(path), allowed)
    return manifest


class LatentsSource:
    """Encoded images (or videos), latents times the autoencoder's scaling factor.

    By index, the mean of the upright image; `draw` samples from the Gaussian.

    Args:
      root: folder that `encode` has written.
      shape: shape of one example, [(frames,) height, width, channels].
      num_classes: that of the config.
      captions: examples have "caption" too: the first by index, a random one in `draw`.

    Raises:
      InputError: they are missing, not finished, or of another shape or number of classes.
    """

    def __init__(self, root: str, shape: tuple[int, ...], num_classes: int, captions: bool = False):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.root, self.captions = root, captions
        self.manifest = read_manifest(root)
        stored = tuple(self.manifest["shape"])
        require(
            stored == shape, "data.path", root, f"holds latents of shape {list(stored)}; the config's {list(shape)}"
        )
        self.num_classes, self.class_names = self.manifest["num_classes"], tuple(self.manifest["class_names"])
        require(
            self.num_classes == num_classes, "data.num_classes", num_classes, f"{root} has {self.num_classes} classes"
        )
        require(not captions or self.manifest["captions"], "data.path", root, "holds no captions; encode them too")
        self.scaling_factor = np.float32(self.manifest["scaling_factor"])
        shards = [shard for shard in self.manifest["shards"] if shard["records"]]
        require(bool(shards), "data.path", root, "holds no records")
        self._records = ArrayRecordDataSource(
            [f"{pathlib.Path(root) / shard['file']}[0:{shard['records']}]" for shard in shards]
        )
        self._names = [(shard["file"], shard["records"]) for shard in shards]

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """File of a record, and its index there."""
        for file, records in self._names:
            if index < records:
                return f"{pathlib.Path(self.root) / file}[{index}]"
            index -= records
        raise IndexError(index)

    def record(self, index: int) -> dict[str, np.ndarray]:
        """All stored arrays of an image. Raises CorruptRecord, or InputError for an I/O error."""
        try:
            record = unpack(read_record(self._records, index))
            stored = record["mean"].shape[1:]
        except (OSError, RuntimeError, ValueError, KeyError, IndexError) as error:
            raise record_error("data", self.name(index), error) from None
        if stored != tuple(self.manifest["shape"]):
            raise CorruptRecord("data", self.name(index), f"is of shape {list(stored)}")
        return record

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.record(index)
        return self._example(record, record["mean"][0].astype(np.float32), 0)

    def draw(self, index: int, rng: np.random.Generator, mirrored: bool = False) -> dict[str, Any]:
        """A sample from the image's Gaussian, and a random one of its captions.

        Args:
          index: index of the image.
          rng: random generator of both.
          mirrored: whether to sample the latents of the image mirrored left to right.
        """
        record = self.record(index)
        mean, std = (record[name][int(mirrored)].astype(np.float32) for name in ("mean", "std"))
        latents = mean + std * rng.standard_normal(mean.shape, np.float32)
        texts = bytes(record["caption"]).count(b"\n") + 1 if self.captions else 1
        return self._example(record, latents, int(rng.integers(texts)))

    def _example(self, record, latents: np.ndarray, caption: int) -> dict[str, Any]:
        example = {"image": latents * self.scaling_factor, "label": np.int32(record["label"])}
        if self.captions:
            example["caption"] = bytes(record["caption"]).decode().split("\n")[caption]
        return example


def _class_names(settings: DataSettings) -> tuple[str, ...]:
    names = tuple(read_manifest(settings.path)["class_names"]) if settings.path else ()
    return names or data_set_class_names(settings)


LATENTS = SourceKind(
    name="latents",
    summary="latents in `path`, which `encode` wrote (its --out)",
    open=lambda settings, captions: LatentsSource(settings.path, settings.shape, settings.num_classes, captions),
    fixed={"image_width": 0, "latents": True},
    needs_path=True,
    class_names=_class_names,
    reading_threads=2,
    has_captions=True,
    stores_mirrored=True,
)
