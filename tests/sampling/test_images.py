"""Pixels out."""

import numpy as np
from PIL import Image

from causalfusion_jax.sampling.images import balanced_labels, frames_in_rows, make_grid, save_png, to_uint8


def test_rounding_is_adms():
    values = np.array([-1.5, -1.0, -0.999, 0.0, 0.5, 1.0, 2.0])
    np.testing.assert_array_equal(to_uint8(values), [0, 0, 0, 128, 191, 255, 255])


def test_labels_are_balanced():
    assert np.bincount(balanced_labels(25, 10)).tolist() == [3] * 5 + [2] * 5


def test_a_video_is_a_row_of_its_frames():
    videos = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2, 1)
    images, columns = frames_in_rows(videos, 7)
    assert columns == 3
    np.testing.assert_array_equal(images[4], videos[1, 1])


def test_latents_are_shown_in_false_colour():
    latents = np.random.default_rng(0).normal(size=(4, 3, 3, 16)).astype(np.float32)
    images, columns = frames_in_rows(latents, 2)
    assert images.shape == (4, 3, 3, 3) and images.dtype == np.uint8 and columns == 2
    assert images.min() == 0 and images.max() == 255
    flat = latents[..., :3].ravel().argsort()
    assert (np.diff(images.ravel()[flat].astype(int)) >= 0).all()


def test_grid(tmp_path):
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
    grid = make_grid(images, columns=3)
    assert grid.shape == (2 * 36, 3 * 36, 1)
    assert [grid[18 + 36 * (i // 3), 18 + 36 * (i % 3), 0] for i in range(6)] == [0, 1, 2, 3, 4, 255]
    save_png(tmp_path / "grid.png", grid)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "grid.png")), grid[..., 0])
