"""Clips of any length in folders of classes; training takes a few frames of each."""

from collections.abc import Callable

import numpy as np

from causalfusion_jax.common.errors import require, require_number
from causalfusion_jax.data.class_folders import ClassFolderSource, names_of_class_folders
from causalfusion_jax.data.image_files import IMAGE_SUFFIXES, ImageFormat
from causalfusion_jax.data.source import DataSettings, SourceKind, require_path
from causalfusion_jax.data.video_files import (
    CLIP_SUFFIXES,
    VIDEO_SUFFIXES,
    clip_indices,
    frame_files,
    read_frames,
    require_decoder,
)


class ClipFolderSource(ClassFolderSource):
    """Clips at `root/class/*.gif|mp4|...`, or `root/class/clip/*.png|jpg`; classes are the folders, sorted by name.

    `image` is float32 [frames, size, size, channels] in [-1, 1], every frame scaled and cropped
    at the centre: the middle of the clip by index, from a random first frame in `draw`. A clip
    that is too short or cannot be decoded is a corrupt record.

    Args:
      root: the folder.
      frames: frames of an example.
      stride: take every n-th frame of a clip.
      image_size: side in pixels.
      channels: 1 (grey) or 3 (RGB).

    Raises:
      InputError: no such folder, no clips in it, or videos without PyAV.
    """

    def __init__(self, root: str, frames: int, stride: int, image_size: int, channels: int):
        super().__init__(root, "clips", lambda path: path.suffix.lower() in CLIP_SUFFIXES or path.is_dir())
        self.frames, self.stride, self.format = frames, stride, ImageFormat(image_size, channels)
        require(
            any(path.is_file() or frame_files(path) for path in self.paths),
            "path",
            root,
            f"holds no clips: need {root}/CLASS/*{'|'.join(CLIP_SUFFIXES)}, or frames as "
            f"{root}/CLASS/CLIP/*{'|'.join(IMAGE_SUFFIXES)}",
        )
        videos = (path for path in self.paths if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
        video = next(videos, None)
        if video is not None:
            require_decoder(video)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._example(index, lambda count: (count - 1) // 2)

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The example with a random first frame."""
        # Drawn before reading, and so once, even if the clip has to be read again.
        fraction = rng.random()
        return self._example(index, lambda count: int(fraction * count))

    def _example(self, index: int, pick: Callable[[int], int]) -> dict[str, np.ndarray]:
        """The example; `pick` maps the number of possible first frames to one of them."""
        path = self.paths[index]
        frames = read_frames(path, lambda count: clip_indices(str(path), count, self.frames, self.stride, pick))
        return {"image": np.stack([self.format.fit(image) for image in frames]), "label": self.labels[index]}


def _check(settings: DataSettings) -> None:
    require_path(settings)
    require_number("frames", settings.frames, 2)


CLIP_FOLDER = SourceKind(
    name="clip_folder",
    summary="videos, GIFs and folders of frames; `path` has one folder for each class",
    open=lambda settings, captions: ClipFolderSource(
        settings.path, settings.frames, settings.frame_stride, settings.image_size, settings.channels
    ),
    fixed={"image_width": 0},
    own=("frame_stride",),
    check=_check,
    needs_path=True,
    class_names=names_of_class_folders,
    encodable=True,
)
