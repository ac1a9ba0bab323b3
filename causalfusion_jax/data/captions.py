"""Captions of a source's examples, as tokens."""

import functools

import grain
import numpy as np

from causalfusion_jax.data.tokenizers import TextConfig, to_slots
from causalfusion_jax.errors import InputError, require


def tokenize(example: dict, rng: np.random.Generator, *, config: TextConfig) -> dict[str, np.ndarray]:
    """An example with `text`, int32 [max_tokens], in place of `caption`.

    Of several captions one is drawn, anew each epoch. Raises InputError where there is none.
    """
    example = dict(example)
    caption = example.pop("caption", None)
    if isinstance(caption, (list, tuple, np.ndarray)):
        caption = caption[rng.integers(len(caption))] if len(caption) else None
    require(isinstance(caption, (str, bytes)), "caption", caption, "an example has no caption")
    caption = caption.decode() if isinstance(caption, bytes) else str(caption)
    return {**example, "text": to_slots(config, caption, cut=True)}


def with_text(dataset: grain.MapDataset, config: TextConfig) -> grain.MapDataset:
    """`dataset` of examples with captions as one of examples with text."""
    return dataset.random_map(functools.partial(tokenize, config=config))


def without_caption(example: dict) -> dict:
    """An example for a model that knows no text."""
    return {name: value for name, value in example.items() if name != "caption"}


def check_captions(source, config: TextConfig) -> None:
    """Raises InputError where a source gives no captions, or the tokenizer cannot read the first."""
    require(
        "caption" in source[0], "data.source", type(source).__name__,
        "gives no captions, which text.tokenizer other than none needs",
    )
    try:
        tokenize(source[0], np.random.default_rng(0), config=config)
    except InputError as error:
        raise InputError("data.source", type(source).__name__, f"first caption: {error}") from None
