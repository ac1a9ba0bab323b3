"""What `sample` takes for videos: their length, how the window rolls, and clips to continue."""

import dataclasses
import hashlib
import pathlib
from typing import Any, NamedTuple

from absl import flags

from causalfusion_jax.cli import sampling_flags
from causalfusion_jax.common.errors import require

_FRAMES = flags.DEFINE_integer("frames", None, "Frames of a video, at least the run's; more roll a window over it.")
_CONDITION = flags.DEFINE_string("condition", None, "Clips to continue: npz, video, GIF, folder of frames, image.")
_KEEP_FRAMES = flags.DEFINE_integer("keep_frames", None, "Frames of them that are kept, the first ones [all].")
_FRAME_STRIDE = flags.DEFINE_integer("frame_stride", None, "Every so many-th frame of a video is taken [the run's].")
_STRIDE = flags.DEFINE_integer("window_stride", None, "Frames made each time the window rolls [as few as can be].")
_SINK_FRAMES = flags.DEFINE_integer("sink_frames", None, "The first so many frames never leave the window [0].")


class Video(NamedTuple):
    """What the command line says of videos.

    Attributes:
      before: the frames to continue as they were given, [num, frames, height, width, channels], or None.
      labels: the classes that came with them, int [num], or None.
      clips: the same frames as the model takes them, or None.
      rolling: RollingConfig.
      windows: of `rolling.make_windows`.
    """

    before: Any
    labels: Any
    clips: Any
    rolling: Any
    windows: Any

    @property
    def request(self) -> dict[str, Any]:
        """How these videos are made, as plain values."""
        shown = dataclasses.asdict(self.rolling)
        if self.before is not None:
            shown |= {"keep_frames": self.before.shape[1], "clips": hashlib.sha256(self.before.tobytes()).hexdigest()}
        return {"video": shown}


def read(config, sampler, vae) -> Video | None:
    """What the flags ask for; None where they ask for nothing that `generate_images` does not do.

    Args:
      config: the model's settings.
      sampler: for a whole clip.
      vae: `trained.Autoencoder` or None.

    Raises:
      InputError: flags that do not go together or do not fit the model.
    """
    from causalfusion_jax.sampling.rolling import RollingConfig, make_windows

    names = {"frames": _FRAMES, "condition": _CONDITION, "keep_frames": _KEEP_FRAMES, "window_stride": _STRIDE,
             "sink_frames": _SINK_FRAMES, "frame_stride": _FRAME_STRIDE}  # fmt: skip
    given = {name: flag.value for name, flag in names.items() if flag.value is not None}
    if not given:
        return None
    require(config.data.frames > 1, f"--{min(given)}", given[min(given)], "the model makes images, not videos")
    for name in ("keep_frames", "frame_stride"):
        require(name not in given or "condition" in given, f"--{name}", given.get(name), "needs --condition")
    before, labels = _condition(config, vae) if "condition" in given else (None, None)
    frames = config.data.frames if _FRAMES.value is None else _FRAMES.value
    rolling = RollingConfig(frames, _STRIDE.value or 0, _SINK_FRAMES.value or 0)
    keep = 0 if before is None else before.shape[1]
    windows = make_windows(config, sampler, rolling, keep, sampling_flags.ar_steps_given())
    return Video(before, labels, None if before is None else _as_model_takes(before, vae), rolling, windows)


def _condition(config, vae):
    """The kept frames of --condition, [num, frames, height, width, channels], and labels or None."""
    import numpy as np

    from causalfusion_jax.sampling.images import is_clip, read_images

    latents = config.data.latents and vae is None
    channels = config.data.channels if latents or not config.data.latents else 3
    size = config.data.image_size * (vae.downsampling if vae else 1)
    path, needs = pathlib.Path(_CONDITION.value), "float latents (or give --vae to continue pixels)"
    if is_clip(path):
        require(not latents, "--condition", _CONDITION.value, f"must be {needs}")
        images, labels = _read_clip(config, path, size, channels), None
    else:
        stride = _FRAME_STRIDE.value
        require(stride is None, "--frame_stride", stride, "is of videos and folders of frames")
        images, labels = read_images("--condition", path, channels)
    if images.ndim == 4:
        # An image is a clip of one frame.
        images = images[:, None]
    wanted = (size, size, channels)
    require(
        images.shape[2:] == wanted and len(images) > 0,
        "--condition",
        _CONDITION.value,
        f"frames must be {'x'.join(map(str, wanted))} (height, width, channels), as the model's; "
        f"they are {'x'.join(map(str, images.shape[2:]))}",
    )
    needs = needs if latents else "pixels, uint8"
    require((images.dtype == np.uint8) != latents, "--condition", _CONDITION.value, f"must be {needs}")
    keep = images.shape[1] if _KEEP_FRAMES.value is None else _KEEP_FRAMES.value
    require(
        1 <= keep <= images.shape[1],
        "--keep_frames",
        keep,
        f"must be >= 1 and <= {images.shape[1]}, the frames of --condition",
    )
    return images[:, :keep], labels


def _read_clip(config, path, size, channels):
    """As many frames of a clip as there are to be kept, or as the model has."""
    from causalfusion_jax.sampling.images import read_clip

    keep = config.data.frames if _KEEP_FRAMES.value is None else _KEEP_FRAMES.value
    stride = config.data.frame_stride if _FRAME_STRIDE.value is None else _FRAME_STRIDE.value
    for name, value in (("keep_frames", keep), ("frame_stride", stride)):
        require(value >= 1, f"--{name}", value, "must be >= 1")
    return read_clip("--condition", path, size, channels, keep, stride)


def _as_model_takes(frames, vae):
    """uint8 to [-1, 1], encoded where there is an autoencoder; latents as they are."""
    import jax
    import numpy as np

    if frames.dtype != np.uint8:
        return frames.astype(np.float32)
    pixels = frames / np.float32(127.5) - 1
    if vae is None:
        return pixels
    latents = jax.device_get(vae.encode(pixels.reshape(-1, *pixels.shape[2:])))
    return latents.reshape(*pixels.shape[:2], *latents.shape[1:])
