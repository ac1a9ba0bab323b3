"""Scores of samples against the training data, and the metrics that can be measured of samples."""

import functools
import math

import numpy as np

from causalfusion_jax.common.errors import require
from causalfusion_jax.data.image_files import scale_pixels
from causalfusion_jax.data.registry import SOURCES, make_source
from causalfusion_jax.data.source import DataSettings, PixelScores
from causalfusion_jax.metrics.distribution import frechet_distance
from causalfusion_jax.metrics.registry import FD, FEATURE_METRICS, Metric

MAX_SIDE = 16
"""Images are averaged down to this side before their pixels are compared."""


def shrink(image: np.ndarray) -> np.ndarray:
    """Averages [side, side, channels] down to at most MAX_SIDE pixels a side."""
    side = image.shape[0]
    factor = -(-side // MAX_SIDE)
    kept = side // factor * factor
    blocks = image[:kept, :kept].reshape(kept // factor, factor, kept // factor, factor, -1)
    return blocks.mean(axis=(1, 3))


@functools.lru_cache(maxsize=1)
def training_pixels(config: DataSettings) -> np.ndarray:
    """All training images, shrunk, [num, height, width, channels]; cached."""
    source = make_source(config)
    return np.stack([shrink(source[i]["image"]) for i in range(len(source))])


def _score_pixels(config: DataSettings, images: np.ndarray, labels: np.ndarray) -> dict:
    """`fd` of images against all training images."""
    real, generated = training_pixels(config), np.stack([shrink(image) for image in scale_pixels(images)])
    distance = frechet_distance(generated.reshape(len(generated), -1), real.reshape(len(real), -1))
    return {"fd": distance, "fd_pixels": list(real.shape[1:])}


TRAINING_PIXELS = PixelScores((FD,), _score_pixels)
"""Scores of images of sources that declare none."""


def _pixel_scores(config: DataSettings) -> PixelScores | None:
    """How samples of a model of these data are compared with the data; None for latents and most videos."""
    if config.latents:
        return None
    return SOURCES[config.source].scores or (TRAINING_PIXELS if config.frames == 1 else None)


def pixel_metrics(config: DataSettings) -> dict[str, Metric]:
    """Metrics of samples against these training data, pixel by pixel; none for latents."""
    scores = _pixel_scores(config)
    return {metric.name: metric for metric in scores.metrics} if scores else {}


def measurable(config: DataSettings) -> dict[str, Metric]:
    """All metrics of samples of a model of these data, the default one to compare models by first."""
    of_videos = config.frames > 1
    of_features = {name: metric for name, metric in FEATURE_METRICS.items() if metric.of_videos == of_videos}
    return pixel_metrics(config) | of_features


def metrics() -> dict[str, Metric]:
    """All metrics of samples: those of pixels, of every source, then those of features."""
    scores = (TRAINING_PIXELS, *(kind.scores for kind in SOURCES.values() if kind.scores))
    return {metric.name: metric for part in scores for metric in part.metrics} | FEATURE_METRICS


def higher_is_better(metric: str) -> bool:
    """Whether a higher value of the metric is better; False for names that are not metrics."""
    known = metrics()
    return metric in known and known[metric].higher_is_better


def is_better(metric: str, value: float, best: float) -> bool:
    """Whether `value` is better than `best`. NaN is worse than any number, and not better than NaN."""
    if math.isnan(best):
        return not math.isnan(value)
    return value > best if higher_is_better(metric) else value < best


def score(config: DataSettings, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores of samples against the training data.

    Args:
      config: settings of the training data.
      images: uint8 [num, (frames,) height, width, channels]; videos of any length.
      labels: int [num], the class that each was sampled for; `num_classes`: none, which leaves out
        metrics that need classes.

    Returns:
      Values of `pixel_metrics` by name, and values that say how they were measured.

    Raises:
      InputError: samples of another size, fewer than two images, or data without pixel scores;
        nothing to measure without classes.
    """
    scores = _pixel_scores(config)
    allowed = "was not trained on images, and only images are compared pixel by pixel"
    require(scores is not None, "--workdir", config.source, allowed)
    shape = config.shape[-3:]
    fits = images.shape[-3:] == shape and images.ndim == 4 + (config.frames > 1)
    samples = "videos" if config.frames > 1 else "images"
    require(fits, "--samples", images.shape, f"must be {samples} of {shape}, as the run's")
    require(config.frames > 1 or len(images) >= 2, "--samples", len(images), "need at least two images")
    values = scores.score(config, images, labels)
    if np.any(labels == config.num_classes):
        known = pixel_metrics(config)
        values = {name: value for name, value in values.items() if name not in known or not known[name].needs_classes}
        allowed = f"images of source {config.source} are scored by their classes or prompts, and these have none"
        require(bool(values), "--samples", f"class {config.num_classes}", allowed)
    return values
