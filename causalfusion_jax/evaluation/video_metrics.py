"""The Fréchet Video Distance (arXiv 1812.01717): the Fréchet distance of I3D's logits of videos.

As published: frames are resized to 224x224 without keeping their aspect ratio, bilinearly as in
TensorFlow 1, and scaled to [-1, 1]; a video has 16 frames; the 400 logits before the softmax are
the features. Many later values, among them those of StyleGAN-V's protocol, use other resizing,
other numbers of frames or other ways to choose clips: values compare under one protocol only.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from causalfusion_jax.common.errors import InputError, require, require_number, require_one_of
from causalfusion_jax.common.npz import NpzReader, NpzWriter
from causalfusion_jax.evaluation.images import ImageSet, open_videos
from causalfusion_jax.evaluation.inception_metrics import (
    STATISTICS,
    Collected,
    Moments,
    Network,
    compute,
    read_moments,
    write_moments,
)
from causalfusion_jax.metrics.distribution import FeatureStatistics
from causalfusion_jax.metrics.registry import I3D_STATISTICS, Summary
from causalfusion_jax.models.i3d import MIN_FRAMES, RESIZES, abstract_i3d, i3d_logits

BATCH_SIZE = 16


class VideoProtocol(NamedTuple):
    """What comparable values of FVD have in common.

    Attributes:
      frames: number of frames of a video, its first ones.
      resize: one of `models.i3d.RESIZES`: `tf1`, as FVD was published, or `half_pixel`, as in PyTorch.
    """

    frames: int = 16
    resize: str = "tf1"

    def check(self) -> None:
        """Raises InputError for values that cannot be used."""
        require_number("--fvd_frames", self.frames, MIN_FRAMES)
        require_one_of("--fvd_resize", self.resize, RESIZES)


class I3DNetwork(Network):
    """The I3D of FVD, with one feature, `i3d_logits`.

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
        return {I3D_STATISTICS.feature: i3d_logits(params, images, self.resize)}


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
        self._moments = self._videos = None
        file = pathlib.Path(path)
        if file.is_file() and file.suffix == ".npz":
            reader = NpzReader(field, file)
            if set(STATISTICS[I3D_STATISTICS]) <= set(reader.names):
                stored = _read_protocol(reader)
                require(
                    stored == protocol,
                    field,
                    path,
                    f"is of {stored.frames} frames, resized by {stored.resize}; --fvd_frames={protocol.frames}"
                    f" --fvd_resize={protocol.resize} need another",
                )
                self._moments = read_moments(reader, I3D_STATISTICS)
                return
        self._videos = open_videos(field, path, protocol.frames)
        require(self._videos.num >= 2, field, path, "need at least two videos")

    def prepare(self, network: Network) -> None:
        """Computes mean and covariance if they were not read."""
        if self._moments is None:
            self._moments = collect(self._videos, network)[I3D_STATISTICS]

    def __getitem__(self, summary: Summary) -> Moments | FeatureStatistics:
        """The prepared mean and covariance."""
        require(summary == I3D_STATISTICS, "summary", summary.feature, f"must be {I3D_STATISTICS.feature}")
        return self._moments


def _read_protocol(reader: NpzReader) -> VideoProtocol:
    """The protocol of stored statistics."""
    for name in ("frames", "resize"):
        allowed = f"does not say its {name}; make one with `evaluate --make_reference --i3d=DIR`"
        require(name in reader.names, reader.field, str(reader.path), allowed)
    frames, resize = (reader.array(name) for name in ("frames", "resize"))
    return VideoProtocol(int(frames[0]), str(resize[0]))


def collect(videos: ImageSet, network: Network, progress: Callable[[int], None] = lambda done: None) -> Collected:
    """What FVD needs of videos, in one pass."""
    collected = Collected(["fvd"])
    return collected.add_all(network.features(videos.batches, collected.names), progress)


def score_videos(
    videos: ImageSet, reference: VideoReference, network: Network, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """`fvd` of videos.

    Args:
      videos: at least two.
      reference: the reference of real videos.
      network: I3DNetwork, or another network with 400 features called `i3d_logits`.
      progress: called with the number of videos done.

    Raises:
      InputError: fewer than two videos.
    """
    require(videos.num >= 2, "--samples", videos.num, "need at least two videos")
    reference.prepare(network)
    return compute(["fvd"], collect(videos, network, progress), reference)


def make_video_reference(
    videos: ImageSet,
    network: Network,
    protocol: VideoProtocol,
    path: pathlib.Path,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes the statistics of real videos: `mu_i3d` [400], `sigma_i3d` [400, 400], `num` and the protocol.

    Args:
      videos: at least two.
      network: I3DNetwork.
      protocol: the protocol of `videos` and `network`.
      path: the .npz to write.
      progress: called with the number of videos done.

    Raises:
      InputError: fewer than two videos.
    """
    if videos.num < 2:
        raise InputError("--samples", videos.num, "need at least two videos")
    collected = collect(videos, network, progress)
    with NpzWriter(path) as writer:
        write_moments(writer, I3D_STATISTICS, collected[I3D_STATISTICS])
        writer.array("num", np.array([videos.num]))
        writer.array("frames", np.array([protocol.frames]))
        writer.array("resize", np.array([protocol.resize]))
