"""Clips of scikit-learn's digits that move over a small canvas, and their scores.

A digit starts in the middle, moves in a straight line by STRIDE pixels a frame on one axis or
both, and bounces off the sides. So the correct continuation is known exactly: the class in
every frame, and the position of the digit in a frame given some frames before it.
"""

import functools

import numpy as np

from causalfusion_jax.common.errors import require_number
from causalfusion_jax.data.digits import BUILT_IN, SIDE, DigitsSource, digit_reader, digits
from causalfusion_jax.data.source import DataSettings, PixelScores, SourceKind
from causalfusion_jax.metrics.registry import ACCURACY, Metric

STRIDE = 2
"""Pixels a frame, on either axis."""
MOTIONS_PER_DIGIT = 64
FRAMES_AT_A_TIME = 64
"""Frames that `track` compares with all templates at once."""


def bounce(start, frames, room: int) -> np.ndarray:
    """Positions between two walls: start + speed * frame, reflected at 0 and `room`.

    Args:
      start: (position, speed) in pixels and pixels a frame, arrays of one shape [...].
      frames: numbers of frames, int [n] or int.
      room: the largest position.

    Returns:
      [..., n], of the common type of both.
    """
    position, speed = (np.asarray(a)[..., None] for a in start)
    unfolded = (position + speed * np.asarray(frames)) % (2 * room)
    return np.minimum(unfolded, 2 * room - unfolded)


class MovingDigitsSource:
    """`image` float32 [frames, size, size, 1] in [-1, 1], black but for the digit; `label` int32.

    Every digit of a half (`DigitsSource`) has MOTIONS_PER_DIGIT motions, each in one of eight
    directions, which depends on the index of the clip alone.

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


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Ink of the held-out digits, [num, SIDE^2] in 0..1, and half of each one's energy."""
    ink = (digits("held_out").images.reshape(-1, SIDE**2) + 1.0) / 2.0
    return ink, np.square(ink).sum(axis=1) / 2.0


def track(clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position and class of the digit in every frame, each frame by itself.

    The position is the best fit of any held-out digit, by least squares over the whole frame
    with black around the digit: the maximum of the correlation minus half of the digit's energy.
    The class is what `digit_reader` reads there.

    Args:
      clips: uint8 [num, frames, size, size, 1].

    Returns:
      position: int [num, frames, 2], row and column of the digit's corner.
      label: int [num, frames].
    """
    num, frames, size = clips.shape[:3]
    ink = clips.reshape(num * frames, size, size).astype(np.float32) / 255.0
    crops = np.lib.stride_tricks.sliding_window_view(ink, (SIDE, SIDE), axis=(1, 2))
    positions = crops.shape[1]
    templates, half_energy = _templates()
    best = []
    for start in range(0, len(crops), FRAMES_AT_A_TIME):
        chunk = crops[start : start + FRAMES_AT_A_TIME].reshape(-1, SIDE**2)
        fit = (chunk @ templates.T - half_energy).max(axis=1)
        best.append(fit.reshape(-1, positions**2).argmax(axis=1))
    row, column = np.divmod(np.concatenate(best), positions)
    digit_pixels = crops[np.arange(len(crops)), row, column].reshape(-1, SIDE**2)
    label = digit_reader().predict(2.0 * digit_pixels - 1.0)
    return np.stack([row, column], axis=-1).reshape(num, frames, 2), label.reshape(num, frames)


def path_error(position: np.ndarray, room: int) -> np.ndarray:
    """Distance of tracked paths from the nearest path that is possible in the data.

    Args:
      position: int [num, frames, 2].
      room: the largest position.

    Returns:
      Mean absolute error in pixels on each axis, [num, 2]: the minimum over all positions and
      speeds of a straight line with bounce through all frames.
    """
    # Phases over the whole period 2 * room include backward motion, so one sign of the speed is enough.
    phases = np.arange(room // 2 % STRIDE, 2 * room, STRIDE)
    phase, speed = np.meshgrid(phases, (0, STRIDE), indexing="ij")
    paths = bounce((phase.ravel(), speed.ravel()), np.arange(position.shape[1]), room)
    error = np.abs(position.swapaxes(1, 2)[:, :, None] - paths).mean(axis=-1)
    return error.min(axis=-1)


def score_moving_digits(clips: np.ndarray, labels: np.ndarray, trained_frames: int) -> dict[str, float]:
    """Scores of generated clips.

    Args:
      clips: uint8 [num, frames, size, size, 1].
      labels: int [num], the class that each was sampled for.
      trained_frames: frames of the clips trained on.

    Returns:
      `accuracy`: share of frames read as their clip's class, and `motion_error`: mean
      `path_error`, both over the first `trained_frames`. For longer clips also
      `accuracy_beyond`, over the frames after those, and `motion_error_beyond`, over each
      further part of `trained_frames` by itself.
    """
    position, read = track(clips)
    room, correct = clips.shape[2] - SIDE, read == labels[:, None]
    parts = range(0, clips.shape[1] - trained_frames + 1, trained_frames)
    errors = [path_error(position[:, start : start + trained_frames], room).mean() for start in parts]
    scores = {"accuracy": correct[:, :trained_frames].mean(), "motion_error": errors[0]}
    if clips.shape[1] > trained_frames:
        scores |= {"accuracy_beyond": correct[:, trained_frames:].mean()}
        scores |= {"motion_error_beyond": np.mean(errors[1:])} if errors[1:] else {}
    return {name: float(value) for name, value in scores.items()}


def _check(settings: DataSettings) -> None:
    # Room for a step to either side of the middle.
    require_number("image_size", settings.image_size, SIDE + 2 * STRIDE)
    require_number("frames", settings.frames, 2)


MOTION_ERROR = Metric("motion_error", "distance of the tracked path to a straight one, in pixels", of_videos=True)
ACCURACY_BEYOND = Metric(
    "accuracy_beyond",
    "accuracy over the frames beyond the training length",
    higher_is_better=True,
    needs_classes=True,
    of_videos=True,
)
MOTION_ERROR_BEYOND = Metric(
    "motion_error_beyond", "motion_error over the frames beyond the training length", of_videos=True
)

MOVING_DIGITS = SourceKind(
    name="moving_digits",
    summary="clips of a handwritten digit that moves and bounces (built in)",
    open=lambda settings, captions: MovingDigitsSource(settings.frames, settings.image_size),
    fixed={name: value for name, value in BUILT_IN.items() if name != "frames"}
    | {"num_classes": 10, "flip": False, "image_width": 0},
    check=_check,
    class_names=lambda settings: DigitsSource.class_names,
    open_held_out=lambda settings: MovingDigitsSource(settings.frames, settings.image_size, "held_out"),
    reading_threads=0,
    scores=PixelScores(
        (ACCURACY, MOTION_ERROR, ACCURACY_BEYOND, MOTION_ERROR_BEYOND),
        lambda settings, clips, labels: score_moving_digits(clips, labels, settings.frames),
    ),
)
