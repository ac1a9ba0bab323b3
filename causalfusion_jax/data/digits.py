"""scikit-learn's handwritten digits, and a classifier that scores generated ones."""

import functools

import numpy as np

from causalfusion_jax.data.image_files import scale_pixels
from causalfusion_jax.data.source import PixelScores, SourceKind
from causalfusion_jax.metrics.distribution import frechet_distance
from causalfusion_jax.metrics.registry import ACCURACY, FD

SIDE = 8
"""Pixels of a digit's side."""
BUILT_IN = {"channels": 1, "path": "", "frames": 1, "latents": False}
"""Settings that are fixed for images of built-in digits."""


class DigitsSource:
    """scikit-learn's handwritten digits: 1,797 real 8x8 grey images of 10 classes.

    A stratified half (`random_state=0`) is for training, the other half is held out.
    """

    num_classes = 10
    class_names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __init__(self, split: str = "train"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        train, held_out = train_test_split(np.arange(len(labels)), test_size=0.5, stratify=labels, random_state=0)
        rows = {"train": train, "held_out": held_out}[split]
        # 17 grey levels, 0..16.
        self.images = (pixels[rows].reshape(-1, 8, 8, 1) / 8.0 - 1.0).astype(np.float32)
        self.labels = labels[rows].astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}


@functools.cache
def digits(split: str) -> DigitsSource:
    """One shared copy of a half of the digits, `train` or `held_out`."""
    return DigitsSource(split)


@functools.cache
def digit_reader():
    """A classifier of digits: an SVC of pixels [num, SIDE^2] in [-1, 1], fitted on the held-out half."""
    from sklearn.svm import SVC

    real = digits("held_out")
    return SVC(gamma=0.05).fit(real.images.reshape(-1, SIDE**2), real.labels)


def score_digits(pixels: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`accuracy` and `fd` of digits [num, 8, 8, 1] in [-1, 1] against the held-out half; labels: int [num]."""
    pixels, real = pixels.reshape(len(pixels), -1), digits("held_out").images
    return {
        "accuracy": float(np.mean(digit_reader().predict(pixels) == labels)),
        "fd": frechet_distance(pixels, real.reshape(len(real), -1)),
    }


DIGITS = SourceKind(
    name="digits",
    summary="scikit-learn's handwritten digits, 8x8 grey images of 10 classes (built in)",
    open=lambda settings, captions: digits("train"),
    fixed={"image_size": SIDE, "image_width": 0, "num_classes": 10, **BUILT_IN},
    class_names=lambda settings: DigitsSource.class_names,
    open_held_out=lambda settings: digits("held_out"),
    reading_threads=0,
    scores=PixelScores((FD, ACCURACY), lambda settings, images, labels: score_digits(scale_pixels(images), labels)),
)
