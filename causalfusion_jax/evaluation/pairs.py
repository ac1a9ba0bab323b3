"""What pairs of digits show, read by a classifier that has seen other digits only."""

import numpy as np

from causalfusion_jax.common.errors import require
from causalfusion_jax.data.digit_pairs import DigitPairsSource
from causalfusion_jax.evaluation.tracking import digit_reader


def read_pairs(pixels: np.ndarray) -> np.ndarray:
    """Digits left and right of images [num, 8, 16, 1] in [-1, 1]; int [num, 2]."""
    halves = np.split(pixels, 2, axis=2)
    return np.stack([digit_reader().predict(half.reshape(len(half), -1)) for half in halves], axis=1)


def labels_of_prompts(prompts: list[str]) -> np.ndarray:
    """The pair that each prompt names; int [num]. Raises InputError for one that names none."""
    known = {name: label for label, name in enumerate(DigitPairsSource.class_names)}
    for prompt in prompts:
        require(prompt in known, "prompts", prompt, 'must be two digits in words: "three seven"')
    return np.array([known[prompt] for prompt in prompts])


def score_pairs(pixels: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Shares of images whose digits are read as asked for: `accuracy` (both), `left`, `right`.

    Args:
      pixels: [num, 8, 16, 1] in [-1, 1].
      labels: int [num], ten times the left digit plus the right one.
    """
    right = read_pairs(pixels) == np.stack([labels // 10, labels % 10], axis=1)
    return {
        "accuracy": float(right.all(axis=1).mean()),
        "left": float(right[:, 0].mean()),
        "right": float(right[:, 1].mean()),
    }
