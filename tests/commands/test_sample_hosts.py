"""`sample` interrupted, on two processes of one job, on two hosts that do not know of each other: the same bytes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, assert_all_succeed, command, command_env, start_processes

ARGS = ("--num=18", "--batch_size=4", "--solver_steps=3", "--ar_steps=2", "--seed=5")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = command(
        "train", "--config=configs/digits.py", "--config.model.hidden=32", "--config.model.heads=2",
        "--config.model.layers=1", "--config.train.steps=2", "--config.train.batch_size=8",
        "--config.optimizer.warmup_steps=1", "--config.logging.sample_every=0", f"--workdir={folder}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def expected(workdir, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    done = command("sample", f"--workdir={workdir}", f"--out={out}", *ARGS)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("sampled")][-1] == "sampled 18/18"
    return contents(out)


def contents(out):
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "request.json", "samples.npz"]
    return {path.name: path.read_bytes() for path in out.iterdir()}


def start(workdir, out, *args):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "host_reads",
            "causalfusion_jax.sample",
            f"--workdir={workdir}",
            f"--out={out}",
            *ARGS,
            *args,
        ],
        cwd=ROOT,
        env=command_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_kill_and_resume(workdir, expected, tmp_path):
    out = tmp_path / "out"
    process = start(workdir, out)
    for line in process.stdout:
        if line.startswith("sampled"):
            break
    process.kill()
    process.communicate()
    refused = command("sample", f"--workdir={workdir}", f"--out={out}", *ARGS, "--seed=6")
    assert refused.returncode == 2 and "samples of another request (seed 5, now 6)" in refused.stderr, refused.stderr
    done = command("sample", f"--workdir={workdir}", f"--out={out}", *ARGS)
    assert done.returncode == 0, done.stderr
    assert "sampled 4/18" not in done.stdout, "the first batch is made once"
    assert contents(out) == expected


def test_two_processes(workdir, expected, tmp_path):
    sample = "causalfusion_jax.sample", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", *ARGS
    printed = assert_all_succeed(start_processes(2, *sample))
    assert "sampled" in printed[0] and "sampled" not in printed[1]
    assert contents(tmp_path / "out") == expected


def test_hosts_that_do_not_know_of_each_other(workdir, expected, tmp_path):
    out = tmp_path / "out"
    for host in (1, 0):
        done = command("sample", f"--workdir={workdir}", f"--out={out}", *ARGS, f"--host_index={host}", "--num_hosts=2")
        assert done.returncode == 0 and f"host {host} of 2 has done its share" in done.stdout, done.stderr
        parts = sorted(int(path.stem) for path in (out / "parts").glob("*.npy"))
        assert parts == ([1, 3] if host else [0, 1, 2, 3, 4])
    done = command("sample", f"--workdir={workdir}", f"--out={out}", *ARGS)
    assert done.returncode == 0 and "sampled" not in done.stdout, done.stderr
    assert contents(out) == expected
    with np.load(out / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == json.loads((out / "request.json").read_text())["labels"]
