"""`evaluate --probe`, as a user runs it."""

import json

import numpy as np
import pytest
from helpers import command, run_module
from PIL import Image

from causalfusion_jax.cli import app

SMALL = (
    "--config=configs/digits.py", "--config.model.hidden=32", "--config.model.heads=2", "--config.model.layers=2",
    "--config.train.steps=12", "--config.train.batch_size=8", "--config.optimizer.warmup_steps=3",
    "--config.logging.every=6", "--config.logging.sample_every=0", "--config.probe.epochs=12",
    "--config.probe.map_noise_levels=(0.0,0.2)", "--config.probe.warmup_epochs=1", "--config.finetune.epochs=6",
    "--config.finetune.warmup_epochs=1", "--config.finetune.batch_size=32",
)  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = command("train", *SMALL, f"--workdir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def probe(workdir, kind, *args):
    return command("evaluate", f"--probe={kind}", f"--workdir={workdir}", *args)


def result(done):
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def refused(done, *words):
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    for word in ("error: ", *words):
        assert word in line, (word, line)


def test_features_are_classified(workdir):
    done = probe(workdir, "linear", "--untrained")
    linear = result(done)
    assert f"weights: ema of step 12 of {workdir}\n" in done.stderr
    assert linear["probe"] == "linear" and (linear["tokens"], linear["layer"]) == ("clean", 1)
    assert (linear["num"], linear["trained_on"]) == (899, 898)
    # Even random features distinguish digits to some degree.
    assert 0.5 < linear["top1"] <= linear["top5"] <= 1 and 0.5 < linear["untrained"]["top1"] <= 1
    kept = json.loads((workdir / "probe_linear.json").read_text())
    assert kept.pop("request")["probe"]["epochs"] == 12 and kept == linear
    # The same request prints the stored result; another request does not replace it.
    assert result(probe(workdir, "linear", "--untrained")) == linear
    refused(probe(workdir, "linear"), "probe_linear.json", "exists with another result")
    refused(probe(workdir, "linear", "--untrained", *SMALL, "--config.probe.layer=1"), "exists with another result")
    knn = result(probe(workdir, "knn", f"--out={workdir / 'near.json'}", *SMALL, "--config.probe.tokens=noisy"))
    assert knn["tokens"] == "noisy" and knn["noise_level"] == 0.0 and 0.3 < knn["top1"] <= 1
    assert (workdir / "near.json").is_file() and not (workdir / "probe_knn.json").exists()


def test_fine_tuning(workdir):
    found = result(probe(workdir, "finetune"))
    assert 0.2 < found["top1"] <= 1 and "untrained" not in found
    folder = workdir / "probe_finetune" / "trained"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6 and (folder / "checkpoints").is_dir()
    (workdir / "probe_finetune.json").unlink()
    # Another fine-tuning does not continue from these checkpoints; the same one only tests them again.
    refused(probe(workdir, "finetune", *SMALL, "--config.finetune.mixup=0.1"), "holds fine-tuning by other settings")
    assert result(probe(workdir, "finetune")) == found
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6


def test_map(workdir):
    found = result(probe(workdir, "map", *SMALL, "--config.probe.max_images=300"))
    assert found["layers"] == [1, 2] and found["tokens"] == ["clean", "0", "0.2"]
    table = np.array(found["trained"])
    assert table.shape == (2, 3) and (table > 0.2).all() and found["best"]["top1"] == table.max()
    with Image.open(workdir / "probe_map.png") as picture:
        assert picture.mode == "RGB" and min(picture.size) > 100


def test_bad_input_is_one_clear_line(workdir, tmp_path):
    refused(probe(workdir, "liner"), "--probe='liner'", "did you mean linear?")
    refused(probe(workdir, "linear", "--samples=x"), "--samples", "leave it out")
    deeper = ("--config.probe.layer=3", f"--out={tmp_path / 'a.json'}")
    refused(probe(workdir, "linear", *SMALL, *deeper), "config.probe.layer=3", "<= 2")
    refused(probe(workdir, "linear", *SMALL, "--config.probe.layers=3"), "unknown key", "did you mean layer?")
    refused(probe(workdir, "linear", "--step=5", f"--out={tmp_path / 'a.json'}"), "step=5", "must be one of")
    refused(probe(workdir, "linear", "--out=a.txt"), "--out='a.txt'", ".json")
    refused(probe(tmp_path, "linear"), "config.json")
    refused(command("evaluate", "--probe=linear", "--checkpoint=x"), "--config", "is needed with --checkpoint")
    refused(command("evaluate", f"--workdir={workdir}", "--untrained"), "--untrained", "needs --probe")
    refused(command("evaluate", f"--workdir={workdir}", "--multihost"), "--multihost", "needs --probe")
    refused(command("evaluate", "--probe=linear"), "--workdir", "--checkpoint")
    other = "--config=configs/moving_digits.py"
    refused(probe(workdir, "linear", other, f"--out={tmp_path / 'a.json'}"), "config.data", "as the network's")
    much = ("--config.finetune.batch_size=1024", f"--out={tmp_path / 'a.json'}")
    refused(probe(workdir, "finetune", *SMALL, *much), "config.finetune.batch_size=1024", "must be <= 898")


def test_stopped_fine_tuning_exits_as_interrupted(tmp_path):
    done = run_module("stopped_probe", tmp_path / "finetuned")
    assert done.returncode == app.INTERRUPTED and "saved step 6 of 16" in done.stderr, done.stderr
