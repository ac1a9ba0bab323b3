"""Two processes as two hosts: train, sample and evaluate, a signal to one, resume with one.

Implicit host reads of device arrays fail in both, as `host_reads` says.
"""

import json
import re
import signal

import multihost_checks
import numpy as np
import pytest
from helpers import all_done, command, random_params, start_processes
from tiny_data import write_vae

from causalfusion_jax.checkpoints.checkpoint import Checkpoints
from causalfusion_jax.cli.command import INTERRUPTED
from causalfusion_jax.common.distributed import initialize
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.sampling.trained import make_autoencoder

SMALL = (
    "--config=configs/digits.py", "--config.model.hidden=32", "--config.model.heads=2", "--config.train.steps=24",
    "--config.train.batch_size=8", "--config.optimizer.warmup_steps=3", "--config.checkpoint.every=10",
    "--config.logging.every=1", "--config.logging.sample_every=0",
)  # fmt: skip


def test_two_processes_give_the_results_of_one(tmp_path):
    """Batches, sampling from split weights, decoding, and merged statistics, on meshes across processes."""
    write_vae(tmp_path / "vae")
    all_done(start_processes(2, "multihost_checks", f"--folder={tmp_path}"))
    results = [dict(np.load(tmp_path / f"{i}.npz")) for i in range(2)]
    batch = np.arange(12, dtype=np.float32).reshape(4, 3)
    rows = {"fsdp": ([0, 1], [2, 3]), "tensor": ([0, 1, 2, 3],) * 2, "sequence": ([0, 1, 2, 3],) * 2}
    for process, values in enumerate(results):
        for name in multihost_checks.MESHES:
            assert values[f"{name}.rows"].tolist() == rows[name][process]
            np.testing.assert_array_equal(values[f"{name}.batch"], batch)
    decode = make_autoencoder(str(tmp_path / "vae"), multihost_checks.CONFIG).decode
    alone = multihost_checks.sampled(random_params(multihost_checks.CONFIG.transformer), decode)
    assert sorted(np.concatenate([values["numbers"] for values in results])) == [0, 1, 2, 3, 4]
    for values in results:
        assert len(values["numbers"]) < 5
        assert np.abs(values["images"].astype(int) - alone["images"]).max() <= 1
        np.testing.assert_array_equal(values["own"], values["images"][values["numbers"]])
    whole = multihost_checks.collected_by(range(7))
    for values in results:
        np.testing.assert_allclose(values["mean"], whole.statistics["2048"].mean, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(values["cov_row"], whole.statistics["2048"].cov[0], rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(values["score"], whole.score.result(), rtol=1e-12)
        np.testing.assert_array_equal(values["kept"], whole.kept)
        assert values["plain"] == np.pi * 1e-9


def series(workdir, name):
    """A metric by step, where it was logged; of repeated steps, the last."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def test_signal_to_one_of_two_hosts_saves_both_and_one_resumes(tmp_path):
    pair = start_processes(
        2, "causalfusion_jax.train", *SMALL, f"--workdir={tmp_path / 'pair'}", "--config.mesh.tensor=2",
        "--config.logging.sample_every=4", "--config.logging.num_samples=4", "--config.sampling.solver_steps=2",
        "--config.evaluation.eval_every=4", "--config.evaluation.num_images=6",
        "--config.evaluation.sample_batch_size=4",
    )  # fmt: skip
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
    best = Checkpoints(tmp_path / "pair", read_only=True).best()
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
