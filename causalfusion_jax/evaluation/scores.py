"""Scores of generated images against real ones."""

import numpy as np

from causalfusion_jax.data.pipeline import DataConfig, make_source
from causalfusion_jax.data.sources import digits
from causalfusion_jax.errors import require

MAX_SIDE = 16
"""Images are averaged down to this side before their pixels are compared."""


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the normal distributions fitted to two sets of features.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), by symmetric
    eigenvalues alone, so that singular covariances give no complex numbers.

    Args:
      a, b: features [num, dim], at least two of each.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0.0)).sum()
    mean = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return float(mean + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


def score(data: DataConfig, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores of generated images, by what they were trained on.

    Args:
      data: the training data.
      images: uint8 [num, height, width, channels].
      labels: int [num], the class each was asked for.

    Raises:
      InputError: images of another size, or fewer than two.
    """
    shape = (data.image_size, data.image_size, data.channels)
    require(images.shape[1:] == shape, "--samples", images.shape, f"images must be {shape}, as the run's")
    require(len(images) >= 2, "--samples", len(images), "need at least two images")
    pixels = images.astype(np.float64) / 127.5 - 1.0
    if data.source == "digits":
        return score_digits(pixels, labels)
    source = make_source(data)
    real = np.stack([shrink(source[i]["image"]) for i in range(len(source))])
    generated = np.stack([shrink(image) for image in pixels])
    return {"fd": frechet_distance(flatten(generated), flatten(real)), "fd_pixels": list(real.shape[1:])}


def score_digits(pixels: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`accuracy` and `fd` of digits [num, 8, 8, 1] in [-1, 1] against the held-out half."""
    from sklearn.svm import SVC

    real = digits("held_out")
    reader = SVC(gamma=0.05).fit(flatten(real.images), real.labels)
    return {
        "accuracy": float(np.mean(reader.predict(flatten(pixels)) == labels)),
        "fd": frechet_distance(flatten(pixels), flatten(real.images)),
    }


def flatten(images: np.ndarray) -> np.ndarray:
    """[num, ...] to [num, values]."""
    return images.reshape(len(images), -1)


def shrink(image: np.ndarray) -> np.ndarray:
    """Averages [side, side, channels] down to at most MAX_SIDE pixels a side."""
    side = image.shape[0]
    factor = -(-side // MAX_SIDE)
    kept = side // factor * factor
    blocks = image[:kept, :kept].reshape(kept // factor, factor, kept // factor, factor, -1)
    return blocks.mean(axis=(1, 3))
