"""Images and prompts that the caption and sample commands read."""

import numpy as np
import pytest
from helpers import tiny_config
from PIL import Image

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config import experiment
from causalfusion_jax.data.caption_folder import load_image
from causalfusion_jax.sampling import reading


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

    monkeypatch.setattr(reading, "load_image", noted)
    read = reading.read_images(config, str(tmp_path), None)
    assert read.names == [f"{i}.png" for i in range(5)] == sorted(loaded) and len(read.images) == 5
    loaded.clear()
    chosen = read.images[np.array([1, 3, 3])]
    assert sorted(loaded) == ["1.png", "3.png", "3.png"]
    expected = [load_image(tmp_path / f"{i}.png", (8, 8, 1), "--images") for i in (1, 3, 3)]
    np.testing.assert_array_equal(chosen, expected)
    (tmp_path / "4.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="--images=.*4.png.*not a readable image"):
        reading.read_images(config, str(tmp_path), None)
    assert len(reading.read_images(config, str(tmp_path), 4).images) == 4
    alone = reading.read_images(config, str(tmp_path / "2.png"), None)
    assert alone.names == ["2.png"] and alone.references == [()] and alone.images[[0]].shape == (1, 8, 8, 1)


def test_images_of_an_npz_stay_bytes(config, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=pixels)
    read = reading.read_images(config, str(tmp_path / "x.npz"), 4)
    assert len(read.images) == 4
    found = read.images[np.arange(4)]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, pixels[:4].astype(np.float32) / 127.5 - 1.0)


def test_prompts_keep_their_line_separators(config, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("one\u2028two\r\n\n three\x0cfour\n".encode())
    found = reading.read_prompts(config, None, str(tmp_path / "prompts.txt"), 3)
    assert found == ["one\u2028two", " three\x0cfour", "one\u2028two"]
