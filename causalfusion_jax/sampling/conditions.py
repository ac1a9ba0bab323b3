"""Default conditions: of previews, of evaluation, and of programs that are compiled ahead."""

import jax
import numpy as np

from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.data.captions import example_prompts
from causalfusion_jax.data.registry import make_source
from causalfusion_jax.data.source import Source


def balanced_labels(num: int, num_classes: int) -> np.ndarray:
    """`num` labels, all classes in turn; int32 [num]."""
    return (np.arange(num) % num_classes).astype(np.int32)


def default_labels(config: ExperimentConfig, num: int) -> np.ndarray:
    """All classes in turn, or no class for a model that was trained without; int32 [num]."""
    labels = balanced_labels(num, config.data.num_classes)
    return labels if config.knows_classes else np.full_like(labels, config.data.num_classes)


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
    if config.text.is_on:
        source = make_source(config.data, captions=True) if source is None else source
        text, classes = example_prompts(source, config.text, num)
        labels = np.full_like(classes, config.data.num_classes) if config.drops_classes else classes
        return Condition(labels, text), classes
    labels = default_labels(config, num)
    return Condition(labels), labels


def condition_shapes(config: ExperimentConfig, num: int) -> Condition:
    """Shapes and types of the condition of `num` images."""
    text = jax.ShapeDtypeStruct((num, config.text.max_tokens), np.int32) if config.text.is_on else None
    return Condition(jax.ShapeDtypeStruct((num,), np.int32), text)
