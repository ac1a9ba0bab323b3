"""Times the input pipeline alone, or against a plain Python loop that does the same.

    python launch/bench/loader.py --config=configs/digits.py [--workers=0,1,2] [--batches=100]
    python launch/bench/loader.py --compare [--workers=1,2] [--num=512]
    python launch/bench/loader.py --train [--workers=1,2] [--num=512]

With --config: batches per second of that config, by number of workers.

With --compare: records per second of JPEG files, 500 x 375, decoded and cropped to 256x256 (folder
and tar shards), and of latents of that size, 32x32x4, sampled from mean and standard deviation;
each by a plain loop over the files in one thread, and by the pipeline. Both read the same generated
files of smooth noise.

With --train: images per second of the training loop on the same images and latents, and the share
of its time that it waited for them, with a small network of 256 tokens: of 16x16 pixels or of 2x2
latents.
"""

import dataclasses
import io
import pathlib
import tarfile
import tempfile
import time

import ml_dtypes
import numpy as np
from absl import app, flags
from common import report
from ml_collections import config_flags
from PIL import Image

from causalfusion_jax.common import files
from causalfusion_jax.config import experiment
from causalfusion_jax.data import latents
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.image_files import center_crop
from causalfusion_jax.data.pipeline import BatchIterator, host_batches
from causalfusion_jax.data.registry import make_source
from causalfusion_jax.training.loop import train

_CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py")
_WORKERS = flags.DEFINE_list("workers", ["0", "1", "2"], "Numbers of worker processes.")
_BATCHES = flags.DEFINE_integer("batches", 100, "Batches timed, after as many tenths to warm up.")
_COMPARE = flags.DEFINE_bool("compare", False, "Images and latents beside a plain loop, instead of a config.")
_TRAIN = flags.DEFINE_bool("train", False, "The training loop on images and on latents, instead.")
_NUM = flags.DEFINE_integer("num", 512, "With --compare and --train: number of files of each kind.")
_BATCH = 16
_READ_AHEAD = 32
"""Upper bound of the batches that a process has ready before timing starts; many more are timed."""


def timed(iterator, batches: int) -> float:
    """Seconds per batch, after a warm-up of a tenth as many."""
    for _ in range(max(batches // 10, 1)):
        next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    return (time.perf_counter() - start) / batches


def pipeline(config: DataConfig, workers: int, batch: int, batches: int, seed: int = 0) -> float:
    """Examples per second of the pipeline."""
    threads = config.kind.reading_threads
    iterator = BatchIterator(host_batches(make_source(config), config, batch, seed), 0, workers, threads)
    try:
        return batch / timed(iterator, batches)
    finally:
        iterator.close()


def config_rows() -> list[dict]:
    """A row for each number of workers."""
    config = experiment.from_dict(_CONFIG.value.to_dict())
    batch, rows = config.train.batch_size, []
    for workers in map(int, _WORKERS.value):
        data = dataclasses.replace(config.data, workers=workers)
        rate = pipeline(data, workers, batch, _BATCHES.value, config.train.seed)
        rows.append(
            {
                "source": data.source,
                "workers": workers,
                "batch": batch,
                "ms a batch": round(1e3 * batch / rate, 2),
                "examples/s": round(rate),
            }
        )
    return rows


def write_images(folder: pathlib.Path, num: int) -> tuple[DataConfig, DataConfig]:
    """JPEG files as a folder, and the same files as tar shards."""
    rng = np.random.default_rng(0)
    (folder / "images" / "a").mkdir(parents=True)
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "0.tar", "w") as shard:
        for i in range(num):
            path = folder / "images" / "a" / f"{i:05d}.jpg"
            small = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
            small.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=92)
            shard.add(path, f"{i:05d}.jpg")
            label = tarfile.TarInfo(f"{i:05d}.cls")
            label.size = 1
            shard.addfile(label, io.BytesIO(b"0"))
    common = dict(image_size=256, channels=3, num_classes=1, flip=True, verify=False)
    return (
        DataConfig(source="image_folder", path=str(folder / "images"), **common),
        DataConfig(source="tar", path=str(folder / "tars"), **common),
    )


def write_latents(folder: pathlib.Path, num: int) -> DataConfig:
    """Latents as `encode` writes them, with random values."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir()
    path, rng = folder / latents.shard_name(0, 1), np.random.default_rng(0)
    writer = ArrayRecordWriter(str(path), latents.WRITER_OPTIONS)
    for i in range(num):
        mean, std = rng.normal(size=(2, 2, 32, 32, 4)).astype(ml_dtypes.bfloat16)
        record = {"mean": mean, "std": abs(std), "label": np.array(0, np.int32), "index": np.array(i)}
        writer.write(latents.pack(record))
    writer.close()
    shard = {"file": path.name, "first_index": 0, "records": num, **files.describe_file(path)}
    files.write_json(
        folder / latents.MANIFEST,
        {
            "version": latents.VERSION,
            "shape": [32, 32, 4],
            "num_classes": 1,
            "class_names": [],
            "captions": False,
            "scaling_factor": 0.18215,
            "shards": [shard],
        },
    )
    return DataConfig(
        source="latents", latents=True, path=str(folder), image_size=32, channels=4, num_classes=1, flip=True
    )


def plain_images(config: DataConfig) -> float:
    """Images per second of a loop: open, decode, crop, flip, stack."""
    rng, paths = np.random.default_rng(0), sorted(pathlib.Path(config.path).rglob("*.jpg"))
    order, batch = rng.permutation(len(paths)), []
    start = time.perf_counter()
    for index in order:
        with Image.open(paths[index]) as image:
            pixels = np.asarray(center_crop(image.convert("RGB"), 256), np.float32) / 127.5 - 1
        batch.append(pixels[:, ::-1] if rng.integers(2) else pixels)
        if len(batch) == _BATCH:
            np.stack(batch)
            batch = []
    return len(paths) / (time.perf_counter() - start)


def plain_latents(config: DataConfig) -> float:
    """Latents per second of a loop: read, unpack, choose a flip, sample, stack."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(
        str(pathlib.Path(config.path) / latents.shard_name(0, 1)), "readahead_buffer_size:0,max_parallelism:0"
    )
    rng, batch = np.random.default_rng(0), []
    num = reader.num_records()
    start = time.perf_counter()
    for index in rng.permutation(num):
        record, flip = latents.unpack(reader.read([int(index)])[0]), rng.integers(2)
        mean, std = (record[name][flip].astype(np.float32) for name in ("mean", "std"))
        batch.append((mean + std * rng.standard_normal(mean.shape, np.float32)) * np.float32(0.18215))
        if len(batch) == _BATCH:
            np.stack(batch)
            batch = []
    return num / (time.perf_counter() - start)


def compared(folder: pathlib.Path) -> list[dict]:
    """A row for each kind of data and each reader."""
    images, tars = write_images(folder, _NUM.value)
    encoded = write_latents(folder / "latents", 8 * _NUM.value)
    plain = {"image_folder": plain_images(images), "latents": plain_latents(encoded)}
    plain["tar"] = plain["image_folder"]
    rows = [
        {"source": name, "reader": "plain loop", "records/s": round(plain[name])}
        for name in ("image_folder", "latents")
    ]
    for config in (images, tars, encoded):
        for workers in map(int, _WORKERS.value):
            batches = 4 * _READ_AHEAD * max(workers, 1) * (8 if config.latents else 1)
            rate = pipeline(dataclasses.replace(config, workers=workers), workers, _BATCH, batches)
            rows.append(
                {
                    "source": config.source,
                    "reader": f"pipeline, {workers} workers",
                    "records/s": round(rate),
                    "relative to the plain loop": f"{rate / plain[config.source]:.2f}",
                }
            )
    return rows


def trained(folder: pathlib.Path) -> list[dict]:
    """A row for each kind of data and number of workers: the second half of a short training."""
    images, _ = write_images(folder, _NUM.value)
    rows = []
    for data, patch_size in ((images, 16), (write_latents(folder / "latents", _NUM.value), 2)):
        for workers in map(int, _WORKERS.value):
            config = experiment.default_config()
            config.data.update(dataclasses.asdict(dataclasses.replace(data, workers=workers)))
            config.model.update(hidden=64, heads=1, layers=2, patch_size=patch_size)
            steps = max(_NUM.value // _BATCH, 2)
            config.train.update(steps=steps, batch_size=_BATCH)
            config.checkpoint.every, config.logging.every = steps, steps // 2
            config.optimizer.warmup_steps = 1
            workdir = folder / f"{data.source}_{workers}"
            seen = []
            train(experiment.from_dict(config.to_dict()), str(workdir), lambda _, m, seen=seen: seen.append(m))
            rows.append(
                {
                    "source": data.source,
                    "workers": workers,
                    "images/s": round(seen[-1]["images_per_second"], 1),
                    "waited for data": f"{seen[-1]['data_wait_fraction']:.1%}",
                }
            )
    return rows


def main(argv):
    """Runs the benchmark."""
    del argv
    if not (_COMPARE.value or _TRAIN.value):
        report(config_rows())
        return
    with tempfile.TemporaryDirectory() as folder:
        report((trained if _TRAIN.value else compared)(pathlib.Path(folder)))


if __name__ == "__main__":
    app.run(main)
