"""Images to latents on disk: shard by shard, resumed at the first shard that is not whole.

Shard k holds the source's examples k * records_per_shard ... in their order. It is written
under another name, and named only once it is on disk; beside it, in `progress/`, its checksum
and statistics. So a kill at any point costs the shards that were being written, and the end is
byte for byte that of a run nobody killed. (Another number of devices may change last bits.)
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from causalfusion_jax.common import distributed, files, sharding
from causalfusion_jax.common.errors import InputError, require, require_number
from causalfusion_jax.common.lock import FolderLock
from causalfusion_jax.data import latents
from causalfusion_jax.data.batches import InThreads
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.fingerprint import fingerprint
from causalfusion_jax.data.pipeline import BatchIterator
from causalfusion_jax.data.records import CorruptRecord
from causalfusion_jax.data.registry import make_source, require_encodable
from causalfusion_jax.data.source import Source
from causalfusion_jax.models.autoencoder import AutoencoderConfig, abstract_autoencoder, moments
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.store import Converted

FITTING_STD = (0.7, 1.4)
"""Standard deviations of scaled latents that the scaling factor is taken to fit."""


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """How latents are written.

    Attributes:
      batch_size: images encoded at a time, over the devices of a host.
      micro_batch: images in a device's memory at a time.
      records_per_shard: examples of the source in a file.
      captions: keep captions too.
    """

    batch_size: int = 64
    micro_batch: int = 16
    records_per_shard: int = 8192
    captions: bool = False

    def __post_init__(self):
        for name in ("batch_size", "micro_batch", "records_per_shard"):
            require_number(name, getattr(self, name), 1)


def pixel_data(data: DataConfig, vae: AutoencoderConfig) -> DataConfig:
    """The images to encode.

    Args:
      data: of a model of latents (`latents` set), whose images are so many times larger; or
        of the images themselves.
      vae: the autoencoder.

    Raises:
      InputError: its latents are not the model's, or the source holds latents already.
    """
    if data.latents:
        require_encodable(data)
        require(
            data.channels == vae.latent_channels,
            "config.data.channels",
            data.channels,
            f"must be {vae.latent_channels}, the channels of the autoencoder's latents",
        )
        data = dataclasses.replace(
            data, latents=False, image_size=data.image_size * vae.downsampling, channels=vae.image_channels
        )
    require(
        data.channels == vae.image_channels,
        "config.data.channels",
        data.channels,
        f"must be {vae.image_channels}, which the autoencoder takes",
    )
    require(
        data.image_size % vae.downsampling == 0,
        "config.data.image_size",
        data.image_size,
        f"must be a multiple of {vae.downsampling}, the pixels of a latent",
    )
    return data


def check_batch_size(settings: EncodeConfig, devices: int) -> None:
    """Raises InputError where a batch does not split over the devices of a host."""
    require(
        settings.batch_size % devices == 0,
        "--batch_size",
        settings.batch_size,
        f"must be a multiple of the {devices} devices",
    )


def encode(
    data: DataConfig, converted: Converted, vae: AutoencoderConfig, out: str, settings: EncodeConfig
) -> dict[str, Any]:
    """Encodes a data set into a folder, or goes on with it; shards are dealt out to processes.

    Args:
      data: as of `pixel_data`.
      converted, vae: the autoencoder.
      out: new or empty folder, or one that this very request has begun.
      settings: how.

    Returns:
      The manifest.

    Raises:
      InputError: what is asked for does not fit together, `out` holds something else or is in
        use, a record cannot be read, or too many are corrupt; what was encoded stays.
    """
    data = pixel_data(data, vae)
    devices = jax.local_devices()
    check_batch_size(settings, len(devices))
    source = make_source(data, settings.captions)
    request = describe_request(data, source, converted, settings)
    folder = pathlib.Path(out)
    require(folder.is_dir() or not folder.exists(), "--out", out, "must be a folder")
    with distributed.held_folder(folder, "--out") as lock:
        if distributed.on_primary(lambda: int(_claim(folder, request)), 0):
            print(f"{out} already holds these {len(source)} latents")
            return latents.read_manifest(out)
        shards = _Shards(folder, source, data, lock, settings)
        todo = shards.missing(jax.process_index(), jax.process_count())
        if todo:
            _encode_shards(shards, todo, _Encoder(converted, vae, data, settings, devices))
        distributed.wait_for_all("latents encoded")
        distributed.on_primary(lambda: _finish(shards, request, vae), None)
    return latents.read_manifest(out)


def describe_request(data: DataConfig, source: Source, converted: Converted, settings: EncodeConfig) -> dict[str, Any]:
    """What identifies the latents that are asked for, as plain values."""
    named = ("source", "name", "split", "image_key", "label_key", "caption_key", "image_size", "channels", "frames")
    values = dataclasses.asdict(data)
    # Named where it matters, so that what was encoded before it could be chosen stays the same.
    named += ("frame_stride",) if data.frame_stride > 1 else ()
    how = {name: value for name, value in dataclasses.asdict(settings).items() if name != "micro_batch"}
    return {
        "data": {name: values[name] for name in named} | {"examples": len(source)},
        "num_classes": source.num_classes,
        "class_names": list(source.class_names),
        "crop": "adm_center",
        "listing": fingerprint(source),
        "vae": {"kind": converted.kind, "checksum": converted.fingerprint, "settings": converted.settings},
        **how,
    }


def _claim(folder: pathlib.Path, request: dict[str, Any]) -> bool:
    """Makes the folder this request's; True where it is finished. Raises InputError where it is another's."""
    request = json.loads(json.dumps(request))
    progress = folder / latents.PROGRESS
    for path in (folder / latents.MANIFEST, progress / "request.json"):
        if not path.is_file():
            continue
        theirs = (files.read_json(path) or {}).get("request") or {}
        differs = [name for name in request if theirs.get(name) != request[name]]
        require(not differs, "--out", str(folder), f"holds latents of another request ({', '.join(differs)} differ)")
        if path.name == latents.MANIFEST:
            shutil.rmtree(progress, ignore_errors=True)
            latents.read_manifest(str(folder))
            return True
        return False
    others = {path.name for path in folder.iterdir()} - {latents.PROGRESS, files.LEASE}
    # Killed between the folder and its request, nothing is there to lose.
    require(not others, "--out", str(folder), "exists with other content; give a new or empty folder")
    progress.mkdir(parents=True, exist_ok=True)
    files.write_json(progress / "request.json", {"request": request})
    return False


class _Shards:
    """The shards of a folder: which are whole, and which examples each is to hold."""

    def __init__(self, folder, source, data, lock: FolderLock | None, settings):
        self.folder, self.source, self.data, self.lock = folder, source, data, lock
        self.size, self.batch_size = settings.records_per_shard, settings.batch_size
        self.count = -(-len(source) // self.size)
        self.max_corrupt = data.max_corrupt

    def path(self, number: int) -> pathlib.Path:
        """File of a shard."""
        return self.folder / latents.shard_name(number, self.count)

    def note(self, number: int) -> pathlib.Path:
        """What is known of a shard once it is whole."""
        return self.folder / latents.PROGRESS / f"{number:05d}.json"

    def examples(self, number: int) -> range:
        """Its part of the source."""
        return range(number * self.size, min((number + 1) * self.size, len(self.source)))

    def missing(self, process: int, processes: int) -> list[int]:
        """The shards that this process is to write; what it had begun is removed."""
        mine = range(process, self.count, processes)
        todo = [number for number in mine if not (self.note(number).is_file() and self.path(number).is_file())]
        for number in todo:
            self.path(number).with_suffix(".part").unlink(missing_ok=True)
        return todo

    def batches(self, numbers: list[int]) -> list[tuple[int, range]]:
        """(shard, examples) of each batch; none reaches over the end of a shard."""
        return [
            (number, self.examples(number)[start : start + self.batch_size])
            for number in numbers
            for start in range(0, len(self.examples(number)), self.batch_size)
        ]


class _ReadBatch:
    """Reads a batch in a worker: what can be read of it, and what cannot by name."""

    def __init__(self, source: Source, threads: int):
        self.source, self.read = source, InThreads(self._example, threads)

    def __call__(self, item: tuple[int, range]) -> dict[str, Any]:
        number, indices = item
        read = self.read(indices)
        examples = [example for example in read if not isinstance(example, CorruptRecord)]
        corrupt = [
            (str(found.value), found.allowed, index)
            for index, found in zip(indices, read, strict=True)
            if isinstance(found, CorruptRecord)
        ]
        return {
            "shard": number,
            "last": indices[-1],
            "corrupt": corrupt,
            "index": np.array([example["index"] for example in examples], np.int64),
            "image": np.stack([example["image"] for example in examples]) if examples else None,
            "label": np.array([example["label"] for example in examples], np.int32),
            "caption": [example.get("captions") for example in examples],
        }

    def _example(self, index: int) -> dict[str, Any] | CorruptRecord:
        """An example with its index, and all its captions, one a line, where they are kept."""
        try:
            example = self.source[index] | {"index": index}
            if "caption" not in example:
                return example
            every = self.source.captions_of(index) if hasattr(self.source, "captions_of") else [example["caption"]]
        except CorruptRecord as error:
            return error
        return example | {"captions": "\n".join(" ".join(caption.split()) for caption in every)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode_views(vae: AutoencoderConfig, micro_batch: int, params: Params, images: jax.Array) -> jax.Array:
    """Mean and std of images, upright and mirrored, as `_Encoder` returns them."""
    flat = images.reshape(-1, *images.shape[-3:])
    both = []
    for view in (flat, flat[:, :, ::-1]):
        mean, log_variance = moments(vae, params, view, micro_batch)
        shape = (*images.shape[:-3], *mean.shape[1:])
        both.append(jnp.stack([mean, jnp.exp(0.5 * log_variance)]).reshape(2, *shape))
    return jnp.stack(both, 2).swapaxes(0, 1).astype(jnp.bfloat16)


def lower_encoder(
    vae: AutoencoderConfig, data: DataConfig, settings: EncodeConfig, devices, slice_devices: int
) -> jax.stages.Lowered:
    """The program that encodes a batch, or a device's part of it, on the devices of a host, to be compiled.

    Args:
      vae: the autoencoder.
      data: the images, as of `pixel_data`.
      settings: how many at a time.
      devices, slice_devices: as of `sharding.own_meshes`.
    """
    meshes = sharding.own_meshes(devices, slice_devices)
    mesh, batch_size = meshes[0], settings.batch_size // len(meshes)
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), abstract_autoencoder(vae)[1]
    )
    images = jax.ShapeDtypeStruct((batch_size, *data.shape), np.float32, sharding=split)
    return _encode_views.lower(vae, settings.micro_batch * mesh.size, params, images)


class _Encoder:
    """Images to the two Gaussians of each, upright and mirrored, over the devices of this host."""

    def __init__(self, converted: Converted, vae: AutoencoderConfig, data: DataConfig, settings, devices):
        params = jax.device_get(converted.params(abstract_autoencoder(vae)[1]))
        self.batch_size, self._devices = settings.batch_size, sharding.OwnDevices(params, devices)
        each = len(devices) // self._devices.count
        self._run = functools.partial(_encode_views, vae, settings.micro_batch * each)

    def __call__(self, images: np.ndarray) -> list[jax.Array]:
        """Mean and std, bfloat16 [batch, 2 (mean, std), 2 (flips), (frames,) h, w, channels], as they get ready.

        In parts, as of `OwnDevices.run`.
        """
        filled = np.zeros((self.batch_size, *images.shape[1:]), np.float32)
        filled[: len(images)] = images
        # Of a batch, its images alone are moved to the devices.
        with jax.transfer_guard("disallow"):
            return self._devices.run(self._run, filled)


def _encode_shards(shards: _Shards, todo: list[int], encoder: _Encoder) -> None:
    """Writes shards. Raises InputError where more records are corrupt than may be."""
    from array_record.python.array_record_module import ArrayRecordWriter

    done, start = 0, time.perf_counter()
    writer, corrupt, part = None, [], None
    for batch, encoded in _ahead(_read(shards, todo), encoder):
        number = batch["shard"]
        if writer is None:
            part = shards.path(number).with_suffix(".part")
            writer, corrupt, statistics = ArrayRecordWriter(str(part), latents.WRITER_OPTIONS), [], None
        corrupt += batch["corrupt"]
        for i, index in enumerate(batch["index"]):
            record = {"mean": encoded[i, 0], "std": encoded[i, 1], "label": batch["label"][i : i + 1].reshape(())}
            record |= {"index": np.array(index, np.int64)}
            if batch["caption"][i] is not None:
                record["caption"] = np.frombuffer(batch["caption"][i].encode(), np.uint8)
            with files.writing(part):
                writer.write(latents.pack(record))
        statistics = _add(statistics, _statistics(encoded[: len(batch["index"])]))
        done += len(batch["index"])
        if batch["last"] == shards.examples(number)[-1]:
            with files.writing(part):
                writer.close()
            writer = None
            _name_shard(shards, number, part, corrupt, statistics)
            speed = done / (time.perf_counter() - start)
            print(f"shard {number + 1}/{shards.count}: {speed:.1f} images/s", flush=True)


def _read(shards: _Shards, todo: list[int]) -> Iterator[dict[str, Any]]:
    """Batches of all `todo`, read ahead; ends where too many records are corrupt."""
    noted = [json.loads(path.read_text()) for path in map(shards.note, range(shards.count)) if path.is_file()]
    threads = shards.data.kind.reading_threads
    dataset = grain.MapDataset.source(shards.batches(todo)).map(_ReadBatch(shards.source, threads))
    iterator = BatchIterator(dataset, 0, shards.data.workers, min(threads, 4), shards.max_corrupt)
    try:
        iterator.corrupt |= {name: reason for note in noted for name, reason, _ in note["corrupt"]}
        for _ in range(len(dataset)):
            batch = iterator.next_raw()
            iterator.note_corrupt([(name, reason) for name, reason, _ in batch["corrupt"]])
            yield batch
    finally:
        iterator.close()


def _ahead(batches: Iterator[dict[str, Any]], encoder: _Encoder) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Each batch with its latents; the devices are one batch ahead of the disk."""
    waiting = None
    for batch in batches:
        images = batch.pop("image")
        encoded = encoder(images) if images is not None else [np.zeros((0, 1), ml_dtypes.bfloat16)]
        if waiting is not None:
            yield waiting[0], sharding.joined(waiting[1])
        waiting = (batch, encoded)
    if waiting is not None:
        yield waiting[0], sharding.joined(waiting[1])


def _statistics(encoded: np.ndarray) -> dict[str, Any] | None:
    """Count, and sums of mean and of mean^2 + std^2 by channel, over images, flips and places."""
    if not len(encoded):
        return None
    flat = encoded.astype(np.float64)
    mean, std = (flat[:, i].reshape(-1, flat.shape[-1]) for i in range(2))
    return {"count": len(mean), "sum": mean.sum(0).tolist(), "sum_of_squares": (mean**2 + std**2).sum(0).tolist()}


def _add(a: dict[str, Any] | None, b: dict[str, Any] | None) -> dict[str, Any] | None:
    if a is None or b is None:
        return a or b
    return {name: (np.array(a[name]) + np.array(b[name])).tolist() for name in a}


def _name_shard(shards: _Shards, number: int, part: pathlib.Path, corrupt: list, statistics) -> None:
    """Makes a written shard count: on disk, named, noted."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    if shards.lock is not None:
        # Process 0 holds the folder for all.
        shards.lock.require_held()
    described = files.describe_file(part)
    part.replace(shards.path(number))
    examples = shards.examples(number)
    files.write_json(
        shards.note(number),
        {
            "shard": {
                "file": shards.path(number).name,
                "first_index": examples[0],
                "records": len(examples) - len(corrupt),
                **described,
            },
            "corrupt": corrupt,
            "statistics": statistics,
        },
    )


def _finish(shards: _Shards, request: dict[str, Any], vae: AutoencoderConfig) -> None:
    """Checks every shard against its note, and writes the manifest."""
    notes, shape = [], None
    for number in range(shards.count):
        note = json.loads(shards.note(number).read_text())
        expected = sorted(set(shards.examples(number)) - {index for _, _, index in note["corrupt"]})
        shape = _verify(shards.path(number), note["shard"], expected, shape)
        notes.append(note)
    statistics = None
    for note in notes:
        statistics = _add(statistics, note["statistics"])
    require(statistics is not None, "config.data.path", shards.data.path, "holds no readable image")
    reported = report_statistics(statistics, vae.scaling_factor)
    manifest = {
        "version": latents.VERSION,
        "shape": list(shape),
        "num_records": sum(n["shard"]["records"] for n in notes),
        "num_classes": request["num_classes"],
        "class_names": request["class_names"],
        "captions": request["captions"],
        "crop": request["crop"],
        "scaling_factor": vae.scaling_factor,
        "statistics": reported,
        "request": request,
        "corrupt": [{"name": n, "reason": r, "index": i} for note in notes for n, r, i in note["corrupt"]],
        "shards": [note["shard"] for note in notes],
    }
    files.write_json(shards.folder / latents.MANIFEST, manifest)
    shutil.rmtree(shards.folder / latents.PROGRESS)


def _verify(path: pathlib.Path, described: dict[str, Any], expected: list[int], shape: tuple[int, ...] | None):
    """Reads a shard whole; its examples' shape. Raises InputError where it is not what was written."""
    from array_record.python.array_record_module import ArrayRecordReader

    again = "remove it, and encode again"
    found = files.describe_file(path)
    same = all(found[name] == described[name] for name in found)
    require(same, "--out", str(path), f"is not as it was written (another checksum); {again}")
    reader = ArrayRecordReader(str(path))
    try:
        records = [latents.unpack(record) for record in reader.read_all()] if expected else []
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError("--out", str(path), f"cannot be read ({error}); {again}") from None
    finally:
        reader.close()
    indices = [int(record["index"]) for record in records]
    require(indices == expected, "--out", str(path), f"does not hold the examples that it should; {again}")
    shapes = {record[name].shape[1:] for record in records for name in ("mean", "std")} | ({shape} if shape else set())
    require(len(shapes) <= 1, "--out", str(path), f"holds latents of shapes {sorted(shapes)}; {again}")
    return next(iter(shapes), shape)


def report_statistics(sums: dict[str, Any], scaling_factor: float) -> dict[str, Any]:
    """Mean and standard deviation of latents, by channel; printed, with a warning where the scaling does not fit.

    Args:
      sums: count, and by channel sum and sum_of_squares.
      scaling_factor: the autoencoder's.

    Returns:
      `mean` and `std` by channel, not scaled; `scaled_std`, of all channels, scaled.
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
