"""Clips of scikit-learn's digits that move over a small canvas: real pixels, known motion.

A digit begins in the middle, moves straight, STRIDE pixels a frame on one axis or both, and
bounces off the sides. So what a model should have generated is known exactly: the class in every frame, and
where the digit is in a frame once it has been seen in some before.
"""

import numpy as np

from causalfusion_jax.data.sources import digits

SIDE = 8
"""Pixels of a digit."""
STRIDE = 2
"""Pixels a frame, on either axis."""
MOTIONS_PER_DIGIT = 64


def bounce(start, frames, room: int) -> np.ndarray:
    """Positions between two walls: start + speed * frame, reflected at 0 and `room`.

    Args:
      start: (position, speed) in pixels and pixels a frame, arrays of one shape [...].
      frames: int [n], or one number.
      room: the largest position.

    Returns:
      [..., n], of the common type of both.
    """
    position, speed = (np.asarray(a)[..., None] for a in start)
    unfolded = (position + speed * np.asarray(frames)) % (2 * room)
    return np.minimum(unfolded, 2 * room - unfolded)


class MovingDigitsSource:
    """`image` float32 [frames, size, size, 1] in [-1, 1], black but for the digit; `label` int32.

    Every digit of a half (`DigitsSource`) is there with MOTIONS_PER_DIGIT motions, which the
    clip's number alone decides: one of eight directions.

    Args:
      frames: frames of a clip.
      size: side of the canvas in pixels.
      split: `train` or `held_out`.
    """

    num_classes = 10

    def __init__(self, frames: int, size: int, split: str = "train"):
        self.frames, self.size, self.digits = frames, size, digits(split)
        self.class_names = self.digits.class_names

    def __len__(self) -> int:
        return len(self.digits) * MOTIONS_PER_DIGIT

    def path(self, index: int) -> np.ndarray:
        """Row and column of the digit's corner in every frame; int [frames, 2]."""
        rng, room = np.random.default_rng(index), self.size - SIDE
        directions = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
        direction = np.array(directions[rng.integers(len(directions))])
        return bounce((np.full(2, room // 2), STRIDE * direction), np.arange(self.frames), room).T

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        digit = int(index) % len(self.digits)
        clip = np.full((self.frames, self.size, self.size, 1), -1.0, np.float32)
        for frame, (y, x) in zip(clip, self.path(int(index)), strict=True):
            frame[y : y + SIDE, x : x + SIDE] = self.digits.images[digit]
        return {"image": clip, "label": self.digits.labels[digit]}
