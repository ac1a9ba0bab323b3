"""I/O errors end reading and are not skipped as corrupt records; few files stay open."""

import concurrent.futures
import errno
import os
import pathlib
import pickle
import resource
import weakref

import numpy as np
import pytest
from tiny_data import write_clip, write_tars

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.data import latents, tar_shards, video_files
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.image_files import ImageFormat
from causalfusion_jax.data.records import CorruptRecord
from causalfusion_jax.data.registry import make_source


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between tries, which are not waited for."""
    taken = []
    monkeypatch.setattr(files.time, "sleep", taken.append)
    return taken


def tar_config(folder, **changes):
    return DataConfig(**{"source": "tar", "path": str(folder), "image_size": 8, "channels": 3, **changes})


def write_latents(folder, num):
    """`num` latents in a shard each."""
    from array_record.python.array_record_module import ArrayRecordWriter

    shards = []
    for i in range(num):
        path = folder / latents.shard_name(i, num)
        writer = ArrayRecordWriter(str(path), latents.WRITER_OPTIONS)
        values = np.full((2, 4, 4, 4), i, np.float32)
        label = {"label": np.array(i, np.int32), "index": np.array(i)}
        writer.write(latents.pack({"mean": values.astype("bfloat16"), "std": values.astype("bfloat16"), **label}))
        writer.close()
        shards.append({"file": path.name, "first_index": i, "records": 1, **files.describe_file(path)})
    files.write_json(
        folder / "manifest.json",
        {
            "version": 1,
            "shape": [4, 4, 4],
            "num_classes": 10,
            "class_names": [],
            "captions": False,
            "scaling_factor": 0.5,
            "shards": shards,
        },
    )


def open_source(kind, folder):
    """A source of two examples of each of two classes, or of two examples, and the file of the first."""
    if kind == "tar":
        write_tars(folder, 2, per_shard=1)
        return make_source(tar_config(folder)), folder / "digits-000.tar"
    if kind == "latents":
        write_latents(folder, 2)
        config = DataConfig(source="latents", latents=True, path=str(folder), image_size=4, channels=4)
        return make_source(config), folder / latents.shard_name(0, 2)
    common = dict(path=str(folder), image_size=8, channels=3)
    if kind in ("gif", "mp4"):
        first = write_clip(folder / "a" / "0", kind, 4)
        return make_source(DataConfig(source="clip_folder", frames=2, num_classes=1, **common)), first
    frames = sorted(write_clip(folder / "a", "folder", 2).iterdir())
    if kind == "caption_folder":
        (folder / "captions.jsonl").write_text('{"file_name": "a/frame0.png", "caption": "zero"}\n')
    return make_source(DataConfig(source=kind, num_classes=1, **common)), frames[0]


@pytest.mark.parametrize("kind", ["image_folder", "caption_folder", "gif", "mp4", "tar", "latents"])
def test_missing_file_ends_reading(kind, tmp_path):
    source, first = open_source(kind, tmp_path)
    first.unlink()
    with pytest.raises(InputError, match="could not be read .*No such file or directory.*not skipped") as error:
        source[0]
    assert not isinstance(error.value, CorruptRecord) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["image_folder", "caption_folder", "gif", "mp4", "tar", "latents"])
def test_truncated_file_is_a_corrupt_record(kind, tmp_path):
    source, first = open_source(kind, tmp_path)
    os.truncate(first, min(first.stat().st_size // 4, 700))
    with pytest.raises(CorruptRecord):
        source[0]


@pytest.mark.parametrize("fails", [1, 10])
def test_errors_that_pass_are_tried_again(fails, tmp_path, monkeypatch, pauses):
    source, _ = open_source("tar", tmp_path)
    real, left = os.pread, fails

    def failing(*args):
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, "pread", failing)
    if fails == 1:
        assert source[0]["image"].shape == (8, 8, 3) and pauses == [1.0]
        return
    with pytest.raises(InputError, match="Input/output error") as error:
        source[0]
    assert not isinstance(error.value, CorruptRecord) and pauses == [1.0, 4.0]


def test_io_error_within_a_video_is_no_damage(tmp_path, monkeypatch, pauses):
    path, real = write_clip(tmp_path / "clip", "mp4", 12), pathlib.Path.open

    class Failing:
        """A file of a mount that went away."""

        def __init__(self, file):
            self.file, self.seek, self.tell, self.name = file, file.seek, file.tell, file.name

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, size=-1):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pathlib.Path, "open", lambda path, mode: Failing(real(path, mode)))
    with pytest.raises(InputError, match="could not be read .*Input/output error") as error:
        video_files.read_frames(path, lambda count: [0])
    assert not isinstance(error.value, CorruptRecord) and len(pauses) == 2


def test_packets_of_a_video_are_not_kept():
    """They hold the whole compressed file."""

    class Packet:
        size, is_discard = 1, False

        def __init__(self, pts):
            self.pts = pts

    alive = []

    class Container:
        @staticmethod
        def demux(stream):
            for pts in (2, 0, 1, 3):
                packet = Packet(pts)
                alive.append(weakref.ref(packet))
                yield packet
                del packet
                assert sum(reference() is not None for reference in alive) <= 1

    assert video_files.frame_times(Container, None) == [0, 1, 2, 3]
    assert len(alive) == 4


def test_images_that_are_verified_are_not_kept(tmp_path, monkeypatch):
    write_clip(tmp_path / "a", "folder", 20)
    opened, alive, real = [], [], ImageFormat.open

    def noted(*args):
        image = real(*args)
        opened.append(weakref.ref(image))
        alive.append(sum(reference() is not None for reference in opened))
        return image

    monkeypatch.setattr(ImageFormat, "open", noted)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    make_source(DataConfig(source="image_folder", path=str(tmp_path), channels=3, num_classes=1))
    assert len(opened) == 20 and max(alive) <= 4


def test_few_shards_stay_open(tmp_path):
    """More shards than the process may open, read by 16 threads in any order."""
    write_tars(tmp_path, 150, per_shard=1)
    config = tar_config(tmp_path)
    source, kept = make_source(config), tar_shards.MAX_IDLE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(150), 2))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + kept + 20, hard))
    try:
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            read = list(pool.map(source.__getitem__, order.tolist()))
        assert len(os.listdir("/proc/self/fd")) <= used + kept
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    alone = pickle.loads(pickle.dumps(source))
    del source, pool
    assert len(os.listdir("/proc/self/fd")) <= used
    for index, example in zip(order, read, strict=True):
        np.testing.assert_array_equal(example["image"], alone[index]["image"])


@pytest.mark.parametrize("size", [0, 10, 500])
def test_broken_index_is_made_anew(size, tmp_path):
    write_tars(tmp_path, 3)
    make_source(tar_config(tmp_path))
    whole = (tmp_path / "index.npz").read_bytes()
    (tmp_path / "index.npz").write_bytes(whole[:size])
    assert len(make_source(tar_config(tmp_path))) == 3
    with np.load(tmp_path / "index.npz") as index:
        assert len(index["label"]) == 3


def test_index_of_several_hosts_has_a_temporary_name_of_each(tmp_path, monkeypatch):
    """Process numbers are alike on the hosts of a pod."""
    write_tars(tmp_path, 1)
    real, parts = os.replace, []
    monkeypatch.setattr(os, "replace", lambda part, path: (parts.append(str(part)), real(part, path)))
    for _ in range(2):
        make_source(tar_config(tmp_path))
        (tmp_path / "index.npz").unlink()
    assert len(set(parts)) == 2 and not list(tmp_path.glob(".index*"))


def test_folder_that_cannot_be_written_is_walked_each_time(tmp_path, monkeypatch):
    write_tars(tmp_path, 3)

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tar_shards.tempfile, "mkstemp", refuse)
    for _ in range(2):
        assert len(make_source(tar_config(tmp_path))) == 3
    assert not (tmp_path / "index.npz").exists()
