"""Clips of moving digits: real pixels, motion that is known."""

import numpy as np
import pytest

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.digits import digits
from causalfusion_jax.data.moving_digits import MovingDigitsSource, bounce
from causalfusion_jax.data.pipeline import host_batches
from causalfusion_jax.data.registry import make_source


def test_bounce_by_hand():
    assert bounce((0, 2), np.arange(8), 8).tolist() == [0, 2, 4, 6, 8, 6, 4, 2]
    assert bounce((7, 2), np.arange(5), 8).tolist() == [7, 7, 5, 3, 1]
    assert bounce((3, -2), np.arange(4), 8).tolist() == [3, 1, 1, 3]
    assert bounce((np.array([5, 2]), np.array([0, 1])), np.arange(3), 8).tolist() == [[5, 5, 5], [2, 3, 4]]


def test_clips_are_real_digits_on_black_that_move_straight():
    source = MovingDigitsSource(16, 16)
    assert len(source) == 64 * 898
    for index in (0, 5, 898 * 63 + 5):
        example, path = source[index], source.path(index)
        assert example["image"].shape == (16, 16, 16, 1) and example["image"].dtype == np.float32
        assert example["label"] == digits("train").labels[index % 898]
        for frame, (y, x) in zip(example["image"], path, strict=True):
            np.testing.assert_array_equal(frame[y : y + 8, x : x + 8], digits("train").images[index % 898])
            assert (frame == -1).sum() >= 16 * 16 - 64
        assert path[0].tolist() == [4, 4] and path.min() >= 0 and path.max() <= 8
        moves = np.abs(np.diff(path, axis=0))
        assert moves.any() and ((moves == 2).all(axis=0) | (moves == 0).all(axis=0)).all()
    np.testing.assert_array_equal(source[7]["image"], MovingDigitsSource(16, 16)[7]["image"])
    directions = [tuple(source.path(i)[1] - 4) for i in range(2000)]
    counts = [directions.count((y, x)) for y in (-2, 0, 2) for x in (-2, 0, 2)]
    assert counts[4] == 0 and min(counts[:4] + counts[5:]) > 200 and sum(counts) == 2000


def test_pipeline_makes_batches_of_them():
    config = DataConfig(source="moving_digits", image_size=12, frames=6)
    batch = host_batches(make_source(config), config, 4, seed=0)[3]
    assert batch["image"].shape == (4, 6, 12, 12, 1) and batch["label"].dtype == np.int32


@pytest.mark.parametrize(
    ("changes", "field"),
    [(dict(frames=1), "frames"), (dict(image_size=11), "image_size"), (dict(channels=3), "channels"),
     (dict(flip=True), "flip")],
)  # fmt: skip
def test_other_settings_are_refused(changes, field):
    with pytest.raises(InputError) as error:
        DataConfig(**dict(source="moving_digits", image_size=16, frames=16) | changes)
    assert error.value.field == field
