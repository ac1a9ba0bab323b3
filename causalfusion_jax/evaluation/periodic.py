"""Evaluation during training: scores of images sampled from the averaged weights on the run's devices."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh

from causalfusion_jax.common import distributed
from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.data import scores
from causalfusion_jax.data.source import Source
from causalfusion_jax.evaluation import inception_metrics
from causalfusion_jax.metrics.registry import FEATURE_METRICS
from causalfusion_jax.sampling.conditions import default_condition
from causalfusion_jax.sampling.generation import SamplingJob, generate_images, image_shares
from causalfusion_jax.sampling.trained import make_autoencoder


def check_evaluation(config: ExperimentConfig) -> None:
    """Raises InputError if `config.evaluation` does not fit the data; reads no file."""
    evaluation, data = config.evaluation, config.data
    require(data.frames == 1, "config.evaluation.eval_every", evaluation.eval_every, "must be 0 for videos")
    allowed = "a model of latents is evaluated on images, which its autoencoder decodes"
    require(bool(evaluation.vae) or not data.latents, "config.evaluation.vae", evaluation.vae, allowed)
    if evaluation.needs_inception:
        return
    of_inception = [name for name, metric in FEATURE_METRICS.items() if metric.network == "inception"]
    allowed = f"compares pixels with those trained on; for latents give {' or '.join(of_inception)}"
    require(not data.latents, "config.evaluation.metric", evaluation.metric, allowed)
    known = _pixel_metrics(config)
    require(
        evaluation.metric in known,
        "config.evaluation.metric",
        evaluation.metric,
        f"cannot be measured of this model of source {data.source}; give"
        f" {' or '.join((*known, 'one that needs evaluation.inception'))}",
    )


def _pixel_metrics(config: ExperimentConfig) -> tuple[str, ...]:
    """Those of the source; without those that need classes if samples are unconditional."""
    conditional = config.knows_classes or config.text.is_on
    known = scores.pixel_metrics(config.data)
    return tuple(name for name, metric in known.items() if conditional or not metric.needs_classes)


class Evaluator:
    """Samples and scores images, with the same noise and conditions at every call.

    Args:
      config: all settings of the run.
      mesh: its devices; the averaged weights are replicated on them while they sample, and they
        share every batch. Each process scores the images of its own devices.
      source: the training data, for the prompts of a text-conditioned model; default: opened here.

    Raises:
      InputError: the settings do not fit, or a folder or file that they name is missing or wrong.
    """

    def __init__(self, config: ExperimentConfig, mesh: Mesh, source: Source | None = None):
        check_evaluation(config)
        self._config, self._mesh = config, mesh
        evaluation = config.evaluation
        self._inception = self._reference = self._decode = None
        if evaluation.vae:
            self._decode = make_autoencoder(evaluation.vae, config, "config.evaluation.vae").decode
        if evaluation.needs_inception:
            self._open_inception()
        condition, self._classes = default_condition(config, evaluation.num_images, source)
        seed, batch_size = config.train.seed, evaluation.sample_batch_size
        self._job = SamplingJob(config, config.sampling, condition, seed, batch_size, self._decode)

    def _open_inception(self) -> None:
        evaluation, metric = self._config.evaluation, self._config.evaluation.metric
        if evaluation.scored.reference:
            self._reference = inception_metrics.Reference("config.evaluation.reference", evaluation.reference)
        try:
            inception_metrics.check_counts("num_images", [metric], evaluation.num_images, self._reference)
        except InputError as error:
            raise error if error.field.startswith("config") else error.under("config.evaluation") from None
        self._inception = inception_metrics.Inception(
            "config.evaluation.inception",
            evaluation.inception,
            self._mesh.devices.ravel(),
            min(inception_metrics.BATCH_SIZE, evaluation.num_images),
        )
        if self._reference is not None:
            self._reference.prepare([metric], self._inception)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that comparable values share, as plain values."""
        evaluation, sampling = self._config.evaluation, self._config.sampling
        names = ("metric", "num_images", "inception", "reference", "vae")
        return {name: getattr(evaluation, name) for name in names} | {"sampling": repr(sampling)}

    def __call__(self, ema, between_batches: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Scores of the averaged weights; collective.

        Args:
          ema: the weights, sharded as in training.
          between_batches: called after each batch of samples, on all processes; may raise to end the evaluation.
        """
        if self._inception is None:
            images = generate_images(self._job, ema, progress=lambda done: between_batches())
            return distributed.on_primary(lambda: self._pixel_scores(images))
        collected = inception_metrics.Collected([self._config.evaluation.metric])
        numbers = collections.deque()

        def shares() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for share in image_shares(self._job, ema):
                between_batches()
                yield share

        def batches(size: int) -> Iterator[np.ndarray]:
            for part, images in _in_batches(shares(), size):
                numbers.append(part)
                yield images

        for features in self._inception.features(batches, collected.names):
            collected.add(features, numbers.popleft())
        whole = collected.of_all_processes()
        return distributed.on_primary(lambda: self._inception_score(whole))

    def _pixel_scores(self, images: np.ndarray) -> dict[str, float]:
        values = scores.score(self._config.data, images, self._classes)
        known = _pixel_metrics(self._config)
        return {name: value for name, value in values.items() if name in known}

    def _inception_score(self, collected: inception_metrics.Collected) -> dict[str, float]:
        metric = self._config.evaluation.metric
        return {metric: inception_metrics.compute([metric], collected, self._reference)[metric]}


def _in_batches(parts: Iterable[tuple[np.ndarray, np.ndarray]], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Image numbers and images, regrouped from parts of any size to batches of `size`, the last one smaller."""
    numbers, images = [], []
    for part in parts:
        numbers, images = [*numbers, part[0]], [*images, part[1]]
        while sum(map(len, numbers)) >= size:
            joined = np.concatenate(numbers), np.concatenate(images)
            yield joined[0][:size], joined[1][:size]
            numbers, images = [joined[0][size:]], [joined[1][size:]]
    if sum(map(len, numbers)):
        yield np.concatenate(numbers), np.concatenate(images)
