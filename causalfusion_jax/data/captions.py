"""Captions of a source's examples, as tokens."""

import functools
from typing import Any

import grain
import numpy as np

from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.data.records import CorruptRecord
from causalfusion_jax.data.tokenizers import TextConfig, to_slots


def tokenize(example: dict[str, Any], config: TextConfig) -> dict[str, Any]:
    """An example with `text`, int32 [max_tokens], instead of `caption`. Raises InputError without a caption."""
    caption = example.get("caption")
    require(isinstance(caption, str), "caption", caption, "an example has no caption")
    others = {name: value for name, value in example.items() if name != "caption"}
    return {**others, "text": to_slots(config, caption, cut=True)}


def with_text(dataset: grain.MapDataset, config: TextConfig) -> grain.MapDataset:
    """`dataset` of examples with captions as one of examples with text."""
    return dataset.map(functools.partial(tokenize, config=config))


def check_captions(source, config: TextConfig) -> None:
    """Raises InputError if a source's first readable example has no caption that the tokenizer can read."""
    example = _readable(source, 0)
    try:
        tokenize(example, config)
    except InputError as error:
        raise InputError("config.data.source", type(source).__name__, f"first example: {error}") from None


def example_prompts(source, config: TextConfig, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts and labels of `num` evenly spaced examples: prompts for sampling during training.

    Returns:
      text: int32 [num, max_tokens].
      label: int32 [num].
    """
    indices = np.arange(num) * len(source) // num
    examples = [tokenize(_readable(source, int(index)), config) for index in indices]
    return np.stack([example["text"] for example in examples]), np.array([e["label"] for e in examples], np.int32)


def _readable(source, index: int) -> dict[str, Any]:
    """Example `index`, or the next one that is not corrupt. Raises CorruptRecord if all are."""
    for candidate in range(index, index + len(source)):
        try:
            return source[candidate % len(source)]
        except CorruptRecord as error:
            corrupt = error
    raise corrupt
