"""What images are sampled for while a model trains: classes and prompts, as the model was trained with them."""

from typing import NamedTuple

import numpy as np

from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.data.captions import example_prompts
from causalfusion_jax.data.registry import make_source
from causalfusion_jax.data.source import Source
from causalfusion_jax.sampling.images import balanced_labels


class Conditions(NamedTuple):
    """The condition of each image.

    Attributes:
      labels: int32 [num], as the model is given them; num_classes stands for no class.
      text: prompts, int32 [num, T]; None for a model without text.
      classes: int32 [num], what each image should show, by its label or prompt; num_classes: anything.
    """

    labels: np.ndarray
    text: np.ndarray | None
    classes: np.ndarray


def make_conditions(config: ExperimentConfig, num: int, source: Source | None = None) -> Conditions:
    """All classes in turn, or for a model of text, captions of examples all over the training data.

    Args:
      config: all settings of the run.
      num: number of images.
      source: the training data with captions, for a model of text; default: opened here.
    """
    if config.text.is_on:
        source = make_source(config.data, captions=True) if source is None else source
        text, classes = example_prompts(source, config.text, num)
        labels = np.full_like(classes, config.data.num_classes) if config.drops_classes else classes
        return Conditions(labels, text, classes)
    labels = balanced_labels(num, config.data.num_classes)
    labels = labels if config.knows_classes else np.full_like(labels, config.data.num_classes)
    return Conditions(labels, None, labels)
