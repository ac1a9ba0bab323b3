"""launch/bench/accelerator.sh: what it needs, keeps, skips and refuses; the rehearsal as a whole is slow."""

import importlib.metadata
import json
import subprocess
import sys
import types

import pytest
from helpers import ROOT, command_env

SCRIPT = ROOT / "launch" / "bench" / "accelerator.sh"
DEVICE = {"platform": "gpu", "device": "NVIDIA H200", "devices": 1, "jax": "0.10.2"}


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import accelerator

    monkeypatch.setattr(accelerator, "missing_packages", lambda requirements: [])
    return accelerator


@pytest.fixture
def children(accelerator, monkeypatch):
    """Child processes that answer at once; the names of those that were started."""
    started = []

    def child(bench, name, *args, **env):
        started.append(name)
        if name == "device":
            return json.dumps(DEVICE)
        if name.endswith("_64"):
            raise accelerator.OutOfMemory(name)
        error = 0.5 if "bfloat16" in name else 1e-6
        row = {"name": name, "error of outputs": error, "error of gradients": 0.0}
        return json.dumps({"rows": [row]})

    monkeypatch.setattr(accelerator.Bench, "child", child)
    return started


def test_what_is_measured_is_kept(accelerator, children, tmp_path, capsys):
    out = tmp_path / "out"
    assert accelerator.main([f"--out={out}", "--part=step"]) == 0
    steps = [f"step_{implementation}_{batch}" for implementation in ("flash", "dense") for batch in (16, 32, 64)]
    assert children == ["device", *steps], "larger batches are not tried once one does not fit"
    assert accelerator.main([f"--out={out}", "--part=step"]) == 0
    assert children == ["device", *steps, "device"]
    # Killed before the part was complete, it measures what is missing.
    (out / "parts" / "step.json").unlink()
    (out / "measured" / "step_dense_32.json").unlink()
    assert accelerator.main([f"--out={out}", "--part=step"]) == 0 and children[-1] == "step_dense_32"
    (record,) = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    assert record["part"] == "step" and record["device"] == "NVIDIA H200"
    assert [row["fits"] for row in record["rows"]] == [True, True, False] * 2
    assert "## step: ok" in (out / "results.md").read_text()


def test_a_value_out_of_tolerance_fails(accelerator, children, tmp_path, capsys):
    assert accelerator.main([f"--out={tmp_path}", "--part=attention"]) == 1
    (record,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert [row["ok"] for row in record["rows"]] == [True, False] * 3
    assert "## attention: FAILED" in (tmp_path / "results.md").read_text()


def test_a_failed_part_is_not_kept_and_the_others_run(accelerator, children, tmp_path, capsys, monkeypatch):
    def failing(bench):
        raise accelerator.Failed("digits_whole: exit status 3; see the log")

    monkeypatch.setitem(accelerator.PARTS, "digits", failing)
    assert accelerator.main([f"--out={tmp_path}"]) == 1
    assert "error: digits_whole: exit status 3" in capsys.readouterr().err
    parts = [json.loads(line)["part"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert parts == ["attention", "step", "sampler"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--part=digit"], ["--part", "digits"]),
        (["--rehearsal"], ["--rehearsal", "--help"]),
        (["--rehearse"], ["--out", "holds results of", "give another folder"]),
    ],
)
def test_wrong_input_is_one_line(accelerator, children, tmp_path, capsys, args, words):
    accelerator.main([f"--out={tmp_path}", "--part=sampler"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        accelerator.main([f"--out={tmp_path}", *args])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and line.startswith("error: ") and all(word in line for word in words), line


def test_a_cpu_is_no_accelerator(accelerator, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(accelerator.Bench, "child", lambda *_, **__: json.dumps(DEVICE | {"platform": "cpu"}))
    with pytest.raises(SystemExit):
        accelerator.main([f"--out={tmp_path}"])
    assert "no accelerator" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import accelerator

    assert not accelerator.missing_packages(accelerator.install_requires())
    here = {"jax": "0.9.1", "flax": "0.12", "tensorflow": "2.20.0"}

    def version(name):
        if name not in here:
            raise importlib.metadata.PackageNotFoundError(name)
        return here[name]

    lines = "jax>=0.10\n# a comment\nflax>=0.12\ntensorflow-cpu>=2.20; platform_machine == 'x'\ngrain>=0.2.18\n"
    assert accelerator.missing_packages(lines, version) == ["jax>=0.10 (is 0.9.1)", "grain>=0.2.18 (not installed)"]


def test_a_machine_without_the_project_is_told_what_to_install(tmp_path):
    python = tmp_path / "python"
    # An interpreter without site-packages.
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
    done = subprocess.run(
        ["bash", SCRIPT, "--rehearse", f"--out={tmp_path / 'out'}"], env=env, capture_output=True, text=True
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and not (tmp_path / "out").exists()
    assert all(word in line for word in ("orbax-checkpoint>=", "grain>=", "launch/setup_env.sh cuda")), line


def test_the_slice_of_devices(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import common

    def devices(kind, *coords):
        return [types.SimpleNamespace(device_kind=kind, coords=place) for place in coords]

    square = [(x, y, 0) for y in range(2) for x in range(2)]
    assert common.topology_of(devices("TPU v5 lite", *square)).name == "v5e:2x2"
    assert common.topology_of(devices("TPU v5", *square)).name == "v5p:2x2x1"
    assert common.topology_of(devices("TPU v6 lite", (0, 0, 0))).name == "v6e:1x1"
    assert common.topology_of(devices("NVIDIA H200", None)) is None and common.topology_of(devices("cpu", None)) is None


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """All parts on a CPU; digits end byte-identical after a SIGKILL."""
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", SCRIPT, "--rehearse", f"--out={out}"],
        env=command_env() | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = {record["part"]: record for record in map(json.loads, (out / "results.jsonl").read_text().splitlines())}
    assert list(records) == ["digits", "attention", "step", "sampler"] and all(r["ok"] for r in records.values())
    whole, killed, difference = records["digits"]["rows"]
    assert whole["grids"] == killed["grids"] and whole["fd"] == killed["fd"] and killed["resumed at"] > 0
    assert difference["weights identical"] and difference["samples identical"]
    assert {row["attention"] for row in records["attention"]["rows"]} == {"dense", "blockwise"}
    assert all(row["images/s"] > 0 for part in ("step", "sampler") for row in records[part]["rows"])
    assert "## sampler: ok" in done.stdout
