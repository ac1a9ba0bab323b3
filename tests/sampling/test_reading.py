"""Images and prompts that the caption and sample commands read."""

import numpy as np
import pytest
from helpers import tiny_config
from PIL import Image

from causalfusion_jax.cli.condition_flags import read_prompts
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config import experiment
from causalfusion_jax.data.caption_folder import load_image
from causalfusion_jax.sampling import images


@pytest.fixture(scope="module")
def config():
    return experiment.from_dict(tiny_config(text=dict(tokenizer="bytes", max_tokens=40)))


def test_images_are_loaded_when_they_are_indexed(config, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 9, 3), np.uint8)
    for i in range(5):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.png")
    loaded = []

    def noted(path, *args):
        loaded.append(path.name)
        return load_image(path, *args)

    monkeypatch.setattr(images, "load_image", noted)
    read = images.read_captioned_images(config, str(tmp_path), None)
    assert read.names == [f"{i}.png" for i in range(5)] == sorted(loaded) and len(read.images) == 5
    loaded.clear()
    indexed = read.images[np.array([1, 3, 3])]
    assert sorted(loaded) == ["1.png", "3.png", "3.png"]
    expected = [load_image(tmp_path / f"{i}.png", (8, 8, 1), "--images") for i in (1, 3, 3)]
    np.testing.assert_array_equal(indexed, expected)
    (tmp_path / "4.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="--images=.*4.png.*not a readable image"):
        images.read_captioned_images(config, str(tmp_path), None)
    assert len(images.read_captioned_images(config, str(tmp_path), 4).images) == 4
    alone = images.read_captioned_images(config, str(tmp_path / "2.png"), None)
    assert alone.names == ["2.png"] and alone.references == [()] and alone.images[[0]].shape == (1, 8, 8, 1)


def test_images_of_an_npz_stay_bytes(config, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=pixels)
    read = images.read_captioned_images(config, str(tmp_path / "x.npz"), 4)
    assert len(read.images) == 4
    loaded = read.images[np.arange(4)]
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, pixels[:4].astype(np.float32) / 127.5 - 1.0)


def test_prompts_keep_their_line_separators(config, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("one\u2028two\r\n\n three\x0cfour\n".encode())
    prompts = read_prompts(config, None, str(tmp_path / "prompts.txt"), 3)
    assert prompts == ["one\u2028two", " three\x0cfour", "one\u2028two"]
