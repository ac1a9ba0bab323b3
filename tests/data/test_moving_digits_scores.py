"""The tracker, on clips whose motion and class are known."""

import numpy as np

from causalfusion_jax.common.pictures import to_uint8
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.moving_digits import MovingDigitsSource, bounce, path_error, score_moving_digits, track
from causalfusion_jax.data.scores import score


def real_clips(num, frames=16, split="train"):
    source = MovingDigitsSource(frames, 16, split)
    indices = np.random.default_rng(0).choice(len(source), num, replace=False)
    clips = to_uint8(np.stack([source[int(i)]["image"] for i in indices]))
    labels = np.array([source[int(i)]["label"] for i in indices])
    return clips, labels, np.stack([source.path(int(i)) for i in indices])


def test_held_out_digits_are_found_exactly():
    """They are the tracker's own templates."""
    clips, labels, paths = real_clips(4, split="held_out")
    position, read = track(clips)
    np.testing.assert_array_equal(position, paths)
    np.testing.assert_array_equal(read, np.broadcast_to(labels[:, None], read.shape))


def test_training_digits_are_found_and_read():
    """Digits that the tracker has never seen."""
    clips, labels, paths = real_clips(12)
    position, read = track(clips)
    assert (position == paths).all(axis=-1).mean() > 0.9 and np.abs(position - paths).max() <= 1
    assert (read == labels[:, None]).mean() > 0.95


def test_path_error_by_hand():
    """A straight line with bounce costs nothing; one frame k pixels off it, k of all frames."""
    for y, x in (((0, 2), (6, -2)), ((4, 0), (8, -2)), ((6, -2), (2, 0))):
        path = np.stack([bounce(y, np.arange(16), 8), bounce(x, np.arange(16), 8)], axis=-1)
        np.testing.assert_array_equal(path_error(path[None], 8), [[0, 0]])
    path[9, 0] += 3
    np.testing.assert_allclose(path_error(path[None], 8), [[3 / 16, 0]])
    # Where the middle is an odd place.
    path = MovingDigitsSource(16, 14).path(3)
    assert path[0].tolist() == [3, 3] and not path_error(path[None], 6).any()


def test_scores_tell_motion_and_class_apart():
    clips, labels, _ = real_clips(6, 24)
    scores = score_moving_digits(clips, labels, 8)
    assert set(scores) == {"accuracy", "motion_error", "accuracy_beyond", "motion_error_beyond"}
    assert scores["accuracy"] > 0.9 and scores["motion_error"] < 0.1 and scores["motion_error_beyond"] < 0.1
    shuffled = clips[:, np.random.default_rng(0).permutation(24)]
    other = score(DataConfig(source="moving_digits", image_size=16, frames=24), shuffled, (labels + 1) % 10)
    assert other["accuracy"] < 0.1 and other["motion_error"] > 1.0
