"""Generated images as files."""

import pathlib

import numpy as np
from PIL import Image


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0..255, rounded as ADM does: clip(127.5 x + 128), truncated."""
    return np.clip(127.5 * np.asarray(images, np.float32) + 128.0, 0, 255).astype(np.uint8)


def balanced_labels(num: int, num_classes: int) -> np.ndarray:
    """`num` labels, every class equally often (the first ones once more); int32 [num]."""
    return (np.arange(num) % num_classes).astype(np.int32)


def make_grid(images: np.ndarray, columns: int, min_cell: int = 32, margin: int = 2) -> np.ndarray:
    """Images side by side.

    Args:
      images: uint8 [num, height, width, channels].
      columns: images in a row.
      min_cell: small images are enlarged by a whole factor to at least this height.
      margin: white pixels around each.

    Returns:
      uint8 [height, width, channels].
    """
    num, height, width, channels = images.shape
    factor = max(1, -(-min_cell // height))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    cells = np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)), constant_values=255)
    columns = min(columns, num)
    rows = -(-num // columns)
    blank = np.full((rows * columns - num, *cells.shape[1:]), 255, np.uint8)
    cells = np.concatenate([cells, blank]).reshape(rows, columns, *cells.shape[1:])
    return cells.swapaxes(1, 2).reshape(rows * cells.shape[2], columns * cells.shape[3], channels)


def save_png(path: pathlib.Path, image: np.ndarray) -> None:
    """Writes uint8 [height, width, 1 or 3]."""
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)
