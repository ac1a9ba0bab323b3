"""What can be measured, which way is better, and when training does it."""

import dataclasses
import math
from collections.abc import Iterable

from causalfusion_jax.errors import require, require_number, require_one_of

PIXEL_METRICS = ("fd", "accuracy")
"""Of `evaluation.scores`: against the training data; accuracy for digits alone."""
INCEPTION_METRICS = ("fid", "sfid", "inception_score", "precision", "recall", "kid")
"""Of `evaluation.inception_metrics`: they need a converted Inception."""
METRICS = (*PIXEL_METRICS, *INCEPTION_METRICS)
"""Those that training can evaluate."""
VIDEO_METRICS = ("fvd",)
"""Of `evaluation.video_metrics`: they need a converted I3D."""
WITHOUT_REFERENCE = ("inception_score",)
OF_REFERENCE_IMAGES = ("precision", "recall", "kid")
"""Compare images with images, where the others compare statistics."""
HIGHER_IS_BETTER = ("accuracy", "inception_score", "precision", "recall")


def is_better(metric: str, value: float, best: float) -> bool:
    """Whether `value` beats `best`. A value that is not a number beats nothing, and any number beats it."""
    if math.isnan(best):
        return not math.isnan(value)
    return value > best if metric in HIGHER_IS_BETTER else value < best


def check_metrics(field: str, names: Iterable[str], known: Iterable[str] = METRICS) -> None:
    """Raises InputError for a metric that is not known; suggests the nearest."""
    for name in names:
        require_one_of(field, name, known)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during training: images from the averaged weights, scored.

    Attributes:
      eval_every: steps between evaluations; 0 is none. The last step is always evaluated.
      metric: what is logged, and what the best checkpoint is best in: `fd` (pixels against
        the training data) or `accuracy` (digits), or with `inception` fid, sfid,
        inception_score, precision, recall or kid.
      num_images: images sampled, all classes in turn, as `config.sampling` says, by the
        run's seed.
      sample_batch_size: images sampled at a time, over all devices.
      inception: folder of the converted Inception.
      reference: .npz of reference statistics, as of `evaluate --make_reference`.
      vae: folder of the converted autoencoder, for a model of latents.
    """

    eval_every: int = 0
    metric: str = "fd"
    num_images: int = 1000
    sample_batch_size: int = 250
    inception: str = ""
    reference: str = ""
    vae: str = ""

    def __post_init__(self):
        require_number("eval_every", self.eval_every, 0)
        check_metrics("metric", [self.metric])
        require_number("num_images", self.num_images, 2)
        require_number("sample_batch_size", self.sample_batch_size, 1)
        if self.eval_every and self.metric in INCEPTION_METRICS:
            require(bool(self.inception), "inception", self.inception, f"metric {self.metric} needs it")
            needs_reference = self.metric not in WITHOUT_REFERENCE
            require(
                bool(self.reference) or not needs_reference, "reference", self.reference,
                f"metric {self.metric} needs it",
            )
