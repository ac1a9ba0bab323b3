"""Windows that roll: the same as whole clips while nothing is dropped, in constant memory after."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from helpers import command, random_params, tiny_config
from PIL import Image
from tiny_data import write_clip

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config import experiment
from causalfusion_jax.config.sampling import SamplerConfig
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.models.patches import patchify, unpatchify
from causalfusion_jax.models.presets import ACDIT
from causalfusion_jax.sampling.generation import SamplingJob, generate_images
from causalfusion_jax.sampling.rolling import RollingConfig, generate_videos, least_stride, make_windows
from causalfusion_jax.sampling.sampler import Given, SamplingSpec, image_keys, sample_tokens

SAMPLER = SamplerConfig(ar_steps=4, solver="ddim", solver_steps=3, cfg_scale=1.5)
CONDITION = Condition(np.array([3, 1], np.int32))


def make(**sections):
    """Clips of 8 frames of 2x2 tokens; blocks of 2 frames."""
    blocks = dict(order="raster", steps="block", block_size=8, weight="none")
    video = dict(
        data=dict(source="arrays", path="x", frames=8, image_size=4, latents=True, channels=1),
        model=dict(ACDIT, hidden=32, heads=2), factorization=blocks, diffusion=dict(t_shared_by="step"),
    )  # fmt: skip
    config = tiny_config(**video)
    for section, values in sections.items():
        config[section] |= values
    return experiment.from_dict(config)


@functools.cache
def params(config):
    return random_params(config.transformer, 0.08)


def videos(config, frames, clips=None, batch_size=2, **how):
    keep = 0 if clips is None else clips.shape[1]
    settings = RollingConfig(frames, **how)
    windows = make_windows(config, SAMPLER, settings, keep)
    job = SamplingJob(config, SAMPLER, CONDITION, seed=5, batch_size=batch_size)
    return generate_videos(job, params(config), windows, settings, clips)


def test_nothing_dropped_is_generating_whole():
    config = make()
    whole = generate_images(SamplingJob(config, SAMPLER, CONDITION, seed=5), params(config))
    np.testing.assert_array_equal(videos(config, 8), whole)
    np.testing.assert_array_equal(videos(config, 12)[:, :8], whole)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_every_window_is_the_sampler_on_the_frames_before(positions):
    """What a rolled window holds, from the sampler alone: known frames, then as many new ones."""
    config = make(model=dict(positions=positions))
    long = videos(config, 13)
    assert long.shape == (2, 13, 4, 4, 1)
    keys = jax.vmap(functools.partial(jax.random.fold_in, data=10))(image_keys(5, range(2)))
    order = np.tile(np.arange(32), (2, 1))
    known = np.asarray(patchify(long[:, 4:10], 2))
    sampler = dataclasses.replace(SAMPLER, ar_steps=1)
    spec = SamplingSpec(config.transformer, config.diffusion, config.factorization, sampler)
    tokens = sample_tokens(spec, params(config), keys, CONDITION, Given(order, known, np.repeat([0, 1, 2], 8)))
    np.testing.assert_allclose(long[:, 10:12], unpatchify(tokens, (8, 2, 2), 2)[:, 6:], atol=1e-5)


def test_memory_is_that_of_one_clip():
    """Twice as long runs the very same programs: every array, the cache's too, has the same shape."""
    config = make()
    videos(config, 10)
    programs = sample_tokens._cache_size()
    videos(config, 24)
    assert sample_tokens._cache_size() == programs
    (window,) = {make_windows(config, SAMPLER, RollingConfig(frames))[1].kept for frames in (10, 24)}
    assert window == 6


def test_clips_are_continued():
    config = make()
    clips = np.random.default_rng(0).normal(size=(2, 4, 4, 4, 1)).astype(np.float32)
    long = videos(config, 12, clips)
    assert long.shape[1] == 12
    np.testing.assert_array_equal(long[:, :4], clips)
    other = videos(config, 12, clips + np.float32(0.5) * (np.arange(2) == 1)[:, None, None, None, None])
    np.testing.assert_array_equal(other[0], long[0])
    assert np.abs(other[1, 4:] - long[1, 4:]).max() > 1e-3
    # A video does not depend on its batch.
    alone = videos(config, 12, clips, batch_size=1)
    np.testing.assert_allclose(alone, long, atol=1e-5 * np.abs(long).max())


def test_sinks_stay_in_the_window():
    config = make()
    without, with_sinks = videos(config, 12), videos(config, 12, sink_frames=2)
    np.testing.assert_array_equal(without[:, :8], with_sinks[:, :8])
    assert np.abs(without[:, 8:] - with_sinks[:, 8:]).max() > 1e-3


def test_strides():
    assert least_stride(make()) == 2
    # Blocks of half a frame, of one and a half, and drawn AR steps.
    assert least_stride(make(factorization=dict(block_size=2))) == 1
    assert least_stride(make(factorization=dict(block_size=16))) == 4
    drawn = make(factorization=dict(order="random", steps="decay", block_size=1), model=dict(
        conditioning="in_context", num_condition_tokens=4
    ))  # fmt: skip
    assert least_stride(drawn) == 2
    first, rolled = make_windows(drawn, SAMPLER, RollingConfig(20, stride=3), explicit_steps=True)
    assert first.sampler == SAMPLER and rolled.kept == 5 and rolled.sampler.ar_steps == 2
    _, rolled = make_windows(make(), SAMPLER, RollingConfig(20, stride=4))
    assert rolled.sampler.ar_steps == 2 and rolled.plan.known_step.tolist() == [0] * 8 + [1] * 8


@pytest.mark.parametrize(
    ("sections", "settings", "keep", "words"),
    [
        ({}, dict(frames=7), 0, "frames=7: must be >= 8"),
        ({}, dict(frames=16, stride=3), 0, "window_stride=3: leaves 5 of 8.*steps of 8 tokens"),
        ({}, dict(frames=16, stride=8), 0, "window_stride=8"),
        ({}, dict(frames=16, sink_frames=6), 0, "sink_frames=6: must be >= 0 and <= 5"),
        ({}, dict(frames=8, sink_frames=1), 0, "does not roll"),
        ({}, dict(frames=16), 3, "keep_frames=3: leaves 3 of 8"),
        ({}, dict(frames=16), 8, "keep_frames=8: must be >= 0 and <= 7"),
        (dict(factorization=dict(steps="fixed", num_steps=1)), dict(frames=16, stride=2), 0, "never seen a clean"),
        (dict(factorization=dict(steps="fixed", num_steps=1)), dict(frames=16), 0, "frames=16: must be 8"),
        (dict(data=dict(frames=1), model=dict(hidden=32)), dict(frames=16), 0, "makes images"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(sections, settings, keep, words):
    config = make(**sections) if sections.get("data") is None else experiment.from_dict(tiny_config())
    with pytest.raises(InputError, match=words):
        make_windows(config, SAMPLER, RollingConfig(**settings), keep)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("videos") / "run"
    done = command(
        "train", "--config=configs/moving_digits.py", f"--workdir={workdir}", "--config.data.image_size=12",
        "--config.model.patch_size=4",
        "--config.data.frames=4", "--config.factorization.block_size=9", "--config.model.hidden=32",
        "--config.model.heads=2", "--config.model.layers=2", "--config.train.steps=2", "--config.train.batch_size=4",
        "--config.optimizer.warmup_steps=0", "--config.logging.sample_every=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return workdir


def sample(run, out, *args):
    return command("sample", f"--workdir={run}", f"--out={out}", "--solver_steps=2", *args)


@pytest.mark.slow
def test_sample_longer_videos_and_continue_them(run, tmp_path):
    out = tmp_path / "out"
    done = sample(run, out, "--frames=10", "--num=3")
    assert done.returncode == 0, done.stderr
    with np.load(out / "samples.npz") as arrays:
        videos, labels = arrays["arr_0"], arrays["arr_1"]
    assert videos.shape == (3, 10, 12, 12, 1) and videos.dtype == np.uint8
    with Image.open(out / "clips.gif") as movie:
        assert movie.n_frames == 10
    assert Image.open(out / "grid.png").size == (10 * 40, 3 * 40)
    again = sample(run, out, "--frames=10", "--num=3")
    assert again.returncode == 0 and "already holds" in again.stdout
    done = sample(run, tmp_path / "on", "--frames=6", f"--condition={out / 'samples.npz'}", "--keep_frames=2")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "on" / "samples.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"][:, :2], videos[:, :2])
        assert arrays["arr_0"].shape[1] == 6 and arrays["arr_1"].tolist() == labels.tolist()
    # The frames of a GIF, every second one.
    continued = [f"--condition={write_clip(tmp_path / 'clip', 'gif', 7)}", "--keep_frames=3", "--frame_stride=2"]
    done = sample(run, tmp_path / "gif", "--frames=6", "--labels=3", *continued)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "gif" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (1, 6, 12, 12, 1)
        assert np.round(arrays["arr_0"][0, :3].mean(axis=(1, 2, 3)) / 10).tolist() == [1, 3, 5]
    scored = command("evaluate", f"--workdir={run}", f"--samples={out / 'samples.npz'}")
    assert scored.returncode == 0 and {"accuracy", "motion_error_beyond"} <= set(json.loads(scored.stdout))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--frames=3"], "--frames=3: must be >= 4"),
        (["--keep_frames=2"], "--keep_frames=2: needs --condition"),
        (["--frames=8", "--window_stride=4"], "--window_stride=4: must be >= 1 and <= 3"),
        (["--frame_stride=2"], "--frame_stride=2: needs --condition"),
        (["--condition=nowhere.mp4"], "--condition='nowhere.mp4': no such file"),
        (["--condition=configs"], "--condition='configs': holds no frames"),
        (["--condition=LICENSE", "--frame_stride=2"], "--frame_stride=2: is of videos and folders of frames"),
        (["--condition=configs/digits.py"], "--condition='configs/digits.py': neither an image nor an npz"),
    ],
)
def test_bad_video_input_touches_nothing(run, tmp_path, args, words):
    done = sample(run, tmp_path / "out", *args)
    assert done.returncode == 2 and words in done.stderr and not (tmp_path / "out").exists(), done.stderr
