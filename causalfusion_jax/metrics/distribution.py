"""Distances between distributions of features, with torch-fidelity's definitions.

Statistics are float64 on the host. Only precision and recall, which compare every sample
with every other, run on the device. SciPy is imported by the functions that use it: commands
that only read data do not need it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from causalfusion_jax.common.errors import require, require_number


def _features(name: str, features: np.ndarray, dtype=np.float64, at_least: int = 2) -> np.ndarray:
    """`features` as [num, dim] of `dtype`, or InputError."""
    features = np.asarray(features, dtype)
    require(features.ndim == 2, name, features.shape, "must be [num, dim]")
    require(len(features) >= at_least, name, features.shape, f"need at least {at_least} samples")
    require(bool(np.isfinite(features).all()), name, features.shape, "must be finite")
    return features


def _pair(names: tuple[str, str], a, b, dtype=np.float64) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features of the same dimension, or InputError."""
    a, b = _features(names[0], a, dtype), _features(names[1], b, dtype)
    require(a.shape[1] == b.shape[1], names[1], b.shape, f"must have {a.shape[1]} dimensions, as {names[0]}")
    return a, b


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches.

    Batches are merged by their means and scatter matrices; sums of squares would lose precision
    by cancellation.

    Attributes:
      count: number of samples added.
      mean: float64 [dim].
    """

    def __init__(self, dim: int):
        require_number("dim", dim, 1)
        self.count = 0
        self.mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))

    @classmethod
    def of(cls, features: np.ndarray) -> "FeatureStatistics":
        """Statistics of features [num, dim]."""
        features = _features("features", features, at_least=1)
        statistics = cls(features.shape[1])
        statistics.count, statistics.mean = len(features), features.mean(axis=0)
        centred = features - statistics.mean
        statistics._scatter = centred.T @ centred
        return statistics

    def update(self, features: np.ndarray, numbers: np.ndarray | None = None) -> None:
        """Adds features [num, dim]; their `numbers` do not matter."""
        self.merge(FeatureStatistics.of(features))

    def merge(self, other: "FeatureStatistics") -> None:
        """Adds all samples of `other`."""
        dim = len(self.mean)
        require(len(other.mean) == dim, "features", len(other.mean), f"must have {dim} dimensions")
        count = self.count + other.count
        if other.count == 0:
            return
        step = other.mean - self.mean
        self.mean = self.mean + step * (other.count / count)
        self._scatter = self._scatter + other._scatter + np.outer(step, step) * (self.count * other.count / count)
        self.count = count

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The whole state, for `merge_arrays`, for example on another process."""
        return {"count": np.array(self.count), "mean": self.mean, "scatter": self._scatter}

    def merge_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Adds the state of other statistics."""
        other = FeatureStatistics(len(arrays["mean"]))
        other.count, other.mean, other._scatter = int(arrays["count"]), arrays["mean"], arrays["scatter"]
        self.merge(other)

    @property
    def cov(self) -> np.ndarray:
        """Unbiased covariance, float64 [dim, dim]; of at least two samples."""
        require(self.count >= 2, "features", self.count, "need at least 2 samples")
        return self._scatter / (self.count - 1)


def frechet_from_statistics(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Fréchet distance of two normal distributions.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2). The last trace is the sum
    of the square roots of the eigenvalues of F^T C_b F for any F F^T = C_a. That matrix is
    symmetric, so singular covariances give no complex numbers, and its size is the lower rank
    of the two.

    Args:
      mean_a, mean_b: [dim].
      cov_a, cov_b: [dim, dim].
    """
    mean_a, cov_a, mean_b, cov_b = (np.asarray(x, np.float64) for x in (mean_a, cov_a, mean_b, cov_b))
    require(mean_a.ndim == 1, "mean_a", mean_a.shape, "must be [dim]")
    dim = len(mean_a)
    require(mean_b.shape == (dim,), "mean_b", mean_b.shape, f"must be {(dim,)}, as mean_a")
    for name, cov in (("cov_a", cov_a), ("cov_b", cov_b)):
        require(cov.shape == (dim, dim), name, cov.shape, f"must be {(dim, dim)}")
    factor, other = _root(cov_a), _root(cov_b)
    if other.shape[1] < factor.shape[1]:
        factor, cov_b, cov_a = other, cov_a, cov_b
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(factor.T @ cov_b @ factor), 0.0)).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


def _root(cov: np.ndarray) -> np.ndarray:
    """F [dim, rank] with F F^T = `cov` [dim, dim], by a Cholesky decomposition with pivots."""
    import scipy.linalg

    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(cov, lower=1)
    rows = np.empty_like(factor[:, :rank])
    rows[pivots - 1] = np.tril(factor)[:, :rank]
    return rows


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the normal distributions fitted to two sets of features.

    Args:
      a, b: features [num, dim], at least two of each.
    """
    a, b = FeatureStatistics.of(a), FeatureStatistics.of(b)
    return frechet_from_statistics(a.mean, a.cov, b.mean, b.cov)


class KeptFeatures:
    """All features of samples that arrive in batches.

    Args:
      dim: number of values of a feature.
    """

    def __init__(self, dim: int):
        self._numbers, self._features = [np.zeros(0, int)], [np.zeros((0, dim), np.float32)]

    def update(self, features: np.ndarray, numbers: np.ndarray) -> None:
        """Adds features [num, dim] of the samples with these numbers, int [num]."""
        self._numbers.append(numbers)
        self._features.append(features)

    @property
    def features(self) -> np.ndarray:
        """All features by the numbers of their samples, float32 [num, dim]."""
        order = np.argsort(np.concatenate(self._numbers), kind="stable")
        return np.concatenate(self._features)[order]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The whole state, for `merge_arrays`, for example on another process."""
        return {"numbers": np.concatenate(self._numbers), "features": np.concatenate(self._features)}

    def merge_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Adds the state of others."""
        self.update(arrays["features"], arrays["numbers"])


class InceptionScore:
    """Inception Score of values that arrive in batches: exp of the mean divergence of
    p(class | image) from p(class).

    Args:
      sizes: values in each part, which are scored by themselves; or one size for all parts,
        of which the last may then be shorter (ADM: 5,000).
      probabilities: whether the values are probabilities; else logits (`logits_unbiased` by
        convention).
    """

    def __init__(self, sizes: int | list[int] = 5000, *, probabilities: bool = False):
        self._probabilities = probabilities
        self._part_of = functools.partial(_part_of, sizes)
        # By number of the part: values, sum of p log p, sum of p.
        self._parts: dict[int, tuple[int, float, np.ndarray]] = {}
        self._seen = 0

    def update(self, values: np.ndarray, numbers: np.ndarray | None = None) -> None:
        """Adds values.

        Args:
          values: [num, classes].
          numbers: int [num], their indices among all values; default: the next ones.
        """
        from scipy.special import entr, softmax

        values = _features("values", values, at_least=1)
        if self._probabilities:
            valid = bool((values >= 0).all() and (np.abs(values.sum(axis=1) - 1) < 1e-3).all())
            require(valid, "values", values.shape, "must be non-negative and sum to 1 in every row")
        p = values if self._probabilities else softmax(values, axis=1)
        numbers = self._seen + np.arange(len(p)) if numbers is None else numbers
        parts = self._part_of(numbers)
        for number in np.unique(parts).tolist():
            part = p[parts == number]
            self._add(number, len(part), -float(entr(part).sum()), part.sum(axis=0))
        self._seen += len(p)

    def _add(self, number: int, count: int, negentropy: float, total: np.ndarray) -> None:
        seen = self._parts.get(number, (0, 0.0, 0.0))
        self._parts[number] = (seen[0] + count, seen[1] + negentropy, seen[2] + total)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The whole state, for `merge_arrays`, for example on another process."""
        columns = zip(*self._parts.values(), strict=True) if self._parts else ((), (), ())
        counts, negentropy, totals = map(np.array, columns)
        return {"part": np.array(list(self._parts), int), "count": counts, "negentropy": negentropy, "total": totals}

    def merge_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Adds the state of another score with the same parts."""
        columns = (arrays[name] for name in ("part", "count", "negentropy", "total"))
        for number, count, negentropy, total in zip(*columns, strict=True):
            self._add(int(number), int(count), float(negentropy), total)
            self._seen += int(count)

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over the parts."""
        from scipy.special import entr

        require(bool(self._parts), "values", 0, "need at least 1 sample")
        parts = [self._parts[number] for number in sorted(self._parts)]
        scores = [np.exp(negentropy / n + entr(total / n).sum()) for n, negentropy, total in parts]
        return float(np.mean(scores)), float(np.std(scores))


def _part_of(sizes: int | list[int], numbers: np.ndarray) -> np.ndarray:
    """The part of each value, by its index among all; `sizes`: as of InceptionScore."""
    return numbers // sizes if isinstance(sizes, int) else np.searchsorted(np.cumsum(sizes), numbers, side="right")


def inception_score(values: np.ndarray, splits: int = 10, *, probabilities: bool = False) -> tuple[float, float]:
    """Inception Score of values [num, classes] in `splits` consecutive parts; see InceptionScore.

    Returns:
      Mean and standard deviation over the parts.
    """
    values = _features("values", values)
    require_number("splits", splits, 1, len(values))
    bounds = [i * len(values) // splits for i in range(splits + 1)]
    score = InceptionScore(np.diff(bounds).tolist(), probabilities=probabilities)
    score.update(values)
    return score.result()


BLOCK = 1024
"""Samples of one set that are compared with the whole other set at once."""


def _squared_distances(a, b):
    """Between rows, [m, dim] and [n, dim] to [m, n]."""
    product = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1) - 2.0 * product, 0.0)


@functools.partial(jax.jit, static_argnames="num")
def _nearest(rows, features, num):
    """Squared distances from each of `rows` to the `num` nearest of `features`, ascending."""
    # Returned whole: XLA:CPU sorts all distances if only one column of the result is used.
    return -jax.lax.top_k(-_squared_distances(rows, features), num)[0]


@jax.jit
def _covered(rows, rows_radii, features, features_radii):
    """Which rows are within the radius of a feature, and which features within that of a row."""
    distances = _squared_distances(rows, features)
    return (distances <= features_radii).any(axis=1), (distances <= rows_radii[:, None]).any(axis=0)


def _blocks(x: np.ndarray, block: int, fill: float):
    """`x` in parts of `block` rows, the last one padded with `fill`, so that one program serves all."""
    for start in range(0, len(x), block):
        part = x[start : start + block]
        yield np.concatenate([part, np.full((block - len(part), *x.shape[1:]), fill, x.dtype)])


def _manifold(features: np.ndarray, k: int, block: int) -> np.ndarray:
    """Squared distance of every sample to its k-th neighbor, [num]."""
    block = min(block, len(features))
    on_device = jnp.asarray(features)
    # The nearest one is the sample itself.
    nearest = [jax.device_get(_nearest(rows, on_device, k + 1)) for rows in _blocks(features, block, 0.0)]
    return np.concatenate(nearest)[: len(features), k]


def lower_precision_recall(
    num_real: int, num_generated: int, dim: int, device: jax.Device, k: int = 3
) -> dict[str, jax.stages.Lowered]:
    """The larger programs of `precision_recall`, `radii` and `coverage`, to be compiled for a device."""

    def rows(num, *more):
        return jax.ShapeDtypeStruct((num, *more), jnp.float32, sharding=SingleDeviceSharding(device))

    most, block = max(num_real, num_generated), min(BLOCK, num_generated)
    return {
        "radii": _nearest.lower(rows(min(BLOCK, most), dim), rows(most, dim), k + 1),
        "coverage": _covered.lower(rows(block, dim), rows(block), rows(num_real, dim), rows(num_real)),
    }


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 3, block: int = BLOCK) -> dict[str, float]:
    """Improved precision and recall (arXiv 1904.06991), by distances in float32.

    A set's manifold is the union of balls around its samples that reach their k-th
    neighbor. Precision: generated samples in the manifold of the real ones; recall: the
    reverse.

    Args:
      real: [num_real, dim].
      generated: [num_generated, dim].
      k: neighbors, fewer than samples of either set.
      block: samples of one set that are compared with the whole other set at once.

    Returns:
      `precision`, `recall` and their harmonic mean, `f_score`.
    """
    real, generated = _pair(("real", "generated"), real, generated, np.float32)
    require_number("block", block, 1)
    require_number("k", k, 1, min(len(real), len(generated)) - 1)
    real_radii, generated_radii = _manifold(real, k, block), _manifold(generated, k, block)
    block = min(block, len(generated))
    real_on_device, real_covered, generated_covered = jnp.asarray(real), np.zeros(len(real), bool), []
    # Padding rows have a negative radius, which contains nothing.
    parts = zip(_blocks(generated, block, 0.0), _blocks(generated_radii, block, -1.0), strict=True)
    for rows, radii in parts:
        rows_covered, features_covered = jax.device_get(_covered(rows, radii, real_on_device, real_radii))
        generated_covered.append(rows_covered)
        real_covered |= features_covered
    precision = float(np.concatenate(generated_covered)[: len(generated)].mean())
    recall = float(real_covered.mean())
    f_score = 2.0 * precision * recall / max(precision + recall, 1e-5)
    return {"precision": precision, "recall": recall, "f_score": f_score}


def kernel_inception_distance(
    a: np.ndarray, b: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Kernel Inception Distance: unbiased squared MMD under the kernel (x . y / dim + 1)^3.

    Args:
      a, b: [num, dim]; subsets are drawn from each as torch-fidelity draws them.
      subsets: number of subsets.
      subset_size: samples in each, not more than in either set.
      seed: of the subsets.

    Returns:
      Mean and standard deviation over the subsets.
    """
    a, b = _pair(("a", "b"), a, b)
    require_number("subsets", subsets, 1)
    require_number("subset_size", subset_size, 2, min(len(a), len(b)))
    rng = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x, y = (z[rng.choice(len(z), subset_size, replace=False)] for z in (a, b))
        distances.append(_squared_mmd(x, y))
    return float(np.mean(distances)), float(np.std(distances))


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased estimate from the same number of samples of each, [num, dim]: without pairs of a sample with itself."""
    num = len(x)
    kernel = lambda u, v: (u @ v.T / u.shape[1] + 1.0) ** 3
    others = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
    return float(others / (num * (num - 1)) - 2.0 * kernel(x, y).mean())
