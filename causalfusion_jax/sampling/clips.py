"""Clips that are given to be continued."""

import dataclasses
import hashlib
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.common.pictures import to_uint8
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.data.image_files import ImageFormat
from causalfusion_jax.data.video_files import CLIP_SUFFIXES, read_frames
from causalfusion_jax.sampling.images import read_image_file
from causalfusion_jax.sampling.rolling import RollingConfig, Window
from causalfusion_jax.sampling.trained import LatentCodec


class Clips(NamedTuple):
    """Frames to continue.

    Attributes:
      frames: uint8 pixels, or float latents, [num, frames, height, width, channels].
      labels: int [num], the classes that came with them, or None.
      encoded: the frames in the model's range, encoded if there is an autoencoder; float32.
    """

    frames: np.ndarray
    labels: np.ndarray | None
    encoded: np.ndarray


class LongVideos(NamedTuple):
    """Videos that `rolling` generates.

    Attributes:
      clips: their first frames, or None.
      rolling: their length, and how the window rolls.
      windows: from `rolling.make_windows`.
    """

    clips: Clips | None
    rolling: RollingConfig
    windows: tuple[Window, Window | None]

    @property
    def request(self) -> dict[str, Any]:
        """The settings of these videos, as plain values."""
        settings = dataclasses.asdict(self.rolling)
        if self.clips is not None:
            frames = self.clips.frames
            settings |= {"keep_frames": frames.shape[1], "clips": hashlib.sha256(frames.tobytes()).hexdigest()}
        return {"video": settings}


def read_clips(
    config: ExperimentConfig,
    path: str,
    keep_frames: int | None = None,
    frame_stride: int | None = None,
    vae: LatentCodec | None = None,
) -> Clips:
    """The first frames of clips, as `--condition` of `sample` names them.

    Args:
      config: settings of the model.
      path: an npz of clips or images, a video, a GIF, a folder of frames, or an image.
      keep_frames: number of frames; default: all, of a video at most those of a training clip.
      frame_stride: of a video, every `frame_stride`-th frame is taken; default: as in training.
      vae: encodes pixels, for a model of latents.

    Raises:
      InputError: clips that cannot be read, or that do not fit the model.
    """
    latents, field, file = config.data.latents and vae is None, "--condition", pathlib.Path(path)
    channels = config.data.channels if latents or not config.data.latents else 3
    size = config.data.image_size * (vae.downsampling if vae else 1)
    needs = "float latents (or give --vae to continue pixels)"
    if is_clip(file):
        require(not latents, field, path, f"must be {needs}")
        count = config.data.frames if keep_frames is None else keep_frames
        stride = config.data.frame_stride if frame_stride is None else frame_stride
        for name, value in (("keep_frames", count), ("frame_stride", stride)):
            require(value >= 1, f"--{name}", value, "must be >= 1")
        frames, labels = read_clip(field, file, size, channels, count, stride), None
    else:
        require(frame_stride is None, "--frame_stride", frame_stride, "is of videos and folders of frames")
        frames, labels = read_image_file(field, file, channels)
    if frames.ndim == 4:
        # An image is a clip of one frame.
        frames = frames[:, None]
    shape = (size, size, channels)
    require(
        frames.shape[2:] == shape and len(frames) > 0,
        field,
        path,
        f"frames must be {'x'.join(map(str, shape))} (height, width, channels), as the model's; "
        f"they are {'x'.join(map(str, frames.shape[2:]))}",
    )
    needs = needs if latents else "pixels, uint8"
    require((frames.dtype == np.uint8) != latents, field, path, f"must be {needs}")
    keep = frames.shape[1] if keep_frames is None else keep_frames
    allowed = f"must be >= 1 and <= {frames.shape[1]}, the frames of --condition"
    require(1 <= keep <= frames.shape[1], "--keep_frames", keep, allowed)
    frames = frames[:, :keep]
    return Clips(frames, labels, _encode(frames, vae))


def is_clip(path: pathlib.Path) -> bool:
    """Whether `read_clip` reads it."""
    return path.is_dir() or path.suffix.lower() in CLIP_SUFFIXES


def read_clip(field: str, path: pathlib.Path, size: int, channels: int, max_frames: int, stride: int) -> np.ndarray:
    """The first frames of a video, a GIF or a folder of images, scaled and cropped as in training.

    Args:
      field: the option that names the path, for errors.
      path: the clip.
      size: side in pixels.
      channels: 1 (grey) or 3 (RGB).
      max_frames: number of frames, if the clip is not shorter.
      stride: every `stride`-th frame of the clip is taken.

    Returns:
      uint8 [1, frames, size, size, channels].

    Raises:
      InputError: it cannot be read, or has no frames.
    """
    require(path.exists(), field, str(path), "no such file")
    try:
        frames = read_frames(path, lambda count: range(count)[: max_frames * stride : stride])
    except InputError as error:
        raise InputError(field, error.value, error.allowed) from None
    require(bool(frames), field, str(path), "holds no frames")
    fit = ImageFormat(size, channels).fit
    return np.stack([to_uint8(fit(frame)) for frame in frames])[None]


def _encode(frames: np.ndarray, vae: LatentCodec | None) -> np.ndarray:
    """Pixels uint8 to [-1, 1], and to latents if there is an autoencoder; latents unchanged."""
    if frames.dtype != np.uint8:
        return frames.astype(np.float32)
    pixels = frames / np.float32(127.5) - 1
    if vae is None:
        return pixels
    latents = jax.device_get(vae.encode(pixels.reshape(-1, *pixels.shape[2:])))
    return latents.reshape(*pixels.shape[:2], *latents.shape[1:])
