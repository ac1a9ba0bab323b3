"""FID and its kin in one pass over the images, in the convention of ADM (arXiv 2105.05233).

Images are uint8. FID and sFID compare means and covariances of Inception's pooled and
spatial features, the Inception Score is of parts of 5,000, precision and recall (k = 3) and
KID compare the features of single images, which are the one thing that is kept of them.
Reference statistics are an .npz of ADM's layout: `mu`, `sigma`, `mu_s`, `sigma_s` of all
images, and `arr_0`, some of the images, for what compares single ones.
"""

import collections
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from causalfusion_jax.common import distributed, sharding
from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.common.npz import NpzReader, NpzWriter
from causalfusion_jax.data.scores import OF_REFERENCE_IMAGES, WITHOUT_REFERENCE
from causalfusion_jax.evaluation.images import Images
from causalfusion_jax.metrics.distribution import (
    FeatureStatistics,
    InceptionScore,
    frechet_from_statistics,
    kernel_inception_distance,
    precision_recall,
)
from causalfusion_jax.models import i3d
from causalfusion_jax.models.inception import SPATIAL_CHANNELS, abstract_inception, inception_features
from causalfusion_jax.models.store import open_converted

NUM_PUBLISHED = 50_000
"""Images that published values are of."""
NUM_REFERENCE_IMAGES = 10_000
"""Images that ADM's references hold."""
NUM_NEIGHBORS = 3
BATCH_SIZE = 64
KID_SUBSET_SIZE = 1000
POOLED, SPATIAL, LOGITS, I3D_LOGITS = "2048", "spatial", "logits_unbiased", "i3d_logits"
STATISTICS = {POOLED: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s"), I3D_LOGITS: ("mu_i3d", "sigma_i3d")}
"""Names of mean and covariance in ADM's layout (of I3D in our own), by feature."""
FRECHET = {"fid": POOLED, "sfid": SPATIAL, "fvd": I3D_LOGITS}
"""The feature whose Fréchet distance a metric is."""
DIMS = {POOLED: int(POOLED), SPATIAL: SPATIAL_CHANNELS * 17 * 17, I3D_LOGITS: i3d.LOGITS}

Features = dict[str, np.ndarray]


class Network:
    """A converted network whose features are compared, whole on every device, which share a batch.

    Of several processes, each computes features of images of its own, on its own devices.

    Args:
      field: the option that names the folder, for errors.
      folder: of kind KIND.
      devices: those of them that are this process's are used; default: all.
      batch_size: images (or videos) at a time; rounded up to a multiple of the devices.

    Raises:
      InputError: it is not one.
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
        """Features of all images, batch by batch; the device computes one batch ahead.

        Args:
          batches: size -> uint8 [size, (frames,) height, width, 1 or 3], as of `Images`.
          names: of the features wanted.
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
        # Filled up, so that one program serves all batches.
        filled = np.zeros((self._batch_size, *images.shape[1:-1], 3), np.uint8)
        filled[: len(images)] = images
        found = self._devices.run(self._compute, filled)
        return [{name: part[name] for name in names} for part in found], len(images)

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
    """What is kept of the features of images that are seen once.

    Args:
      metrics: of `settings.INCEPTION_METRICS` or VIDEO_METRICS; what none of them needs is not kept.
    """

    def __init__(self, metrics: Iterable[str]):
        self._metrics = frozenset(metrics)
        self.count = 0
        self.statistics = {
            name: FeatureStatistics(DIMS[name]) for metric, name in FRECHET.items() if metric in self._metrics
        }
        self.score = InceptionScore() if "inception_score" in self._metrics else None
        # Image numbers, and their pooled features.
        self._kept = [] if self._metrics & set(OF_REFERENCE_IMAGES) else None

    @property
    def names(self) -> tuple[str, ...]:
        """The features that `add` must be given."""
        wanted = set(self.statistics)
        wanted |= {LOGITS} if self.score is not None else set()
        wanted |= {POOLED} if self._kept is not None else set()
        return tuple(sorted(wanted))

    def add(self, features: Features, numbers: np.ndarray | None = None) -> None:
        """Adds a batch.

        Args:
          features: by name.
          numbers: of the images, int [num], among all that are scored; default: they follow those seen.
        """
        num = len(next(iter(features.values())))
        numbers = self.count + np.arange(num) if numbers is None else numbers
        for name, statistics in self.statistics.items():
            statistics.update(features[name])
        if self.score is not None:
            self.score.update(features[LOGITS], numbers)
        if self._kept is not None:
            self._kept.append((numbers, features[POOLED]))
        self.count += num

    def add_all(self, batches: Iterable[Features], progress: Callable[[int], None] = lambda done: None) -> "Collected":
        """Adds all batches, and returns itself."""
        for features in batches:
            self.add(features)
            progress(self.count)
        return self

    @property
    def kept(self) -> np.ndarray:
        """Pooled features of all images by their numbers, float32 [num, 2048]."""
        numbers, features = self._kept_arrays()
        return features[np.argsort(numbers, kind="stable")]

    def _kept_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        empty = (np.zeros(0, int), np.zeros((0, DIMS[POOLED]), np.float32))
        numbers, features = zip(empty, *self._kept, strict=True)
        return np.concatenate(numbers), np.concatenate(features)

    def of_all_processes(self) -> "Collected":
        """What all processes together have collected, on each of them; collective."""
        if jax.process_count() == 1:
            return self
        whole = Collected(self._metrics)
        for arrays in distributed.from_each(self._to_arrays()):
            whole._merge_arrays(arrays)
        return whole

    def _to_arrays(self) -> dict[str, np.ndarray]:
        arrays = {"count": np.array(self.count)}
        for name, part in self._parts().items():
            arrays |= {f"{name}.{key}": array for key, array in part.to_arrays().items()}
        if self._kept is not None:
            arrays["numbers"], arrays["kept"] = self._kept_arrays()
        return arrays

    def _parts(self) -> dict[str, FeatureStatistics | InceptionScore]:
        return self.statistics | ({} if self.score is None else {"score": self.score})

    def _merge_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        self.count += int(arrays["count"])
        for name, part in self._parts().items():
            start = f"{name}."
            part.merge_arrays({key.removeprefix(start): arrays[key] for key in arrays if key.startswith(start)})
        if self._kept is not None:
            self._kept.append((arrays["numbers"], arrays["kept"]))


class Reference:
    """Reference statistics of an .npz in ADM's layout; what it lacks is computed of its images.

    Args:
      field: the option that names it, for errors.
      path: the file.

    Raises:
      InputError: it is not one.
    """

    def __init__(self, field: str, path: str):
        self._field, self._path = field, path
        self._reader = NpzReader(field, pathlib.Path(path))
        self.has_images = "arr_0" in self._reader.names
        if self.has_images:
            shape, dtype = self._reader.shape("arr_0")
            require(
                dtype == np.uint8 and len(shape) == 4 and shape[-1] == 3 and shape[0] >= 2,
                field,
                path,
                f"arr_0 must be uint8 images [num, height, width, 3]; it is {dtype} {list(shape)}",
            )
        for name in (*STATISTICS[POOLED], *STATISTICS[SPATIAL]):
            require(
                self.has_images or name in self._reader.names,
                field,
                path,
                f"has neither {name} nor images (arr_0); make one with `evaluate --make_reference`",
            )
        self._statistics: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._features = None

    def supports(self, metric: str) -> bool:
        """Whether the metric can be computed with this reference."""
        return self.has_images or metric not in OF_REFERENCE_IMAGES

    def prepare(self, metrics: Iterable[str], inception: Inception) -> None:
        """Reads, or computes of its images, all that the metrics need; processes share the images.

        Raises:
          InputError: an array of another shape, or no images where a metric needs them.
        """
        metrics = set(metrics) - set(WITHOUT_REFERENCE)
        for metric in metrics:
            require(self.supports(metric), self._field, self._path, f"has no images (arr_0), which {metric} needs")
        wanted = {name for metric, name in FRECHET.items() if metric in metrics}
        read = {name for name in wanted if set(STATISTICS[name]) <= set(self._reader.names)}
        for name in read - set(self._statistics):
            self._statistics[name] = read_statistics(self._reader, name)
        missing = (wanted - set(self._statistics)) and {"fid", "sfid"}
        keep = set(OF_REFERENCE_IMAGES) & metrics if self._features is None else set()
        if not missing and not keep:
            return
        collected = self._collect(missing | keep, inception)
        for name in wanted - set(self._statistics):
            statistics = collected.statistics[name]
            self._statistics[name] = (statistics.mean, statistics.cov)
        if keep:
            self._features = collected.kept

    def _collect(self, metrics: set[str], inception: Inception) -> Collected:
        """What the metrics need of its images; the processes read them in turn, batch by batch."""
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

    def statistics(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of a feature, once prepared."""
        return self._statistics[name]

    @property
    def features(self) -> np.ndarray:
        """Pooled features of its images, once prepared."""
        return self._features


def read_statistics(reader: NpzReader, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of a feature, as an .npz keeps them. Raises InputError for arrays of another shape."""
    mean, cov = (np.asarray(reader.array(part), np.float64) for part in STATISTICS[name])
    dim = DIMS[name]
    for part, array, shape in zip(STATISTICS[name], (mean, cov), ((dim,), (dim, dim)), strict=True):
        require(
            array.shape == shape and bool(np.isfinite(array).all()),
            reader.field,
            str(reader.path),
            f"{part} must be finite {list(shape)}; it is {list(array.shape)}",
        )
    return mean, cov


def compute(metrics: Iterable[str], collected: Collected, reference: Reference | None) -> dict[str, float]:
    """The metrics of what was collected.

    Args:
      metrics: of `settings.INCEPTION_METRICS`, as given to `collected`.
      collected: of the images scored.
      reference: prepared; None where no metric needs one.

    Returns:
      Every metric, and `inception_score_std`, `kid_std`, `kid_subset_size` beside theirs.
    """
    metrics, scores = set(metrics), {}
    for metric, name in FRECHET.items():
        if metric in metrics:
            ours = collected.statistics[name]
            scores[metric] = frechet_from_statistics(ours.mean, ours.cov, *reference.statistics(name))
    if "inception_score" in metrics:
        scores["inception_score"], scores["inception_score_std"] = collected.score.result()
    if metrics & {"precision", "recall"}:
        found = precision_recall(reference.features, collected.kept, NUM_NEIGHBORS)
        scores |= {name: found[name] for name in ("precision", "recall") if name in metrics}
    if "kid" in metrics:
        size = min(KID_SUBSET_SIZE, collected.count, len(reference.features))
        mean, std = kernel_inception_distance(collected.kept, reference.features, subset_size=size)
        scores |= {"kid": mean, "kid_std": std, "kid_subset_size": size}
    return scores


def check_counts(field: str, metrics: Iterable[str], num: int, reference: Reference | None) -> None:
    """Raises InputError where there are too few images for a metric."""
    least = NUM_NEIGHBORS + 1 if {"precision", "recall"} & set(metrics) else 2
    require(num >= least, field, num, f"need at least {least} images")
    if reference is not None and reference.has_images and {"precision", "recall"} & set(metrics):
        count = reference._reader.shape("arr_0")[0][0]
        require(count >= least, reference._field, count, f"need at least {least} images")


def bias_warning(metrics: Iterable[str], num: int) -> str | None:
    """What is to be said of the metrics of few images; None where there are enough."""
    biased = [name for name in ("fid", "sfid", "inception_score", "precision", "recall") if name in set(metrics)]
    if num >= NUM_PUBLISHED or not biased:
        return None
    singular = "; their covariance is singular" if num <= int(POOLED) and {"fid", "sfid"} & set(biased) else ""
    return (
        f"{', '.join(biased)} of {num:,} images {'is' if len(biased) == 1 else 'are'} biased (fid and sfid upwards)"
        f"{singular}: published values are of {NUM_PUBLISHED:,}"
    )


def make_reference(
    images: Images,
    inception: Inception,
    path: pathlib.Path,
    num_images: int = NUM_REFERENCE_IMAGES,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes reference statistics in ADM's layout, in one pass.

    Args:
      images: all images that the statistics are of; grey ones are stored as RGB.
      inception: the network.
      path: the .npz to write.
      num_images: images kept in it, drawn without replacement; fewer where there are fewer.
      seed: of the drawing.
      progress: called with the number of images done.

    Raises:
      InputError: fewer than two images.
    """
    if images.num < 2:
        raise InputError("--samples", images.num, "need at least two images")
    num_images = min(num_images, images.num)
    chosen = np.zeros(images.num, bool)
    chosen[np.random.default_rng(seed).choice(images.num, num_images, replace=False)] = True
    collected = Collected(("fid", "sfid"))
    with NpzWriter(path) as writer:
        with writer.rows("arr_0", (num_images, *images.shape[:2], 3), np.uint8) as write:

            def kept(size):
                start = 0
                for batch in images.batches(size):
                    part = batch[chosen[start : start + len(batch)]]
                    write(np.broadcast_to(part, (*part.shape[:3], 3)))
                    start += len(batch)
                    yield batch

            collected.add_all(inception.features(kept, collected.names), progress)
        for name, statistics in collected.statistics.items():
            for part, array in zip(STATISTICS[name], (statistics.mean, statistics.cov), strict=True):
                writer.array(part, array)
