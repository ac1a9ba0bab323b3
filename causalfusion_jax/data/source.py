"""Data sources: the settings that select one, its examples, and its entry in `data.registry`.

A source is declared once, as a `SourceKind` in the module that reads it; `data.registry` lists
the entries. Code elsewhere asks the entry and never compares names of sources.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from causalfusion_jax.common.errors import require
from causalfusion_jax.metrics.registry import Metric


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The settings that select and describe the training data; `data.config.DataConfig` checks them.

    Attributes:
      source: name of an entry of `data.registry.SOURCES`, whose summary says what it holds.
      path: folder of the data; see the summary of the source. "" for built-in sources.
      name: the data set's TFDS name, `NAME`, `NAME/CONFIG` or `NAME:VERSION`; for sources whose
        classes have no names of their own, the data set that names them.
      split: of tfds, for example `train` or `train[:90%]`.
      image_key, label_key, caption_key: features of tfds (`outer/inner`); "": the known ones of
        imagenet2012, cifar10, ucf101 and coco_captions, else `image` and `label`.
      image_size: height and width in pixels (or latents); images are scaled and centre-cropped.
      image_width: width if it is not `image_size`, which is then the height; 0: square.
      channels: 1 or 3; any number for latents.
      frames: 1 for images; the number of frames for videos.
      frame_stride: of sources of video files, take every n-th frame of a video. The first frame
        is drawn anew each epoch; evaluation and `encode` take the middle of a video.
      latents: the model takes an autoencoder's latents, scaled; sources of image files have to be
        encoded first.
      num_classes: number of classes; must be that of the source.
      flip: flip half of the images, drawn anew each epoch; for latents, take half of them from
        the mirrored images, which are encoded too.
      workers: processes that read and decode; 0 reads in the main process. Batches that are read
        ahead take at most 2 GiB over all workers (`batches.READ_AHEAD_BYTES`), or one batch each.
      verify: decode every image of a folder once before training, and reject corrupt ones.
      max_corrupt: number of different records that cannot be decoded and that a process may skip;
        one more ends training. A record that cannot be read at all always ends it.
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

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example: [(frames,) height, width, channels]."""
        frames = (self.frames,) if self.frames > 1 else ()
        return (*frames, self.image_size, self.image_width or self.image_size, self.channels)


class Source(Protocol):
    """Random access to examples: `source[i] -> {"image", "label"}`, and "caption" (str) if asked for.

    `image` is float32 [(frames,) height, width, channels] in [-1, 1] (latents: scaled as the model
    takes them), `label` int32 []. A record whose bytes cannot be decoded raises CorruptRecord, one
    whose bytes cannot be read another InputError.

    Optional members: `name(index) -> str`, the name of a record; `draw(index, rng)`, an example with
    a random part (of sources that store mirrored images, also given `mirrored`);
    `captions_of(index)`, all captions of an example; `listing()`, the files that identify the
    examples (`records.SourceFiles`); `skipped`, the number of other files beside them, by kind.
    """

    num_classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class PixelScores:
    """How samples are compared with a source's images, pixel by pixel.

    Attributes:
      metrics: what `score` measures.
      score: (settings, samples, labels) -> value of each metric by name. Samples are uint8
        [num, (frames,) height, width, channels], labels int [num]. It may leave out metrics of
        longer videos than those trained on, and may add values that are no metrics.
    """

    metrics: tuple[Metric, ...]
    score: Callable[[DataSettings, np.ndarray, np.ndarray], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class HeldOutCaptions:
    """Captioned examples of a source that training does not see.

    Attributes:
      open: from the name of a split to its examples, which have "caption".
      splits: names of the splits, the one that `prompts` are of first.
      prompts: num -> that number of captions, evenly over those that training never sees.
      labels: from prompts to the classes that they name, int [num]. Raises InputError.
    """

    open: Callable[[str], Source]
    splits: tuple[str, ...]
    prompts: Callable[[int], list[str]]
    labels: Callable[[list[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class SourceKind:
    """A data source's entry in `data.registry`.

    Attributes:
      name: the value of `data.source`.
      summary: one line on what it holds.
      open: (settings, captions) -> the training examples, with captions if `captions` is True.
        Raises InputError if the data are not what the settings say.
      fixed: values that settings must have for this source.
      own: settings that only sources which list them read; for others they keep their defaults.
      check: further checks of the settings. Raises InputError.
      needs_path: whether the source cannot be opened without `path`.
      class_names: from the settings to the names of the classes, without reading an image; () if
        they have none. Raises InputError if the data that say so are missing. None: those of the
        TFDS data set `name`, if that is set.
      open_held_out: from the settings to a held-out split that the source has by itself; None:
        held-out examples are in another folder, or in another `split` where that is its own.
      reading_threads: threads that read ahead in each process. Image files wait for the disk and
        decode without Python's lock; small records mostly hold the lock; data in memory need none.
      has_captions: whether `open` can give captions.
      encodable: whether it holds images that `encode` makes latents of; with `latents` set it
        stands for images that have yet to be encoded.
      stores_mirrored: whether `draw` takes `mirrored`, because mirrored images are stored too.
      scores: None: `fd` of pixels for images, nothing for videos.
      held_out_captions: None: there are none.
    """

    name: str
    summary: str
    open: Callable[[DataSettings, bool], Source]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    own: tuple[str, ...] = ()
    check: Callable[[DataSettings], None] = lambda settings: None
    needs_path: bool = False
    class_names: Callable[[DataSettings], tuple[str, ...]] | None = None
    open_held_out: Callable[[DataSettings], Source] | None = None
    reading_threads: int = 16
    has_captions: bool = False
    encodable: bool = False
    stores_mirrored: bool = False
    scores: PixelScores | None = None
    held_out_captions: HeldOutCaptions | None = None


def require_path(settings: DataSettings) -> None:
    """Raises InputError without `path`."""
    require(bool(settings.path), "path", settings.path, f"source {settings.source} needs the folder's path")
