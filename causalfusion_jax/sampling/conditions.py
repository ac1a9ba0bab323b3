"""Conditions of the images that are sampled while a model trains."""

import numpy as np

from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.data.captions import example_prompts
from causalfusion_jax.data.pipeline import Source, make_source


def balanced_labels(num: int, num_classes: int) -> np.ndarray:
    """`num` labels, all classes in turn; int32 [num]."""
    return (np.arange(num) % num_classes).astype(np.int32)


def default_condition(config: ExperimentConfig, num: int, source: Source | None = None) -> tuple[Condition, np.ndarray]:
    """All classes in turn, or for a text-conditioned model, captions of examples spread over the training data.

    Args:
      config: all settings of the run.
      num: number of images.
      source: the training data with captions, for a text-conditioned model; default: opened here.

    Returns:
      The condition of `num` images, without a class where the model drops classes beside texts or
      knows none; and the class that each image should show, int32 [num]; num_classes: any.
    """
    no_class = config.data.num_classes
    if config.text.is_on:
        source = make_source(config.data, captions=True) if source is None else source
        text, classes = example_prompts(source, config.text, num)
        return Condition(np.full_like(classes, no_class) if config.drops_classes else classes, text), classes
    labels = balanced_labels(num, no_class)
    labels = labels if config.knows_classes else np.full_like(labels, no_class)
    return Condition(labels), labels
