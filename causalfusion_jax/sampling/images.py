"""Images that are given to commands: image files, arrays, and images to caption."""

import concurrent.futures
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.data.caption_folder import CAPTIONS, load_image, read_captions
from causalfusion_jax.data.image_files import IMAGE_SUFFIXES
from causalfusion_jax.data.registry import held_out_captions

NUM_HELD_OUT = 500
"""Default number of held-out images."""


def read_image_file(field: str, path: pathlib.Path, channels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Images of an image file, or of an npz as written by `sample` and `edit`.

    Args:
      field: the option that names the path, for errors.
      path: an image file; or an npz with `arr_0` [num, (frames,) height, width, channels], uint8
        pixels or float latents, and optionally `arr_1`, int labels [num].
      channels: 1 (grey) or 3 (RGB), to which an image file is converted.

    Returns:
      The images, and their labels or None.

    Raises:
      InputError: no such file, or another kind of file.
    """
    require(path.is_file(), field, str(path), "no such file")
    try:
        if path.suffix.lower() != ".npz":
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
            return pixels.reshape(1, *pixels.shape[:2], channels), None
        with np.load(path) as arrays:
            images, labels = arrays["arr_0"], arrays.get("arr_1")
    except Exception as error:
        raise InputError(field, str(path), f"neither an image nor an npz with arr_0 ({type(error).__name__})") from None
    fits = images.ndim >= 4 and (images.dtype == np.uint8 or images.dtype.kind == "f")
    require(fits, field, str(path), f"arr_0 must be uint8 or float images; it is {images.dtype} {images.shape}")
    require(
        labels is None or (labels.shape == images.shape[:1] and labels.dtype.kind in "iu"),
        field,
        str(path),
        f"arr_1 must be int [{len(images)}], the labels",
    )
    return images, labels


# --- Images to caption --------------------------------------------------------------


class ImagesOnDemand:
    """Images that are loaded when they are indexed: `len(images)`, `images[indices]`.

    Args:
      num: number of images.
      load: returns the image of a number.
    """

    def __init__(self, num: int, load: Callable[[int], np.ndarray]):
        self._num, self._load = num, load

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Images [len(indices), ...], loaded by several threads."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.stack(list(pool.map(self._load, np.asarray(indices).tolist())))

    def check(self) -> None:
        """Loads every image once. Raises the error of the first one that cannot be loaded."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(lambda index: self._load(index) is None, range(self._num)):
                pass


class CaptionedImages(NamedTuple):
    """Images to caption.

    Attributes:
      names: name of each image.
      images: float32 [num, height, width, channels], in the model's range, loaded when indexed.
      references: captions of each image, () if it has none.
    """

    names: list[str]
    images: ImagesOnDemand
    references: list[tuple[str, ...]]


def read_captioned_images(config: ExperimentConfig, path: str, num: int | None) -> CaptionedImages:
    """Images of a file, a folder, an .npz, or a held-out split of the data source, with their captions.

    Args:
      config: settings of the model.
      path: an image file; a folder of image files, with or without captions.jsonl; an .npz with
        `arr_0`, images uint8 (latents: float) [num, height, width, channels], and optionally
        `captions`; or a held-out split with captions of the model's data source (`held_out`).
      num: the greatest number of images; default: all, of a held-out split NUM_HELD_OUT.

    Raises:
      InputError: another kind of path, or images of the wrong size.
    """
    field = "--images"
    held_out = held_out_captions(field, path, config.data)
    if held_out is not None:
        return _held_out(held_out.open(path), path, NUM_HELD_OUT if num is None else num)
    file = pathlib.Path(path)
    if file.suffix == ".npz":
        return _captioned_npz(config, file, num)
    allowed = "the model reads latents: give an .npz with arr_0, latents as it was trained on"
    require(not config.data.latents, field, path, allowed)
    require(file.exists(), field, path, "no such file or folder")
    if not file.is_dir():
        folder, records = file.parent, [(file.name, ())]
    elif (file / CAPTIONS).is_file():
        folder, records = file, read_captions(file, field)[:num]
    else:
        paths = sorted(path for path in file.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        folder, records = file, [(path.relative_to(file).as_posix(), ()) for path in paths][:num]
    require(bool(records), field, path, f"holds no images (*{'|'.join(IMAGE_SUFFIXES)})")
    names, captions = map(list, zip(*records, strict=True))
    images = ImagesOnDemand(len(names), lambda i: load_image(folder / names[i], config.data.shape, field))
    # Unreadable images are reported before any compile.
    images.check()
    return CaptionedImages(names, images, captions)


def _held_out(source, path, num) -> CaptionedImages:
    require(1 <= num <= len(source), "--num", num, f"must be >= 1 and <= {len(source)}")
    indices = np.random.default_rng(0).choice(len(source), num, replace=False)
    images = ImagesOnDemand(num, lambda i: source[int(indices[i])]["image"])
    captions = [(source[int(i)]["caption"],) for i in indices]
    return CaptionedImages([f"{path}/{i}" for i in indices], images, captions)


def _captioned_npz(config, file, num) -> CaptionedImages:
    require(file.is_file(), "--images", str(file), "no such file")
    try:
        with np.load(file) as arrays:
            images = arrays["arr_0"]
            captions = arrays.get("captions")
    except Exception as error:
        raise InputError("--images", str(file), f"not an .npz with arr_0 ({type(error).__name__})") from None
    shape, kind = config.data.shape, "f" if config.data.latents else "u"
    require(
        images.shape[1:] == shape and images.dtype.kind == kind and len(images) > 0,
        "--images",
        str(file),
        f"arr_0 must be {'float' if config.data.latents else 'uint8'} [num, {', '.join(map(str, shape))}];"
        f" it is {images.dtype} {list(images.shape)}",
    )
    allowed = f"captions must be {len(images)}, as arr_0"
    require(captions is None or len(captions) == len(images), "--images", str(file), allowed)
    images = images[:num]
    references = [()] * len(images) if captions is None else [(str(caption),) for caption in captions[:num]]
    scale = (lambda values: values) if config.data.latents else (lambda values: values / np.float32(127.5) - 1)
    scaled = ImagesOnDemand(len(images), lambda i: scale(images[i].astype(np.float32)))
    return CaptionedImages([str(i) for i in range(len(images))], scaled, references)
