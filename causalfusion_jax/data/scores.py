"""What can be measured, which way is better, and when training does it."""

import math
from collections.abc import Iterable

from causalfusion_jax.common.errors import require_one_of
from causalfusion_jax.data.pipeline import DataConfig

PIXEL_METRICS_OF = {
    "digits": ("fd", "accuracy"),
    "digit_pairs": ("accuracy", "left", "right"),
    "moving_digits": ("accuracy", "motion_error", "accuracy_beyond", "motion_error_beyond"),
}
"""What `evaluation.scores` measures against the training data, by source; of images of all others, `fd`."""
PIXEL_METRICS = ("fd", *dict.fromkeys(name for names in PIXEL_METRICS_OF.values() for name in names if name != "fd"))
OF_CLASSES = ("accuracy", "accuracy_beyond", "left", "right")
"""Pixel metrics that compare an image with the class it was sampled for."""
INCEPTION_METRICS = ("fid", "sfid", "inception_score", "precision", "recall", "kid")
"""Of `evaluation.inception_metrics`: they need a converted Inception."""
METRICS = ("fd", "accuracy", "left", "right", *INCEPTION_METRICS)
"""Those of images, which training can evaluate."""
VIDEO_METRICS = ("fvd",)
"""Of `evaluation.video_metrics`: they need a converted I3D."""
WITHOUT_REFERENCE = ("inception_score",)
OF_REFERENCE_IMAGES = ("precision", "recall", "kid")
"""Compare images with images, where the others compare statistics."""
SCORES = (*PIXEL_METRICS, *INCEPTION_METRICS, *VIDEO_METRICS)
"""Everything that `evaluate` measures of samples; what else it reports (`num`, `frames`) says how."""
HIGHER_IS_BETTER = (*OF_CLASSES, "inception_score", "precision", "recall")
"""Of all other scores the lowest is best."""


def pixel_metrics(data: DataConfig) -> tuple[str, ...]:
    """What can be measured of samples against these training data, pixel by pixel; () for latents."""
    return () if data.latents else PIXEL_METRICS_OF.get(data.source, ("fd",) if data.frames == 1 else ())


def measurable(data: DataConfig) -> tuple[str, ...]:
    """All metrics of samples of a model of these data, the one to compare models by first."""
    return (*pixel_metrics(data), *(INCEPTION_METRICS if data.frames == 1 else VIDEO_METRICS))


def is_better(metric: str, value: float, best: float) -> bool:
    """Whether `value` beats `best`. A value that is not a number beats nothing, and any number beats it."""
    if math.isnan(best):
        return not math.isnan(value)
    return value > best if metric in HIGHER_IS_BETTER else value < best


def check_metrics(field: str, names: Iterable[str], known: Iterable[str] = METRICS) -> None:
    """Raises InputError for a metric that is not known; suggests the nearest."""
    for name in names:
        require_one_of(field, name, known)
