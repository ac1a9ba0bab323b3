"""TFDS, tar shards and folders as sources; class names; what is corrupt."""

import io
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_data import NAMES, digit_file, write_tars, write_tfds

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.digits import digits
from causalfusion_jax.data.fingerprint import fingerprint
from causalfusion_jax.data.image_files import ImageFormat, center_crop
from causalfusion_jax.data.pipeline import BatchIterator, host_batches
from causalfusion_jax.data.records import CorruptRecord
from causalfusion_jax.data.registry import class_names, make_source


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    return write_tfds(str(tmp_path_factory.mktemp("tfds")), 24)


def adm_crop(image, size):
    """Centre crop as ADM's image_datasets.py defines it, on arrays."""
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.BOX)
    scale = size / min(width, height)
    pixels = np.asarray(image.resize((round(width * scale), round(height * scale)), resample=Image.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (1200, 1600), (255, 256), (100, 256), (513, 512)])
def test_crop_is_adms_to_the_bit(shape):
    rng = np.random.default_rng(shape[0])
    low = Image.fromarray(rng.integers(0, 256, (shape[0] // 8, shape[1] // 8, 3), np.uint8))
    file = io.BytesIO()
    low.resize(shape[::-1], Image.LANCZOS).save(file, "JPEG", quality=90)
    with Image.open(file) as image:
        expected = adm_crop(image.convert("RGB"), 256)
        np.testing.assert_array_equal(np.asarray(center_crop(image.convert("RGB"), 256)), expected)
    decoded = ImageFormat(256, 3).decode("x.jpg", file)
    np.testing.assert_array_equal(np.round((decoded + 1) * 127.5), expected)


def tfds_config(folder, **changes):
    return DataConfig(
        **{"source": "tfds", "path": folder, "name": "tiny_digits", "image_size": 16, "channels": 3, **changes}
    )


def test_tfds_reads_what_the_builder_wrote(tfds_folder):
    source = make_source(tfds_config(tfds_folder))
    assert len(source) == 24 and source.class_names == NAMES
    expected = {}
    for i in range(24):
        expected[ImageFormat(16, 3).decode("", io.BytesIO(digit_file(i))).tobytes()] = digits("train").labels[i]
    for copy in (source, pickle.loads(pickle.dumps(source))):
        read = {example["image"].tobytes(): example["label"] for example in (copy[i] for i in range(24))}
        assert read == expected
    assert set(source[0]) == {"image", "label"} and source[0]["label"].dtype == np.int32
    assert len(make_source(tfds_config(tfds_folder, split="train[:25%]"))) == 6
    direct = tfds_config(tfds_folder + "/tiny_digits/1.0.0", name="")
    np.testing.assert_array_equal(make_source(direct)[5]["image"], source[5]["image"])


def test_tfds_captions_and_videos(tfds_folder):
    config = tfds_config(tfds_folder, caption_key="captions/text")
    source = make_source(config, captions=True)
    name = NAMES[source[3]["label"]]
    assert source[3]["caption"] == f"the digit {name}" and source.captions_of(3) == [f"the digit {name}", f"a {name}"]
    rng = np.random.default_rng(0)
    assert {source.draw(3, rng)["caption"] for _ in range(20)} == set(source.captions_of(3))
    videos = make_source(tfds_config(tfds_folder, image_key="clip", frames=2))
    clips = [videos[i]["image"] for i in range(24)]
    assert all(clip.shape == (2, 16, 16, 3) for clip in clips)
    repeated = [np.array_equal(*clip) for clip in clips]
    assert sum(repeated) == 6  # those of one frame
    longest = max(range(24), key=lambda i: len({videos.draw(i, rng)["image"].tobytes() for _ in range(20)}))
    assert len({videos.draw(longest, rng)["image"].tobytes() for _ in range(40)}) == 3
    batch = host_batches(videos, tfds_config(tfds_folder, image_key="clip", frames=2), 4, seed=0)[0]
    assert batch["image"].shape == (4, 2, 16, 16, 3)


def test_tfds_video_feature_with_a_stride(tfds_folder):
    """Encoded frames, as of ucf101: every second one, around the middle, or from a drawn first one."""
    config = tfds_config(tfds_folder, image_key="video", frames=4, frame_stride=2)
    source = make_source(config)
    numbers = lambda clip: tuple(np.round((clip.mean(axis=(1, 2, 3)) + 1) * 12.75).astype(int) - 1)
    assert {numbers(source[i]["image"]) for i in range(24)} == {(2, 4, 6, 8)}
    rng = np.random.default_rng(0)
    assert {numbers(source.draw(0, rng)["image"]) for _ in range(60)} == {tuple(range(i, i + 8, 2)) for i in range(6)}
    assert host_batches(source, config, 2, seed=0)[0]["image"].shape == (2, 4, 16, 16, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(name="imagenet2012"), r"imagenet2012 is not prepared in .*download_and_prepare\(\)"),
        (dict(name="cifar1O"), "did you mean cifar10"),
        (dict(name=""), "needs the data set's name"),
        (dict(split="test"), "tiny_digits has train"),
        (dict(num_classes=9), "tiny_digits has 10"),
        (dict(image_key="picture"), "must be an image; tiny_digits has captions/id, captions/text, clip, image, label"),
        (dict(image_key="image", frames=2), "a sequence of images"),
        (dict(label_key="clip"), "must be a class label"),
        (dict(latents=True, channels=4), "encode them by causalfusion_jax.encode"),
    ],
)
def test_tfds_that_is_not_there_is_one_line(tfds_folder, changes, words):
    with pytest.raises(InputError, match=words) as error:
        make_source(tfds_config(tfds_folder, **changes))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="caption_key"):
        make_source(tfds_config(tfds_folder, caption_key="words"), captions=True)


def test_fingerprints_of_splits_are_different(tfds_folder):
    first, same, second = (
        fingerprint(make_source(tfds_config(tfds_folder, split=split)))
        for split in ("train[:50%]", "train[:12]", "train[50%:]")
    )
    assert first == same != second


def test_tfds_record_that_is_damaged_is_named(tfds_folder, tmp_path):
    shutil.copytree(tfds_folder, tmp_path / "copy")
    (file,) = (tmp_path / "copy").rglob("*.array_record-*")
    content = np.fromfile(file, np.uint8)
    content[np.flatnonzero(content)[np.count_nonzero(content) // 2]] ^= 255
    content.tofile(file)
    source = make_source(tfds_config(str(tmp_path / "copy")))
    failed = []
    for i in range(24):
        try:
            source[i]
        except CorruptRecord as error:
            failed.append(error.value)
    assert len(failed) == 1 and failed[0].startswith("tiny_digits train["), failed
    file.unlink()
    with pytest.raises(InputError, match="could not be read .*No such file") as error:
        pickle.loads(pickle.dumps(source))[0]
    assert not isinstance(error.value, CorruptRecord)


def tar_config(folder, **changes):
    return DataConfig(**{"source": "tar", "path": folder, "image_size": 16, "channels": 3, **changes})


def test_tar_shards_by_offset(tmp_path):
    folder = write_tars(tmp_path, 12)
    source = make_source(tar_config(folder), captions=True)
    assert len(source) == 12 and source.name(7) == f"{folder}/digits-001.tar/part/0007.png"
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for i in (11, 0, 7):
            example = copy[i]
            expected = ImageFormat(16, 3).decode("", io.BytesIO(digit_file(i, "PNG")))
            np.testing.assert_array_equal(example["image"], expected)
            assert example["label"] == digits("train").labels[i] and example["caption"] == f"digit {i}"
    before = (tmp_path / "index.npz").stat().st_mtime_ns
    again = make_source(tar_config(folder))
    assert (tmp_path / "index.npz").stat().st_mtime_ns == before and set(again[0]) == {"image", "label"}
    write_tars(tmp_path, 15)
    assert len(make_source(tar_config(folder))) == 15


def test_tar_shards_that_make_no_sense(tmp_path):
    with pytest.raises(InputError, match="must be a folder"):
        make_source(tar_config(str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="holds no .*tar shards"):
        make_source(tar_config(str(tmp_path)))
    folder = write_tars(tmp_path, 12)
    with pytest.raises(InputError, match="labels of .* are 1..8"):
        make_source(tar_config(folder, num_classes=3))
    (tmp_path / "digits-003.tar").write_bytes(b"x" * 2000)
    with pytest.raises(InputError, match="digits-003.tar.*not a readable tar"):
        make_source(tar_config(folder))


def batches_of(config, count, hosts=1, workers=0, position=0, batch=4):
    source = make_source(config)
    iterators = [
        BatchIterator(host_batches(source, config, batch, 3, rows), position, workers, 0, config.max_corrupt)
        for rows in np.split(np.arange(batch), hosts)
    ]
    try:
        parts = [[next(iterator) for iterator in iterators] for _ in range(count)]
        corrupt = {name for iterator in iterators for name in iterator.corrupt}
    finally:
        for iterator in iterators:
            iterator.close()
    return [{name: np.concatenate([p[name] for p in part]) for name in part[0]} for part in parts], corrupt


def test_corrupt_records_are_skipped_by_name_and_nothing_else_moves(tmp_path, capsys):
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole, _ = batches_of(tar_config(write_tars(tmp_path / "whole", 12), flip=True), 6)
    config = tar_config(write_tars(tmp_path / "broken", 12, broken=(2, 9)), flip=True)
    batches, corrupt = batches_of(config, 6)
    assert corrupt == {f"{config.path}/digits-{n}" for n in ("000.tar/part/0002.png", "001.tar/part/0009.png")}
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2 and all("warning: corrupt record skipped: " in line for line in printed)
    changed = np.array(
        [
            (a != b).any(axis=(1, 2, 3))
            for a, b in zip((batch["image"] for batch in whole), (batch["image"] for batch in batches), strict=True)
        ]
    )
    assert changed.reshape(2, 12).sum(1).tolist() == [2, 2]  # in each epoch, their two places alone
    for hosts, workers in ((2, 0), (4, 0), (1, 2)):
        other, other_corrupt = batches_of(config, 6, hosts, workers)
        assert other_corrupt == corrupt
        for a, b in zip(batches, other, strict=True):
            np.testing.assert_array_equal(a["image"], b["image"])
            np.testing.assert_array_equal(a["label"], b["label"])
    resumed, _ = batches_of(config, 2, position=4)
    np.testing.assert_array_equal(resumed[1]["image"], batches[5]["image"])


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_corrupt_records_end_training(tmp_path, workers):
    config = tar_config(write_tars(tmp_path, 12, broken=(2, 5, 9)), max_corrupt=2)
    with pytest.raises(InputError, match=r"max_corrupt=2: 3 corrupt records, the first .*tar/part/.*png") as error:
        batches_of(config, 3, workers=workers)
    assert "\n" not in str(error.value)
    everything = tar_config(write_tars(tmp_path, 5, broken=range(5)), max_corrupt=100)
    for shard in sorted(tmp_path.glob("*.tar"))[1:]:
        shard.unlink()
    with pytest.raises(InputError, match="corrupt records"):
        batches_of(everything, 1, workers=workers)


def test_class_names_come_without_data(tfds_folder, tmp_path):
    imagenet = class_names(DataConfig(source="latents", latents=True, name="imagenet2012", num_classes=1000))
    assert len(set(map(str.casefold, imagenet))) == 1000
    assert imagenet[207] == "golden retriever" and imagenet[360] == "otter" and imagenet[0] == "tench"
    assert class_names(tfds_config(tfds_folder)) == class_names(DataConfig()) == NAMES
    assert class_names(tar_config(write_tars(tmp_path, 3))) == NAMES
    assert class_names(DataConfig(source="arrays", path="x")) == ()
    folders = DataConfig(source="image_folder", path=tfds_folder, channels=3, num_classes=2)
    assert class_names(folders) == ("downloads", "tiny_digits")
    with pytest.raises(InputError, match="not prepared"):
        class_names(tfds_config(tfds_folder, name="cifar10"))
