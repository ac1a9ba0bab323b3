"""Settings of the evaluation during training."""

import dataclasses

from causalfusion_jax.common.errors import require, require_number, require_one_of
from causalfusion_jax.data.scores import metrics
from causalfusion_jax.metrics.registry import Metric


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during training: scores of images sampled from the averaged weights.

    Attributes:
      eval_every: steps between evaluations; 0: none. The last step is always evaluated.
      metric: the metric that is logged and that selects the best checkpoint: a metric of the
        source's pixels (`data.scores.pixel_metrics`), or with `inception` one of
        `metrics.registry.FEATURE_METRICS` that is of images.
      num_images: images sampled with `config.sampling` and the run's seed: all classes in turn, or
        for a text-conditioned model, captions of examples spread over the training data.
      sample_batch_size: images sampled at a time, over all devices.
      inception: folder of the converted Inception.
      reference: .npz of reference statistics, as written by `evaluate --make_reference`.
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
        require_one_of("metric", self.metric, [name for name, metric in metrics().items() if not metric.of_videos])
        require_number("num_images", self.num_images, 2)
        require_number("sample_batch_size", self.sample_batch_size, 1)
        if self.eval_every and self.scored.network:
            needs_it = f"metric {self.metric} needs it"
            require(bool(self.inception), "inception", self.inception, needs_it)
            require(bool(self.reference) or not self.scored.reference, "reference", self.reference, needs_it)

    @property
    def scored(self) -> Metric:
        """The entry of `metric`."""
        return metrics()[self.metric]

    @property
    def needs_inception(self) -> bool:
        """Whether `metric` is of Inception's features."""
        return self.scored.network == "inception"
