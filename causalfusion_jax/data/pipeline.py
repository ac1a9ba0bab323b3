"""The input pipeline: global batches that depend on (seed, step) alone.

A Grain MapDataset is random access, so batch k is a pure function of the seed and k: the
same whatever the number of hosts or workers, and a position to resume from is one number.
Of an example itself, flips and draws are a function of (seed, index, epoch).

Leaving a corrupt record out would move all that follow it, and who reads what would depend on
who has met it. So its place, and no other, is given to another record, drawn from (seed, index,
epoch) too; which records were skipped travels with the batch, is counted and printed by name.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from causalfusion_jax.common.errors import InputError, require, require_number, require_one_of
from causalfusion_jax.data import tar_shards, tfds_source
from causalfusion_jax.data.batches import in_batches, num_bytes, read_ahead
from causalfusion_jax.data.caption_folder import CaptionFolderSource
from causalfusion_jax.data.captions import with_text
from causalfusion_jax.data.clip_folder import ClipFolderSource
from causalfusion_jax.data.digit_pairs import digit_pairs
from causalfusion_jax.data.latents import LatentsSource, read_manifest
from causalfusion_jax.data.moving_digits import SIDE, STRIDE, MovingDigitsSource
from causalfusion_jax.data.sources import ArraysSource, CorruptRecord, ImageFolderSource, class_folders, digits
from causalfusion_jax.data.tokenizers import TextConfig

SOURCES = (
    "digits",
    "digit_pairs",
    "moving_digits",
    "image_folder",
    "clip_folder",
    "caption_folder",
    "tfds",
    "tar",
    "latents",
    "arrays",
)
ENCODED = ("image_folder", "clip_folder", "tfds", "tar")
"""Sources of image files: with `latents` they are what `encode` makes latents of."""

BUILT_IN = {"channels": 1, "path": "", "frames": 1, "latents": False}
ENDLESS = 2**31
"""Epochs. Grain's own endless repeat is of length sys.maxsize, which batches of one overflow."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
      source: `digits` (scikit-learn's, built in), `digit_pairs` (two of them side by side, with
        captions), `moving_digits` (clips of them), `image_folder`, `clip_folder` (videos, GIFs,
        folders of frames), `caption_folder` (images and captions.jsonl), `tfds` (prepared by
        TensorFlow Datasets), `tar` (shards in WebDataset's layout), `latents` (written by
        `encode`), or `arrays`.
      path: of image_folder and clip_folder, one folder for each class; of caption_folder, that of
        captions.jsonl, each line of which is {"file_name": ..., "caption": ...}; of tfds, its
        data_dir ("": the default one); of tar, the folder of shards; of latents, that of
        `encode --out`; of arrays, a folder with image.npy and label.npy.
      name: the data set as TFDS calls it, `NAME`, `NAME/CONFIG` or `NAME:VERSION`; for
        latents and arrays, where classes have no names of their own, it names them.
      split: of tfds, for example `train` or `train[:90%]`.
      image_key, label_key, caption_key: features of tfds (`outer/inner`); "": those known of
        imagenet2012, cifar10, ucf101 and coco_captions, else `image` and `label`.
      image_size: side in pixels (or latents); images are scaled and centre-cropped to it.
      image_width: width where it is not `image_size`, which is then the height; 0: it is.
      channels: 1 or 3; any number for latents.
      frames: 1 for images, more for videos of so many frames.
      frame_stride: of clip_folder and tfds, every so many-th frame of a video is taken. The first
        one is drawn anew each epoch; evaluation and `encode` take the middle of a video.
      latents: the model takes an autoencoder's latents. Arrays hold them, scaled as models take
        them; image_folder, tfds and tar are to be encoded first.
      num_classes: classes; must be what the source holds.
      flip: flip half of the images, drawn anew each epoch; of latents, take half of them from
        the mirrored images that were encoded too.
      workers: processes that read and decode; 0 reads in this one. All of them together hold
        2 GiB of batches that are read ahead (`batches.READ_AHEAD_BYTES`), or one batch each.
      verify: decode every image of a folder once before training, and refuse one that is corrupt.
      max_corrupt: different records that cannot be decoded and that a process may skip; one more
        ends training. A record that cannot be read at all ends it in any case.
    """

    source: str = "digits"
    path: str = ""
    name: str = ""
    split: str = "train"
    image_key: str = ""
    label_key: str = ""
    caption_key: str = ""
    image_size: int = 8
    image_width: int = 0
    channels: int = 1
    frames: int = 1
    frame_stride: int = 1
    latents: bool = False
    num_classes: int = 10
    flip: bool = False
    workers: int = 0
    verify: bool = True
    max_corrupt: int = 16

    def __post_init__(self):
        require_one_of("source", self.source, SOURCES)
        require_number("image_size", self.image_size, 1)
        require_number("image_width", self.image_width, 0)
        if self.latents:
            require_number("channels", self.channels, 1)
            require(
                not (self.flip and self.source == "arrays"),
                "flip",
                self.flip,
                "must be False for arrays of latents: encode flipped images instead",
            )
        else:
            require_one_of("channels", self.channels, (1, 3))
        require_number("frames", self.frames, 1)
        require_number("frame_stride", self.frame_stride, 1)
        require(
            self.frame_stride == 1 or (self.source in ("clip_folder", "tfds") and self.frames > 1),
            "frame_stride",
            self.frame_stride,
            "is of videos of sources clip_folder and tfds alone",
        )
        require_number("num_classes", self.num_classes, 1)
        require_number("workers", self.workers, 0)
        require_number("max_corrupt", self.max_corrupt, 0)
        if self.source != "tfds":
            for name, neutral in {"split": "train", "image_key": "", "label_key": "", "caption_key": ""}.items():
                require(getattr(self, name) == neutral, name, getattr(self, name), "is of source tfds alone")
        if self.source in ("image_folder", "clip_folder", "caption_folder"):
            require(bool(self.path), "path", self.path, f"source {self.source} needs the folder's path")
        fixed = {
            "digits": {"image_size": 8, "image_width": 0, "num_classes": 10, **BUILT_IN},
            "digit_pairs": {"image_size": 8, "image_width": 16, "num_classes": 100, "flip": False, **BUILT_IN},
            "moving_digits": {
                "channels": 1,
                "num_classes": 10,
                "path": "",
                "latents": False,
                "flip": False,
                "image_width": 0,
            },
            "image_folder": {"image_width": 0, "frames": 1},
            "clip_folder": {"image_width": 0},
            "caption_folder": {"frames": 1, "latents": False, "num_classes": 1},
            "tfds": {"image_width": 0},
            "tar": {"image_width": 0, "frames": 1},
            "latents": {"image_width": 0, "latents": True},
        }.get(self.source, {})
        for name, value in fixed.items():
            given = getattr(self, name)
            require(given == value, name, given, f"must be {value!r} for source {self.source}")

        if self.source == "moving_digits":
            # Room for a step to either side of the middle.
            require_number("image_size", self.image_size, SIDE + 2 * STRIDE)
        if self.source in ("moving_digits", "clip_folder"):
            require_number("frames", self.frames, 2)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example: [(frames,) height, width, channels]."""
        frames = (self.frames,) if self.frames > 1 else ()
        return (*frames, self.image_size, self.image_width or self.image_size, self.channels)


class Source(Protocol):
    """Random access to images; see `data.sources`.

    A source may have `name(index) -> str`, what a record is called; `draw(index, rng)`, an example
    of which something is random (of latents, with `mirrored` too); `captions_of(index)`, all
    captions of one; `listing()`, the files that identify its examples; `skipped`, the number of
    files beside them that are none, by kind.
    """

    num_classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def make_source(config: DataConfig, captions: bool = False) -> Source:
    """Opens the training source.

    Args:
      config: which.
      captions: examples hold "caption" too.

    Raises:
      InputError: it is not what `config` says, has no captions, or has yet to be encoded.
    """
    if config.latents and config.source in ENCODED:
        raise InputError(
            "config.data.source",
            config.source,
            "gives pixels, and the model takes latents: encode them by"
            " causalfusion_jax.encode, then give source=latents and as path its --out",
        )
    if config.source in ("digits", "arrays", "image_folder", "clip_folder"):
        require(not captions, "config.data.source", config.source, "has no captions")
    if config.source == "digits":
        return digits("train")
    if config.source == "caption_folder":
        return CaptionFolderSource(config.path, config.shape, captions)
    if config.source == "digit_pairs":
        return digit_pairs("train", captions)
    if config.source == "moving_digits":
        return MovingDigitsSource(config.frames, config.image_size)
    if config.source == "latents":
        require(bool(config.path), "config.data.path", config.path, "source latents needs the folder that encode wrote")
        return LatentsSource(config.path, config.shape, config.num_classes, captions)
    if config.source == "tar":
        require(bool(config.path), "config.data.path", config.path, "source tar needs the folder of its shards")
        return tar_shards.TarSource(config.path, config.image_size, config.channels, config.num_classes, captions)
    if config.source == "tfds":
        source = tfds_source.TfdsSource(
            config.name,
            config.path,
            config.split,
            _keys(config),
            config.image_size,
            config.channels,
            config.frames,
            captions,
            config.frame_stride,
        )
        require(
            source.num_classes == config.num_classes,
            "num_classes",
            config.num_classes,
            f"{source.dataset} has {source.num_classes}",
        )
        return source
    if config.source == "arrays":
        # The papers' configs are whole but for where the latents lie.
        require(bool(config.path), "config.data.path", config.path, "source arrays needs the path of its folder")
        return ArraysSource(config.path, config.shape, config.latents, config.num_classes)
    if config.source == "clip_folder":
        source = ClipFolderSource(config.path, config.frames, config.frame_stride, config.image_size, config.channels)
    else:
        source = ImageFolderSource(config.path, config.image_size, config.channels, config.verify)
    require(
        source.num_classes == config.num_classes,
        "num_classes",
        config.num_classes,
        f"{config.path} has {source.num_classes} class folders",
    )
    return source


def describe(source: Source, config: DataConfig) -> str:
    """One line on what is trained on: source, number and shape of examples, classes, files left out."""
    kind = "latents" if config.latents else "videos" if config.frames > 1 else "images"
    axes = f"{'frames x ' if config.frames > 1 else ''}height x width x channels"
    classes = "class" if config.num_classes == 1 else "classes"
    skipped = ", ".join(f"{count:,} {name}" for name, count in getattr(source, "skipped", {}).items())
    return (
        f"data: {' '.join(filter(None, (config.source, config.name, config.path)))}: {len(source):,} {kind} of"
        f" {'x'.join(map(str, config.shape))} ({axes}), {config.num_classes:,} {classes}"
        + (f"; left out in the folders of classes: {skipped}" if skipped else "")
    )


def make_held_out_source(config: DataConfig, path: str = "", split: str = "validation") -> Source:
    """Opens labelled images of the training source's kind that training does not see.

    Args:
      config: of the training source.
      path: where they lie, for sources that are a folder; of tfds, its data_dir, "": the same.
      split: of tfds.

    Raises:
      InputError: as `make_source`; no path, or that of the training source; without classes.
    """
    require(config.num_classes > 1, "config.data.num_classes", config.num_classes, "needs classes to tell apart")
    if config.source in ("digits", "digit_pairs", "moving_digits"):
        require(path == "", "config.probe.held_out_path", path, f"must be '': source {config.source} has its own")
        if config.source == "moving_digits":
            return MovingDigitsSource(config.frames, config.image_size, "held_out")
        return digits("held_out") if config.source == "digits" else digit_pairs("held_out_digits", captions=False)
    if config.source == "tfds":
        field, value, different = "config.probe.held_out_split", split, split != config.split
        changed = dataclasses.replace(config, split=split, path=path or config.path)
    else:
        field, value = "config.probe.held_out_path", path
        different = bool(path) and pathlib.Path(path).resolve() != pathlib.Path(config.path).resolve()
        changed = dataclasses.replace(config, path=path)
    require(different, field, value, "must say where images are that were not trained on")
    source, trained = make_source(changed), class_names(config)
    known = tuple(source.class_names) and trained
    require(not known or tuple(source.class_names) == trained, field, value, "has other classes than those trained on")
    return source


def _keys(config: DataConfig) -> tfds_source.Keys:
    return tfds_source.keys_of(config.name, config.image_key, config.label_key, config.caption_key)


def class_names(config: DataConfig) -> tuple[str, ...]:
    """What the classes are called, without reading an image; () where nothing says so.

    Raises InputError where the data that say so are not there.
    """
    names: tuple[str, ...] = ()
    if config.source == "digits":
        names = digits("train").class_names
    elif config.source in ("image_folder", "clip_folder"):
        root = pathlib.Path(config.path)
        require(root.is_dir(), "data.path", config.path, "must be a folder with one folder for each class")
        names = tuple(folder.name for folder in class_folders(root))
        require(
            len(names) == config.num_classes,
            "data.path",
            config.path,
            f"has {len(names)} class folders, the config {config.num_classes} classes",
        )
    elif config.source == "tar" and config.path:
        names = tar_shards.class_names(pathlib.Path(config.path))
    elif config.source == "latents" and config.path:
        names = tuple(read_manifest(config.path)["class_names"])
    if names or not config.name:
        return names
    if config.name.partition("/")[0].partition(":")[0] == "imagenet2012":
        return tfds_source.imagenet_class_names()
    path = config.path if config.source == "tfds" else ""
    return tfds_source.class_names_of(tfds_source.builder_info(config.name, path), _keys(config))


class _Read:
    """The example at a place of the endless stream of indices.

    Args:
      source: the examples.
      config: flip, max_corrupt.
      seed: of flips, draws and what takes the place of a corrupt record.
    """

    def __init__(self, source: Source, config: DataConfig, seed: int):
        self.source, self.config, self.seed, self.length = source, config, seed, len(source)

    def __call__(self, place: int, index: int) -> dict[str, Any]:
        """The example, and as "corrupt" (name, reason) of each record skipped for it."""
        rng = np.random.default_rng((self.seed, place // self.length, index))
        corrupt: dict[str, str] = {}
        while True:
            try:
                example = self._draw(index, rng)
                return {**example, "corrupt": tuple(corrupt.items())} if corrupt else example
            except CorruptRecord as error:
                corrupt[str(error.value)] = error.allowed
            check_corrupt(corrupt, min(self.config.max_corrupt, self.length - 1))
            # A random one, and from there on the next, so that no record comes twice.
            step = 1 if len(corrupt) > 1 or self.length == 2 else int(rng.integers(1, self.length - 1))
            index = (index + step) % self.length

    def _draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        mirrored = self.config.flip and bool(rng.integers(2))
        if self.config.source == "latents":
            return self.source.draw(index, rng, mirrored)
        example = self.source.draw(index, rng) if hasattr(self.source, "draw") else self.source[index]
        return {**example, "image": example["image"][..., ::-1, :]} if mirrored else example


class _ReadRow:
    """The example of a row of this host's batches, which follow one another.

    Args:
      read: the example at a place of the endless stream.
      indices: the endless stream of indices.
      batch_size: of the global batch.
      rows: int [num], this host's rows of it.
    """

    def __init__(self, read: _Read, indices: grain.MapDataset, batch_size: int, rows: np.ndarray):
        self.read, self.indices, self.batch_size, self.rows = read, indices, batch_size, rows

    def __call__(self, number: int) -> dict[str, Any]:
        batch, row = divmod(number, len(self.rows))
        place = batch * self.batch_size + int(self.rows[row])
        return self.read(place, self.indices[place])


def host_batches(
    source: Source,
    config: DataConfig,
    batch_size: int,
    seed: int,
    rows: np.ndarray | None = None,
    text: TextConfig = TextConfig(),
) -> grain.MapDataset:
    """This host's share of an endless sequence of global batches.

    Row r of global batch k is example k * batch_size + r of the endlessly repeated, each time
    newly shuffled source, whichever hosts read it.

    Args:
      source: the examples.
      config: flip, max_corrupt.
      batch_size: of the global batch.
      seed: of shuffling and augmentation.
      rows: int [num], the rows of a global batch that this host reads, as of
        `sharding.rows_of_process`; default: all.
      text: the tokenizer of captions, which the source must give.

    Returns:
      Element k is {"image": float32 [num, ...], "label": int32 [num]}, for a tokenizer "text",
      int32 [num, max_tokens], and "corrupt", (name, reason) of records that were skipped, which
      BatchIterator takes out.
    """
    rows = np.arange(batch_size) if rows is None else rows
    indices = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(ENDLESS)
    numbers = grain.MapDataset.range(len(indices) // batch_size * len(rows))
    dataset = numbers.map(_ReadRow(_Read(source, config, seed), indices, batch_size, rows))
    if text.is_on:
        dataset = with_text(dataset, text)
    return in_batches(dataset, len(rows), reading_threads(config.source))


def reading_threads(source: str) -> int:
    """Threads that read ahead in each process, by `data.source`.

    Files wait for the disk and decode without Python's lock; small records only wait for that
    lock; what is in memory is there already.
    """
    return {"digits": 0, "digit_pairs": 0, "moving_digits": 0, "latents": 2}.get(source, 16)


class BatchIterator(Iterator):
    """Batches from a position on. `position` is all there is to save.

    The first batch is read here, and its size tells how many may be read ahead. Corrupt records
    that were skipped are printed, and kept as `corrupt`, reason by name.

    Args:
      batches: random access to this host's batches.
      position: the batch to start with.
      workers: processes that read ahead; 0 reads in this process.
      threads: threads that read ahead in each process, at most.
      max_corrupt: different corrupt records to put up with.

    Raises:
      InputError: at the batch that has more corrupt records, or that cannot be read.
    """

    def __init__(
        self, batches: grain.MapDataset, position: int = 0, workers: int = 0, threads: int = 0, max_corrupt: int = 0
    ):
        self.position, self.max_corrupt = position, max_corrupt
        self.corrupt: dict[str, str] = {}
        self._batches, self._workers, self._threads = batches, workers, threads
        self._iterator: Iterator[dict[str, Any]] | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        batch = self.next_raw()
        self.note_corrupt(batch.pop("corrupt", ()))
        return batch

    def next_raw(self) -> dict[str, Any]:
        """The next batch with what it reports as corrupt still in it."""
        if self._iterator is not None:
            batch = next(self._iterator)
        elif self.position < len(self._batches):
            batch = self._batches[self.position]
            self._iterator = self._read_ahead(self.position + 1, num_bytes(batch))
        else:
            raise StopIteration
        self.position += 1
        return batch

    def _read_ahead(self, position: int, batch_bytes: int) -> Iterator[dict[str, Any]]:
        """Batches from `position` on, which are being read from now on."""
        if self._workers and not flags.FLAGS.is_parsed():
            # Grain hands parsed absl flags to its workers, also where none uses them.
            flags.FLAGS.mark_as_parsed()
        dataset = self._batches[position:].to_iter_dataset(read_ahead(batch_bytes, self._workers, self._threads))
        if self._workers:
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        iterator = iter(dataset)
        iterator.start_prefetch()
        return iterator

    def note_corrupt(self, records: list[tuple[str, str]]) -> None:
        """Prints and keeps what is new. Raises InputError where there are too many."""
        for name, reason in records:
            if name not in self.corrupt:
                self.corrupt[name] = reason
                print(f"warning: corrupt record skipped: {name} ({reason})", file=sys.stderr, flush=True)
        check_corrupt(self.corrupt, self.max_corrupt)

    def close(self) -> None:
        """Ends the workers."""
        if hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator, self._batches = None, ()


def check_corrupt(corrupt: dict[str, str], limit: int) -> None:
    """Raises InputError where more than `limit` records, reason by name, are corrupt."""
    name = next(iter(corrupt), "")
    require(
        len(corrupt) <= limit,
        "config.data.max_corrupt",
        limit,
        f"{len(corrupt)} corrupt records, the first {name} ({corrupt.get(name)}); mend them, or allow more",
    )
