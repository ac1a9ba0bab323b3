"""Two of scikit-learn's digits side by side, and what they say: "three seven"."""

import functools

import numpy as np

from causalfusion_jax.common.errors import require_one_of
from causalfusion_jax.data.sources import DigitsSource, digits

WORDS = DigitsSource.class_names
HELD_OUT_PAIRS = tuple((left, (3 * left + 1) % 10) for left in range(10))
"""Pairs that training never sees; every digit is in two of them, once on each side."""

SPLITS = ("train", "held_out", "held_out_digits")


class DigitPairsSource:
    """Every ordered pair of digits of one half, 8x16 grey images with a caption and a label.

    Args:
      split: `train`: the digits that DigitsSource trains on, in all pairs but HELD_OUT_PAIRS;
        `held_out`: the other digits, in those pairs alone; `held_out_digits`: the other
        digits, in all pairs.
      captions: examples hold "caption" too.
    """

    num_classes = 100
    class_names = tuple(f"{left} {right}" for left in WORDS for right in WORDS)

    def __init__(self, split: str = "train", captions: bool = True):
        require_one_of("split", split, SPLITS)
        self._captions = captions
        self._digits = digits("train" if split == "train" else "held_out")
        self._of_class = [np.flatnonzero(self._digits.labels == digit) for digit in range(10)]
        wanted = {"train": lambda pair: pair not in HELD_OUT_PAIRS, "held_out": lambda pair: pair in HELD_OUT_PAIRS}
        pairs = [(left, right) for left in range(10) for right in range(10)]
        self._pairs = [pair for pair in pairs if wanted.get(split, lambda pair: True)(pair)]
        sizes = [len(self._of_class[left]) * len(self._of_class[right]) for left, right in self._pairs]
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict:
        which = int(np.searchsorted(self._ends, index, side="right"))
        left, right = self._pairs[which]
        first = index - (int(self._ends[which - 1]) if which else 0)
        lefts, rights = self._of_class[left], self._of_class[right]
        i, j = lefts[first // len(rights)], rights[first % len(rights)]
        image = np.concatenate([self._digits.images[i], self._digits.images[j]], axis=1)
        label = 10 * left + right
        example = {"image": image, "label": np.int32(label)}
        return example | {"caption": self.class_names[label]} if self._captions else example


@functools.cache
def digit_pairs(split: str, captions: bool = True) -> DigitPairsSource:
    """One shared copy of a split."""
    return DigitPairsSource(split, captions)


def held_out_prompts(num: int) -> list[str]:
    """`num` captions of pairs that training never saw, all equally often."""
    captions = [f"{WORDS[left]} {WORDS[right]}" for left, right in HELD_OUT_PAIRS]
    return [captions[i % len(captions)] for i in range(num)]
