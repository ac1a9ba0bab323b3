"""A folder of samples, written part by part."""

import numpy as np
import pytest
from PIL import Image

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.sampling.shards import SampleFolder

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
REQUEST = {"labels": [0, 1, 2, 0, 1, 2, 0], "seed": 3}


def sample(folder, indices):
    for index in indices:
        folder.write(index, IMAGES[3 * index : 3 * index + 3])


def test_parts_of_any_order_become_one_file(tmp_path):
    np.savez(tmp_path / "expected.npz", IMAGES, np.array(REQUEST["labels"], np.int32))
    folder = SampleFolder(tmp_path / "out", REQUEST, 3)
    folder.claim()
    assert folder.missing() == [0, 1, 2] and folder.missing(1, 2) == [1]
    sample(folder, [2, 1])
    # Another process continues; a part that was being written when the first one ended does not count.
    (tmp_path / "out" / "parts" / ".000000.npy.part").write_bytes(b"half")
    other = SampleFolder(tmp_path / "out", REQUEST, 3)
    other.claim()
    assert other.missing() == [0] and not other.is_done
    sample(other, [0])
    other.join(columns=3)
    assert other.is_done and sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "grid.png",
        "request.json",
        "samples.npz",
    ]
    assert (tmp_path / "out" / "samples.npz").read_bytes() == (tmp_path / "expected.npz").read_bytes()
    assert Image.open(tmp_path / "out" / "grid.png").size == (3 * 36, 3 * 36)


def test_a_folder_whose_request_could_not_be_written_is_claimed_again(tmp_path):
    (tmp_path / "out" / "parts").mkdir(parents=True)
    folder = SampleFolder(tmp_path / "out", REQUEST, 3)
    folder.claim()
    assert folder.missing() == [0, 1, 2] and (tmp_path / "out" / "parts" / "request.json").is_file()


@pytest.mark.parametrize("joined", [False, True])
def test_another_request_is_refused(tmp_path, joined):
    folder = SampleFolder(tmp_path / "out", REQUEST, 3)
    folder.claim()
    sample(folder, range(3))
    if joined:
        folder.join(columns=3)
    for change, words in (
        ({"seed": 4}, "seed 3, now 4"),
        ({"labels": [0]}, r"labels \[0, 1, 2, 0, 1, 2, 0\], now \[0\]"),
    ):
        other = SampleFolder(tmp_path / "out", REQUEST | change, 3)
        with pytest.raises(InputError, match=rf"samples of another request \({words}\)"):
            other.claim()
    assert folder.is_done == joined
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(InputError, match="other content"):
        SampleFolder(tmp_path / "mine", REQUEST, 3).claim()


@pytest.mark.parametrize("made_before", [False, True])
def test_claimed_while_others_look(tmp_path, monkeypatch, made_before):
    """Neither an incomplete folder of another host, nor one that was claimed first, is another request."""
    mine, other = (SampleFolder(tmp_path / "out", REQUEST, 3) for _ in range(2))
    if made_before:
        (tmp_path / "out").mkdir()
    write_json = files.write_json

    def watched(path, content):
        mine.check()
        write_json(path, content)
        if not (tmp_path / "out" / "parts").exists():
            monkeypatch.setattr(files, "write_json", write_json)
            other.claim()
            sample(other, [1])

    monkeypatch.setattr(files, "write_json", watched)
    mine.claim()
    assert mine.missing() == other.missing() == [0, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
