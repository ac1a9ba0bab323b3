"""Images and clips that samplers are given, and the classes they are sampled for."""

import pathlib

import numpy as np
from PIL import Image

from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.common.pictures import to_uint8
from causalfusion_jax.data.image_files import ImageFormat
from causalfusion_jax.data.video_files import CLIP_SUFFIXES, read_frames


def balanced_labels(num: int, num_classes: int) -> np.ndarray:
    """`num` labels, every class equally often (the first ones once more); int32 [num]."""
    return (np.arange(num) % num_classes).astype(np.int32)


def read_images(field: str, path: pathlib.Path, channels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Images of one image file, or of an npz as this package writes it.

    Args:
      field: what to call the path in errors.
      path: an image file; or an npz with `arr_0` [num, height, width, channels], uint8, or
        float latents, and perhaps `arr_1`, int labels [num].
      channels: 1 (grey) or 3 (RGB): what an image file is converted to.

    Returns:
      `arr_0`, and the labels or None.

    Raises:
      InputError: no such file, or not one of these.
    """
    require(path.is_file(), field, str(path), "no such file")
    try:
        if path.suffix.lower() != ".npz":
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
            return pixels.reshape(1, *pixels.shape[:2], channels), None
        with np.load(path) as arrays:
            images, labels = arrays["arr_0"], arrays["arr_1"] if "arr_1" in arrays else None
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


def is_clip(path: pathlib.Path) -> bool:
    """Whether `read_clip` reads it."""
    return path.is_dir() or path.suffix.lower() in CLIP_SUFFIXES


def read_clip(field: str, path: pathlib.Path, size: int, channels: int, max_frames: int, stride: int = 1) -> np.ndarray:
    """The first frames of a video, a GIF or a folder of images, scaled and cropped as in training.

    Args:
      field: what to call the path in errors.
      path: the clip.
      size: side in pixels.
      channels: 1 (grey) or 3 (RGB).
      max_frames: so many, or fewer where it ends before.
      stride: every so many-th frame of it.

    Returns:
      uint8 [1, frames, size, size, channels].

    Raises:
      InputError: it cannot be read, or holds no frames.
    """
    require(path.exists(), field, str(path), "no such file")
    try:
        frames = read_frames(path, lambda count: range(count)[: max_frames * stride : stride])
    except InputError as error:
        raise InputError(field, error.value, error.allowed) from None
    require(bool(frames), field, str(path), "holds no frames")
    fit = ImageFormat(size, channels).fit
    return np.stack([to_uint8(fit(frame)) for frame in frames])[None]
