"""Images to be scored, a batch at a time: of an .npz file, of a folder, of a data set."""

import concurrent.futures
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from causalfusion_jax.data.pipeline import Source
from causalfusion_jax.data.sources import IMAGE_SUFFIXES
from causalfusion_jax.errors import InputError, require
from causalfusion_jax.npz import NpzReader
from causalfusion_jax.sampling.images import to_uint8


class Images(NamedTuple):
    """Images that are read anew at every pass.

    Attributes:
      num: how many.
      shape: of one: (height, width, channels).
      batches: size -> uint8 [size, *shape] of all images in order, the last one shorter.
    """

    num: int
    shape: tuple[int, ...]
    batches: Callable[[int], Iterator[np.ndarray]]


def open_images(field: str, path: str) -> Images:
    """Images of an .npz (`arr_0`), of a folder with samples.npz, or of a folder of image files.

    Args:
      field: the option that names it, for errors.
      path: the file or folder.

    Raises:
      InputError: it is none of these, or its images are not uint8 and of one size.
    """
    place = pathlib.Path(path)
    if place.is_dir():
        if not (place / "samples.npz").is_file():
            require(
                not (place / "parts").is_dir(), field, path, "is not complete; run the same `sample` command again"
            )
            return _folder(field, place)
        place = place / "samples.npz"
    reader = NpzReader(field, place)
    shape, dtype = reader.shape("arr_0")
    require(
        dtype == np.uint8 and len(shape) == 4 and shape[-1] in (1, 3), field, str(place),
        f"not images: arr_0 must be uint8 [num, height, width, 1 or 3]; it is {dtype} {list(shape)}"
        + (" (latents; sample with --vae=FOLDER)" if dtype.kind == "f" else ""),
    )
    return Images(shape[0], shape[1:], lambda size: reader.batches("arr_0", size))


def _folder(field: str, folder: pathlib.Path) -> Images:
    """All image files below a folder, by name."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    require(bool(paths), field, str(folder), f"holds neither samples.npz nor images ({', '.join(IMAGE_SUFFIXES)})")

    def load(path: pathlib.Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(field, str(path), f"not a readable image ({error})") from None

    shape = load(paths[0]).shape

    def load_same(path: pathlib.Path) -> np.ndarray:
        image = load(path)
        require(image.shape == shape, field, str(path), f"is {image.shape}, the first one {shape}; crop them alike")
        return image

    return Images(len(paths), shape, lambda size: _loaded(load_same, paths, size))


def of_source(field: str, source: Source) -> Images:
    """The images of a data set, in its order.

    Raises:
      InputError: it holds no images of one or three channels.
    """
    shape = np.shape(source[0]["image"])
    require(
        len(shape) == 3 and shape[-1] in (1, 3), field, shape, "the data must be images of 1 or 3 channels, not latents"
    )
    return Images(
        len(source), shape, lambda size: _loaded(lambda i: to_uint8(source[i]["image"]), range(len(source)), size)
    )


def _loaded(load: Callable, items, size: int) -> Iterator[np.ndarray]:
    """`load` of every item in batches, decoded by several threads, one batch ahead."""
    items = iter(items)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        start = lambda: [pool.submit(load, item) for item in itertools.islice(items, size)]  # noqa: E731
        ahead = start()
        while ahead:
            batch, ahead = ahead, start()
            yield np.stack([future.result() for future in batch])
