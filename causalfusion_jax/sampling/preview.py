"""Sample grids during training."""

from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from causalfusion_jax.common.pictures import frames_in_rows, make_grid
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.data.source import Source
from causalfusion_jax.sampling.conditions import make_conditions
from causalfusion_jax.sampling.generation import generate_images


class Preview:
    """Samples the same images at every call, with the sampler of the commands.

    Args:
      config: all settings of the run.
      mesh: unused: the weights have it.
      source: the training data, for the prompts of a text-conditioned model.
    """

    def __init__(self, config: ExperimentConfig, mesh: Mesh, source: Source):
        del mesh
        self._config, self._conditions = config, make_conditions(config, config.logging.num_samples, source)

    def __call__(self, ema, between_batches: Callable[[], None] = lambda: None) -> np.ndarray:
        """Draws a grid of samples, uint8 [height, width, channels]; collective.

        Args:
          ema: the averaged weights, with their placement in training.
          between_batches: called after each batch of samples, on all processes; may raise to end the preview.
        """
        config = self._config
        images = generate_images(
            config,
            config.sampling,
            ema,
            self._conditions.labels,
            config.train.seed,
            progress=lambda done: between_batches(),
            text=self._conditions.text,
        )
        columns = config.data.num_classes if config.data.num_classes <= 20 else 8
        return make_grid(*frames_in_rows(images, columns))
