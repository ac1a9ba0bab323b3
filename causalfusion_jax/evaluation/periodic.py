"""Evaluation during training: images from the averaged weights on the run's devices, scored."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from causalfusion_jax.errors import InputError, require
from causalfusion_jax.evaluation import inception_metrics, scores
from causalfusion_jax.evaluation.settings import INCEPTION_METRICS, WITHOUT_REFERENCE
from causalfusion_jax.experiment import ExperimentConfig
from causalfusion_jax.sampling.generation import generate_images, image_batches, replicate
from causalfusion_jax.sampling.images import balanced_labels
from causalfusion_jax.sampling.trained import make_autoencoder


class Evaluator:
    """Samples and scores, the same images at every call.

    Args:
      config: all settings of the run.
      mesh: its devices, which each hold the averaged weights whole while they sample, and
        share every batch.

    Raises:
      InputError: the settings do not fit, or a folder or file that they name is not what
        it must be.
    """

    def __init__(self, config: ExperimentConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        evaluation, data = config.evaluation, config.data
        self._inception = self._reference = self._decode = None
        if evaluation.vae:
            self._decode = make_autoencoder(evaluation.vae, config, "config.evaluation.vae").decode
        require(
            self._decode is not None or not data.latents, "config.evaluation.vae", evaluation.vae,
            "a model of latents is evaluated on the images that an autoencoder makes of them",
        )
        require(data.frames == 1, "config.evaluation.eval_every", evaluation.eval_every, "must be 0 for videos")
        if evaluation.metric in INCEPTION_METRICS:
            self._open_inception()
        else:
            require(
                not data.latents, "config.evaluation.metric", evaluation.metric,
                f"compares pixels with those trained on; for latents give {' or '.join(INCEPTION_METRICS)}",
            )
            require(
                evaluation.metric != "accuracy" or data.source == "digits", "config.evaluation.metric",
                evaluation.metric, "is of source digits; else give fd",
            )
        self._labels = balanced_labels(evaluation.num_images, data.num_classes)

    def _open_inception(self) -> None:
        evaluation, metric = self._config.evaluation, self._config.evaluation.metric
        if metric not in WITHOUT_REFERENCE:
            self._reference = inception_metrics.Reference("config.evaluation.reference", evaluation.reference)
        try:
            inception_metrics.check_counts("num_images", [metric], evaluation.num_images, self._reference)
        except InputError as error:
            raise error if error.field.startswith("config") else error.under("config.evaluation") from None
        self._inception = inception_metrics.Inception(
            "config.evaluation.inception", evaluation.inception, self._mesh.devices.ravel(),
            min(inception_metrics.BATCH_SIZE, evaluation.num_images),
        )
        if self._reference is not None:
            self._reference.prepare([metric], self._inception)

    @property
    def settings(self) -> dict[str, Any]:
        """What makes values comparable, as plain values."""
        evaluation, sampling = self._config.evaluation, self._config.sampling
        names = ("metric", "num_images", "inception", "reference", "vae")
        return {name: getattr(evaluation, name) for name in names} | {"sampling": repr(sampling)}

    def __call__(self, ema, between_batches: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Scores of the averaged weights, which lie as training has them; collective.

        Args:
          ema: the weights.
          between_batches: called after each batch of samples, on all processes; may raise to end the evaluation.
        """
        config, evaluation = self._config, self._config.evaluation
        params = replicate(ema, self._mesh.devices.ravel())
        sampled = (config, config.sampling, params, self._labels, config.train.seed, evaluation.sample_batch_size)
        if self._inception is None:
            images = generate_images(*sampled, progress=lambda done: between_batches(), decode=self._decode)
            found = scores.score(config.data, images, self._labels)
            return {name: value for name, value in found.items() if isinstance(value, float)}
        collected = inception_metrics.Collected([evaluation.metric])

        def batches(size: int) -> Iterator[np.ndarray]:
            for images in image_batches(*sampled, decode=self._decode):
                between_batches()
                yield from (images[i:i + size] for i in range(0, len(images), size))

        collected.add_all(self._inception.features(batches, collected.names))
        # The statistics are alike on all processes; the first one's numbers count.
        if jax.process_index() != 0:
            return {evaluation.metric: 0.0}
        found = inception_metrics.compute([evaluation.metric], collected, self._reference)
        return {evaluation.metric: found[evaluation.metric]}
