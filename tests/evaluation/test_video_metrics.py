"""FVD of known distributions, references and what they must have in common, videos from everywhere."""

import dataclasses
import json

import i3d_weights
import numpy as np
import pytest
from helpers import command
from tiny_data import clip_frame, write_clip

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config.evaluation import EvaluationConfig
from causalfusion_jax.data.pipeline import DataConfig, make_source
from causalfusion_jax.evaluation.images import Images, of_source, open_videos
from causalfusion_jax.evaluation.video_metrics import (
    VideoProtocol,
    VideoReference,
    bias_warning,
    make_video_reference,
    score_videos,
)
from causalfusion_jax.models.i3d import abstract_i3d
from causalfusion_jax.models.store import write_converted
from causalfusion_jax.prepare.names import from_released
from causalfusion_jax.prepare.released_i3d import i3d_table

PROTOCOL = VideoProtocol(frames=9)


class FirstFrame:
    """Stands for the I3D: 400 features that are the 20x20 pixels of the first frame."""

    def features(self, batches, names):
        assert tuple(names) == ("i3d_logits",)
        for videos in batches(7):
            assert videos.shape[1:] == (9, 20, 20, 1)
            yield {"i3d_logits": videos[:, 0].reshape(len(videos), 400).astype(np.float32)}


def videos_of(values) -> np.ndarray:
    """Videos of 10 frames whose first frame holds `values` [num, 400]."""
    videos = np.random.default_rng(0).integers(0, 256, (len(values), 10, 20, 20, 1)).astype(np.uint8)
    videos[:, 0] = values.reshape(-1, 20, 20, 1)
    return videos


def opened(tmp_path, name, values) -> str:
    np.savez(tmp_path / f"{name}.npz", videos_of(values), np.zeros(len(values), np.int32))
    return str(tmp_path / f"{name}.npz")


def test_fvd_of_known_normals(tmp_path):
    """Of a set and its shift by s: 400 s^2. Of a set and its double: |mean|^2 + tr C, as (2 - 1)^2 tr C is left."""
    values = np.random.default_rng(0).normal(60, 12, (30, 400)).clip(0, 120).astype(np.uint8)
    reference = VideoReference("--reference", opened(tmp_path, "real", values), PROTOCOL)
    exact = values.astype(np.float64)
    spread = np.square(exact.mean(0)).sum() + exact.var(0, ddof=1).sum()
    cases = ("same", values, 0.0), ("shifted", values + 5, 10_000.0), ("double", 2 * values, spread)
    for name, made, expected in cases:
        videos = open_videos("--samples", opened(tmp_path, name, made), 9)
        seen = []
        found = score_videos(videos, reference, FirstFrame(), seen.append)
        np.testing.assert_allclose(found["fvd"], expected, rtol=1e-6, atol=1e-2)
        assert seen == [7, 14, 21, 28, 30]


def test_references_on_disk(tmp_path):
    values = np.random.default_rng(0).normal(60, 12, (20, 400)).clip(0, 120).astype(np.uint8)
    real = open_videos("--samples", opened(tmp_path, "real", values), 9)
    make_video_reference(real, FirstFrame(), PROTOCOL, tmp_path / "ref.npz")
    with np.load(tmp_path / "ref.npz") as arrays:
        np.testing.assert_allclose(arrays["mu_i3d"], values.mean(0, dtype=np.float64), rtol=1e-6)
        np.testing.assert_allclose(arrays["sigma_i3d"], np.cov(values.astype(np.float64), rowvar=False), atol=1e-6)
        assert [arrays[name].tolist() for name in ("num", "frames", "resize")] == [[20], [9], ["tf1"]]
        stored = dict(arrays)
    reference = VideoReference("--reference", str(tmp_path / "ref.npz"), PROTOCOL)
    shifted = open_videos("--samples", opened(tmp_path, "shifted", values + 2), 9)
    np.testing.assert_allclose(score_videos(shifted, reference, FirstFrame())["fvd"], 1600, rtol=1e-6)
    for protocol, words in (
        (VideoProtocol(16), "is of 9 frames, resized by tf1; --fvd_frames=16"),
        (VideoProtocol(9, "half_pixel"), "--fvd_resize=half_pixel need another"),
    ):
        with pytest.raises(InputError, match=words):
            VideoReference("--reference", str(tmp_path / "ref.npz"), protocol)
    for changes, words in (
        ({"mu_i3d": np.zeros(5)}, r"mu_i3d must be finite \[400\]"),
        ({"frames": None}, "does not say its frames"),
    ):
        changed = {name: array for name, array in (stored | changes).items() if array is not None}
        np.savez(tmp_path / "bad.npz", **changed)
        with pytest.raises(InputError, match=words):
            VideoReference("--reference", str(tmp_path / "bad.npz"), PROTOCOL)
    one = Images(1, real.shape, lambda size: (batch[:1] for batch in real.batches(1)))
    with pytest.raises(InputError, match="at least two videos"):
        score_videos(one, reference, FirstFrame())
    with pytest.raises(InputError, match="at least two videos"):
        make_video_reference(one, FirstFrame(), PROTOCOL, tmp_path / "new.npz")
    assert not (tmp_path / "new.npz").exists()


def test_videos_of_folders_and_data(tmp_path):
    root = tmp_path / "clips"
    for name, kind, frames in (("a/0", "gif", 12), ("a/1", "folder", 9), ("b/2", "mp4", 10)):
        write_clip(root / name, kind, frames)
    folder = open_videos("--samples", str(root), 9)
    assert (folder.num, folder.shape) == (3, (9, 20, 24, 3))
    expected = np.stack([clip_frame(i) for i in range(9)])
    for size in (1, 2):
        videos = np.concatenate(list(folder.batches(size)))
        np.testing.assert_array_equal(videos[1], expected)
        levels = np.tile(expected.mean(axis=(1, 2, 3)), (3, 1))
        np.testing.assert_allclose(videos.mean(axis=(2, 3, 4)), levels, atol=2)
    data = DataConfig(source="clip_folder", path=str(root), image_size=16, channels=3, num_classes=2, frames=9)
    source = of_source("config.data", make_source(data), 9)
    assert (source.num, source.shape) == (3, (9, 16, 16, 3)) and next(source.batches(2)).dtype == np.uint8
    with pytest.raises(InputError, match="videos of at least 16 frames"):
        of_source("config.data", make_source(data), 16)
    with pytest.raises(InputError, match="clips/a/1'.*has 9 frames; 10 frames 1 apart need 10"):
        list(open_videos("--samples", str(root), 10).batches(3))
    (tmp_path / "empty").mkdir()
    for path, words in (
        (tmp_path / "empty", "neither samples.npz nor clips"),
        (tmp_path / "none.npz", "no such file"),
        (opened(tmp_path, "short", np.zeros((3, 400))), "frames >= 16"),
    ):
        with pytest.raises(InputError, match=words):
            open_videos("--samples", str(path), 16)
    np.savez(tmp_path / "latents.npz", np.zeros((3, 16, 4, 4, 4), np.float32))
    with pytest.raises(InputError, match="latents; sample with --vae"):
        open_videos("--samples", str(tmp_path / "latents.npz"), 16)


def test_small_samples_are_called_biased():
    assert bias_warning(2048) is None and "singular" not in bias_warning(401)
    assert "fvd of 400 videos is biased upwards; their covariance is singular" in bias_warning(400)


def test_training_does_not_evaluate_it():
    with pytest.raises(InputError, match="must be one of fd, accuracy"):
        dataclasses.replace(EvaluationConfig(), metric="fvd")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--metrics=fvd", "--workdir=x"], "--i3d=None: is needed for fvd"),
        (["--i3d=x"], "--reference=None: is needed for fvd"),
        (["--i3d=x", "--inception=y"], "--i3d='x': is of videos, --inception of images"),
        (["--i3d=x", "--reference=y", "--fvd_frames=8"], "--fvd_frames=8: must be >= 9"),
        (["--i3d=x", "--reference=y", "--fvd_resize=cubic"], "must be one of tf1, half_pixel"),
        (["--inception=x", "--fvd_frames=16"], "--fvd_frames=16: needs --i3d"),
        (["--i3d=x", "--make_reference", "--out=y.npz", "--num_reference_images=5"], "keeps no videos"),
        (["--i3d=configs", "--reference={0}", "--fvd_frames=9"], "--i3d='configs': is not a converted checkpoint"),
    ],
)
def test_bad_options_are_one_line(tmp_path, args, words):
    samples = opened(tmp_path, "samples", np.zeros((3, 400)))
    done = command("evaluate", f"--samples={samples}", *(arg.format(samples) for arg in args))
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.slow
def test_the_commands_at_full_size(tmp_path):
    """Videos of 16 frames, resized to 224x224, through a random I3D: a shift of the colours is a distance."""
    weights = i3d_weights.pytorch_i3d()
    write_converted(tmp_path / "i3d", "fvd_i3d", {}, {}, from_released(i3d_table(), weights, abstract_i3d()[1]))
    network = [f"--i3d={tmp_path / 'i3d'}", "--batch_size=2"]
    rng = np.random.default_rng(0)
    real = rng.integers(0, 128, (3, 16, 8, 8, 3)).astype(np.uint8)
    for name, videos in {"real": real, "shifted": real + 100}.items():
        np.savez(tmp_path / f"{name}.npz", videos, np.zeros(3, np.int32))
    done = command("evaluate", "--make_reference", f"--samples={tmp_path / 'real.npz'}", *network,
                   f"--out={tmp_path / 'ref.npz'}")  # fmt: skip
    assert done.returncode == 0 and "statistics of 3 videos of 16 frames" in done.stdout, done.stderr
    found = {}
    for name, reference in (("real", "ref"), ("shifted", "ref"), ("shifted", "real")):
        done = command("evaluate", f"--samples={tmp_path / name}.npz", f"--reference={tmp_path / reference}.npz",
                       *network)  # fmt: skip
        assert done.returncode == 0 and "fvd of 3 videos is biased" in done.stderr, done.stderr
        line = json.loads(done.stdout.splitlines()[-1])
        assert (line["num"], line["frames"], line["resize"]) == (3, 16, "tf1")
        found[name, reference] = line["fvd"]
    assert abs(found["real", "ref"]) < 1e-3 * found["shifted", "ref"]
    np.testing.assert_allclose(found["shifted", "ref"], found["shifted", "real"], rtol=1e-4)
