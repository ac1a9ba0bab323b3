"""Clips in files: which frames are read, how they are drawn, what is too short or broken."""

import pickle
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_data import write_clip

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.data import video_files
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.image_files import ImageFormat
from causalfusion_jax.data.pipeline import BatchIterator, host_batches
from causalfusion_jax.data.records import CorruptRecord
from causalfusion_jax.data.registry import class_names, make_source

KINDS = ("gif", "mp4", "webm", "avi", "mov", "mkv", "folder")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A clip of 24 frames of every kind, and two classes: `long` of 24 and `short` of 9 frames, some of each kind."""
    root = tmp_path_factory.mktemp("clips")
    kinds = {kind: write_clip(root / "kinds" / kind, kind, 24) for kind in KINDS}
    for kind in ("gif", "mp4", "folder", "webm"):
        write_clip(root / "data" / "long" / kind, kind, 24)
        write_clip(root / "data" / "short" / kind, kind, 9)
    (root / "data" / "long" / "notes.txt").write_text("no clip")
    return root / "data", kinds


def numbers(images) -> list[int]:
    """Which frames of `write_clip` these are: frame i is of grey 10 (i + 1)."""
    return [round(float(np.asarray(image, np.float32).mean()) / 10) - 1 for image in images]


def of_example(example) -> list[int]:
    return numbers((example["image"] + 1) * 127.5)


def clip_config(path, **changes):
    return DataConfig(
        **{
            "source": "clip_folder",
            "path": str(path),
            "image_size": 16,
            "channels": 3,
            "num_classes": 2,
            "frames": 4,
            **changes,
        }
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_frames_that_were_asked_for(clips, kind, monkeypatch):
    path = clips[1][kind]
    for wanted in ([0, 1, 2], [23], [5, 9, 13], list(range(24))):
        frames = video_files.read_frames(path, lambda count, wanted=wanted: wanted if count == 24 else [])
        assert numbers(frames) == wanted and frames[0].size == (24, 20)
    if kind in ("gif", "folder"):
        return
    # What seeking finds is, to the bit, what decoding from the start finds; also where seeking finds nothing.
    sought = video_files.read_frames(path, lambda count: [11, 17])
    monkeypatch.setattr(video_files, "decode_times", lambda *args: {})
    for a, b in zip(sought, video_files.read_frames(path, lambda count: [11, 17]), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_file_that_tells_more_frames_than_it_has(clips, monkeypatch):
    """The number of frames that can be decoded counts in the end."""
    real = video_files.decode_all
    monkeypatch.setattr(video_files, "decode_times", lambda *args: {})
    monkeypatch.setattr(
        video_files, "decode_all", lambda path: (frame for frame, _ in zip(real(path), range(20), strict=False))
    )
    last = lambda count: video_files.clip_indices("x", count, 2, 1, lambda first: first - 1)
    frames = video_files.read_frames(clips[1]["mp4"], last)
    assert numbers(frames) == [18, 19]


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    for i in (10, 2, 1, 0):
        Image.new("L", (8, 8), 10 * (i + 1)).save(tmp_path / f"frame{i}.png")
    assert numbers(video_files.read_frames(tmp_path, range)) == [0, 1, 2, 10]


def test_videos_are_turned_upright(tmp_path):
    """What a phone writes that was held sideways: turned by a quarter, clockwise, to be shown."""
    import av

    path = tmp_path / "phone.mp4"
    lying = np.zeros((32, 48, 3), np.uint8)
    lying[16:, :24] = 200  # at the bottom left, which a turn clockwise brings to the top left
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(-90)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(lying, format="rgb24")))
        container.mux(stream.encode())
    (frame,) = video_files.read_frames(path, lambda count: [1])
    pixels = np.asarray(frame.convert("L"), np.float32)
    assert pixels.shape == (48, 32)
    quarters = [pixels[y : y + 24, x : x + 16].mean() for y in (0, 24) for x in (0, 16)]
    np.testing.assert_allclose(quarters, [200, 0, 0, 0], atol=8)


def test_damaged_frames_are_no_frames():
    class Frame:
        is_corrupt = True

    with pytest.raises(ValueError, match="damaged frame"):
        video_files.to_image(Frame())


def test_a_folder_of_clips(clips):
    config = clip_config(clips[0], frame_stride=2)
    source = make_source(config)
    assert len(source) == 8 and source.class_names == ("long", "short") == class_names(config)
    assert source.labels.tolist() == [0] * 4 + [1] * 4 and source.name(0).endswith("data/long/folder")
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for i in range(8):
            example = copy[i]
            assert example["image"].shape == (4, 16, 16, 3) and example["image"].dtype == np.float32
            # The middle: 18 and 3 frames that could be first.
            assert of_example(example) == ([8, 10, 12, 14] if i < 4 else [1, 3, 5, 7])
    with Image.open(clips[0] / "long" / "folder" / "frame8.png") as frame:
        np.testing.assert_array_equal(source[0]["image"][0], ImageFormat(16, 3).fit(frame))
    assert make_source(clip_config(clips[0], channels=1))[0]["image"].shape == (4, 16, 16, 1)


def batches(config, count, hosts=1, workers=0, seed=3):
    source = make_source(config)
    iterators = [
        BatchIterator(host_batches(source, config, 4, seed, rows), 0, workers, 0, config.max_corrupt)
        for rows in np.split(np.arange(4), hosts)
    ]
    try:
        parts = [[next(iterator) for iterator in iterators] for _ in range(count)]
        return [np.concatenate([p["image"] for p in part]) for part in parts], iterators[0].corrupt
    finally:
        for iterator in iterators:
            iterator.close()


def test_where_a_clip_begins_is_of_seed_index_and_epoch(clips):
    config = clip_config(clips[0], flip=True)
    images, _ = batches(config, 24)
    drawn = np.concatenate(images)
    first = {tuple(of_example({"image": image})) for image in drawn}
    # Consecutive frames, from all over the clips.
    assert all(clip == tuple(range(clip[0], clip[0] + 4)) for clip in first)
    starts = {clip[0] for clip in first}
    assert len(starts) > 12 and min(starts) <= 2 and max(starts) >= 18
    # The left edge of every frame is darker than its right one: a clip is mirrored whole, or not at all.
    left = (drawn[:, :, :, 0] < drawn[:, :, :, -1]).mean(axis=(2, 3)) > 0.5
    assert (left.all(axis=1) | ~left.any(axis=1)).all() and 0.2 < left.mean() < 0.8
    for hosts, workers in ((2, 0), (1, 1)):
        other, _ = batches(config, 3, hosts, workers)
        np.testing.assert_array_equal(other, images[:3])
    assert not np.array_equal(batches(config, 2, seed=4)[0], images[:2])


def test_clips_too_short_or_broken_are_corrupt_records(clips, tmp_path, capsys):
    write_clip(tmp_path / "a" / "good", "gif", 12)
    write_clip(tmp_path / "a" / "also", "mp4", 12)
    short = write_clip(tmp_path / "a" / "short", "folder", 9)
    broken = write_clip(tmp_path / "b" / "broken", "mp4", 12)
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    (tmp_path / "b" / "empty").mkdir()
    (tmp_path / "b" / "text.avi").write_text("no video")
    config = clip_config(tmp_path, frame_stride=3)
    source = make_source(config)
    with pytest.raises(CorruptRecord, match="short'.*has 9 frames; 4 frames 3 apart need 10"):
        source[2]
    _, corrupt = batches(config, 3)
    assert set(corrupt) == {
        str(path) for path in (short, broken, tmp_path / "b" / "empty", tmp_path / "b" / "text.avi")
    }
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 4 and all("corrupt record skipped" in line for line in printed)
    with pytest.raises(InputError, match="3 corrupt records, the first"):
        batches(clip_config(tmp_path, frame_stride=3, max_corrupt=2), 3)


def test_what_is_no_folder_of_clips(clips, tmp_path, monkeypatch):
    for path, changes, words in (
        (tmp_path / "none", {}, "must be a folder"),
        (tmp_path, {}, "holds no clips"),
        (clips[0], dict(num_classes=3), "has 2 classes"),
    ):
        with pytest.raises(InputError, match=words):
            make_source(clip_config(path, **changes))
    for changes, words in (
        (dict(frames=1), "frames=1: must be >= 2"),
        (dict(frame_stride=0), "frame_stride=0"),
        (dict(source="image_folder", frames=1, frame_stride=2), "is a setting of source clip_folder or tfds only"),
        (dict(path=""), "needs the folder's path"),
    ):
        with pytest.raises(InputError, match=words):
            clip_config(clips[0], **changes) if "path" not in changes else clip_config("")
    with pytest.raises(InputError, match="encode them by causalfusion_jax.encode"):
        make_source(clip_config(clips[0], latents=True, channels=4))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"long/mp4.mp4'?: needs PyAV .* pip install 'causalfusion_jax\[video\]'"):
        make_source(clip_config(clips[0]))
