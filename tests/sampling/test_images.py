"""Pixels out."""

import numpy as np
from PIL import Image

from causalfusion_jax.common.pictures import edit_strip, frames_in_rows, make_grid, save_gif, save_png, to_uint8
from causalfusion_jax.sampling.conditions import balanced_labels


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


def test_strip_shows_before_mask_and_results():
    before = np.full((2, 32, 32, 1), 10, np.uint8)
    after = np.arange(4, dtype=np.uint8)[:, None, None, None] + np.full((4, 32, 32, 1), 100, np.uint8)
    mask = np.zeros((32, 32), bool)
    mask[:16] = True
    strip = edit_strip(before, mask, after)
    assert strip.shape == (2 * 36, 4 * 36, 3)
    assert [strip[36 + 10, 18 + 36 * column].tolist() for column in range(4)] == [
        [10] * 3, [228, 87, 86], [102] * 3, [103] * 3
    ]  # fmt: skip
    assert strip[36 + 30, 18 + 36].tolist() == [10] * 3


def test_gif_plays_all_frames_of_all_clips(tmp_path):
    clips = np.zeros((3, 5, 32, 32, 1), np.uint8)
    clips[2] = np.arange(50, 100, 10, dtype=np.uint8)[:, None, None, None]
    save_gif(tmp_path / "clips.gif", clips, columns=2)
    with Image.open(tmp_path / "clips.gif") as movie:
        assert movie.n_frames == 5 and movie.size == (72, 72) and movie.info["loop"] == 0
        for frame in range(5):
            movie.seek(frame)
            assert movie.info["duration"] == 120
            pixels = np.asarray(movie.convert("L"))
            assert pixels[18, 18] == 0 and pixels[36 + 18, 18] == 50 + 10 * frame and pixels[36 + 18, 36 + 18] == 255
