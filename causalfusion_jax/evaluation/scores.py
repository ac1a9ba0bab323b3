"""Scores of generated images against real ones."""

import numpy as np

from causalfusion_jax.data.pipeline import DataConfig, make_source
from causalfusion_jax.data.sources import digits
from causalfusion_jax.errors import require
from causalfusion_jax.evaluation.distribution import FeatureStatistics, frechet_from_statistics
from causalfusion_jax.evaluation.pairs import digit_reader, score_pairs

MAX_SIDE = 16
"""Images are averaged down to this side before their pixels are compared."""


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the normal distributions fitted to two sets of features.

    Args:
      a, b: features [num, dim], at least two of each.
    """
    a, b = FeatureStatistics.of(a), FeatureStatistics.of(b)
    return frechet_from_statistics(a.mean, a.cov, b.mean, b.cov)


def score(data: DataConfig, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores of generated images, by what they were trained on.

    Args:
      data: the training data.
      images: uint8 [num, height, width, channels].
      labels: int [num], the class each was asked for.

    Raises:
      InputError: images of another size, or fewer than two.
    """
    shape = data.shape
    require(images.shape[1:] == shape, "--samples", images.shape, f"images must be {shape}, as the run's")
    require(len(images) >= 2, "--samples", len(images), "need at least two images")
    pixels = images.astype(np.float64) / 127.5 - 1.0
    if data.source == "digits":
        return score_digits(pixels, labels)
    if data.source == "digit_pairs":
        return score_pairs(pixels, labels)
    source = make_source(data)
    real = np.stack([shrink(source[i]["image"]) for i in range(len(source))])
    generated = np.stack([shrink(image) for image in pixels])
    return {"fd": frechet_distance(flatten(generated), flatten(real)), "fd_pixels": list(real.shape[1:])}


def score_digits(pixels: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`accuracy` and `fd` of digits [num, 8, 8, 1] in [-1, 1] against the held-out half."""
    real = digits("held_out")
    return {
        "accuracy": float(np.mean(digit_reader().predict(flatten(pixels)) == labels)),
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
