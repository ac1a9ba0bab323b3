"""Where the digit is in every frame of a clip, which digit it is, and how it moves."""

import functools

import numpy as np

from causalfusion_jax.data.moving_digits import SIDE, STRIDE, bounce
from causalfusion_jax.data.sources import digits

FRAMES_AT_A_TIME = 64


@functools.cache
def digit_reader():
    """An SVC of digits, pixels [num, SIDE^2] in [-1, 1], fitted on the held-out half."""
    from sklearn.svm import SVC

    real = digits("held_out")
    return SVC(gamma=0.05).fit(real.images.reshape(-1, SIDE**2), real.labels)


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Ink of the held-out digits, [num, SIDE^2] in 0..1, and half of each one's energy."""
    ink = (digits("held_out").images.reshape(-1, SIDE**2) + 1.0) / 2.0
    return ink, np.square(ink).sum(axis=1) / 2.0


def track(clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads every frame by itself.

    The position is that at which the best of all held-out digits fits best: least squares
    over the whole frame, with black around the digit, which is correlation less half of the
    digit's energy. The class is what an SVC fitted on the held-out digits reads there.

    Args:
      clips: uint8 [num, frames, size, size, 1].

    Returns:
      position: int [num, frames, 2], row and column of the digit's corner.
      label: int [num, frames].
    """
    num, frames, size = clips.shape[:3]
    ink = clips.reshape(num * frames, size, size).astype(np.float32) / 255.0
    crops = np.lib.stride_tricks.sliding_window_view(ink, (SIDE, SIDE), axis=(1, 2))
    places = crops.shape[1]
    templates, half_energy = _templates()
    best = []
    for start in range(0, len(crops), FRAMES_AT_A_TIME):
        chunk = crops[start : start + FRAMES_AT_A_TIME].reshape(-1, SIDE**2)
        fit = (chunk @ templates.T - half_energy).max(axis=1)
        best.append(fit.reshape(-1, places**2).argmax(axis=1))
    row, column = np.divmod(np.concatenate(best), places)
    found = crops[np.arange(len(crops)), row, column].reshape(-1, SIDE**2)
    label = digit_reader().predict(2.0 * found - 1.0)
    return np.stack([row, column], axis=-1).reshape(num, frames, 2), label.reshape(num, frames)


def path_error(position: np.ndarray, room: int) -> np.ndarray:
    """How far tracked paths are from the nearest one that the data could take.

    Args:
      position: int [num, frames, 2].
      room: the largest position.

    Returns:
      Mean absolute error in pixels, [num, 2], of each axis: the least over all places and
      speeds of a straight line with bounce through all frames.
    """
    # Half of them, at one speed and from one end, are the others moving backwards.
    places = np.arange(room // 2 % STRIDE, 2 * room, STRIDE)
    phase, speed = np.meshgrid(places, (0, STRIDE), indexing="ij")
    paths = bounce((phase.ravel(), speed.ravel()), np.arange(position.shape[1]), room)
    error = np.abs(position.swapaxes(1, 2)[:, :, None] - paths).mean(axis=-1)
    return error.min(axis=-1)


def score_moving_digits(clips: np.ndarray, labels: np.ndarray, trained_frames: int) -> dict[str, float]:
    """Scores of generated clips.

    Args:
      clips: uint8 [num, frames, size, size, 1].
      labels: int [num], the class each was asked for.
      trained_frames: frames of the clips trained on.

    Returns:
      `accuracy`: frames read as their clip's class; `motion_error`: `path_error` of the first
      `trained_frames`. Of longer clips also `accuracy_beyond`, of the frames after those, and
      `motion_error_beyond`, of every following `trained_frames` by themselves.
    """
    position, read = track(clips)
    room, right = clips.shape[2] - SIDE, read == labels[:, None]
    parts = range(0, clips.shape[1] - trained_frames + 1, trained_frames)
    errors = [path_error(position[:, start : start + trained_frames], room).mean() for start in parts]
    scores = {"accuracy": right[:, :trained_frames].mean(), "motion_error": errors[0]}
    if clips.shape[1] > trained_frames:
        scores |= {"accuracy_beyond": right[:, trained_frames:].mean()}
        scores |= {"motion_error_beyond": np.mean(errors[1:])} if errors[1:] else {}
    return {name: float(value) for name, value in scores.items()}
