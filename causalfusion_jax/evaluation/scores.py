"""Scores of generated images against real ones."""

import functools

import numpy as np

from causalfusion_jax.common.errors import require
from causalfusion_jax.data.pipeline import DataConfig, make_source
from causalfusion_jax.data.scores import OF_CLASSES
from causalfusion_jax.data.sources import digits
from causalfusion_jax.evaluation.pairs import score_pairs
from causalfusion_jax.evaluation.tracking import digit_reader, score_moving_digits
from causalfusion_jax.metrics.distribution import FeatureStatistics, frechet_from_statistics

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
      images: uint8 [num, (frames,) height, width, channels]; videos of any length.
      labels: int [num], the class each was asked for; `data.num_classes`: none, so that what compares
        images with their classes is left out.

    Raises:
      InputError: images of another size, fewer than two, or videos without scores; latents; nothing
        to measure of images of no class.
    """
    require(
        not data.latents and (data.frames == 1 or data.source == "moving_digits"),
        "--workdir",
        data.source,
        "was not trained on images, which alone are compared pixel by pixel",
    )
    shape = data.shape[-3:]
    fits = images.shape[-3:] == shape and images.ndim == 4 + (data.frames > 1)
    kind = "videos" if data.frames > 1 else "images"
    require(fits, "--samples", images.shape, f"must be {kind} of {shape}, as the run's")
    require(data.frames > 1 or len(images) >= 2, "--samples", len(images), "need at least two images")
    found = _score(data, images, labels)
    if np.any(labels == data.num_classes):
        found = {name: value for name, value in found.items() if name not in OF_CLASSES}
        require(
            bool(found),
            "--samples",
            f"class {data.num_classes}",
            f"images of source {data.source} are scored by their classes or prompts, and these have none",
        )
    return found


def _score(data: DataConfig, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`score` of samples that fit the data."""
    if data.source == "moving_digits":
        return score_moving_digits(images, labels, data.frames)
    pixels = images.astype(np.float64) / 127.5 - 1.0
    if data.source == "digits":
        return score_digits(pixels, labels)
    if data.source == "digit_pairs":
        return score_pairs(pixels, labels)
    real = training_pixels(data)
    generated = np.stack([shrink(image) for image in pixels])
    return {"fd": frechet_distance(flatten(generated), flatten(real)), "fd_pixels": list(real.shape[1:])}


@functools.lru_cache(maxsize=1)
def training_pixels(data: DataConfig) -> np.ndarray:
    """All training images, shrunk; read once."""
    source = make_source(data)
    return np.stack([shrink(source[i]["image"]) for i in range(len(source))])


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
