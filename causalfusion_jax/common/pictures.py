"""Images as grids and strips, written as PNG and GIF files."""

import pathlib

import numpy as np
from PIL import Image

from causalfusion_jax.common import files


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0..255, rounded as ADM does: clip(127.5 x + 128), truncated."""
    return np.clip(127.5 * np.asarray(images, np.float32) + 128.0, 0, 255).astype(np.uint8)


def frames_in_rows(images: np.ndarray, columns: int) -> tuple[np.ndarray, int]:
    """Images or videos as cells for `make_grid`: a video is a row of its frames.

    Args:
      images: [num, (frames,) height, width, channels]; uint8, or float latents, of which at
        most three channels are shown, scaled to their range.
      columns: images in a row.

    Returns:
      uint8 [num * frames, height, width, 1 or 3], and the columns of the grid.
    """
    if images.ndim == 5:
        images, columns = images.reshape(-1, *images.shape[2:]), images.shape[1]
    if images.dtype != np.uint8:
        shown = images[..., :3] if images.shape[-1] >= 3 else images[..., :1]
        low, high = np.quantile(shown, (0.01, 0.99))
        images = to_uint8((shown - low) / max(high - low, 1e-6) * 2.0 - 1.0)
    return images, columns


def make_grid(images: np.ndarray, columns: int, min_cell: int = 32, margin: int = 2) -> np.ndarray:
    """Arranges images in a grid.

    Args:
      images: uint8 [num, height, width, channels].
      columns: images in a row.
      min_cell: smaller images are enlarged by an integer factor to at least this height.
      margin: white pixels around each image.

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


MASKED = (228, 87, 86)
"""Colour (red) of the regenerated part."""


def edit_strip(before: np.ndarray, mask: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Edited images, a row for each: the image, the image with the mask in red, the results.

    Args:
      before: [num, height, width, channels], from `frames_in_rows`.
      mask: bool [height, width], True where pixels were regenerated.
      after: [num * results, height, width, channels], the results of each image in turn.

    Returns:
      uint8 [height, width, 3].
    """
    num, shape = len(before), before.shape[1:]
    rows = np.concatenate([before[:, None], before[:, None], after.reshape(num, -1, *shape)], axis=1)
    columns = rows.shape[1]
    cells, _ = frames_in_rows(rows.reshape(-1, *shape), columns)
    cells = np.repeat(cells, 3 // cells.shape[-1], axis=-1)
    cells[1::columns] = np.where(mask[:, :, None], np.uint8(MASKED), cells[1::columns])
    return make_grid(cells, columns)


def save_gif(path: pathlib.Path, clips: np.ndarray, columns: int, frames_per_second: float = 8.0) -> None:
    """Writes a grid of clips as an animation that loops.

    Args:
      path: the file.
      clips: [num, frames, height, width, channels]; uint8, or float latents, as in `frames_in_rows`.
      columns: clips in a row.
      frames_per_second: of the animation; a GIF rounds to hundredths of a second.
    """
    num, frames = clips.shape[:2]
    cells, _ = frames_in_rows(clips, frames)
    cells = cells.reshape(num, frames, *cells.shape[1:])
    grids = [make_grid(cells[:, frame], columns) for frame in range(frames)]
    pictures = [_picture(grid) for grid in grids]
    duration = round(100.0 / frames_per_second) * 10
    with files.replacing(path) as part:
        pictures[0].save(
            part, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0, optimize=False
        )


def save_png(path: pathlib.Path, image: np.ndarray) -> None:
    """Writes uint8 [height, width, 1 or 3], whole or not at all."""
    with files.replacing(path) as part:
        _picture(image).save(part, "PNG")


def _picture(image: np.ndarray) -> Image.Image:
    """uint8 [height, width, 1 or 3] as a grey or RGB picture."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
