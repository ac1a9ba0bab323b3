"""Latents on disk: written, resumed to the same bytes after any interruption, and trained on."""

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import ROOT, assert_all_succeed, command, command_env, start_processes
from tiny_data import NAMES, write_clip, write_tars, write_tfds, write_vae

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.lock import FolderLock
from causalfusion_jax.data import latents
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.pipeline import host_batches
from causalfusion_jax.data.registry import make_source
from causalfusion_jax.models.autoencoder import abstract_autoencoder, moments
from causalfusion_jax.prepare import encoding, latent_shards
from causalfusion_jax.prepare.encoding import ReadBatch, encode
from causalfusion_jax.prepare.settings import EncodeConfig
from causalfusion_jax.sampling.trained import open_autoencoder

IMAGES = 320
SETTINGS = EncodeConfig(batch_size=8, micro_batch=8, records_per_shard=12)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    return write_tfds(str(tmp_path_factory.mktemp("tfds")), IMAGES)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return DataConfig(source="tar", path=write_tars(tmp_path_factory.mktemp("tars"), 30), image_size=16, channels=3)


@pytest.fixture(scope="module")
def encoded(tars, vae, tmp_path_factory):
    """30 images in 3 shards, encoded without interruption, and their manifest."""
    out = tmp_path_factory.mktemp("latents") / "out"
    return out, encode(tars, *open_autoencoder(vae), str(out), SETTINGS)


def latent_config(out, **changes):
    values = {"source": "latents", "latents": True, "path": str(out), "image_size": 4, "channels": 4, **changes}
    return DataConfig(**values)


def test_records_are_the_autoencoders_gaussians(encoded, tars, vae):
    out, manifest = encoded
    assert manifest["shape"] == [4, 4, 4] and manifest["num_records"] == 30
    assert [shard["records"] for shard in manifest["shards"]] == [12, 12, 6]
    assert {path.name for path in out.iterdir()} == {s["file"] for s in manifest["shards"]} | {"manifest.json"}
    assert manifest["class_names"] == list(NAMES) and manifest["scaling_factor"] == 0.5
    converted, config = open_autoencoder(vae)
    assert manifest["request"]["vae"]["checksum"] == converted.fingerprint
    source, pixels = make_source(latent_config(out)), make_source(tars)
    images = np.stack([pixels[i]["image"] for i in range(30)])
    params = jax.tree.map(np.asarray, converted.params(abstract_autoencoder(config)[1]))
    records = [source.record(i) for i in range(30)]
    assert [int(record["index"]) for record in records] == list(range(30))
    assert [int(record["label"]) for record in records] == [pixels[i]["label"] for i in range(30)]
    assert records[0]["mean"].dtype == ml_dtypes.bfloat16
    for flip, view in enumerate((images, images[:, :, ::-1])):
        mean, log_variance = moments(config, params, view)
        for name, expected in {"mean": mean, "std": np.exp(0.5 * log_variance)}.items():
            stored = np.stack([record[name][flip] for record in records]).astype(np.float32)
            np.testing.assert_allclose(stored, expected, rtol=1e-2, atol=1e-4)
    kept = np.stack([record["mean"] for record in records]).astype(np.float64)
    np.testing.assert_allclose(manifest["statistics"]["mean"], kept.mean((0, 1, 2, 3)), rtol=1e-6)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips of two classes in files, which are to be read with a stride of 2."""
    root = tmp_path_factory.mktemp("clips")
    for i, kind in enumerate(("gif", "folder", "mp4", "gif")):
        write_clip(root / ("a" if i < 2 else "b") / str(i), kind, 9 + i)
    return DataConfig(
        source="clip_folder", path=str(root), image_size=16, channels=3, num_classes=2, frames=4, frame_stride=2
    )


def test_every_frame_of_a_clip_is_encoded(clips, vae, tmp_path):
    manifest = encode(clips, *open_autoencoder(vae), str(tmp_path / "out"), SETTINGS)
    assert manifest["shape"] == [4, 4, 4, 4] and manifest["num_records"] == 4
    assert manifest["request"]["data"]["frame_stride"] == 2 and manifest["class_names"] == ["a", "b"]
    config = latent_config(tmp_path / "out", frames=4, num_classes=2, flip=True)
    source, pixels = make_source(config), make_source(clips)
    converted, settings = open_autoencoder(vae)
    params = jax.tree.map(np.asarray, converted.params(abstract_autoencoder(settings)[1]))
    frames = np.concatenate([pixels[i]["image"] for i in range(4)])
    for flip, view in enumerate((frames, frames[:, :, ::-1])):
        mean, log_variance = moments(settings, params, view)
        for name, expected in {"mean": mean, "std": np.exp(0.5 * log_variance)}.items():
            stored = np.concatenate([source.record(i)[name][flip] for i in range(4)]).astype(np.float32)
            np.testing.assert_allclose(stored, expected, rtol=1e-2, atol=1e-4)
    batch = host_batches(source, config, 4, seed=0)[0]
    assert batch["image"].shape == (4, 4, 4, 4, 4) and sorted(batch["label"]) == [0, 0, 1, 1]


def test_training_draws_from_seed_index_and_epoch(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    # Image i lies at 100 i, mirrored at 100 i + 50, with a standard deviation of 2.
    path = tmp_path / latents.shard_name(0, 1)
    writer = ArrayRecordWriter(str(path), latents.WRITER_OPTIONS)
    for i in range(20):
        mean = np.stack([np.full((4, 4, 4), 100 * i), np.full((4, 4, 4), 100 * i + 50)]).astype(np.float32)
        record = {"mean": mean.astype(ml_dtypes.bfloat16), "std": np.full_like(mean, 2).astype(ml_dtypes.bfloat16)}
        writer.write(latents.pack(record | {"label": np.array(i % 10, np.int32), "index": np.array(i)}))
    writer.close()
    shard = {"file": path.name, "first_index": 0, "records": 20, **files.describe_file(path)}
    files.write_json(
        tmp_path / "manifest.json",
        {
            "version": 1,
            "shape": [4, 4, 4],
            "num_classes": 10,
            "class_names": [],
            "captions": False,
            "scaling_factor": 0.5,
            "shards": [shard],
        },
    )
    config = latent_config(tmp_path, flip=True)
    source = make_source(config)
    epochs = [host_batches(source, config, 20, seed=5)[k] for k in range(50)]
    again = host_batches(make_source(config), config, 10, seed=5)
    np.testing.assert_array_equal(epochs[1]["image"][10:], again[3]["image"])
    drawn = np.stack([epoch["image"] for epoch in epochs]).reshape(50, 20, 64) / 0.5
    position = np.round(drawn.mean(-1) / 50).astype(int)  # bfloat16 keeps the means to 4 in 1,000
    assert all(sorted(epoch) == list(range(20)) for epoch in position // 2)
    assert 0.4 < (position % 2).mean() < 0.6
    stored = np.stack([source.record(i)["mean"][:, 0, 0, 0] for i in range(20)]).astype(np.float32).ravel()
    noise = (drawn - stored[position][..., None]) / 2
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    # Each epoch draws anew.
    first, second = (epoch["image"][np.argsort(order // 2)] for epoch, order in zip(epochs[:2], position, strict=False))
    assert (first != second).any(axis=(1, 2, 3)).all()
    upright = host_batches(source, dataclasses.replace(config, flip=False), 20, seed=5)[0]["image"] / 0.5
    assert (np.round(upright.mean((1, 2, 3)) / 50).astype(int) % 2 == 0).all()
    np.testing.assert_array_equal(source[4]["image"], np.full((4, 4, 4), 200, np.float32))


class Killed(BaseException):
    """Raised instead of ending the process."""


@pytest.mark.parametrize("seed", range(3))
def test_killed_anywhere_it_ends_in_the_same_bytes(seed, encoded, tars, vae, tmp_path, monkeypatch):
    expected, _ = encoded
    out, rng = tmp_path / "out", random.Random(seed)
    # The process ends at a random call of each function; the last time between the manifest and the clean-up.
    for module, name, calls in (
        (latents, "pack", 24),
        (files, "write_json", 2),
        (files, "describe_file", 3),
        (encoding.shutil, "rmtree", 1),
    ):
        left = rng.randrange(calls)
        real = getattr(module, name)

        def dying(*args, real=real):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*args)

        monkeypatch.setattr(module, name, dying)
        with pytest.raises(Killed):
            encode(tars, *open_autoencoder(vae), str(out), SETTINGS)
        monkeypatch.undo()
        if name != "rmtree":
            with pytest.raises(InputError, match="not finished|holds no latents"):
                make_source(latent_config(out))
    encode(tars, *open_autoencoder(vae), str(out), SETTINGS)
    assert files.describe(out) == files.describe(expected)


@pytest.mark.slow
def test_mesh_captions_and_what_is_corrupt(encoded, vae, tmp_path, capsys):
    expected, _ = encoded
    (tmp_path / "tars").mkdir()
    tars = DataConfig(
        source="tar", path=write_tars(tmp_path / "tars", 30, broken=(3, 12)), image_size=16, channels=3, workers=1
    )
    few = dataclasses.replace(SETTINGS, captions=True)
    with pytest.raises(InputError, match="2 corrupt records"):
        encode(dataclasses.replace(tars, max_corrupt=1), *open_autoencoder(vae), str(tmp_path / "few"), few)
    manifest = encode(tars, *open_autoencoder(vae), str(tmp_path / "few"), few)
    assert [record["index"] for record in manifest["corrupt"]] == [3, 12]
    assert "part/0003.png" in manifest["corrupt"][0]["name"] and manifest["num_records"] == 28
    source, all_of_them = (
        make_source(latent_config(tmp_path / "few"), captions=True),
        make_source(latent_config(expected)),
    )
    kept = [i for i in range(30) if i not in (3, 12)]
    assert [int(source.record(i)["index"]) for i in range(28)] == kept
    assert source[27]["caption"] == "digit 29"
    for i, index in enumerate(kept):
        np.testing.assert_array_equal(source[i]["image"], all_of_them[index]["image"])
    assert "corrupt record skipped" in capsys.readouterr().err


def test_scaling_that_does_not_fit_is_reported(capsys):
    sums = {"count": 4, "sum": [4.0, 8.0], "sum_of_squares": [40.0, 52.0]}
    report = latent_shards.report_statistics(sums, 0.5)
    assert report["mean"] == [1.0, 2.0] and report["std"] == [3.0, 3.0]
    overall = np.sqrt(11.5 - 1.5**2)
    assert report["scaled_std"] == pytest.approx(0.5 * overall)
    assert f"{1 / overall:.4g} would fit" in capsys.readouterr().err
    latent_shards.report_statistics(sums, 0.33)
    assert capsys.readouterr().err == ""


def test_what_does_not_fit_is_refused(encoded, tars, vae, tmp_path):
    out, _ = encoded
    for changes, words in (
        (dict(channels=16), "shape .4, 4, 4.; the config's .4, 4, 16."),
        (dict(num_classes=9), "has 10 classes"),
        (dict(path=str(tmp_path)), "holds no latents"),
        (dict(path=""), "source latents needs the path of its folder"),
    ):
        with pytest.raises(InputError, match=words):
            make_source(latent_config(**{"out": out, **changes} if "path" not in changes else {"out": "", **changes}))
    with pytest.raises(InputError, match="holds no captions"):
        make_source(latent_config(out), captions=True)
    opened = open_autoencoder(vae)
    for data, words in (
        (dataclasses.replace(tars, image_size=18), "multiple of 4"),
        (DataConfig(), "must be 3"),
        (latent_config(out), "images to encode"),
        (dataclasses.replace(tars, latents=True, channels=16, image_size=4), "must be 4, the channels"),
    ):
        with pytest.raises(InputError, match=words):
            encode(data, *opened, str(tmp_path / "new"), SETTINGS)
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="another request .records_per_shard 12, now 10"):
        encode(tars, *opened, str(out), dataclasses.replace(SETTINGS, records_per_shard=10))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="new or empty"):
        encode(tars, *opened, str(tmp_path / "full"), SETTINGS)
    with pytest.raises(InputError, match="multiple of the 8 devices"):
        encode(tars, *opened, str(tmp_path / "new"), dataclasses.replace(SETTINGS, batch_size=12))


def test_other_data_of_the_same_counts_are_refused(encoded, tars, vae, tmp_path):
    """Images of the same number, names and labels, one of which is another."""
    out, _ = encoded
    other = dataclasses.replace(tars, path=write_tars(tmp_path, 30, broken=(3,)))
    with pytest.raises(InputError, match="another request .listing"):
        encode(other, *open_autoencoder(vae), str(out), SETTINGS)
    # The same data in another folder are the same request.
    (tmp_path / "moved").mkdir()
    moved = dataclasses.replace(tars, path=write_tars(tmp_path / "moved", 30))
    assert encode(moved, *open_autoencoder(vae), str(out), SETTINGS)["num_records"] == 30


def test_folder_that_another_process_writes_is_refused(encoded, tars, vae):
    out, _ = encoded
    with FolderLock(out, "--out"), pytest.raises(InputError, match="--out=.*is in use by process"):
        encode(tars, *open_autoencoder(vae), str(out), SETTINGS)
    encode(tars, *open_autoencoder(vae), str(out), SETTINGS)
    assert not (out / files.LEASE).exists()


def test_all_captions_are_kept_and_what_is_corrupt_is_left_out(tmp_path):
    for i in range(2):
        write_clip(tmp_path / str(i), "gif", 1).rename(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_text("no image")
    captions = {"0.png": ["one", "uno  \n eins"], "1.png": "two", "2.png": "three"}
    records = [{"file_name": name, "caption": caption} for name, caption in captions.items()]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DataConfig(source="caption_folder", path=str(tmp_path), image_size=16, channels=3, num_classes=1)
    batch = ReadBatch(make_source(config, captions=True), threads=2)((5, range(3)))
    assert batch["caption"] == ["one\nuno eins", "two"] and batch["index"].tolist() == [0, 1]
    assert batch["image"].shape == (2, 16, 16, 3) and batch["shard"] == 5 and batch["last"] == 2
    ((name, reason, index),) = batch["corrupt"]
    assert name == str(tmp_path / "2.png") and "not a readable image" in reason and index == 2


def test_damage_is_found(tars, vae, tmp_path, monkeypatch):
    opened, out = open_autoencoder(vae), tmp_path / "out"
    real = latent_shards.write_manifest

    def damage(shards, *args):
        path = shards.path(1)
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
        real(shards, *args)

    monkeypatch.setattr(latent_shards, "write_manifest", damage)
    with pytest.raises(InputError, match="00001-of-00003.*another checksum.; remove it, and encode again"):
        encode(tars, *opened, str(out), SETTINGS)
    monkeypatch.undo()
    (out / latents.shard_name(1, 3)).unlink()
    encode(tars, *opened, str(out), SETTINGS)
    make_source(latent_config(out))
    (out / latents.shard_name(2, 3)).write_bytes(b"")
    with pytest.raises(InputError, match="must have .* bytes, has 0"):
        make_source(latent_config(out))


TINY = (
    "--config=configs/digits.py",
    "--config.model.hidden=32",
    "--config.model.heads=2",
    "--config.model.layers=2",
    "--config.optimizer.warmup_steps=3",
    "--config.train.batch_size=16",
    "--config.train.steps=6",
    "--config.logging.every=1",
    "--config.logging.sample_every=0",
    "--config.data.flip=True",
)
LATENTS = ("--config.data.latents=True", "--config.data.image_size=4", "--config.data.channels=4",
           "--config.model.patch_size=1")  # fmt: skip


def images(folder):
    """Options of the TFDS data set as pixels."""
    return (
        "--config.data.source=tfds",
        "--config.data.name=tiny_digits",
        f"--config.data.path={folder}",
        "--config.data.image_size=16",
        "--config.data.channels=3",
        "--config.model.patch_size=4",
    )


def latent_options(out):
    return ("--config.data.source=latents", f"--config.data.path={out}", *LATENTS)


def encode_args(folder, vae, out):
    """Options of `encode`: the model's config, with the images as its source."""
    return (*TINY, *images(folder), *LATENTS, f"--vae={vae}", f"--out={out}", "--batch_size=16",
            "--records_per_shard=64")  # fmt: skip


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_tfds_trains_as_images_and_as_latents(tfds_folder, vae, tmp_path):
    refused = command("train", *TINY, *images(tfds_folder), *LATENTS, f"--workdir={tmp_path / 'none'}")
    assert refused.returncode == 2 and "causalfusion_jax.encode" in refused.stderr
    done = command("encode", *encode_args(tfds_folder, vae, tmp_path / "latents"))
    assert done.returncode == 0 and f"{IMAGES} latents of shape [4, 4, 4]" in done.stdout, done.stderr
    for name, options in {"pixels": images(tfds_folder), "latents": latent_options(tmp_path / "latents")}.items():
        done = command("train", *TINY, *options, f"--workdir={tmp_path / 'runs' / name}")
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 6 and all(np.isfinite(line["loss"]) for line in lines)
        assert lines[-1]["corrupt_records"] == 0 and 0 <= lines[-1]["data_wait_fraction"] < 1


VIDEO = (
    "--config=configs/ucf101_acdit.py:XL",
    "--config.data.image_size=4",
    "--config.data.frames=4",
    "--config.data.num_classes=2",
    "--config.model.patch_size=2",
    "--config.factorization.block_size=4",
    "--config.mesh.preset=dp",
    "--config.optimizer.warmup_steps=0",
    *TINY[1:4],
    *TINY[5:],
)


@pytest.mark.slow
def test_clips_are_encoded_trained_on_and_continued(clips, vae, tmp_path):
    """The config of UCF-101, small, from files to a longer video of pixels."""
    files_of = ("--config.data.source=clip_folder", f"--config.data.path={clips.path}", "--config.data.frame_stride=2")
    done = command("encode", *VIDEO, *files_of, f"--vae={vae}", f"--out={tmp_path / 'latents'}", "--batch_size=2")
    assert done.returncode == 0 and "4 latents of shape [4, 4, 4, 4]" in done.stdout, done.stderr
    run = tmp_path / "run"
    done = command("train", *VIDEO, f"--config.data.path={tmp_path / 'latents'}", f"--workdir={run}")
    assert done.returncode == 0 and np.isfinite(losses(run)).all() and len(losses(run)) == 6, done.stderr
    clip = write_clip(tmp_path / "clip", "mp4", 9)
    continued = (f"--workdir={run}", f"--condition={clip}", "--frames=6", "--keep_frames=2", "--labels=1")
    on = (f"--vae={vae}", "--frame_stride=2", "--solver_steps=2", f"--out={tmp_path / 'on'}")
    done = command("sample", *continued, *on)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "on" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (1, 6, 16, 16, 3)
        assert np.round(arrays["arr_0"][0, :2].mean(axis=(1, 2, 3)) / 10).tolist() == [1, 3]
    done = command("sample", *continued, f"--out={tmp_path / 'none'}")
    assert done.returncode == 2 and "must be float latents (or give --vae" in done.stderr


def processes(name, count, *args):
    """Runs a command as `count` processes of one job."""
    assert_all_succeed(start_processes(count, f"causalfusion_jax.{name}", *args))


@pytest.mark.slow
def test_one_and_two_processes_are_one(tfds_folder, vae, tmp_path):
    for count in (1, 2):
        out = tmp_path / f"latents_{count}"
        processes("encode", count, *encode_args(tfds_folder, vae, out))
        for name, options in {"pixels": images(tfds_folder), "latents": latent_options(out)}.items():
            processes("train", count, *TINY, *options, f"--workdir={tmp_path / 'runs' / f'{name}_{count}'}")
    assert files.describe(tmp_path / "latents_1") == files.describe(tmp_path / "latents_2")
    for name in ("pixels", "latents"):
        one, two = (losses(tmp_path / "runs" / f"{name}_{count}") for count in (1, 2))
        assert len(one) == 6
        np.testing.assert_allclose(one, two, rtol=1e-4)


@pytest.mark.slow
def test_kill_9_at_three_random_points(tfds_folder, vae, tmp_path):
    rng = random.Random(int(time.time()))

    def start(out):
        args = [sys.executable, "-m", "host_reads", "causalfusion_jax.encode", *encode_args(tfds_folder, vae, out)]
        args += ["--batch_size=4", "--records_per_shard=10"]
        return subprocess.Popen(args, cwd=ROOT, env=command_env(), stdout=subprocess.PIPE, text=True)

    assert start(tmp_path / "straight").wait(timeout=600) == 0
    whole = 32
    points = sorted(rng.sample(range(1, whole), 3))
    for point in points:
        process = start(tmp_path / "killed")
        while process.poll() is None and len(list((tmp_path / "killed").glob("*.array_record"))) < point:
            time.sleep(rng.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it was done before it was killed at {points}"
        assert not (tmp_path / "killed" / "manifest.json").exists()
    assert start(tmp_path / "killed").wait(timeout=600) == 0
    assert files.describe(tmp_path / "killed") == files.describe(tmp_path / "straight")
    print("killed at shards", points)
