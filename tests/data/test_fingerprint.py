"""What identifies the data that were encoded."""

import numpy as np
import pytest
from tiny_data import write_clip, write_tars

from causalfusion_jax.data import fingerprint as module
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.fingerprint import fingerprint
from causalfusion_jax.data.registry import make_source


def image_folder(root):
    write_clip(root / "a", "folder", 5)
    return DataConfig(source="image_folder", path=str(root), channels=3, num_classes=1)


def caption_folder(root):
    write_clip(root / "a", "folder", 2)
    (root / "captions.jsonl").write_text('{"file_name": "a/frame0.png", "caption": "x"}\n')
    return DataConfig(source="caption_folder", path=str(root), channels=3, num_classes=1)


def clip_folder(root):
    write_clip(root / "c" / "a", "folder", 5)
    write_clip(root / "c" / "b", "gif", 5)
    return DataConfig(source="clip_folder", path=str(root), channels=3, num_classes=1, frames=2)


def tar(root):
    return DataConfig(source="tar", path=write_tars(root, 4), channels=3)


def arrays(root):
    np.save(root / "image.npy", np.zeros((70, 8, 8, 3), np.uint8))
    np.save(root / "label.npy", np.zeros(70, np.int32))
    return DataConfig(source="arrays", path=str(root), channels=3)


def change_file(root):
    path = next(path for path in sorted(root.rglob("frame*.png")))
    path.write_bytes(path.read_bytes() + b" ")


def rename_file(root):
    path = next(path for path in sorted(root.rglob("frame*.png")))
    path.rename(path.with_name("frame00.png"))


def change_caption(root):
    (root / "captions.jsonl").write_text('{"file_name": "a/frame0.png", "caption": "y"}\n')


def change_record(root):
    write_tars(root, 4, broken=(2,))


def change_values(root):
    np.save(root / "image.npy", np.ones((70, 8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("write", "change"),
    [
        (image_folder, change_file), (image_folder, rename_file), (clip_folder, change_file),
        (caption_folder, change_caption), (tar, change_record), (arrays, change_values),
    ],
)  # fmt: skip
def test_fingerprint_is_of_the_data_and_not_of_their_place(write, change, tmp_path):
    checksums = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        config = write(tmp_path / name)
        checksums.append(fingerprint(make_source(config)))
    assert checksums[0] == checksums[1]
    change(tmp_path / "second")
    assert fingerprint(make_source(config)) != checksums[0]


def testfile_sizes_of_very_many_files_are_of_a_sample(tmp_path, monkeypatch):
    config = image_folder(tmp_path)
    monkeypatch.setattr(module, "MAX_SIZES", 2)
    sized = []
    real = module.file_sizes
    monkeypatch.setattr(module, "file_sizes", lambda path: (sized.append(path.name), real(path))[1])
    fingerprint(make_source(config))
    assert sorted(sized) == ["frame0.png", "frame2.png"]
