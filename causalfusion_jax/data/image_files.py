"""Encoded images: decoding, centre crops, and folders with one folder for each class."""

import collections
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from causalfusion_jax.common.errors import require
from causalfusion_jax.data.records import read_file, record_error
from causalfusion_jax.data.source import DataSettings

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


class ImageFormat(NamedTuple):
    """The size and channels that encoded images are decoded to.

    Attributes:
      size: side in pixels, to which images are scaled and centre-cropped.
      channels: 1 (grey) or 3 (RGB).
    """

    size: int
    channels: int

    def decode(self, name: str, file: BinaryIO | pathlib.Path) -> np.ndarray:
        """An encoded image as float32 [size, size, channels] in [-1, 1].

        Args:
          name: name of the record, for errors.
          file: its path, or the open file.

        Raises:
          CorruptRecord: it cannot be decoded.
          InputError: it cannot be read.
        """
        return self.fit(self.open(name, file))

    def fit(self, image: Image.Image) -> np.ndarray:
        """A whole image of any mode as float32 [size, size, channels] in [-1, 1]."""
        pixels = np.asarray(center_crop(image.convert(self.mode), self.size), np.float32)
        return pixels.reshape(self.size, self.size, self.channels) / 127.5 - 1.0

    @property
    def mode(self) -> str:
        """Pillow's name of the colour mode."""
        return "L" if self.channels == 1 else "RGB"

    def open(self, name: str, file: BinaryIO | pathlib.Path, field: str = "path") -> Image.Image:
        """The whole image, decoded. Raises as `decode`; `field` names the option."""
        if isinstance(file, pathlib.Path):
            # Read first, so that errors of Pillow concern the image and not the file system.
            file = io.BytesIO(read_file(field, file))
        try:
            with Image.open(file) as image:
                return image.convert(self.mode)
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise record_error(field, name, error, "image") from None


def files_of_classes(
    folders: Sequence[pathlib.Path], is_example: Callable[[pathlib.Path], bool]
) -> tuple[list[tuple[pathlib.Path, int]], dict[str, int]]:
    """The contents of class folders.

    Args:
      folders: one for each class, in the order of the labels.
      is_example: whether a path is that of an example.

    Returns:
      (path, label) of each example; and the number of other entries by kind: `*.SUFFIX`, `folders`
      or `files without suffix`.
    """
    examples, skipped = [], collections.Counter()
    for label, folder in enumerate(folders):
        for path in sorted(folder.iterdir()):
            if is_example(path):
                examples.append((path, label))
            else:
                kind = f"*{path.suffix.lower()}" if path.suffix else "files without suffix"
                skipped["folders" if path.is_dir() else kind] += 1
    return examples, dict(skipped.most_common())


def class_folders(root: pathlib.Path) -> list[pathlib.Path]:
    """The folders of classes below `root`, in the order of their labels."""
    return sorted(path for path in root.iterdir() if path.is_dir())


def names_of_class_folders(settings: DataSettings) -> tuple[str, ...]:
    """Names of the class folders in `settings.path`. Raises InputError for another number than `num_classes`."""
    root = pathlib.Path(settings.path)
    require(root.is_dir(), "data.path", settings.path, "must be a folder with one folder for each class")
    names = tuple(folder.name for folder in class_folders(root))
    require(
        len(names) == settings.num_classes,
        "data.path",
        settings.path,
        f"has {len(names)} class folders, the config {settings.num_classes} classes",
    )
    return names


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Centre crop to size x size as ADM does: halve with a box while that leaves twice `size`, bicubic, crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def scale_pixels(images: np.ndarray) -> np.ndarray:
    """uint8 images as float64 in [-1, 1]."""
    return images.astype(np.float64) / 127.5 - 1.0
