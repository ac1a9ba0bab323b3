"""Shards of latents while they are written: which are complete, their checksums and statistics, the manifest."""

import json
import os
import pathlib
import shutil
import sys
from typing import Any

import numpy as np

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.common.lock import FolderLock
from causalfusion_jax.data import latents
from causalfusion_jax.models.autoencoder import AutoencoderConfig
from causalfusion_jax.prepare.settings import EncodeConfig

FITTING_STD = (0.7, 1.4)
"""Range of the standard deviation of scaled latents in which the scaling factor is taken to fit the images."""


class Shards:
    """The shards of a folder.

    Args:
      folder: where they are written.
      num_examples: examples of the source, spread over the shards in their order.
      settings: sizes of shards and batches.
      lock: the lease on the folder, or None in processes that do not hold it.
    """

    def __init__(self, folder: pathlib.Path, num_examples: int, settings: EncodeConfig, lock: FolderLock | None):
        self.folder, self.lock = folder, lock
        self._num_examples, self._size, self._batch_size = num_examples, settings.records_per_shard, settings.batch_size
        self.count = -(-num_examples // self._size)

    def path(self, number: int) -> pathlib.Path:
        """File of a shard."""
        return self.folder / latents.shard_name(number, self.count)

    def note(self, number: int) -> pathlib.Path:
        """File that describes a shard, written once the shard is complete."""
        return self.folder / latents.PROGRESS / f"{number:05d}.json"

    def notes(self) -> list[dict[str, Any]]:
        """Descriptions of the shards that are complete."""
        return [json.loads(path.read_text()) for path in map(self.note, range(self.count)) if path.is_file()]

    def examples(self, number: int) -> range:
        """Indices of a shard's examples in the source."""
        return range(number * self._size, min((number + 1) * self._size, self._num_examples))

    def missing(self, process: int, processes: int) -> list[int]:
        """The shards that this process has to write; unfinished files of them are removed."""
        own = range(process, self.count, processes)
        missing = [number for number in own if not (self.note(number).is_file() and self.path(number).is_file())]
        for number in missing:
            self.path(number).with_suffix(".part").unlink(missing_ok=True)
        return missing

    def batches(self, numbers: list[int]) -> list[tuple[int, range]]:
        """(shard, indices of examples) of each batch; no batch spans two shards."""
        return [
            (number, self.examples(number)[start : start + self._batch_size])
            for number in numbers
            for start in range(0, len(self.examples(number)), self._batch_size)
        ]


class ShardWriter:
    """Writes one shard under a temporary name, until it is complete."""

    def __init__(self, shards: Shards, number: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._shards, self._number = shards, number
        self._part = shards.path(number).with_suffix(".part")
        self._writer = ArrayRecordWriter(str(self._part), latents.WRITER_OPTIONS)
        self._corrupt: list[tuple[str, str, int]] = []
        self._statistics: dict[str, Any] | None = None

    def write(self, batch: dict[str, Any], encoded: np.ndarray) -> None:
        """Writes a batch.

        Args:
          batch: from `encoding.ReadBatch`.
          encoded: latents of its images, from `LatentEncoder`.
        """
        self._corrupt += batch["corrupt"]
        for i, index in enumerate(batch["index"]):
            record = {"mean": encoded[i, 0], "std": encoded[i, 1], "label": batch["label"][i : i + 1].reshape(())}
            record |= {"index": np.array(index, np.int64)}
            if batch["caption"][i] is not None:
                record["caption"] = np.frombuffer(batch["caption"][i].encode(), np.uint8)
            with files.writing(self._part):
                self._writer.write(latents.pack(record))
        self._statistics = _add(self._statistics, _statistics(encoded[: len(batch["index"])]))

    def finish(self) -> None:
        """Syncs the file to disk, gives it its name and writes its note."""
        shards, path = self._shards, self._shards.path(self._number)
        with files.writing(self._part):
            self._writer.close()
        with self._part.open("rb") as file:
            os.fsync(file.fileno())
        if shards.lock is not None:
            # Process 0 holds the folder for all.
            shards.lock.require_held()
        described = files.describe_file(self._part)
        self._part.replace(path)
        examples = shards.examples(self._number)
        records = len(examples) - len(self._corrupt)
        shard = {"file": path.name, "first_index": examples[0], "records": records, **described}
        note = {"shard": shard, "corrupt": self._corrupt, "statistics": self._statistics}
        files.write_json(shards.note(self._number), note)


def _statistics(encoded: np.ndarray) -> dict[str, Any] | None:
    """Count, and sums of mean and of mean^2 + std^2 by channel, over images, flips and positions."""
    if not len(encoded):
        return None
    flat = encoded.astype(np.float64)
    mean, std = (flat[:, i].reshape(-1, flat.shape[-1]) for i in range(2))
    return {"count": len(mean), "sum": mean.sum(0).tolist(), "sum_of_squares": (mean**2 + std**2).sum(0).tolist()}


def _add(a: dict[str, Any] | None, b: dict[str, Any] | None) -> dict[str, Any] | None:
    """Statistics of two sets of latents together; None stands for an empty set."""
    if a is None or b is None:
        return a or b
    return {name: (np.array(a[name]) + np.array(b[name])).tolist() for name in a}


def write_manifest(shards: Shards, request: dict[str, Any], vae: AutoencoderConfig, source_path: str) -> None:
    """Checks every shard against its note and writes the manifest.

    Args:
      shards: all of them complete.
      request: what the latents are encoded from, and how.
      vae: the autoencoder.
      source_path: folder of the images, for errors.

    Raises:
      InputError: a shard is not as it was written, or no image could be read.
    """
    notes, shape, statistics = [], None, None
    for number in range(shards.count):
        note = json.loads(shards.note(number).read_text())
        notes.append(note)
        expected = sorted(set(shards.examples(number)) - {index for _, _, index in note["corrupt"]})
        shape = _verify(shards.path(number), note["shard"], expected, shape)
        statistics = _add(statistics, note["statistics"])
    require(statistics is not None, "config.data.path", source_path, "holds no readable image")
    manifest = {
        "version": latents.VERSION,
        "shape": list(shape),
        "num_records": sum(note["shard"]["records"] for note in notes),
        "num_classes": request["num_classes"],
        "class_names": request["class_names"],
        "captions": request["captions"],
        "crop": request["crop"],
        "scaling_factor": vae.scaling_factor,
        "statistics": report_statistics(statistics, vae.scaling_factor),
        "request": request,
        "corrupt": [{"name": n, "reason": r, "index": i} for note in notes for n, r, i in note["corrupt"]],
        "shards": [note["shard"] for note in notes],
    }
    files.write_json(shards.folder / latents.MANIFEST, manifest)
    shutil.rmtree(shards.folder / latents.PROGRESS)


def _verify(
    path: pathlib.Path, described: dict[str, Any], expected: list[int], shape: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """Reads a whole shard.

    Args:
      path: its file.
      described: size and checksum from its note.
      expected: indices of the examples it must hold.
      shape: of an example in the shards before, or None.

    Returns:
      The shape of an example.

    Raises:
      InputError: the shard is not as it was written.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    remedy = "remove it, and encode again"
    actual = files.describe_file(path)
    same = all(actual[name] == described[name] for name in actual)
    require(same, "--out", str(path), f"is not as it was written (another checksum); {remedy}")
    reader = ArrayRecordReader(str(path))
    try:
        records = [latents.unpack(record) for record in reader.read_all()] if expected else []
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError("--out", str(path), f"cannot be read ({error}); {remedy}") from None
    finally:
        reader.close()
    indices = [int(record["index"]) for record in records]
    require(indices == expected, "--out", str(path), f"does not hold the expected examples; {remedy}")
    shapes = {record[name].shape[1:] for record in records for name in ("mean", "std")} | ({shape} if shape else set())
    require(len(shapes) <= 1, "--out", str(path), f"holds latents of shapes {sorted(shapes)}; {remedy}")
    return next(iter(shapes), shape)


def report_statistics(sums: dict[str, Any], scaling_factor: float) -> dict[str, Any]:
    """Mean and standard deviation of latents by channel; printed, with a warning if the scaling factor does not fit.

    Args:
      sums: count, and by channel sum and sum_of_squares.
      scaling_factor: the autoencoder's.

    Returns:
      `mean` and `std` by channel, not scaled; `scaled_std` over all channels, scaled.
    """
    count, total, squares = sums["count"], np.array(sums["sum"]), np.array(sums["sum_of_squares"])
    mean = total / count
    std = np.sqrt(squares / count - mean**2)
    overall = float(np.sqrt(squares.mean() / count - mean.mean() ** 2))
    scaled = overall * scaling_factor
    by_channel = f"mean {np.round(mean, 3).tolist()}, std {np.round(std, 3).tolist()}"
    print(f"latents, by channel: {by_channel}; of all, scaled: {scaled:.3f}")
    if not FITTING_STD[0] <= scaled <= FITTING_STD[1]:
        print(
            f"warning: latents times the scaling factor {scaling_factor:g} have a standard deviation of {scaled:.3f},"
            f" not near 1; {1 / overall:.4g} would fit these images. Is it this autoencoder's factor?",
            file=sys.stderr,
            flush=True,
        )
    return {"mean": mean.tolist(), "std": std.tolist(), "scaled_std": scaled}
