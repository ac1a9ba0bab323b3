"""Two processes as two hosts: train, sample and evaluate, a signal to one, resume with one."""

import json
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, command, command_env

from causalfusion_jax.cli import INTERRUPTED
from causalfusion_jax.distributed import initialize
from causalfusion_jax.errors import InputError
from causalfusion_jax.training.checkpoint import CheckpointConfig, Checkpoints

SMALL = (
    "--config=configs/digits.py", "--config.model.hidden=32", "--config.model.heads=2", "--config.train.steps=24",
    "--config.train.batch_size=8", "--config.optimizer.warmup_steps=3", "--config.checkpoint.every=10",
    "--config.logging.every=1", "--config.logging.sample_every=0",
)  # fmt: skip


def start(workdir, *args):
    return subprocess.Popen(
        [sys.executable, "-m", "causalfusion_jax.train", *SMALL, f"--workdir={workdir}", *args],
        cwd=ROOT, env=command_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


def series(workdir, name):
    """A metric by step, where it was logged; of repeated steps, the last."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def test_signal_to_one_of_two_hosts_saves_both_and_one_resumes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [
        start(
            tmp_path / "pair", f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}",
            "--config.logging.sample_every=4", "--config.logging.num_samples=4", "--config.sampling.solver_steps=2",
            "--config.evaluation.eval_every=4", "--config.evaluation.num_images=6",
            "--config.evaluation.sample_batch_size=4",
        )
        for i in range(2)
    ]  # fmt: skip
    begun = []
    for line in pair[0].stdout:
        begun.append(line)
        if line.startswith("step") and int(re.search(r"\d+", line)[0]) >= 6:
            break
    pair[1].send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=600) for process in pair]
    assert [process.returncode for process in pair] == [INTERRUPTED, INTERRUPTED], printed
    step = int(re.search(r"saved step (\d+) of 24", printed[0][0])[1])
    assert step < 24 and "step" not in printed[1][0]
    parts = [json.loads((tmp_path / "pair" / "manifests" / str(step) / f"{p}.json").read_text()) for p in (0, 1)]
    assert all(part["processes"] == 2 and any("ocdbt.process_" in name for name in part["files"]) for part in parts)
    assert list((tmp_path / "pair" / "samples").iterdir())
    scores = series(tmp_path / "pair", "evaluation/fd")
    assert 4 in scores and "evaluated step 4" in "".join(begun) and "evaluated" not in printed[1][0]
    best = Checkpoints(tmp_path / "pair", CheckpointConfig(), read_only=True).best()
    assert best["step"] in scores and best["value"] == min(scores.values())
    for workdir in ("pair", "alone"):
        done = command("train", *SMALL, f"--workdir={tmp_path / workdir}")
        assert done.returncode == 0, done.stderr
        assert (f"resuming {tmp_path / workdir} at step {step}" in done.stdout) == (workdir == "pair")
    pair, alone = (series(tmp_path / name, "loss") for name in ("pair", "alone"))
    assert sorted(pair) == sorted(alone) == list(range(1, 25))
    np.testing.assert_allclose([pair[s] for s in sorted(pair)], [alone[s] for s in sorted(alone)], rtol=1e-4)


@pytest.mark.parametrize(
    ("args", "field"),
    [
        (("host:1", None, 0), "--num_processes"), ((None, 2, 0), "--coordinator_address"),
        (("host:1", 2, 2), "--process_id"), (("host:1", 0, 0), "--num_processes"),
    ],
)  # fmt: skip
def test_processes_half_described_are_refused(args, field):
    with pytest.raises(InputError) as error:
        initialize(*args)
    assert error.value.field == field


def test_environment_describes_processes(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(InputError, match="JAX_PROCESS_ID must be a number"):
        initialize()
