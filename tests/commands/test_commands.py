"""The commands train, sample, edit and evaluate, run as a user runs them."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, command, command_env
from PIL import Image

from causalfusion_jax.checkpoints.manifests import manifest_path
from causalfusion_jax.cli.app import INTERRUPTED

SMALL = (
    "--config=configs/digits.py", "--config.model.hidden=32", "--config.model.heads=2", "--config.train.steps=30",
    "--config.train.batch_size=8",
    "--config.optimizer.warmup_steps=3", "--config.checkpoint.every=6", "--config.checkpoint.keep=4",
    "--config.logging.every=10", "--config.logging.sample_every=0",
)  # fmt: skip


def train(workdir, *args):
    return command("train", *SMALL, f"--workdir={workdir}", *args)


def sample(workdir, out, *args):
    return command("sample", f"--workdir={workdir}", f"--out={out}", "--num=20", "--solver_steps=5", *args)


def samples(workdir, out):
    done = sample(workdir, out, "--ar_steps=4", "--seed=3")
    assert done.returncode == 0, done.stderr
    return (out / "samples.npz").read_bytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = train(workdir, "--config.logging.sample_every=15")
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def assert_refused(done, *words):
    """One clear line, status 2."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])


def test_a_run_leaves_what_it_says(run):
    workdir, output = run
    assert output.startswith("data: digits: 898 images of 8x8x1 ")
    assert "step 30/30" in output and "ETA 0:00:00" in output and "MFU" in output
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    wanted = {
        "loss",
        "mse_by_t/0",
        "mse_by_ar_step/0",
        "grad_norm",
        "learning_rate",
        "steps_per_second",
        "images_per_second",
        "model_flops_utilization",
        "nonfinite_steps",
        "data_wait_fraction",
    }
    assert wanted <= set(lines[-1]) and lines[-1]["loss"] < lines[0]["loss"]
    assert sorted(path.name for path in (workdir / "samples").iterdir()) == ["00000015.png", "00000030.png"]
    assert list((workdir / "tensorboard").iterdir())
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [12, 18, 24, 30]
    again = train(workdir)
    assert again.returncode == 0 and "already trained to step 30" in again.stdout


def test_sample_and_evaluate(run, tmp_path):
    workdir, _ = run
    first, second = samples(workdir, tmp_path / "a"), samples(workdir, tmp_path / "b")
    assert first == second, "same seed, same bytes"
    with np.load(tmp_path / "a" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (20, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].dtype.kind == "i" and np.bincount(arrays["arr_1"]).tolist() == [2] * 10
    assert Image.open(tmp_path / "a" / "grid.png").size == (360, 72)
    again = sample(workdir, tmp_path / "a", "--ar_steps=4", "--seed=3")
    assert again.returncode == 0 and "already holds" in again.stdout
    scored = command("evaluate", f"--workdir={workdir}", f"--samples={tmp_path / 'a' / 'samples.npz'}")
    assert scored.returncode == 0, scored.stderr
    line = json.loads(scored.stdout)
    assert 0 <= line["accuracy"] <= 1 and line["fd"] > 0
    assert json.loads((tmp_path / "a" / "evaluation.json").read_text()) == line
    out = tmp_path / "c"
    chosen = command("sample", f"--workdir={workdir}", f"--out={out}", "--labels=3,Three,7", "--solver_steps=3")
    assert chosen.returncode == 0, chosen.stderr
    with np.load(out / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == [3, 3, 7]


def start(workdir):
    """Training in the background, stdout read line by line; implicit host reads fail in it."""
    # Every step is logged, so that the test can follow it.
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "host_reads",
            "causalfusion_jax.train",
            *SMALL,
            f"--workdir={workdir}",
            "--config.logging.every=1",
        ],
        cwd=ROOT,
        env=command_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process, wanted):
    for line in process.stdout:
        if line.startswith("step") and int(line.split()[1].split("/")[0]) >= wanted:
            return
    raise AssertionError(process.stderr.read())


def edit(workdir, out, image, *args):
    return command("edit", f"--workdir={workdir}", f"--out={out}", f"--image={image}", "--solver_steps=3", *args)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "digit.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)).save(path)
    return path


def test_edit_keeps_what_is_not_masked(run, picture, tmp_path):
    workdir, out = run[0], tmp_path / "out"
    args = ("--mask=1,5,4,8", "--label=Three", "--num=3", "--ar_steps=2")
    done = edit(workdir, out, picture, *args)
    assert done.returncode == 0, done.stderr
    assert "rounded outward to whole tokens of 2x2: 16 pixels are regenerated instead of 9" in done.stderr
    assert f"weights: ema of step 30 of {workdir}\n" in done.stdout
    before = np.asarray(Image.open(picture))
    with np.load(out / "samples.npz") as arrays:
        images, labels, mask = arrays["arr_0"], arrays["arr_1"], arrays["mask"]
        np.testing.assert_array_equal(arrays["before"][0, ..., 0], before)
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8 and labels.tolist() == [3] * 3
    assert mask.sum() == 16 and mask[4:, :4].all()
    np.testing.assert_array_equal(images[:, ~mask, 0], before[~mask][None].repeat(3, axis=0))
    assert (images[0] != images[1]).any()
    np.testing.assert_array_equal(Image.open(out / "002.png"), images[2, ..., 0])
    assert Image.open(out / "strip.png").size == (5 * 36, 36)
    again = edit(workdir, out, picture, *args)
    assert again.returncode == 0 and "already holds" in again.stdout
    assert_refused(edit(workdir, out, picture, "--mask=top", "--label=3"), "--out", "exists with other content")
    # Its results edited again, with their labels and the same mask.
    done = edit(workdir, tmp_path / "more", out / "samples.npz", f"--mask={out / 'mask.png'}")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "more" / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == labels.tolist() and (arrays["mask"] == mask).all()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--mask=middle", "--label=3"], ["--mask='middle'", "center"]),
        (["--mask=0,0,8,8", "--label=3"], ["--mask", "nothing to keep"]),
        (["--mask=0,0,9,8", "--label=3"], ["--mask", "x1 <= 8"]),
        (["--mask=top"], ["--label", "is required"]),
        (["--mask=top", "--label=10"], ["--label=10", "0..9"]),
        (["--mask=top", "--label=1,2"], ["--label", "one class, or 1"]),
        (["--mask=top", "--label=3", "--ar_steps=9"], ["--ar_steps=9", "<= 8"]),
        (["--mask=top", "--label=3", "--num=0"], ["--num=0"]),
        (["--mask=top", "--label=3", "--nopaste"], ["--paste", "needs --vae"]),
        (["--mask=top", "--label=3", "--offset=0,0"], ["--offset", "needs --canvas"]),
        (["--canvas=16,8", "--label=3"], ["--canvas", "positions are learned"]),
        (["--canvas=6,8", "--label=3"], ["--canvas", "at least 8,8"]),
        (["--label=3"], ["--mask", "is required"]),
    ],
)
def test_bad_editing_input_touches_nothing(run, picture, tmp_path, args, words):
    assert_refused(edit(run[0], tmp_path / "out", picture, *args), *words)
    assert not (tmp_path / "out").exists()


def test_an_image_or_mask_of_another_size_is_refused(run, picture, tmp_path):
    Image.new("L", (8, 10)).save(tmp_path / "tall.png")
    (tmp_path / "notes.txt").write_text("no image")
    refused = {
        (tmp_path / "tall.png", "top"): "must be 8x8x1 (height, width, channels), as the model's; it is 10x8x1",
        (tmp_path / "notes.txt", "top"): "neither an image nor an npz",
        (tmp_path / "none.png", "top"): "no such file",
        (picture, tmp_path / "tall.png"): "a picture of 8x8 pixels; it is 8x10",
    }
    for (image, mask), words in refused.items():
        assert_refused(edit(run[0], tmp_path / "out", image, f"--mask={mask}", "--label=3"), words)


@pytest.fixture(scope="module")
def expected(run, tmp_path_factory):
    return samples(run[0], tmp_path_factory.mktemp("expected") / "out")


def test_exported_and_imported_it_samples_what_the_run_samples(run, expected, tmp_path):
    how = ("--num=20", "--solver_steps=5", "--ar_steps=4", "--seed=3")
    assert sampled_through_a_file(tmp_path, run[0], "causalfusion", 30, how) == expected


@pytest.mark.slow
def test_exported_and_imported_videos_are_those_of_the_run(tmp_path):
    done = command(
        "train", "--config=configs/moving_digits.py", "--config.model.hidden=48", "--config.train.steps=4",
        "--config.optimizer.warmup_steps=2", "--config.logging.sample_every=0", f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = command("sample", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'own'}", "--num=2")
    assert done.returncode == 0, done.stderr
    own = (tmp_path / "own" / "samples.npz").read_bytes()
    assert sampled_through_a_file(tmp_path, tmp_path / "run", "acdit", 4, ["--num=2"]) == own


def sampled_through_a_file(tmp_path, workdir, kind, step, how):
    """The samples of a run's weights that were exported and imported."""
    file, folder, out = tmp_path / "run.safetensors", tmp_path / "imported", tmp_path / "out"
    done = command("convert", "--reverse", f"--checkpoint={workdir}", f"--out={file}")
    assert f"weights: ema of step {step} of {workdir}\n" in done.stdout, done.stderr
    done = command("convert", f"--kind={kind}", f"--checkpoint={file}", f"--out={folder}")
    assert f"weights: ema of step {step} of run.safetensors\n" in done.stdout, done.stderr
    done = command("sample", f"--checkpoint={folder}", f"--out={out}", *how)
    assert f"weights: ema of step {step} of run.safetensors in {folder}\n" in done.stdout, done.stderr
    return (out / "samples.npz").read_bytes()


def test_kill_and_resume_is_byte_identical(run, expected, tmp_path):
    workdir = tmp_path / "killed"
    for wanted in (np.random.default_rng().integers(2, 14), 20):
        process = start(workdir)
        wait_for_step(process, wanted)
        process.kill()
        process.communicate()
    assert (workdir / "checkpoints").is_dir()
    done = train(workdir)
    assert done.returncode == 0 and "resuming" in done.stdout, done.stdout + done.stderr
    assert samples(workdir, tmp_path / "out") == expected


@pytest.mark.slow
def test_sigterm_saves_and_resumes_byte_identical(run, expected, tmp_path):
    workdir = tmp_path / "stopped"
    process = start(workdir)
    wait_for_step(process, 8)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == INTERRUPTED, stderr
    assert "SIGTERM: saved step" in stdout and "run the same command again to continue" in stdout
    step = int(stdout.split("saved step ")[1].split()[0])
    assert (workdir / "checkpoints" / str(step)).is_dir() and manifest_path(workdir, step).is_file()
    done = train(workdir)
    assert f"at step {step}" in done.stdout, done.stdout + done.stderr
    assert samples(workdir, tmp_path / "out") == expected


@pytest.mark.parametrize("damage", ["flip", *(pytest.param(d, marks=pytest.mark.slow) for d in ("truncate", "delete"))])
def test_damage_and_resume_is_byte_identical(run, expected, tmp_path, damage):
    workdir = tmp_path / "damaged"
    # Stopped at step 20 of 30; then the newest checkpoint is damaged.
    process = start(workdir)
    wait_for_step(process, 20)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == INTERRUPTED and "SIGTERM: saved step" in stdout, stderr
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 3] ^= 0x10
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    else:
        victim.unlink()
    done = train(workdir)
    assert done.returncode == 0 and f"checkpoint {newest.name} is damaged" in done.stderr, done.stderr
    assert "resuming" in done.stdout
    assert samples(workdir, tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config.train.stpes=5"], ["config.train.stpes", "unknown key", "did you mean steps?"]),
        (["--config.trian.steps=5"], ["config.trian", "did you mean train?"]),
        (["--config.train.steps=many"], ["config.train.steps", "many"]),
        (["--config.model.heads=5"], ["config.model.heads=5", "must divide hidden=32"]),
        (["--config.model.patch_size=3"], ["config.model.patch_size=3", "must divide data.image_size=8"]),
        (["--config.sampling.ar_steps=17"], ["config.sampling.ar_steps=17", "<= 16"]),
        (["--config.train.batch_size=0"], ["config.train.batch_size=0", ">= 1"]),
        (["--config.mesh.data=3"], ["mesh", "must fit the 1 devices"]),
        (["--wrokdir=x"], ["wrokdir", "workdir"]),
        (["stray"], ["stray"]),
    ],
)
def test_bad_training_input_touches_nothing(tmp_path, args, words):
    workdir = tmp_path / "run"
    assert_refused(train(workdir, *args), *words)
    assert not workdir.exists()


def test_missing_flags_and_files():
    assert_refused(command("train", "--config=configs/digits.py"), "--workdir", "is required")
    assert_refused(command("train", "--config=configs/nothing.py", "--workdir=x"), "configs/nothing.py", "no such file")
    assert_refused(command("train", "--config=configs/imagenet_causalfusion.py:XXL", "--workdir=x"), "XXL", "mean XL?")
    assert_refused(command("train", "--workdir=x"), "--config", "is required")


def test_bad_folders(tmp_path):
    def train_on(path):
        return train(
            tmp_path / "run", "--config.data.source=image_folder", f"--config.data.path={path}",
            "--config.data.channels=3", "--config.data.num_classes=1",
        )  # fmt: skip

    (tmp_path / "empty").mkdir()
    assert_refused(train_on(tmp_path / "empty"), "path", "holds no images")
    (tmp_path / "broken" / "cat").mkdir(parents=True)
    (tmp_path / "broken" / "cat" / "a.png").write_bytes(b"not a picture")
    assert_refused(train_on(tmp_path / "broken"), "a.png", "not a readable image")
    assert not (tmp_path / "run").exists()


IMAGES = (
    "--config.data.source=image_folder", "--config.data.channels=3", "--config.data.num_classes=2",
    "--config.data.flip=True", "--config.data.workers=1", "--config.train.steps=10",
)  # fmt: skip


def test_folder_of_images_trains_samples_and_scores(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 120, (10, 12, 3)) + (130 if name == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    done = train(tmp_path / "run", *IMAGES, f"--config.data.path={tmp_path / 'images'}")
    assert done.returncode == 0, done.stderr
    assert sample(tmp_path / "run", tmp_path / "out").returncode == 0
    scored = command("evaluate", f"--workdir={tmp_path / 'run'}", f"--samples={tmp_path / 'out' / 'samples.npz'}")
    assert scored.returncode == 0 and json.loads(scored.stdout)["fd"] > 0, scored.stderr
    named_classes_stay_those_of_training(tmp_path)


def named_classes_stay_those_of_training(folder):
    """Also after the class folders were renamed or moved."""
    (folder / "images" / "dark").rename(folder / "images" / "night")
    done = command("train", *SMALL, f"--workdir={folder / 'run'}", *IMAGES, f"--config.data.path={folder / 'images'}")
    assert_refused(done, "workdir", "class 0 is 'dark' in the run and 'light' in the data")
    scored = command("evaluate", f"--workdir={folder / 'run'}", f"--samples={folder / 'out' / 'samples.npz'}")
    assert "warning: class 0 is 'dark' in the run" in scored.stderr and json.loads(scored.stdout)["fd"] > 0
    (folder / "images").rename(folder / "moved")
    done = sample(folder / "run", folder / "named", f"--labels={','.join(10 * ['dark', 'light'])}")
    assert done.returncode == 0, done.stderr
    with np.load(folder / "named" / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == 10 * [0, 1]


def test_another_config_and_another_folder(run, tmp_path):
    workdir, _ = run
    before = (workdir / "config.json").read_bytes()
    assert_refused(train(workdir, "--config.model.layers=3"), "another config", "layers 4, now 3")
    assert (workdir / "config.json").read_bytes() == before
    (tmp_path / "mine.txt").write_text("keep me")
    assert_refused(train(tmp_path), "workdir", "new or empty")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--ar_steps=17"], ["--ar_steps=17", "<= 16"]),
        (["--labels=3,12"], ["--labels=12", "0..9"]),
        (["--labels=thre"], ["--labels", "thre", "did you mean three?"]),
        (["--step_sizes=4,4"], ["--step_sizes", "sum to the 16 tokens"]),
        (["--solver=rk4"], ["--solver", "rk4", "ddpm"]),
        (["--solver=euler"], ["--solver", "euler", "flow"]),
        (["--step=7"], ["step=7", "must be one of"]),
        (["--step=newest"], ["--step", "newest", "best"]),
        (["--step=best"], ["--step", "best", "config.evaluation.eval_every"]),
        (["--num_hosts=2"], ["--host_index", "--num_hosts"]),
        (["--num=0"], ["--num=0"]),
    ],
)
def test_bad_sampling_input_touches_nothing(run, tmp_path, args, words):
    done = command("sample", f"--workdir={run[0]}", f"--out={tmp_path / 'out'}", *args)
    assert_refused(done, *words)
    assert not (tmp_path / "out").exists()


def test_out_with_other_content_and_wrong_workdir(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    assert_refused(sample(run[0], tmp_path / "out"), "--out", "exists with other content")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert_refused(sample(tmp_path, tmp_path / "new"), "workdir", "is not the folder of a training run")
    assert_refused(
        command("evaluate", f"--workdir={run[0]}", f"--samples={tmp_path / 'out' / 'mine.txt'}"), "not a samples.npz"
    )


def test_divergence_ends_with_one_line(tmp_path):
    done = train(
        tmp_path / "run", "--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=0.0",
        "--config.train.max_nonfinite_steps=3", "--config.logging.every=5",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "had a non-finite gradient" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["train", "sample", "edit", "caption", "evaluate"])
def test_help_is_worth_reading(name):
    shown = command(name, "--help")
    assert f"python -m causalfusion_jax.{name}" in shown.stdout and "--workdir" in shown.stdout


@pytest.mark.slow
def test_recipe_reaches_its_scores(tmp_path):
    """The published digits recipe: legible digits at every number of AR steps."""
    start_time = time.monotonic()
    done = command("train", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    print(f"trained in {time.monotonic() - start_time:.0f} s")
    for ar_steps in (1, 4, 16):
        out = tmp_path / f"out{ar_steps}"
        args = ("--num=1000", f"--ar_steps={ar_steps}", "--solver=ddpm", "--solver_steps=50", "--cfg_scale=1.0")
        assert command("sample", f"--workdir={tmp_path / 'run'}", f"--out={out}", *args).returncode == 0
        scored = command("evaluate", f"--workdir={tmp_path / 'run'}", f"--samples={out / 'samples.npz'}")
        scores = json.loads(scored.stdout)
        print(ar_steps, scores)
        assert scores["accuracy"] >= 0.97 and scores["fd"] <= 1.2
