"""The input pipeline: global batches that depend on (seed, step) alone.

A Grain MapDataset is random access, so batch k is a pure function of the seed and k: the
same whatever the number of hosts or workers, and a position to resume from is one number.
"""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import grain
import numpy as np
from absl import flags

from causalfusion_jax.data.captions import with_text
from causalfusion_jax.data.caption_folder import CaptionFolderSource
from causalfusion_jax.data.digit_pairs import digit_pairs
from causalfusion_jax.data.sources import ArraysSource, ImageFolderSource, digits
from causalfusion_jax.data.tokenizers import TextConfig
from causalfusion_jax.errors import require, require_number, require_one_of

SOURCES = ("digits", "digit_pairs", "image_folder", "caption_folder", "arrays")
BUILT_IN = {"channels": 1, "path": "", "frames": 1, "latents": False}
ENDLESS = 2**31
"""Epochs. Grain's own endless repeat is of length sys.maxsize, which batches of one overflow."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
      source: `digits` (scikit-learn's, built in), `digit_pairs` (two of them side by side,
        with captions), `image_folder`, `caption_folder` (images and captions.jsonl), or `arrays`.
      path: of image_folder, one folder of images for each class; of caption_folder, that of
        captions.jsonl, each line of which is {"file_name": ..., "caption": ...}; of arrays, a folder with
        image.npy and label.npy.
      image_size: side in pixels (or latents); folder images are scaled and centre-cropped
        to it.
      image_width: width where it is not `image_size`, which is then the height; 0: it is.
      channels: 1 or 3; any number for latents.
      frames: 1 for images, more for videos of so many frames.
      latents: the arrays are an autoencoder's latents, scaled as models take them.
      num_classes: classes; must be what the source holds.
      flip: flip half of the images, drawn anew each epoch.
      workers: processes that read and decode; 0 reads in this one.
      verify: decode every image of a folder once before training.
    """

    source: str = "digits"
    path: str = ""
    image_size: int = 8
    image_width: int = 0
    channels: int = 1
    frames: int = 1
    latents: bool = False
    num_classes: int = 10
    flip: bool = False
    workers: int = 0
    verify: bool = True

    def __post_init__(self):
        require_one_of("source", self.source, SOURCES)
        require_number("image_size", self.image_size, 1)
        require_number("image_width", self.image_width, 0)
        if self.latents:
            require_number("channels", self.channels, 1)
            require(not self.flip, "flip", self.flip, "must be False for latents: encode flipped images instead")
        else:
            require_one_of("channels", self.channels, (1, 3))
        require_number("frames", self.frames, 1)
        require_number("num_classes", self.num_classes, 1)
        require_number("workers", self.workers, 0)
        if self.source == "image_folder":
            require(bool(self.path), "path", self.path, "source image_folder needs the folder's path")
        if self.source == "caption_folder":
            require(bool(self.path), "path", self.path, "source caption_folder needs the folder's path")
        fixed = {
            "digits": {"image_size": 8, "image_width": 0, "num_classes": 10, **BUILT_IN},
            "digit_pairs": {"image_size": 8, "image_width": 16, "num_classes": 100, "flip": False, **BUILT_IN},
            "image_folder": {"image_width": 0, "frames": 1, "latents": False},
            "caption_folder": {"frames": 1, "latents": False, "num_classes": 1},
        }.get(self.source, {})
        for name, value in fixed.items():
            given = getattr(self, name)
            require(given == value, name, given, f"must be {value!r} for source {self.source}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example: [(frames,) height, width, channels]."""
        frames = (self.frames,) if self.frames > 1 else ()
        return (*frames, self.image_size, self.image_width or self.image_size, self.channels)


class Source(Protocol):
    """Random access to images; see `data.sources`."""

    num_classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


def make_source(config: DataConfig, captions: bool = False) -> Source:
    """Opens the training source.

    Args:
      config: which.
      captions: examples hold "caption" too.

    Raises:
      InputError: it is not what `config` says, or has no captions.
    """
    if config.source in ("digits", "arrays", "image_folder"):
        require(not captions, "config.data.source", config.source, "has no captions")
    if config.source == "digits":
        return digits("train")
    if config.source == "caption_folder":
        return CaptionFolderSource(config.path, config.shape, captions)
    if config.source == "digit_pairs":
        return digit_pairs("train", captions)
    if config.source == "arrays":
        # The papers' configs are whole but for where the latents lie.
        require(bool(config.path), "config.data.path", config.path, "source arrays needs the path of its folder")
        return ArraysSource(config.path, config.shape, config.latents, config.num_classes)
    source = ImageFolderSource(config.path, config.image_size, config.channels, config.verify)
    require(
        source.num_classes == config.num_classes, "num_classes", config.num_classes,
        f"{config.path} has {source.num_classes} class folders",
    )
    return source


def flip(example: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Mirrors half of the images left to right."""
    if rng.integers(2):
        example = {**example, "image": example["image"][..., ::-1, :]}
    return example


def host_batches(
    source: Source, config: DataConfig, batch_size: int, seed: int, host: int = 0, hosts: int = 1,
    text: TextConfig = TextConfig(),
) -> grain.MapDataset:
    """This host's share of an endless sequence of global batches.

    Global batch k is examples k * batch_size ... of the endlessly repeated, each time
    newly shuffled source; host i holds the i-th of `hosts` consecutive parts of it.

    Args:
      source: the examples.
      config: flip.
      batch_size: of the global batch.
      seed: of shuffling and augmentation.
      host, hosts: this host's number, and how many there are.
      text: the tokenizer of captions, which the source must give.

    Returns:
      Element k is {"image": float32 [batch_size / hosts, ...], "label": int32 [...]}, and for a
      tokenizer "text", int32 [batch_size / hosts, max_tokens].
    """
    require(batch_size % hosts == 0, "batch_size", batch_size, f"must be a multiple of the {hosts} hosts")
    if hasattr(source, "draw"):
        dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(ENDLESS).random_map(source.draw)
    else:
        dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(ENDLESS)
    if config.flip:
        dataset = dataset.random_map(flip)
    if text.is_on:
        dataset = with_text(dataset, text)
    # Batches of one host's size; every hosts-th of them is this host's.
    return dataset.batch(batch_size // hosts)[host::hosts]


class BatchIterator(Iterator):
    """Batches from a position on. `position` is all there is to save.

    Args:
      batches: random access to this host's batches.
      position: the batch to start with.
      workers: processes that read ahead; 0 reads in this process.
      threads: threads that read ahead in each process.
    """

    def __init__(self, batches: grain.MapDataset, position: int = 0, workers: int = 0, threads: int = 0):
        self.position = position
        if workers and not flags.FLAGS.is_parsed():
            # Grain hands parsed absl flags to its workers, also where nobody uses them.
            flags.FLAGS.mark_as_parsed()
        read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * threads, 1))
        dataset = batches[position:].to_iter_dataset(read)
        if workers:
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        self._iterator = iter(dataset)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self.position += 1
        return batch

    def close(self) -> None:
        """Ends the workers."""
        if hasattr(self._iterator, "close"):
            self._iterator.close()
