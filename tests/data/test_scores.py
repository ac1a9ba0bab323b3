"""Scores against known values."""

import numpy as np
import pytest
import scipy.linalg

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.pictures import to_uint8
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.digits import digits, score_digits
from causalfusion_jax.data.scores import score, shrink
from causalfusion_jax.metrics.distribution import frechet_distance


def test_frechet_distance_by_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)), 1 + rng.normal(size=(300, 6))
    covs = [np.cov(x, rowvar=False) for x in (a, b)]
    cross = scipy.linalg.sqrtm(covs[0] @ covs[1]).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covs[0] + covs[1] - 2 * cross)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-8)
    assert abs(frechet_distance(a, a)) < 1e-8
    np.testing.assert_allclose(frechet_distance(a, a + 2), 6 * 4, rtol=1e-8)


def test_frechet_distance_of_singular_covariances():
    rng = np.random.default_rng(0)
    flat = np.concatenate([rng.normal(size=(50, 3)), np.zeros((50, 20))], axis=1)
    assert abs(frechet_distance(flat, flat)) < 1e-8
    assert np.isfinite(frechet_distance(flat[:5], flat))


def test_real_digits_against_real_digits():
    train = digits("train")
    real = score_digits(train.images, train.labels)
    assert abs(real["fd"] - 0.29) < 0.01 and real["accuracy"] > 0.97
    quantized = score(DataConfig(), to_uint8(train.images), train.labels)
    np.testing.assert_allclose(quantized["fd"], real["fd"], atol=0.01)
    wrong = score(DataConfig(), to_uint8(train.images), (train.labels + 1) % 10)
    assert wrong["accuracy"] < 0.05
    noise = np.random.default_rng(0).uniform(-1, 1, (500, 8, 8, 1))
    assert score_digits(noise, np.arange(500) % 10)["fd"] > 10


def test_images_of_another_size_are_refused():
    with pytest.raises(InputError, match="must be"):
        score(DataConfig(), np.zeros((4, 16, 16, 1), np.uint8), np.zeros(4, int))


def test_shrink():
    image = np.arange(32 * 32 * 3, dtype=float).reshape(32, 32, 3)
    small = shrink(image)
    assert small.shape == (16, 16, 3)
    np.testing.assert_allclose(small[0, 0], image[:2, :2].mean(axis=(0, 1)))
    np.testing.assert_array_equal(shrink(small), small)
