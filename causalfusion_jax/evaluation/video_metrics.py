"""The Fréchet Video Distance (arXiv 1812.01717): the Fréchet distance of I3D's logits of videos.

As published: frames are resized to 224x224 without keeping their aspect, bilinearly as
TensorFlow 1 does it, and scaled to [-1, 1]; 16 of them are a video; the 400 logits before the
softmax are the features. Many later values, StyleGAN-V's protocol among them, are of other
resizes, of other numbers of frames, of clips chosen in other ways: only like is comparable.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from causalfusion_jax.common.errors import InputError, require, require_number, require_one_of
from causalfusion_jax.common.npz import NpzReader, NpzWriter
from causalfusion_jax.evaluation.images import Images, open_videos
from causalfusion_jax.evaluation.inception_metrics import (
    DIMS,
    I3D_LOGITS,
    STATISTICS,
    Collected,
    Network,
    compute,
    read_statistics,
)
from causalfusion_jax.models.i3d import MIN_FRAMES, RESIZES, abstract_i3d, i3d_logits

NUM_PUBLISHED = 2048
"""Videos that most published values are of."""
BATCH_SIZE = 16


class VideoProtocol(NamedTuple):
    """What values of FVD must have in common to be compared.

    Attributes:
      frames: of a video, its first ones.
      resize: of `models.i3d.RESIZES`: `tf1`, as FVD was published, or `half_pixel`, as PyTorch.
    """

    frames: int = 16
    resize: str = "tf1"

    def check(self) -> None:
        """Raises InputError for what cannot be."""
        require_number("--fvd_frames", self.frames, MIN_FRAMES)
        require_one_of("--fvd_resize", self.resize, RESIZES)


class I3D(Network):
    """The I3D of FVD; its feature is `i3d_logits`.

    Args:
      field, folder, devices, batch_size: as of `Network`.
      resize: as of VideoProtocol.
    """

    KIND = "fvd_i3d"

    def __init__(self, field: str, folder: str, devices=None, batch_size: int = BATCH_SIZE, resize: str = "tf1"):
        super().__init__(field, folder, devices, batch_size)
        self.resize = resize

    def _shapes(self):
        return abstract_i3d()[1]

    def _compute(self, params, images: jax.Array) -> dict[str, jax.Array]:
        return {I3D_LOGITS: i3d_logits(params, images, self.resize)}


class VideoReference:
    """Mean and covariance of the features of real videos.

    Args:
      field: the option that names it, for errors.
      path: statistics as of `make_video_reference`; or videos, as of `open_videos`.
      protocol: how FVD is measured.

    Raises:
      InputError: it is neither, or the statistics are of another protocol.
    """

    def __init__(self, field: str, path: str, protocol: VideoProtocol):
        self._statistics = self._videos = None
        place = pathlib.Path(path)
        if place.is_file() and place.suffix == ".npz":
            reader = NpzReader(field, place)
            if set(STATISTICS[I3D_LOGITS]) <= set(reader.names):
                theirs = _read_protocol(reader)
                require(
                    theirs == protocol,
                    field,
                    path,
                    f"is of {theirs.frames} frames, resized by {theirs.resize}; --fvd_frames={protocol.frames}"
                    f" --fvd_resize={protocol.resize} need another",
                )
                self._statistics = read_statistics(reader, I3D_LOGITS)
                return
        self._videos = open_videos(field, path, protocol.frames)
        require(self._videos.num >= 2, field, path, "need at least two videos")

    def prepare(self, network: Network) -> None:
        """Computes what was not read."""
        if self._statistics is None:
            found = collect(self._videos, network).statistics[I3D_LOGITS]
            self._statistics = found.mean, found.cov

    def statistics(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance, once prepared."""
        require(name == I3D_LOGITS, "name", name, f"must be {I3D_LOGITS}")
        return self._statistics


def _read_protocol(reader: NpzReader) -> VideoProtocol:
    """How statistics were made."""
    for name in ("frames", "resize"):
        require(
            name in reader.names,
            reader.field,
            str(reader.path),
            f"does not say its {name}; make one with `evaluate --make_reference --i3d=DIR`",
        )
    frames, resize = (reader.array(name) for name in ("frames", "resize"))
    return VideoProtocol(int(frames[0]), str(resize[0]))


def collect(videos: Images, network: Network, progress: Callable[[int], None] = lambda done: None) -> Collected:
    """The statistics of videos that FVD compares, in one pass."""
    collected = Collected(["fvd"])
    return collected.add_all(network.features(videos.batches, collected.names), progress)


def score_videos(
    videos: Images, reference: VideoReference, network: Network, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """`fvd` of videos.

    Args:
      videos: at least two.
      reference: of the real ones.
      network: I3D, or anything of 400 features called `i3d_logits`.
      progress: called with the number of videos done.

    Raises:
      InputError: fewer than two videos.
    """
    require(videos.num >= 2, "--samples", videos.num, "need at least two videos")
    reference.prepare(network)
    return compute(["fvd"], collect(videos, network, progress), reference)


def bias_warning(num: int) -> str | None:
    """What is to be said of FVD of few videos; None where there are enough."""
    if num >= NUM_PUBLISHED:
        return None
    singular = "; their covariance is singular" if num <= DIMS[I3D_LOGITS] else ""
    return f"fvd of {num:,} videos is biased upwards{singular}: published values are of {NUM_PUBLISHED:,} or more"


def make_video_reference(
    videos: Images,
    network: Network,
    protocol: VideoProtocol,
    path: pathlib.Path,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes the statistics of real videos: `mu_i3d` [400], `sigma_i3d` [400, 400], how many and by what protocol.

    Args:
      videos: at least two.
      network: I3D.
      protocol: that `videos` and `network` were made by.
      path: the .npz to write.
      progress: called with the number of videos done.

    Raises:
      InputError: fewer than two videos.
    """
    if videos.num < 2:
        raise InputError("--samples", videos.num, "need at least two videos")
    found = collect(videos, network, progress).statistics[I3D_LOGITS]
    with NpzWriter(path) as writer:
        for name, array in zip(STATISTICS[I3D_LOGITS], (found.mean, found.cov), strict=True):
            writer.array(name, array)
        writer.array("num", np.array([videos.num]))
        writer.array("frames", np.array([protocol.frames]))
        writer.array("resize", np.array([protocol.resize]))
