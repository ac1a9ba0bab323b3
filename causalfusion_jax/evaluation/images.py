"""Images and videos to score, in batches: from an .npz file, a folder or a data set."""

import concurrent.futures
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.common.npz import NpzReader
from causalfusion_jax.common.pictures import to_uint8
from causalfusion_jax.data.image_files import IMAGE_SUFFIXES
from causalfusion_jax.data.source import Source
from causalfusion_jax.data.video_files import CLIP_SUFFIXES, clip_indices, read_frames


class ImageSet(NamedTuple):
    """Images (or videos) that are read again at every pass.

    Attributes:
      num: number of images.
      shape: shape of one: ((frames,) height, width, channels).
      batches: size -> uint8 [size, *shape] of all images in order, the last batch shorter.
    """

    num: int
    shape: tuple[int, ...]
    batches: Callable[[int], Iterator[np.ndarray]]


def open_images(field: str, path: str) -> ImageSet:
    """Images of an .npz (`arr_0`), of a folder with samples.npz, or of a folder of image files.

    Args:
      field: the option that names it, for errors.
      path: the file or folder.

    Raises:
      InputError: it is something else, or its images are not uint8 and of one size.
    """
    file = _samples_file(field, path)
    if file.is_dir():
        return _folder(field, file)
    reader = NpzReader(field, file)
    shape, dtype = reader.shape("arr_0")
    require(
        dtype == np.uint8 and len(shape) == 4 and shape[-1] in (1, 3),
        field,
        str(file),
        f"not images: arr_0 must be uint8 [num, height, width, 1 or 3]; it is {dtype} {list(shape)}"
        + (" (latents; sample with --vae=FOLDER)" if dtype.kind == "f" else ""),
    )
    return ImageSet(shape[0], shape[1:], lambda size: reader.batches("arr_0", size))


def open_videos(field: str, path: str, frames: int) -> ImageSet:
    """The first frames of videos of an .npz (`arr_0`), of a folder with samples.npz, or of a folder of clips.

    Args:
      field: the option that names it, for errors.
      path: the file, or the folder: video files and GIFs anywhere below it, and folders of frames.
      frames: number of frames to take of each.

    Raises:
      InputError: it is something else, or its videos are too short, not uint8 or not of one size.
    """
    file = _samples_file(field, path)
    if file.is_dir():
        return _clips(field, file, frames)
    reader = NpzReader(field, file)
    shape, dtype = reader.shape("arr_0")
    require(
        dtype == np.uint8 and len(shape) == 5 and shape[-1] in (1, 3) and shape[1] >= frames,
        field,
        str(file),
        f"not videos: arr_0 must be uint8 [num, frames >= {frames}, height, width, 1 or 3]; it is {dtype} {list(shape)}"
        + (" (latents; sample with --vae=FOLDER)" if dtype.kind == "f" else ""),
    )
    return ImageSet(
        shape[0], (frames, *shape[2:]), lambda size: (batch[:, :frames] for batch in reader.batches("arr_0", size))
    )


def _samples_file(field: str, path: str) -> pathlib.Path:
    """The samples.npz of a folder that `sample` wrote; else `path` itself."""
    file = pathlib.Path(path)
    if not file.is_dir():
        return file
    if (file / "samples.npz").is_file():
        return file / "samples.npz"
    require(not (file / "parts").is_dir(), field, path, "is not complete; run the same `sample` command again")
    return file


def _clips(field: str, folder: pathlib.Path, frames: int) -> ImageSet:
    """All clips below a folder, by name."""
    clips = {path for path in folder.rglob("*") if path.suffix.lower() in CLIP_SUFFIXES and path.is_file()}
    clips |= {path.parent for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES}
    paths = sorted(clips)
    kinds = ", ".join(CLIP_SUFFIXES)
    require(bool(paths), field, str(folder), f"holds neither samples.npz nor clips ({kinds}, folders of frames)")

    def load(path: pathlib.Path) -> np.ndarray:
        try:
            read = read_frames(path, lambda count: clip_indices(str(path), count, frames, 1, lambda first: 0))
        except InputError as error:
            raise InputError(field, error.value, error.allowed) from None
        sizes = {frame.size for frame in read}
        require(len(sizes) == 1, field, str(path), f"its frames are of sizes {sorted(sizes)}; crop them alike")
        return np.stack([np.asarray(frame.convert("RGB")) for frame in read])

    return _of_files(field, paths, load)


def _of_files(field: str, paths: list[pathlib.Path], load: Callable[[pathlib.Path], np.ndarray]) -> ImageSet:
    """Images (or videos) of files, all of the same shape."""
    shape = load(paths[0]).shape

    def load_same(path: pathlib.Path) -> np.ndarray:
        image = load(path)
        require(image.shape == shape, field, str(path), f"is {image.shape}, the first one {shape}; crop them alike")
        return image

    return ImageSet(len(paths), shape, lambda size: _loaded(load_same, paths, size))


def _folder(field: str, folder: pathlib.Path) -> ImageSet:
    """All image files below a folder, by name."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    require(bool(paths), field, str(folder), f"holds neither samples.npz nor images ({', '.join(IMAGE_SUFFIXES)})")

    def load(path: pathlib.Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(field, str(path), f"not a readable image ({error})") from None

    return _of_files(field, paths, load)


def images_of_source(field: str, source: Source, frames: int = 1) -> ImageSet:
    """The images of a data set, in its order; or the first `frames` frames of its videos.

    Raises:
      InputError: it holds no images (or no videos of that length) of one or three channels.
    """
    shape = np.shape(source[0]["image"])
    if frames == 1:
        allowed = "the data must be images of 1 or 3 channels, not latents"
        require(len(shape) == 3 and shape[-1] in (1, 3), field, shape, allowed)
    else:
        allowed = f"the data must be videos of at least {frames} frames (data.frames) and 1 or 3 channels, not latents"
        require(len(shape) == 4 and shape[-1] in (1, 3) and shape[0] >= frames, field, shape, allowed)
        shape = (frames, *shape[1:])

    def load(index: int) -> np.ndarray:
        image = source[index]["image"]
        return to_uint8(image if frames == 1 else image[:frames])

    return ImageSet(len(source), shape, lambda size: _loaded(load, range(len(source)), size))


def _loaded(load: Callable, items, size: int) -> Iterator[np.ndarray]:
    """`load` of every item, in batches; several threads decode one batch ahead."""
    items = iter(items)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        start = lambda: [pool.submit(load, item) for item in itertools.islice(items, size)]
        ahead = start()
        while ahead:
            batch, ahead = ahead, start()
            yield np.stack([future.result() for future in batch])
