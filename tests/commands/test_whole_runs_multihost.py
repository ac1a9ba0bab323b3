"""Whole runs on several processes, by the commands that users type, against the same runs on one."""

import json
import re

import numpy as np
import pytest
from helpers import assert_all_succeed, command, start_processes
from PIL import Image
from tiny_data import write_inception, write_vae

from causalfusion_jax.checkpoints.manifests import manifest_path

pytestmark = pytest.mark.slow

MODEL = (
    "--config=configs/digits.py", "--config.model.hidden=32", "--config.model.heads=2", "--config.model.layers=2",
    "--config.model.num_condition_tokens=4", "--config.train.batch_size=8", "--config.optimizer.warmup_steps=3",
    "--config.logging.every=1", "--config.sampling.solver_steps=2",
)  # fmt: skip
RUN = (
    *MODEL, "--config.train.steps=12", "--config.checkpoint.every=2", "--config.logging.sample_every=4",
    "--config.logging.num_samples=6", "--config.evaluation.eval_every=4", "--config.evaluation.num_images=10",
    "--config.evaluation.sample_batch_size=6",
)  # fmt: skip
LATENTS = ("--config.data.image_size=4", "--config.data.channels=4", "--config.data.latents=True",
           "--config.data.num_classes=2")  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """`inception`, `vae`, a `reference` of images alone, and images of two classes to train on and to test."""
    folder, rng = tmp_path_factory.mktemp("store"), np.random.default_rng(0)
    write_inception(folder / "inception")
    write_vae(folder / "vae")
    np.savez(folder / "reference.npz", arr_0=rng.integers(0, 256, (9, 8, 8, 3)).astype(np.uint8))
    for part, num in {"images": 24, "held_out": 12}.items():
        for i in range(num):
            where = folder / part / ("cat", "dog")[i % 2]
            where.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(rng.normal(80 + 90 * (i % 2), 30, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(where / f"{i:02d}.png")
    return folder


def fid(store):
    return (
        "--config.evaluation.metric=fid", f"--config.evaluation.inception={store / 'inception'}",
        f"--config.evaluation.reference={store / 'reference.npz'}",
    )  # fmt: skip


def one(name, *args) -> str:
    done = command(name, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def several(count, name, *args) -> list[str]:
    return assert_all_succeed(start_processes(count, f"causalfusion_jax.{name}", *args))


def series(workdir, name):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def assert_same_run(found, expected, metrics):
    """The metrics (relative tolerance by name) of every step, and grids that differ by rounding at most."""
    for name, tolerance in metrics.items():
        ours, theirs = series(found, name), series(expected, name)
        assert sorted(ours) == sorted(theirs) and theirs, name
        np.testing.assert_allclose([ours[s] for s in sorted(ours)], [theirs[s] for s in sorted(theirs)], tolerance)
    for path in (expected / "samples").glob("*.png"):
        ours, theirs = (np.asarray(Image.open(run / "samples" / path.name), int) for run in (found, expected))
        assert np.abs(ours - theirs).mean() < 1, path.name


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    one("train", *RUN, *fid(store), f"--workdir={folder}")
    return folder


@pytest.mark.parametrize(
    ("count", "mesh", "then"),
    [
        (2, ["tensor=2"], (1, [])),
        (2, ["sequence=2"], (2, ["preset=fsdp"])),
        (4, ["data=1", "fsdp=2", "tensor=2"], (2, ["tensor=2"])),
        (4, ["preset=fsdp"], (1, [])),
    ],
    ids=["tensor", "sequence", "fsdp_tensor", "fsdp"],
)  # fmt: skip
def test_killed_and_continued_on_other_processes(count, mesh, then, alone, store, tmp_path):
    """Grids, FID and the best checkpoint; killed after a checkpoint, continued on another number of processes."""
    run = (*RUN, *fid(store), f"--workdir={tmp_path / 'run'}")
    processes = start_processes(count, "causalfusion_jax.train", *run, *(f"--config.mesh.{m}" for m in mesh))
    for line in processes[0].stdout:
        if line.startswith("step") and int(re.search(r"\d+", line)[0]) >= 7:
            break
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    assert manifest_path(tmp_path / "run", 4).is_file()
    count, mesh = then
    printed = several(count, "train", *run, *(f"--config.mesh.{m}" for m in mesh))
    assert re.search(r"resuming .* at step [46]", printed[0]), printed
    assert_same_run(tmp_path / "run", alone, {"loss": 1e-3, "evaluation/fid": 2e-2})
    best = [
        json.loads(one("sample", f"--workdir={run}", "--num=2", "--step=best", f"--out={tmp_path / name}") and
                   (tmp_path / name / "request.json").read_text())["step"]
        for name, run in {"ours": tmp_path / "run", "theirs": alone}.items()
    ]  # fmt: skip
    assert best[0] == best[1]


@pytest.mark.parametrize("count", [2, 4])
def test_from_images_to_latents_to_samples(count, store, tmp_path):
    """encode, train with an autoencoder in the evaluation, sample, probe and fine-tune: the results of one process."""
    images = (
        "--config.data.source=image_folder", f"--config.data.path={store / 'images'}", "--config.data.num_classes=2",
        "--config.data.image_size=16", "--config.data.channels=3",
    )  # fmt: skip

    def run(number, where):
        each = (lambda name, *args: [one(name, *args)]) if number == 1 else lambda *args: several(number, *args)
        encode = (f"--vae={store / 'vae'}", f"--out={where / 'latents'}", "--batch_size=8", "--records_per_shard=8")
        each("encode", *MODEL, *images, *encode)
        each(
            "train",
            *RUN,
            *LATENTS,
            "--config.data.source=latents",
            f"--config.data.path={where / 'latents'}",
            "--config.evaluation.metric=inception_score",
            f"--config.evaluation.inception={store / 'inception'}",
            f"--config.evaluation.vae={store / 'vae'}",
            "--config.mesh.preset=fsdp",
            f"--workdir={where / 'run'}",
        )
        sample = ("--num=10", "--batch_size=3", f"--vae={store / 'vae'}", f"--out={where / 'samples'}")
        each("sample", f"--workdir={where / 'run'}", *sample)
        each("train", *MODEL, *images, "--config.train.steps=4", "--config.logging.sample_every=0",
             "--config.mesh.preset=fsdp", f"--workdir={where / 'pixels'}")  # fmt: skip
        probe = (
            *MODEL, *images, f"--config.probe.held_out_path={store / 'held_out'}", "--config.probe.epochs=4",
            "--config.probe.warmup_epochs=1", "--config.finetune.epochs=2", "--config.finetune.batch_size=8",
            "--config.finetune.warmup_epochs=1", "--config.mesh.preset=fsdp",
        )  # fmt: skip
        return [
            json.loads(each("evaluate", f"--probe={kind}", f"--workdir={where / 'pixels'}", *probe)[0].splitlines()[-1])
            for kind in ("linear", "knn", "finetune")
        ]

    for number in (1, count):
        (tmp_path / str(number)).mkdir()
    expected, found = run(1, tmp_path / "1"), run(count, tmp_path / str(count))
    theirs, ours = tmp_path / "1", tmp_path / str(count)
    for path in (theirs / "latents").iterdir():
        assert path.read_bytes() == (ours / "latents" / path.name).read_bytes(), path.name
    assert_same_run(ours / "run", theirs / "run", {"loss": 1e-3, "evaluation/inception_score": 1e-3})
    with np.load(ours / "samples" / "samples.npz") as a, np.load(theirs / "samples" / "samples.npz") as b:
        assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).mean() < 1 and a["arr_1"].tolist() == b["arr_1"].tolist()
    for one_result, result in zip(expected, found, strict=True):
        assert sorted(one_result) == sorted(result) and abs(one_result["top1"] - result["top1"]) < 0.1, result
