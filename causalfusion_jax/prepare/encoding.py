"""Encodes images to latents on disk, shard by shard; an interrupted run resumes at its first incomplete shard.

Shard k holds the source's examples k * records_per_shard ... in their order. It is written
under a temporary name and renamed once it is on disk; its checksum and statistics are noted in
`progress/`. An interruption at any point therefore costs only the shards being written, and the
result is byte-identical to that of an uninterrupted run. (Another number of devices may change
the last bits.)
"""

import dataclasses
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import grain
import jax
import ml_dtypes
import numpy as np

from causalfusion_jax.common import distributed, files, sharding
from causalfusion_jax.common.errors import require
from causalfusion_jax.common.requests import NEW_FOLDER, plain, require_same
from causalfusion_jax.data import latents
from causalfusion_jax.data.batches import InThreads
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.fingerprint import fingerprint
from causalfusion_jax.data.pipeline import BatchIterator
from causalfusion_jax.data.records import CorruptRecord
from causalfusion_jax.data.registry import make_source
from causalfusion_jax.data.source import Source
from causalfusion_jax.models.autoencoder import AutoencoderConfig
from causalfusion_jax.models.store import Converted
from causalfusion_jax.prepare import latent_shards
from causalfusion_jax.prepare.encoder import LatentEncoder, check_batch_size, pixel_data
from causalfusion_jax.prepare.latent_shards import Shards, ShardWriter
from causalfusion_jax.prepare.settings import EncodeConfig


def encode(
    data: DataConfig, converted: Converted, vae: AutoencoderConfig, out: str, settings: EncodeConfig
) -> dict[str, Any]:
    """Encodes a data set into a folder, or continues to; processes take turns at the shards.

    Args:
      data: see `pixel_data`.
      converted, vae: the autoencoder.
      out: new or empty folder, or that of the same request.
      settings: sizes of batches and shards.

    Returns:
      The manifest.

    Raises:
      InputError: the arguments do not fit together, `out` holds something else or is in
        use, a record cannot be read, or too many are corrupt; complete shards are kept.
    """
    data = pixel_data(data, vae)
    devices = jax.local_devices()
    check_batch_size(settings, len(devices))
    source = make_source(data, settings.captions)
    request = plain(describe_request(data, source, converted, settings))
    folder = pathlib.Path(out)
    require(folder.is_dir() or not folder.exists(), "--out", out, "must be a folder")
    with distributed.held_folder(folder, "--out") as lock:
        if distributed.on_primary(lambda: int(_claim(folder, request)), 0):
            print(f"{out} already holds these {len(source)} latents")
            return latents.read_manifest(out)
        shards = Shards(folder, len(source), settings, lock)
        missing = shards.missing(jax.process_index(), jax.process_count())
        if missing:
            _encode_shards(shards, missing, source, data, LatentEncoder(converted, vae, settings, devices))
        distributed.wait_for_all("latents encoded")
        distributed.on_primary(lambda: latent_shards.write_manifest(shards, request, vae, data.path), None)
    return latents.read_manifest(out)


def describe_request(data: DataConfig, source: Source, converted: Converted, settings: EncodeConfig) -> dict[str, Any]:
    """The values that determine the latents."""
    names = ("source", "name", "split", "image_key", "label_key", "caption_key", "image_size", "channels", "frames")
    values = dataclasses.asdict(data)
    # Only if it is set: requests that were stored before this setting existed stay the same.
    names += ("frame_stride",) if data.frame_stride > 1 else ()
    sizes = {name: value for name, value in dataclasses.asdict(settings).items() if name != "micro_batch"}
    return {
        "data": {name: values[name] for name in names} | {"examples": len(source)},
        "num_classes": source.num_classes,
        "class_names": list(source.class_names),
        "crop": "adm_center",
        "listing": fingerprint(source),
        "vae": {"kind": converted.kind, "checksum": converted.fingerprint, "settings": converted.settings},
        **sizes,
    }


def _claim(folder: pathlib.Path, request: dict[str, Any]) -> bool:
    """Stores the request in a new folder; True if its latents are complete. Raises InputError for other content."""
    progress = folder / latents.PROGRESS
    for path in (folder / latents.MANIFEST, progress / "request.json"):
        if not path.is_file():
            continue
        stored = (files.read_json(path) or {}).get("request")
        require_same("--out", folder, stored, request, "holds latents of another request")
        if path.name == latents.MANIFEST:
            shutil.rmtree(progress, ignore_errors=True)
            latents.read_manifest(str(folder))
            return True
        return False
    others = {path.name for path in folder.iterdir()} - {latents.PROGRESS, files.LEASE}
    # An interruption before the request was stored leaves an empty progress folder.
    require(not others, "--out", str(folder), f"exists with other content; {NEW_FOLDER}")
    progress.mkdir(parents=True, exist_ok=True)
    files.write_json(progress / "request.json", {"request": request})
    return False


class ReadBatch:
    """Reads a batch of examples in a worker; corrupt records are listed instead."""

    def __init__(self, source: Source, threads: int):
        self.source, self.read = source, InThreads(self._example, threads)

    def __call__(self, item: tuple[int, range]) -> dict[str, Any]:
        """Reads a batch.

        Args:
          item: the shard and the indices of the batch's examples.

        Returns:
          The shard, the last index, (name, reason, index) of corrupt records, and of the other
          examples `index`, `image` (None if there are none), `label` and `caption`.
        """
        shard, indices = item
        read = self.read(indices)
        examples = [example for example in read if not isinstance(example, CorruptRecord)]
        corrupt = [
            (str(record.value), record.allowed, index)
            for index, record in zip(indices, read, strict=True)
            if isinstance(record, CorruptRecord)
        ]
        return {
            "shard": shard,
            "last": indices[-1],
            "corrupt": corrupt,
            "index": np.array([example["index"] for example in examples], np.int64),
            "image": np.stack([example["image"] for example in examples]) if examples else None,
            "label": np.array([example["label"] for example in examples], np.int32),
            "caption": [example.get("captions") for example in examples],
        }

    def _example(self, index: int) -> dict[str, Any] | CorruptRecord:
        """An example with its index, and with all its captions, one a line, if captions are stored."""
        try:
            example = self.source[index] | {"index": index}
            if "caption" not in example:
                return example
            captions = self.source.captions_of(index) if hasattr(self.source, "captions_of") else [example["caption"]]
        except CorruptRecord as error:
            return error
        return example | {"captions": "\n".join(" ".join(caption.split()) for caption in captions)}


def _encode_shards(
    shards: Shards, missing: list[int], source: Source, data: DataConfig, encoder: LatentEncoder
) -> None:
    """Writes the missing shards. Raises InputError if more records are corrupt than `data` allows."""
    encoded_images, start = 0, time.perf_counter()
    writer = None
    for batch, encoded in _encode_ahead(_read(shards, missing, source, data), encoder):
        number = batch["shard"]
        writer = ShardWriter(shards, number) if writer is None else writer
        writer.write(batch, encoded)
        encoded_images += len(batch["index"])
        if batch["last"] == shards.examples(number)[-1]:
            writer.finish()
            writer = None
            speed = encoded_images / (time.perf_counter() - start)
            print(f"shard {number + 1}/{shards.count}: {speed:.1f} images/s", flush=True)


def _read(shards: Shards, missing: list[int], source: Source, data: DataConfig) -> Iterator[dict[str, Any]]:
    """Batches of the missing shards, read ahead. Raises InputError at too many corrupt records."""
    notes, threads = shards.notes(), data.kind.reading_threads
    dataset = grain.MapDataset.source(shards.batches(missing)).map(ReadBatch(source, threads))
    iterator = BatchIterator(dataset, 0, data.workers, min(threads, 4), data.max_corrupt)
    try:
        iterator.corrupt |= {name: reason for note in notes for name, reason, _ in note["corrupt"]}
        for _ in range(len(dataset)):
            batch = iterator.next_raw()
            iterator.note_corrupt([(name, reason) for name, reason, _ in batch["corrupt"]])
            yield batch
    finally:
        iterator.close()


def _encode_ahead(
    batches: Iterator[dict[str, Any]], encoder: LatentEncoder
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Each batch with its latents; the devices already encode the next batch while one is written."""
    waiting = None
    for batch in batches:
        images = batch.pop("image")
        encoded = encoder(images) if images is not None else [np.zeros((0, 1), ml_dtypes.bfloat16)]
        if waiting is not None:
            yield waiting[0], sharding.joined(waiting[1])
        waiting = (batch, encoded)
    if waiting is not None:
        yield waiting[0], sharding.joined(waiting[1])
