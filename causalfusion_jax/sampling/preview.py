"""Sample grids during training."""

from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from causalfusion_jax.common.pictures import frames_in_rows, make_grid
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.data.pipeline import Source
from causalfusion_jax.sampling.conditions import default_condition
from causalfusion_jax.sampling.generation import SamplingJob, generate_images


class Preview:
    """Samples the same images at every call, with the sampler of the commands.

    Args:
      config: all settings of the run.
      mesh: unused: the weights have it.
      source: the training data, for the prompts of a text-conditioned model.
    """

    def __init__(self, config: ExperimentConfig, mesh: Mesh, source: Source):
        del mesh  # The weights are on it.
        condition, _ = default_condition(config, config.logging.num_samples, source)
        self._job = SamplingJob(config, config.sampling, condition, config.train.seed)

    def __call__(self, ema, between_batches: Callable[[], None] = lambda: None) -> np.ndarray:
        """Draws a grid of samples, uint8 [height, width, channels]; collective.

        Args:
          ema: the averaged weights, with their placement in training.
          between_batches: called after each batch of samples, on all processes; may raise to end the preview.
        """
        images = generate_images(self._job, ema, progress=lambda done: between_batches())
        classes = self._job.config.data.num_classes
        columns = classes if classes <= 20 else 8
        return make_grid(*frames_in_rows(images, columns))
