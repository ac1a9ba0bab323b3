"""launch/imagenet.md: every command is valid, and its miniature runs from images to metrics."""

import dataclasses
import json
import re
import shlex
import subprocess

import jax
import numpy as np
import pytest
from helpers import ROOT, command, run_module
from PIL import Image
from tiny_data import write_inception

from causalfusion_jax.models.autoencoder import AutoencoderConfig, init_autoencoder
from causalfusion_jax.models.store import write_converted

TEXT = (ROOT / "launch" / "imagenet.md").read_text()
VAE = AutoencoderConfig(8, (1, 1, 1), 4, 0.5, residual_blocks=1, mid_attention=False, norm_groups=4)
"""Latents are a quarter of an image's side."""


def commands() -> list[list[str]]:
    """Arguments of every command in the file."""
    blocks = re.findall(r"^```\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.replace("$STORE", "/store")) for line in lines]


def module_args(name: str, *having: str) -> list[str]:
    """Arguments of the only command of a module with all these flags."""
    matching = [
        args[3:]
        for args in commands()
        if args[:3] == ["python", "-m", f"causalfusion_jax.{name}"]
        and all(any(arg.split("=")[0] == flag for arg in args) for flag in having)
    ]
    assert len(matching) == 1, (name, having)
    return matching[0]


def parse(args: list[str]) -> None:
    """Parses a command with its own flags, and builds its config; runs nothing."""
    done = run_module("parse_command", *args[2:])
    assert done.returncode == 0, (shlex.join(args), done.stderr)


PYTHON = [args for args in commands() if args[:2] == ["python", "-m"] and args[2].startswith("causalfusion_jax")]


@pytest.mark.parametrize("args", PYTHON, ids=lambda args: f"{args[2].split('.')[1]}-{len(args)}")
def test_python_commands_parse(args):
    parse(args)


def test_the_parser_notices():
    train = ["causalfusion_jax.train", *module_args("train")]
    wrong = {
        "--wrokdir=x": "wrokdir",
        "--config.evaluation.metric=fdi": "did you mean fd?",
        "--config.trian.steps=3": "did you mean train?",
        "stray": "stray",
    }
    for arg, word in wrong.items():
        done = run_module("parse_command", *train, arg)
        assert done.returncode != 0 and word in done.stderr, (arg, done.stdout + done.stderr)


def test_the_other_commands_are_valid():
    others = [args for args in commands() if args not in PYTHON]
    names = ["export", "bash", "python", "tfds_env/bin/pip", "tfds_env/bin/tfds"]
    assert [args[0] for args in others] == names and others[2][1:] == ["-m", "venv", "tfds_env"]
    shown = subprocess.run([*others[1], "--dry_run"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "causalfusion_jax.encode --multihost" in shown.stdout, shown.stderr
    (inner,) = [arg.removeprefix("--command=") for arg in others[1] if arg.startswith("--command=")]
    parse(shlex.split(inner))


def test_tfds_has_the_flags():
    """The parser of `tfds build`, without the rest of its command line, which needs Beam."""
    simple_parsing = pytest.importorskip("simple_parsing")
    build = pytest.importorskip("tensorflow_datasets.scripts.cli.build")
    (args,) = (args for args in commands() if args[0] == "tfds_env/bin/tfds")
    assert args[1] == "build"
    parsed = simple_parsing.parse(build.Args, args=args[2:])
    assert parsed.positional_datasets == ["imagenet2012"] and str(parsed.paths.data_dir) == "/store/tfds"
    assert str(parsed.paths.manual_dir) == "/store/archives"
    assert parsed.generation.file_format == "array_record"


# --- The miniature ----------------------------------------------------------------


def changed(args: list[str], **changes) -> list[str]:
    """A command's arguments with other values; None leaves a flag out. `__` stands for a dot."""
    values = {arg.split("=")[0]: arg for arg in args if arg != "--multihost"}
    for name, value in changes.items():
        flag = "--" + name.replace("__", ".")
        values.pop(flag, None)
        if value is not None:
            values[flag] = f"{flag}={value}"
    return list(values.values())


def run(name: str, args: list[str]) -> str:
    done = command(name, *args)
    assert done.returncode == 0, (name, done.stdout + done.stderr)
    return done.stdout


def write_inputs(store) -> None:
    """64 images of two classes, 20 x 24; a random autoencoder and a random Inception."""
    rng = np.random.default_rng(0)
    for i in range(64):
        folder = store / "images" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.linspace(0, rng.uniform(50, 200), 24)[:, None] + rng.normal(40 * (i % 2), 10, (20, 24, 3))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{i:02d}.png")
    vae = jax.device_get(init_autoencoder(VAE, jax.random.key(0)))
    write_converted(store / "vae", "mar_vae", dataclasses.asdict(VAE), {}, vae)
    write_inception(store / "inception")


@pytest.mark.slow
def test_miniature(tmp_path):
    write_inputs(tmp_path)
    data = dict(config__data__name="", config__data__num_classes=2, config__data__workers=None)
    images = dict(config__data__source="image_folder", config__data__path=tmp_path / "images", **data)
    latents = dict(config__data__channels=4, config__data__image_size=4)
    vae, inception = tmp_path / "vae", tmp_path / "inception"

    encode = module_args("encode", "--config.data.workers")
    encode = changed(encode, **images, **latents, vae=vae, out=tmp_path / "latents")
    assert "64 latents of shape" in run("encode", encode)

    reference = tmp_path / "reference.npz"
    make = changed(
        module_args("evaluate", "--make_reference"), **images, config__data__image_size=16, inception=inception,
        out=reference, num_reference_images=16, batch_size=16,
    )  # fmt: skip
    assert "statistics of 64 images, 16 of them kept" in run("evaluate", make)

    workdir = tmp_path / "run"
    train = changed(
        module_args("train"), **data, **latents, config__data__path=tmp_path / "latents", workdir=workdir,
        config__model__hidden=32, config__model__heads=2, config__model__layers=2, config__model__dtype="float32",
        config__model__num_condition_tokens=4, config__train__steps=30, config__train__batch_size=8,
        config__optimizer__warmup_steps=3, config__logging__every=10, config__logging__sample_every=0,
        config__sampling__solver_steps=5, config__evaluation__eval_every=15, config__evaluation__num_images=16,
        config__evaluation__inception=inception, config__evaluation__reference=reference,
        config__evaluation__vae=vae,
    )  # fmt: skip
    printed = run("train", train)
    assert "evaluated step 15: fid" in printed and "evaluated step 30: fid" in printed
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    fids = {line["step"]: line["evaluation/fid"] for line in lines if "evaluation/fid" in line}
    assert sorted(fids) == [15, 30] and all(value > 0 for value in fids.values())

    out = tmp_path / "samples"
    sample = changed(
        module_args("sample", "--num"), workdir=workdir, vae=vae, num=64, solver_steps=5, batch_size=32, out=out,
        step="best",
    )  # fmt: skip
    run("sample", sample)
    assert json.loads((out / "request.json").read_text())["step"] == min(fids, key=fids.get)
    with np.load(out / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (64, 16, 16, 3) and arrays["arr_0"].dtype == np.uint8

    evaluate = changed(
        module_args("evaluate", "--samples"), samples=out, reference=reference, inception=inception, batch_size=16
    )
    scores = json.loads(run("evaluate", evaluate))
    assert scores["num"] == 64
    for name in ("fid", "sfid", "inception_score", "precision", "recall", "kid"):
        assert np.isfinite(scores[name]), name
    assert scores["fid"] > 0 and scores["inception_score"] >= 1
    assert json.loads((out / "evaluation.json").read_text()) == scores

    named = module_args("sample", "--labels")
    named = changed(named, workdir=workdir, vae=vae, labels="dog,1,cat", solver_steps=2, out=tmp_path / "named")
    run("sample", named)
    with np.load(tmp_path / "named" / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == [1, 1, 0]
