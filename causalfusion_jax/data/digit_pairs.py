"""Pairs of scikit-learn's digits side by side with captions ("three seven"), and their scores.

The classifier that reads generated pairs has seen other digits only.
"""

import functools

import numpy as np

from causalfusion_jax.common.errors import require, require_one_of
from causalfusion_jax.data.digits import BUILT_IN, SIDE, DigitsSource, digit_reader, digits
from causalfusion_jax.data.image_files import scale_pixels
from causalfusion_jax.data.source import HeldOutCaptions, PixelScores, SourceKind
from causalfusion_jax.metrics.registry import ACCURACY, Metric

WORDS = DigitsSource.class_names
HELD_OUT_PAIRS = tuple((left, (3 * left + 1) % 10) for left in range(10))
"""Pairs that are left out of training; every digit is in two of them, once on each side."""

SPLITS = ("train", "held_out", "held_out_digits")


class DigitPairsSource:
    """Every ordered pair of digits of one half, 8x16 grey images with a caption and a label.

    Args:
      split: `train`: the training half of the digits, in all pairs but HELD_OUT_PAIRS;
        `held_out`: the held-out half, in HELD_OUT_PAIRS only; `held_out_digits`: the held-out
        half, in all pairs.
      captions: examples have "caption" too.
    """

    num_classes = 100
    class_names = tuple(f"{left} {right}" for left in WORDS for right in WORDS)

    def __init__(self, split: str = "train", captions: bool = True):
        require_one_of("split", split, SPLITS)
        self._captions = captions
        self._digits = digits("train" if split == "train" else "held_out")
        self._indices_by_class = [np.flatnonzero(self._digits.labels == digit) for digit in range(10)]
        pairs = [(left, right) for left in range(10) for right in range(10)]
        held_out = [pair for pair in pairs if pair in HELD_OUT_PAIRS]
        trained = [pair for pair in pairs if pair not in HELD_OUT_PAIRS]
        self._pairs = {"train": trained, "held_out": held_out}.get(split, pairs)
        sizes = [len(self._indices_by_class[left]) * len(self._indices_by_class[right]) for left, right in self._pairs]
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict:
        number = int(np.searchsorted(self._ends, index, side="right"))
        left, right = self._pairs[number]
        offset = index - (int(self._ends[number - 1]) if number else 0)
        lefts, rights = self._indices_by_class[left], self._indices_by_class[right]
        i, j = lefts[offset // len(rights)], rights[offset % len(rights)]
        image = np.concatenate([self._digits.images[i], self._digits.images[j]], axis=1)
        label = 10 * left + right
        example = {"image": image, "label": np.int32(label)}
        return example | {"caption": self.class_names[label]} if self._captions else example


@functools.cache
def digit_pairs(split: str, captions: bool = True) -> DigitPairsSource:
    """One shared copy of a split."""
    return DigitPairsSource(split, captions)


def held_out_prompts(num: int) -> list[str]:
    """`num` captions of the pairs left out of training, in turn."""
    captions = [f"{WORDS[left]} {WORDS[right]}" for left, right in HELD_OUT_PAIRS]
    return [captions[i % len(captions)] for i in range(num)]


def read_pairs(pixels: np.ndarray) -> np.ndarray:
    """Digits left and right of images [num, 8, 16, 1] in [-1, 1]; int [num, 2]."""
    halves = np.split(pixels, 2, axis=2)
    return np.stack([digit_reader().predict(half.reshape(len(half), -1)) for half in halves], axis=1)


def labels_of_prompts(prompts: list[str]) -> np.ndarray:
    """The pair that each prompt names; int [num]. Raises InputError for one that names none."""
    labels = {name: label for label, name in enumerate(DigitPairsSource.class_names)}
    for prompt in prompts:
        require(prompt in labels, "prompts", prompt, 'must be two digits in words: "three seven"')
    return np.array([labels[prompt] for prompt in prompts])


def score_pairs(pixels: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Shares of images whose digits are read as those of their class or prompt.

    Args:
      pixels: [num, 8, 16, 1] in [-1, 1].
      labels: int [num], ten times the left digit plus the right one.

    Returns:
      `accuracy` (both digits), `left` and `right`.
    """
    correct = read_pairs(pixels) == np.stack([labels // 10, labels % 10], axis=1)
    return {
        "accuracy": float(correct.all(axis=1).mean()),
        "left": float(correct[:, 0].mean()),
        "right": float(correct[:, 1].mean()),
    }


LEFT = Metric("left", "share of pairs whose left digit is read as asked for", higher_is_better=True, needs_classes=True)
RIGHT = Metric("right", "the same of the right digit", higher_is_better=True, needs_classes=True)

DIGIT_PAIRS = SourceKind(
    name="digit_pairs",
    summary="two handwritten digits side by side, 8x16 grey images with captions (built in)",
    open=lambda settings, captions: digit_pairs("train", captions),
    fixed={"image_size": SIDE, "image_width": 2 * SIDE, "num_classes": 100, "flip": False, **BUILT_IN},
    class_names=lambda settings: DigitPairsSource.class_names,
    open_held_out=lambda settings: digit_pairs("held_out_digits", captions=False),
    reading_threads=0,
    has_captions=True,
    scores=PixelScores(
        (ACCURACY, LEFT, RIGHT), lambda settings, images, labels: score_pairs(scale_pixels(images), labels)
    ),
    held_out_captions=HeldOutCaptions(digit_pairs, SPLITS[1:], held_out_prompts, labels_of_prompts),
)
