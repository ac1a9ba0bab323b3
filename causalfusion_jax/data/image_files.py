"""Encoded images: decoding and centre crops."""

import io
import pathlib
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from causalfusion_jax.data.records import read_file, record_error

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
