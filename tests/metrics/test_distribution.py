"""Metrics of feature distributions against plain loops."""

import numpy as np
import pytest

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.metrics.distribution import (
    FeatureStatistics,
    InceptionScore,
    frechet_from_statistics,
    inception_score,
    kernel_inception_distance,
    precision_recall,
)


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    # Far from zero, where sums of squares would cancel.
    return 1e4 + rng.normal(size=(101, 6)) @ rng.normal(size=(6, 6))


def assert_statistics(statistics, features):
    assert statistics.count == len(features)
    np.testing.assert_allclose(statistics.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.cov, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bounds", [(), (1, 2, 50), (40,)], ids=str)
def test_statistics_of_batches_are_those_of_the_whole(features, bounds):
    statistics = FeatureStatistics(6)
    for batch in np.split(features, bounds):
        statistics.update(batch)
    assert_statistics(statistics, features)


def test_statistics_merge(features):
    a, b = FeatureStatistics.of(features[:30]), FeatureStatistics.of(features[30:])
    a.merge(b)
    assert_statistics(a, features)
    assert_statistics(b, features[30:])
    a.merge(FeatureStatistics(6))
    assert_statistics(a, features)
    empty = FeatureStatistics(6)
    empty.merge(a)
    assert_statistics(empty, features)


def test_frechet_of_known_normals():
    # Covariances that commute: sum of (root_a - root_b)^2 over their common axes.
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    variances = np.array([1.0, 4.0, 0.0]), np.array([9.0, 4.0, 1.0])
    covs = [axes * variance @ axes.T for variance in variances]
    distance = frechet_from_statistics(np.zeros(3), covs[0], np.full(3, 2.0), covs[1])
    np.testing.assert_allclose(distance, 3 * 4 + (1 - 3) ** 2 + 0 + 1, rtol=1e-6)


def test_score_of_several_processes_has_the_parts_of_one():
    """Parts are consecutive values, whichever process has seen them."""
    logits, numbers = np.random.default_rng(0).normal(size=(23, 4)), np.arange(23)
    whole, merged = InceptionScore(5), InceptionScore(5)
    whole.update(logits)
    for process in range(3):
        score = InceptionScore(5)
        for number in numbers[process::3]:
            score.update(logits[number : number + 1], np.array([number]))
        merged.merge_arrays(score.to_arrays())
    merged.merge_arrays(InceptionScore(5).to_arrays())
    np.testing.assert_allclose(merged.result(), whole.result(), rtol=1e-12)
    assert whole.result()[1] > 0


def test_inception_score_of_known_probabilities():
    certain = np.eye(4)[np.arange(40) % 4]
    assert inception_score(certain, splits=10, probabilities=True) == pytest.approx((4.0, 0.0))
    np.testing.assert_allclose(inception_score(np.ones((40, 4)), splits=3), (1.0, 0.0), atol=1e-12)
    logits = np.random.default_rng(0).normal(size=(23, 5))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = []
    for part in (p[:7], p[7:15], p[15:]):
        divergences = [sum(x * np.log(x / q) for x, q in zip(row, part.mean(axis=0), strict=True)) for row in part]
        scores.append(np.exp(np.mean(divergences)))
    expected = np.mean(scores), np.std(scores)
    np.testing.assert_allclose(inception_score(logits, splits=3), expected, rtol=1e-10)
    np.testing.assert_allclose(inception_score(p, splits=3, probabilities=True), expected, rtol=1e-10)


def plain_precision_recall(real, generated, k):

    def coverage(balls, points):
        covered = 0
        for point in points:
            for center in balls:
                radius = sorted(np.sum((center - other) ** 2) for other in balls)[k]
                if np.sum((center - point) ** 2) <= radius:
                    covered += 1
                    break
        return covered / len(points)

    return coverage(real, generated), coverage(generated, real)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("integers", [False, True], ids=["normal", "with_ties"])
def test_precision_recall_by_loops(k, integers):
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(31, 3)), 1.0 + 0.8 * rng.normal(size=(26, 3))
    if integers:
        real, generated = np.round(2 * real), np.round(2 * generated)
    precision, recall = plain_precision_recall(real, generated, k)
    assert 0 < recall < 1 and 0 < precision < 1
    for block in (1, 7, 26, 1000):
        ours = precision_recall(real, generated, k, block=block)
        np.testing.assert_allclose((ours["precision"], ours["recall"]), (precision, recall), rtol=1e-12)
        np.testing.assert_allclose(ours["f_score"], 2 / (1 / precision + 1 / recall), rtol=1e-12)


def test_precision_recall_of_extremes():
    x = np.random.default_rng(0).normal(size=(20, 4))
    assert precision_recall(x, x) == {"precision": 1.0, "recall": 1.0, "f_score": 1.0}
    assert precision_recall(x, x[:9])["precision"] == 1.0
    assert precision_recall(x, x + 100) == {"precision": 0.0, "recall": 0.0, "f_score": 0.0}


def plain_squared_mmd(x, y):
    kernel = lambda u, v: (np.dot(u, v) / len(u) + 1) ** 3
    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(n)]
    within = sum(kernel(z[i], z[j]) for z in (x, y) for i, j in pairs if i != j)
    return within / (n * (n - 1)) - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / n**2


def test_kernel_inception_distance_by_loops():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(12, 5)), 0.5 + rng.normal(size=(12, 5))
    mean, std = kernel_inception_distance(a, b, subsets=3, subset_size=12, seed=1)
    # The subsets are all samples in another order.
    np.testing.assert_allclose(mean, plain_squared_mmd(a, b), rtol=1e-10)
    assert std < 1e-12


def test_kernel_inception_distance_draws_subsets():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 5)), rng.normal(size=(50, 5))
    draws = np.random.RandomState(7)
    distances = []
    for _ in range(4):
        x = a[draws.choice(60, 10, replace=False)]
        y = b[draws.choice(50, 10, replace=False)]
        distances.append(plain_squared_mmd(x, y))
    ours = kernel_inception_distance(a, b, subsets=4, subset_size=10, seed=7)
    np.testing.assert_allclose(ours, (np.mean(distances), np.std(distances)), rtol=1e-10)
    assert ours != kernel_inception_distance(a, b, subsets=4, subset_size=10, seed=8)


X = np.random.default_rng(0).normal(size=(5, 3))


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: FeatureStatistics(3).update(X[:, :2]), "features"),
        (lambda: FeatureStatistics.of(X[0]), "features"),
        (lambda: FeatureStatistics.of(X[:0]), "features"),
        (lambda: FeatureStatistics.of(X * np.nan), "features"),
        (lambda: FeatureStatistics.of(X[:1]).cov, "features"),
        (lambda: frechet_from_statistics(X[0], np.eye(3), X[0, :2], np.eye(2)), "mean_b"),
        (lambda: frechet_from_statistics(X[0], np.eye(3), X[0], np.eye(2)), "cov_b"),
        (lambda: inception_score(X[:1]), "values"),
        (lambda: inception_score(X, splits=6), "splits"),
        (lambda: inception_score(X, splits=1, probabilities=True), "values"),
        (lambda: precision_recall(X, X[:1], k=1), "generated"),
        (lambda: precision_recall(X, X[:, :2]), "generated"),
        (lambda: precision_recall(X, X[:3], k=3), "k"),
        (lambda: precision_recall(X, X, block=0), "block"),
        (lambda: kernel_inception_distance(X[0], X), "a"),
        (lambda: kernel_inception_distance(X, X, subset_size=6), "subset_size"),
        (lambda: kernel_inception_distance(X, X[:, :2], subset_size=3), "b"),
    ],
)
def test_bad_inputs_are_refused(call, field):
    with pytest.raises(InputError) as error:
        call()
    assert error.value.field == field
