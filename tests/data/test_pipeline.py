"""Sources, and batches that depend on (seed, step) alone."""

import time

import numpy as np
import pytest
from helpers import train_run
from PIL import Image

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.digits import DigitsSource, digits
from causalfusion_jax.data.image_files import center_crop
from causalfusion_jax.data.image_folder import ImageFolderSource
from causalfusion_jax.data.pipeline import BatchIterator, host_batches
from causalfusion_jax.data.registry import describe, make_source


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in {"cat": 5, "ant": 3, "dog": 4}.items():
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (20 + i, 31, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


def folder_config(path, **changes):
    return DataConfig(
        **{"source": "image_folder", "path": str(path), "image_size": 8, "channels": 3, "num_classes": 3, **changes}
    )


def test_digits_halves():
    train, held_out = digits("train"), digits("held_out")
    assert (len(train), len(held_out)) == (898, 899)
    assert train.images.dtype == np.float32 and train[0]["image"].shape == (8, 8, 1)
    assert train.images.min() == -1 and train.images.max() == 1
    counts = [np.bincount(source.labels, minlength=10) for source in (train, held_out)]
    assert np.abs(counts[0] - counts[1]).max() <= 1
    both = np.concatenate([train.images, held_out.images]).reshape(1797, -1)
    from sklearn.datasets import load_digits

    everything = load_digits().data / 8 - 1
    assert sorted(map(tuple, both)) == sorted(map(tuple, everything.astype(np.float32)))


def test_folder_is_sorted_and_scaled(folder):
    source = ImageFolderSource(str(folder), 8, 3)
    assert source.class_names == ("ant", "cat", "dog") and len(source) == 12
    np.testing.assert_array_equal(source.labels, [0] * 3 + [1] * 5 + [2] * 4)
    example = source[4]
    assert example["image"].shape == (8, 8, 3) and example["image"].dtype == np.float32
    with Image.open(folder / "cat" / "1.png") as image:
        expected = np.asarray(center_crop(image, 8), np.float32) / 127.5 - 1
    np.testing.assert_array_equal(example["image"], expected)
    assert ImageFolderSource(str(folder), 8, 1)[0]["image"].shape == (8, 8, 1)


def test_description_names_shape_classes_and_what_is_left_out(folder):
    (folder / "ant" / "photo.WEBP").write_bytes(b"")
    (folder / "dog" / "more.webp").write_bytes(b"")
    (folder / "dog" / "README").write_bytes(b"")
    (folder / "dog" / "nested").mkdir()
    config = folder_config(folder, image_size=8, channels=1)
    assert describe(make_source(config), config) == (
        f"data: image_folder {folder}: 12 images of 8x8x1 (height x width x channels), 3 classes;"
        " left out in the folders of classes: 2 *.webp, 1 *.txt, 1 files without suffix, 1 folders"
    )
    assert describe(digits("train"), DataConfig()).startswith("data: digits: 898 images of 8x8x1 ")


def write_arrays(path, images, labels):
    np.save(path / "image.npy", images)
    np.save(path / "label.npy", labels)
    return str(path)


def test_arrays_of_pixels_videos_and_latents(tmp_path):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (6, 8, 8, 3), np.uint8), np.array([0, 1, 2, 0, 1, 2])
    common = dict(source="arrays", path=str(tmp_path), num_classes=3, image_size=8)
    write_arrays(tmp_path, pixels, labels)
    source = make_source(DataConfig(**common, channels=3))
    assert len(source) == 6 and source[2]["label"] == 2
    np.testing.assert_allclose(source[2]["image"], pixels[2] / 127.5 - 1, atol=1e-6)
    latents = rng.normal(size=(6, 5, 8, 8, 4)).astype(np.float16)
    write_arrays(tmp_path, latents, labels)
    config = DataConfig(**common, channels=4, frames=5, latents=True)
    np.testing.assert_array_equal(make_source(config)[3]["image"], latents[3].astype(np.float32))
    batch = host_batches(make_source(config), config, 2, seed=0)[0]
    assert batch["image"].shape == (2, 5, 8, 8, 4) and batch["image"].dtype == np.float32


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (np.zeros((4, 8, 8, 1), np.float32), [0, 1, 0, 1], "must be .num, 8, 8, 4."),
        (np.zeros((4, 8, 8, 4), np.uint8), [0, 1, 0, 1], "float type, not uint8"),
        (np.zeros((4, 8, 8, 4), np.float32), [0, 1, 0], "int .4."),
        (np.zeros((4, 8, 8, 4), np.float32), [0.0, 1, 0, 1], "int .4."),
        (np.zeros((4, 8, 8, 4), np.float32), [0, 1, 0, 2], "0..1 .data.num_classes.; they are 0..2"),
        (np.zeros((0, 8, 8, 4), np.float32), [], "must be"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path, images, labels, words):
    write_arrays(tmp_path, images, np.asarray(labels))
    config = DataConfig(source="arrays", path=str(tmp_path), num_classes=2, image_size=8, channels=4, latents=True)
    with pytest.raises(InputError, match=words):
        make_source(config)


def test_missing_and_broken_arrays(tmp_path):
    config = DataConfig(source="arrays", path=str(tmp_path), num_classes=2, image_size=8, channels=4, latents=True)
    with pytest.raises(InputError, match="no such file"):
        make_source(config)
    (tmp_path / "image.npy").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a readable"):
        make_source(config)


@pytest.mark.parametrize("size", [(64, 64), (33, 70), (70, 33), (16, 40), (9, 12)])
def test_center_crop(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    assert center_crop(image, 16).size == (16, 16)
    flat = Image.new("RGB", size[::-1], (10, 200, 30))
    assert set(center_crop(flat, 16).getdata()) == {(10, 200, 30)}


def test_folder_errors_name_the_problem(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(InputError, match="holds no images"):
        ImageFolderSource(str(empty), 8, 3)
    with pytest.raises(InputError, match="must be a folder"):
        ImageFolderSource(str(empty / "nowhere"), 8, 3)
    with pytest.raises(InputError, match="has 3 classes"):
        make_source(folder_config(folder, num_classes=4))
    whole = (folder / "dog" / "1.png").read_bytes()
    (folder / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"dog/1.png.*not a readable image"):
        ImageFolderSource(str(folder), 8, 3)
    assert len(ImageFolderSource(str(folder), 8, 3, verify=False)) == 12


@pytest.mark.parametrize(
    "bad",
    [
        dict(source="imagenet"),
        dict(image_size=16),
        dict(num_classes=11),
        dict(path="x"),
        dict(source="image_folder"),
        dict(source="image_folder", path="x", channels=4),
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(InputError):
        DataConfig(**bad)


def labels_of(source, config, batch, count, hosts=1, workers=0, position=0, seed=3):
    """`count` global batches, put together from all hosts."""
    iterators = [
        BatchIterator(host_batches(source, config, batch, seed, rows), position, workers)
        for rows in np.split(np.arange(batch), hosts)
    ]
    batches = []
    for _ in range(count):
        parts = [next(iterator) for iterator in iterators]
        batches.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    for iterator in iterators:
        iterator.close()
    return batches


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def test_same_global_batches_for_any_number_of_hosts(folder):
    config = folder_config(folder, flip=True)
    source = make_source(config)
    alone = labels_of(source, config, 4, 8)
    for hosts in (2, 4):
        assert_same(labels_of(source, config, 4, 8, hosts), alone)


def test_hosts_read_any_rows(folder):
    """Rows need not be consecutive, and hosts whose devices share examples read the same ones."""
    config = folder_config(folder, flip=True)
    source = make_source(config)
    alone = labels_of(source, config, 6, 7)
    for rows in ([0, 1, 4, 5], [2], [0, 1, 2, 3, 4, 5]):
        share = host_batches(source, config, 6, 3, np.array(rows))
        for step, whole in enumerate(alone):
            np.testing.assert_array_equal(share[step]["image"], whole["image"][rows])


@pytest.mark.parametrize("workers", [1, 2])
def test_same_batches_for_any_number_of_workers(folder, workers):
    config = folder_config(folder, flip=True)
    source = make_source(config)
    assert_same(labels_of(source, config, 4, 5, workers=workers, position=2), labels_of(source, config, 4, 7)[2:])


def test_resume_from_any_position():
    config, source = DataConfig(), DigitsSource("train")
    straight = labels_of(source, config, 64, 40)
    iterator = BatchIterator(host_batches(source, config, 64, 3))
    for _ in range(17):
        next(iterator)
    assert iterator.position == 17
    assert_same(labels_of(source, config, 64, 23, position=iterator.position), straight[17:])


def test_every_epoch_holds_every_example_once_in_a_new_order(folder):
    config = folder_config(folder)
    source = make_source(config)
    images = np.concatenate([b["image"] for b in labels_of(source, config, 4, 6)]).reshape(2, 12, -1)
    all_images = {source[i]["image"].tobytes() for i in range(12)}
    for epoch in images:
        assert {image.tobytes() for image in epoch} == all_images
    assert (images[0] != images[1]).any()
    assert any(
        (a["label"] != b["label"]).any()
        for a, b in zip(labels_of(source, config, 4, 3), labels_of(source, config, 4, 3, seed=4), strict=True)
    )


def test_flips_are_drawn_anew_each_epoch(folder):
    config = folder_config(folder, flip=True)
    source = make_source(config)
    plain = {source[i]["image"].tobytes(): i for i in range(12)}
    flips = np.full((8, 12), -1)
    images = np.concatenate([b["image"] for b in labels_of(source, config, 4, 24)])
    for k, image in enumerate(images):
        upright, mirrored = plain.get(image.tobytes()), plain.get(np.ascontiguousarray(image[:, ::-1]).tobytes())
        index = upright if upright is not None else mirrored
        assert index is not None, "neither an image of the folder nor its mirror image"
        flips[k // 12, index] = upright is None
    assert (flips >= 0).all() and 0.3 < flips.mean() < 0.7
    assert (flips != flips[0]).any()


class DigitsOfANote:
    """Digits by index, as a source that no process shares."""

    num_classes, class_names = 10, ()

    def __init__(self, num: int, seconds: float = 0.0):
        self.num, self.seconds = num, seconds

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return {"image": np.full((8, 8, 1), index, np.float32), "label": np.int32(index % 10)}


def test_resume_mid_epoch_under_other_hosts_and_workers(folder):
    config = folder_config(folder, flip=True)
    source = make_source(config)
    straight = labels_of(source, config, 4, 8)
    for hosts, workers in ((1, 0), (2, 0), (4, 0), (2, 2)):
        assert_same(labels_of(source, config, 4, 3, hosts, workers, position=5), straight[5:])


@pytest.mark.slow
@pytest.mark.parametrize(("hosts", "workers"), [(h, w) for h in (1, 2, 4) for w in (0, 2, 8) if (h, w) != (1, 0)])
def test_hosts_times_workers(folder, hosts, workers):
    config = folder_config(folder, flip=True)
    source = make_source(config)
    assert_same(labels_of(source, config, 4, 6, hosts, workers), labels_of(source, config, 4, 6))


def test_epochs_that_no_batch_divides_lose_and_repeat_nothing():
    source, config = DigitsOfANote(11), DataConfig()
    seen = np.concatenate([b["image"][:, 0, 0, 0] for b in labels_of(source, config, 4, 22, hosts=2)])
    assert seen.shape == (88,)
    for epoch in seen.reshape(8, 11):
        assert sorted(epoch) == list(range(11))


def test_flip_is_of_seed_index_and_epoch_alone():
    """However many are in a batch, and wherever shuffling puts an example, its flip is the same."""
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32)[:, None], (8, 8, 1))

    class Ramps(DigitsOfANote):
        def __getitem__(self, index):
            return {"image": ramp + 10 * index, "label": np.int32(0)}

    source, config = Ramps(12), folder_config("unused", flip=True)

    def flips(batch, seed):
        flips = {}
        images = np.concatenate([b["image"] for b in labels_of(source, config, batch, 36 // batch, seed=seed)])
        for position, image in enumerate(images):
            flips[position // 12, int(image[0, 0, 0] // 10)] = image[0, 0, 0] > image[0, 1, 0]
        return flips

    one = flips(3, seed=3)
    assert one == flips(12, seed=3) != flips(12, seed=4)
    assert len(one) == 36
    expected = {(e, i): bool(np.random.default_rng((3, e, i)).integers(2)) for e in range(3) for i in range(12)}
    assert one == expected


@pytest.mark.slow
def test_a_slow_source_shows_in_the_metrics(tmp_path, monkeypatch):
    from helpers import tiny_config

    from causalfusion_jax.config import experiment
    from causalfusion_jax.training import loop

    config = experiment.from_dict(
        tiny_config(train=dict(steps=4, batch_size=8), model=dict(layers=1), logging=dict(every=4))
    )
    written = []
    monkeypatch.setattr(loop, "make_source", lambda data: DigitsOfANote(64, seconds=0.1))
    train_run(config, str(tmp_path / "run"), lambda _, metrics: written.append(metrics))
    # Four steps of eight examples, each of which sleeps a tenth of a second, one after the other.
    seconds = 4 / written[0]["steps_per_second"]
    assert written[0]["data_wait_fraction"] * seconds > 3
