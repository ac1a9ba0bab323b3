"""Metrics of Inception's features in one pass over the images, in ADM's convention (arXiv 2105.05233).

Images are uint8. The metrics are declared in `metrics.registry`; of the features only the
summaries that they name are kept. Reference statistics are an .npz in ADM's layout: `mu`,
`sigma`, `mu_s`, `sigma_s` of all images, and `arr_0`, some of the images, for metrics that
compare single images.
"""

import collections
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from causalfusion_jax.common import distributed, sharding
from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.common.npz import NpzReader, NpzWriter
from causalfusion_jax.evaluation.images import ImageSet
from causalfusion_jax.metrics.registry import (
    FEATURE_METRICS,
    I3D_STATISTICS,
    POOLED_STATISTICS,
    SPATIAL_STATISTICS,
    Accumulator,
    Summary,
)
from causalfusion_jax.models.inception import abstract_inception, inception_features
from causalfusion_jax.models.store import open_converted

NUM_REFERENCE_IMAGES = 10_000
"""Images in ADM's references."""
BATCH_SIZE = 64
STATISTICS = {
    POOLED_STATISTICS: ("mu", "sigma"),
    SPATIAL_STATISTICS: ("mu_s", "sigma_s"),
    I3D_STATISTICS: ("mu_i3d", "sigma_i3d"),
}
"""Names of mean and covariance in ADM's layout (those of I3D are our own)."""

Features = dict[str, np.ndarray]


class Moments(NamedTuple):
    """Mean [dim] and covariance [dim, dim] of a feature, float64."""

    mean: np.ndarray
    cov: np.ndarray


class Network:
    """A converted network whose features are compared: replicated on the devices, which share a batch.

    Each of several processes computes features of its own images, on its own devices.

    Args:
      field: the option that names the folder, for errors.
      folder: a converted checkpoint of kind KIND.
      devices: the devices; those of other processes are ignored; default: all.
      batch_size: images (or videos) at a time; rounded up to a multiple of the devices.

    Raises:
      InputError: the folder holds no such checkpoint.
    """

    KIND: str

    def __init__(self, field: str, folder: str, devices=None, batch_size: int = BATCH_SIZE):
        converted = open_converted(field, folder, (self.KIND,))
        devices = jax.local_devices() if devices is None else devices
        own = [device for device in devices if device.process_index == jax.process_index()]
        self.fingerprint = converted.fingerprint
        self._devices = sharding.OwnDevices(converted.params(self._shapes()), own)
        self._batch_size = -(-batch_size // len(own)) * len(own)

    def _shapes(self):
        """Its parameters as jax.ShapeDtypeStruct."""
        raise NotImplementedError

    def _compute(self, params, images: jax.Array) -> dict[str, jax.Array]:
        """Features of uint8 [batch, (frames,) height, width, 3]."""
        raise NotImplementedError

    def features(self, batches: Callable[[int], Iterator[np.ndarray]], names: Iterable[str]) -> Iterator[Features]:
        """Features of all images, in batches; the device computes one batch ahead.

        Args:
          batches: size -> uint8 [size, (frames,) height, width, 1 or 3], as of `ImageSet`.
          names: names of the features to return.
        """
        ahead = None
        for images in batches(self._batch_size):
            started = self._start(images, names)
            if ahead is not None:
                yield self._fetch(*ahead)
            ahead = started
        if ahead is not None:
            yield self._fetch(*ahead)

    def of(self, images: np.ndarray, names: Iterable[str]) -> Iterator[Features]:
        """Features of images in memory."""
        return self.features(lambda n: (images[i : i + n] for i in range(0, len(images), n)), names)

    def _start(self, images: np.ndarray, names: Iterable[str]):
        # The last batch is padded, so that one program serves all.
        filled = np.zeros((self._batch_size, *images.shape[1:-1], 3), np.uint8)
        filled[: len(images)] = images
        by_device = self._devices.run(self._compute, filled)
        return [{name: part[name] for name in names} for part in by_device], len(images)

    @staticmethod
    def _fetch(features, num: int) -> Features:
        return {name: values[:num] for name, values in sharding.joined(features).items()}


class Inception(Network):
    """The Inception of FID; features as of `inception_features`."""

    KIND = "fid_inception"

    def _shapes(self):
        return abstract_inception()[1]

    def _compute(self, params, images: jax.Array) -> dict[str, jax.Array]:
        return inception_features(params, images)


class Collected:
    """Summaries of the features of samples that are seen once.

    Args:
      metrics: names of FEATURE_METRICS; what none of them needs is not kept.
    """

    def __init__(self, metrics: Iterable[str]):
        self._metrics = frozenset(metrics)
        self.count = 0
        # In the order of the registry, which is the same on all processes.
        summaries = [metric.summary for name, metric in FEATURE_METRICS.items() if name in self._metrics]
        self._parts: dict[Summary, Accumulator] = {summary: summary.make(summary.dim) for summary in summaries}

    def __getitem__(self, summary: Summary) -> Accumulator:
        return self._parts[summary]

    @property
    def names(self) -> tuple[str, ...]:
        """The features that `add` needs."""
        return tuple(sorted({summary.feature for summary in self._parts}))

    def add(self, features: Features, numbers: np.ndarray | None = None) -> None:
        """Adds a batch.

        Args:
          features: by name.
          numbers: indices of the samples among all that are scored, int [num]; default: the next ones.
        """
        num = len(next(iter(features.values())))
        numbers = self.count + np.arange(num) if numbers is None else numbers
        for summary, part in self._parts.items():
            part.update(features[summary.feature], numbers)
        self.count += num

    def add_all(self, batches: Iterable[Features], progress: Callable[[int], None] = lambda done: None) -> "Collected":
        """Adds all batches, and returns itself."""
        for features in batches:
            self.add(features)
            progress(self.count)
        return self

    def of_all_processes(self) -> "Collected":
        """The summaries of all processes together, on each of them; collective."""
        if jax.process_count() == 1:
            return self
        whole = Collected(self._metrics)
        for arrays in distributed.from_each(self._to_arrays()):
            whole._merge_arrays(arrays)
        return whole

    def _to_arrays(self) -> dict[str, np.ndarray]:
        arrays = {"count": np.array(self.count)}
        for i, part in enumerate(self._parts.values()):
            arrays |= {f"{i}.{key}": array for key, array in part.to_arrays().items()}
        return arrays

    def _merge_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        self.count += int(arrays["count"])
        for i, part in enumerate(self._parts.values()):
            start = f"{i}."
            part.merge_arrays({key.removeprefix(start): arrays[key] for key in arrays if key.startswith(start)})


class Reference:
    """Reference statistics of an .npz in ADM's layout; missing ones are computed from its images.

    Args:
      field: the option that names it, for errors.
      path: the file.

    Raises:
      InputError: it holds neither statistics nor images.
    """

    def __init__(self, field: str, path: str):
        self._field, self._path = field, path
        self._reader = NpzReader(field, pathlib.Path(path))
        self.num_images = 0
        if "arr_0" in self._reader.names:
            shape, dtype = self._reader.shape("arr_0")
            self.num_images = shape[0]
            allowed = f"arr_0 must be uint8 images [num, height, width, 3]; it is {dtype} {list(shape)}"
            require(dtype == np.uint8 and len(shape) == 4 and shape[-1] == 3 and shape[0] >= 2, field, path, allowed)
        for name in (*STATISTICS[POOLED_STATISTICS], *STATISTICS[SPATIAL_STATISTICS]):
            allowed = f"has neither {name} nor images (arr_0); make one with `evaluate --make_reference`"
            require(self.num_images > 0 or name in self._reader.names, field, path, allowed)
        self._parts: dict[Summary, Moments | Accumulator] = {}

    def supports(self, metric: str) -> bool:
        """Whether the metric can be computed with this reference."""
        return self.num_images > 0 or FEATURE_METRICS[metric].reference != "images"

    def check_num_images(self, least: int) -> None:
        """Raises InputError if there are images, but fewer than `least`."""
        require(self.num_images == 0 or self.num_images >= least, self._field, self.num_images, _at_least(least))

    def prepare(self, metrics: Iterable[str], inception: Network) -> None:
        """Reads, or computes from its images, all that the metrics need; processes share the images.

        Raises:
          InputError: an array of another shape, or no images for a metric that needs them.
        """
        needed = {name: FEATURE_METRICS[name] for name in metrics if FEATURE_METRICS[name].reference}
        for name in needed:
            require(self.supports(name), self._field, self._path, f"has no images (arr_0), which {name} needs")
        for summary in {metric.summary for metric in needed.values()} & set(STATISTICS) - set(self._parts):
            if set(STATISTICS[summary]) <= set(self._reader.names):
                self._parts[summary] = read_moments(self._reader, summary)
        missing = {name: metric.summary for name, metric in needed.items() if metric.summary not in self._parts}
        if missing:
            collected = self._collect(missing, inception)
            self._parts |= {summary: collected[summary] for summary in missing.values()}

    def _collect(self, metrics: Iterable[str], inception: Network) -> Collected:
        """Summaries of its images; the processes read the batches in turn."""
        collected, numbers = Collected(metrics), collections.deque()

        def batches(size):
            parts = itertools.islice(
                enumerate(self._reader.batches("arr_0", size)), jax.process_index(), None, jax.process_count()
            )
            for index, images in parts:
                numbers.append(index * size + np.arange(len(images)))
                yield images

        for features in inception.features(batches, collected.names):
            collected.add(features, numbers.popleft())
        return collected.of_all_processes()

    def __getitem__(self, summary: Summary) -> Moments | Accumulator:
        """The prepared summary of the reference; of statistics, at least `mean` and `cov`."""
        return self._parts[summary]


def read_moments(reader: NpzReader, summary: Summary) -> Moments:
    """Mean and covariance of a feature in an .npz. Raises InputError for arrays of another shape."""
    arrays = [np.asarray(reader.array(name), np.float64) for name in STATISTICS[summary]]
    for name, array, shape in zip(STATISTICS[summary], arrays, ((summary.dim,), (summary.dim,) * 2), strict=True):
        allowed = f"{name} must be finite {list(shape)}; it is {list(array.shape)}"
        require(array.shape == shape and bool(np.isfinite(array).all()), reader.field, str(reader.path), allowed)
    return Moments(*arrays)


def write_moments(writer: NpzWriter, summary: Summary, moments: Moments | Accumulator) -> None:
    """Writes mean and covariance of a feature, for `read_moments`."""
    for name, array in zip(STATISTICS[summary], (moments.mean, moments.cov), strict=True):
        writer.array(name, array)


def compute(metrics: Iterable[str], collected: Collected, reference: Any) -> dict[str, float]:
    """The metrics of the samples.

    Args:
      metrics: names of FEATURE_METRICS, as given to `collected`.
      collected: summaries of the samples.
      reference: a prepared Reference or VideoReference; None if no metric needs one.

    Returns:
      Every metric, and `inception_score_std`, `kid_std`, `kid_subset_size` with theirs.
    """
    wanted, values = set(metrics), {}
    for name, metric in FEATURE_METRICS.items():
        if name in wanted and name not in values:  # precision and recall come together
            real = reference[metric.summary] if metric.reference else None
            values |= metric.compute(collected[metric.summary], real)
    return {name: value for name, value in values.items() if name in wanted or name not in FEATURE_METRICS}


def _at_least(num: int) -> str:
    return f"need at least {num} images"


def check_counts(field: str, metrics: Iterable[str], num: int, reference: Reference | None) -> None:
    """Raises InputError if there are too few images, or reference images, for a metric."""
    known = [FEATURE_METRICS[name] for name in metrics]
    least = max((metric.min_samples for metric in known), default=2)
    require(num >= least, field, num, _at_least(least))
    if reference is not None and any(metric.reference == "images" for metric in known):
        reference.check_num_images(least)


def bias_warning(metrics: Iterable[str], num: int) -> str | None:
    """The warning for metrics of few samples; None if there are enough."""
    wanted = set(metrics)
    biased = [m for name, m in FEATURE_METRICS.items() if name in wanted and num < m.published_samples]
    if not biased:
        return None
    distances = [metric for metric in biased if metric.reference == "statistics"]
    upwards = f" ({' and '.join(metric.name for metric in distances)} upwards)" if distances else ""
    upwards = " upwards" if len(distances) == len(biased) else upwards
    singular = "; their covariance is singular" if any(num <= m.summary.dim for m in distances) else ""
    samples = "videos" if any(metric.of_videos for metric in biased) else "images"
    return (
        f"{', '.join(metric.name for metric in biased)} of {num:,} {samples}"
        f" {'is' if len(biased) == 1 else 'are'} biased{upwards}{singular}: published values are of"
        f" {max(metric.published_samples for metric in biased):,} or more"
    )


def make_reference(
    images: ImageSet,
    inception: Inception,
    path: pathlib.Path,
    num_images: int = NUM_REFERENCE_IMAGES,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes reference statistics in ADM's layout, in one pass.

    Args:
      images: the images; grey ones are stored as RGB.
      inception: the network.
      path: the .npz to write.
      num_images: number of images stored in it, drawn without replacement; at most all.
      seed: seed of the drawing.
      progress: called with the number of images done.

    Raises:
      InputError: fewer than two images.
    """
    if images.num < 2:
        raise InputError("--samples", images.num, "need at least two images")
    num_images = min(num_images, images.num)
    stored = np.zeros(images.num, bool)
    stored[np.random.default_rng(seed).choice(images.num, num_images, replace=False)] = True
    collected = Collected(("fid", "sfid"))
    with NpzWriter(path) as writer:
        with writer.rows("arr_0", (num_images, *images.shape[:2], 3), np.uint8) as write:

            def batches(size):
                start = 0
                for batch in images.batches(size):
                    part = batch[stored[start : start + len(batch)]]
                    write(np.broadcast_to(part, (*part.shape[:3], 3)))
                    start += len(batch)
                    yield batch

            collected.add_all(inception.features(batches, collected.names), progress)
        for summary in (POOLED_STATISTICS, SPATIAL_STATISTICS):
            write_moments(writer, summary, collected[summary])
