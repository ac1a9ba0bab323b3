"""Settings of the evaluation during training."""

import dataclasses

from causalfusion_jax.common.errors import require, require_number
from causalfusion_jax.data.scores import INCEPTION_METRICS, WITHOUT_REFERENCE, check_metrics


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during training: images from the averaged weights, scored.

    Attributes:
      eval_every: steps between evaluations; 0 is none. The last step is always evaluated.
      metric: what is logged, and what the best checkpoint is best in: a pixel metric of the source
        (`pixel_metrics`), or with `inception` fid, sfid, inception_score, precision, recall or kid.
      num_images: images sampled as `config.sampling` says, by the run's seed: all classes in turn,
        or for a model of text, captions of examples all over the training data.
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
                bool(self.reference) or not needs_reference,
                "reference",
                self.reference,
                f"metric {self.metric} needs it",
            )
