"""Run by accelerator.sh: measurements in child processes, whose results are kept in a folder.

This process never touches a device, as a TPU serves one process at a time. It imports only the
standard library, so that it can name missing packages.
"""

import argparse
import configparser
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from markdown_table import table

ROOT = pathlib.Path(__file__).resolve().parents[2]
BENCH = pathlib.Path("launch") / "bench"
LIMIT_SECONDS = 570.0
"""Time limit of a child process."""
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest error of attention, relative to the largest value."""
NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|Ran out of memory|exceeds available memory")
XL = "configs/imagenet_causalfusion.py:XL"


class Failed(Exception):
    """A measurement failed; the message is one line."""


class OutOfMemory(Failed):
    """A program does not fit into the device's memory."""


# --- Before anything runs ---------------------------------------------------------


def missing_packages(requirements: str, version_of: Callable[[str], str] = importlib.metadata.version) -> list[str]:
    """Requirements that are not installed, or too old.

    Args:
      requirements: lines of NAME>=VERSION with an optional marker; comments and blank lines are skipped.
      version_of: the installed version of a package; raises PackageNotFoundError.
    """
    missing = []
    for line in requirements.splitlines():
        requirement = line.partition(";")[0].strip()
        if not requirement or requirement.startswith("#"):
            continue
        name, _, least = requirement.partition(">=")
        # Either variant of TensorFlow is enough.
        name, version = name.removesuffix("-cpu"), None
        variants = [name, f"{name}-cpu"]
        for variant in variants:
            try:
                version = version or version_of(variant)
            except importlib.metadata.PackageNotFoundError:
                continue
        if version is None:
            missing.append(f"{name}>={least} (not installed)")
        elif _numbers(version) < _numbers(least):
            missing.append(f"{name}>={least} (is {version})")
    return list(dict.fromkeys(missing))


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def install_requires() -> str:
    """The project's requirements, as setup.cfg lists them."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup["options"]["install_requires"]


# --- Running and storing ----------------------------------------------------------


@dataclasses.dataclass
class Bench:
    """A folder of results.

    Attributes:
      out: the folder, absolute.
      rehearse: whether everything is small, for a CPU.
      device: `platform`, `device`, `devices`, `jax`.
    """

    out: pathlib.Path
    rehearse: bool
    device: dict = dataclasses.field(default_factory=dict)

    def env(self, **changes: str) -> dict[str, str]:
        """The environment of child processes: this checkout, and a cache of compiled programs."""
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self.out / "compiled")),
        }
        return env | ({"JAX_PLATFORMS": "cpu"} if self.rehearse else {}) | changes

    def log(self, name: str) -> pathlib.Path:
        """File for the output of a child process."""
        path = self.out / "logs" / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def cached(self, name: str, measure: Callable[[], dict]) -> dict:
        """The result of `measure()`, read from the folder if it is there."""
        path = self.out / "measured" / f"{name}.json"
        if path.is_file():
            return json.loads(path.read_text())
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        result = measure()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        write(path, json.dumps(result))
        return result

    def child(self, name: str, *args: str, **env: str) -> str:
        """Runs a Python child process and returns its standard output.

        Raises:
          OutOfMemory: its program does not fit into the device's memory.
          Failed: its exit status is not 0, or it took longer than LIMIT_SECONDS.
        """
        log = self.log(name)
        try:
            done = subprocess.run(
                [sys.executable, *map(str, args)],
                cwd=ROOT,
                env=self.env(**env),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=LIMIT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"{name}: took longer than {LIMIT_SECONDS:.0f} s") from None
        log.write_text(f"$ python {' '.join(map(str, args))}\n{done.stdout}{done.stderr}")
        if done.returncode:
            check_memory(name, done.stderr)
            raise Failed(f"{name}: exit status {done.returncode}; see {log}")
        return done.stdout

    def rows(self, name: str, script: str, *args: str) -> list[dict]:
        """The rows of a benchmark's table."""
        printed = self.child(name, BENCH / script, *args)
        return json.loads(next(line for line in printed.splitlines() if line.startswith("{")))["rows"]


def check_memory(name: str, printed: str) -> None:
    """Raises OutOfMemory if the output of a failed child process reports it."""
    if NO_MEMORY.search(printed):
        raise OutOfMemory(f"{name}: does not fit into the device's memory")


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


DEVICE = """
import json, jax
devices = jax.devices()
print(json.dumps({"platform": devices[0].platform, "device": devices[0].device_kind, "devices": len(devices),
                  "jax": jax.__version__}))
"""


# --- The parts --------------------------------------------------------------------
#
# Each returns the rows of its table; `ok` in a row tells whether a check passed.


def settings(**sections: dict) -> list[str]:
    """Flags that change settings of a config."""
    return [f"--config.{section}.{name}={value}" for section in sections for name, value in sections[section].items()]


def digits(bench: Bench) -> list[dict]:
    """Training with checkpoints, grids and evaluations: uninterrupted, and killed and resumed."""
    steps, every = (30, 6) if bench.rehearse else (2300, 250)
    flags = ["--config=configs/digits.py", *settings(
        train=dict(steps=steps), checkpoint=dict(every=every), evaluation=dict(eval_every=2 * every),
        logging=dict(every=every // 6 or 1, sample_every=2 * every),
    )]  # fmt: skip
    if bench.rehearse:
        flags += settings(
            model=dict(hidden=32, heads=2), train=dict(batch_size=8), optimizer=dict(warmup_steps=3),
            evaluation=dict(num_images=20), sampling=dict(solver_steps=4),
        )  # fmt: skip
    num = 20 if bench.rehearse else 500
    whole, killed = (bench.out / "digits" / name for name in ("whole", "killed"))
    rows = [bench.cached("digits_whole", lambda: {"run": "whole"} | trained(bench, "digits_whole", flags, whole))]
    stop = bench.cached("digits_kill", lambda: kill_training(bench, "digits_kill", flags, killed, steps // 2))
    resumed = bench.cached("digits_killed", lambda: trained(bench, "digits_killed", flags, killed))
    rows.append({"run": "killed and resumed", **stop, **resumed})
    for row, workdir in zip(rows, (whole, killed), strict=True):
        row |= bench.cached(f"digits_{workdir.name}_scores", lambda workdir=workdir: scores(bench, workdir, num))
        # A kill loses the steps after the newest checkpoint, and one checkpoint that was being written.
        row["ok"] = row.get("resumed at", 0) >= row.get("killed at", 0) - 2 * every
    same = bench.cached("digits_same", lambda: compare(bench, whole, killed))
    return [*rows, {"run": "difference", **same}]


def trained(bench: Bench, name: str, flags: list[str], workdir: pathlib.Path) -> dict:
    """Trains to the end; returns metrics of the run."""
    start = time.perf_counter()
    printed = bench.child(name, "-m", "causalfusion_jax.train", *flags, f"--workdir={workdir}", **deterministic(bench))
    seconds = time.perf_counter() - start
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    resumed = re.search(r"resuming .* at step (\d+)", printed)
    return {
        **({"resumed at": int(resumed[1])} if resumed else {}),
        "seconds": round(seconds, 1),
        "steps/s": round([line for line in lines if "loss" in line][-1]["steps_per_second"], 1),
        "loss": round([line for line in lines if "loss" in line][-1]["loss"], 5),
        "grids": len(list((workdir / "samples").glob("*.png"))),
        "evaluations": len({line["step"] for line in lines if "evaluation/fd" in line}),
    }


def deterministic(bench: Bench) -> dict[str, str]:
    """Environment in which a GPU adds in the same order in every run."""
    if bench.device.get("platform") != "gpu":
        return {}
    flags = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}


def kill_training(bench: Bench, name: str, flags: list[str], workdir: pathlib.Path, step: int) -> dict:
    """Trains until `step` is logged, then kills it."""
    with bench.log(name).open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "causalfusion_jax.train", *flags, f"--workdir={workdir}"],
            cwd=ROOT,
            env=bench.env(**deterministic(bench)),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        reached = 0
        for line in process.stdout:
            step_line = re.match(r"step +(\d+)/", line)
            reached = int(step_line[1]) if step_line else reached
            if reached >= step:
                break
        process.kill()
        process.communicate()
    if process.returncode != -signal.SIGKILL:
        raise Failed(f"{name}: ended by itself with status {process.returncode}; see {bench.log(name)}")
    return {"killed at": reached}


def scores(bench: Bench, workdir: pathlib.Path, num: int) -> dict:
    """Samples a run and scores the samples."""
    out, name = workdir / "end", f"digits_{workdir.name}"
    quick = ["--solver_steps=4"] if bench.rehearse else []
    run = ("-m", "causalfusion_jax.sample", f"--workdir={workdir}", f"--num={num}", f"--out={out}", *quick)
    bench.child(f"{name}_sample", *run, **deterministic(bench))
    flags = (f"--workdir={workdir}", f"--samples={out / 'samples.npz'}")
    printed = bench.child(f"{name}_evaluate", "-m", "causalfusion_jax.evaluate", *flags)
    return {key: round(json.loads(printed)[key], 4) for key in ("accuracy", "fd")}


def compare(bench: Bench, whole: pathlib.Path, killed: pathlib.Path) -> dict:
    """How the ends of two runs differ; `ok` if the weights are nearly the same."""
    printed = bench.child("digits_same", BENCH / "compare_runs.py", whole, killed, JAX_PLATFORMS="cpu")
    compared = json.loads(printed)
    samples, other_samples = ((workdir / "end" / "samples.npz").read_bytes() for workdir in (whole, killed))
    compared["samples identical"] = samples == other_samples
    return compared | {"ok": compared["relative difference of weights"] < 1e-2}


def attention(bench: Bench) -> list[dict]:
    """Attention in tiles against dense attention."""
    lengths, rounds = ((64,), 1) if bench.rehearse else ((256, 1024, 4096), 10)
    rows = []
    for tokens in lengths:
        for dtype, tolerance in TOLERANCES.items():
            flags = [f"--tokens={tokens}", f"--block={tokens // 4}", f"--dtype={dtype}", f"--rounds={rounds}"]
            name = f"attention_{tokens}_{dtype}"
            measured = bench.cached(name, lambda name=name, flags=flags: {
                "rows": bench.rows(name, "attention.py", "--values", *flags)
            })["rows"]  # fmt: skip
            for row in measured:
                row["ok"] = max(row["error of outputs"], row["error of gradients"]) <= tolerance
            rows += measured
    return rows


def small_network(bench: Bench) -> list[str]:
    """Flags that make XL small enough for a rehearsal."""
    network = dict(layers=2, hidden=32, heads=2, num_condition_tokens=4, dtype="float32")
    return settings(model=network, data=dict(image_size=4)) if bench.rehearse else []


def step(bench: Bench) -> list[dict]:
    """The training step at increasing batch sizes, until one does not fit."""
    batches = (4, 8) if bench.rehearse else (16, 32, 64, 128, 256)
    rows = []
    for implementation in ("flash", "dense"):
        for batch in batches:
            batch *= bench.device["devices"]
            name = f"step_{implementation}_{batch}"
            flags = [
                f"--config={XL}",
                *small_network(bench),
                *settings(train=dict(batch_size=batch, grad_accum_steps=1)),
            ]
            flags += [f"--attention={implementation}", "--steps=2", f"--rounds={1 if bench.rehearse else 3}"]
            measured = fitting(bench, name, "train_step.py", flags)
            if not measured:
                rows.append({"attention": implementation, "batch": batch, "fits": False})
                break
            rows += [{**row, "fits": True} for row in measured]
    return rows


def fitting(bench: Bench, name: str, script: str, flags: list[str]) -> list[dict]:
    """The rows of a benchmark; none if its program does not fit into the device's memory."""

    def measure() -> dict:
        try:
            return {"rows": bench.rows(name, script, *flags)}
        except OutOfMemory:
            return {"rows": []}

    return bench.cached(name, measure)["rows"]


def sampler(bench: Bench) -> list[dict]:
    """The sampler at increasing numbers of images, until one does not fit."""
    rows = []
    for num in (2, 4) if bench.rehearse else (16, 64, 256):
        num *= bench.device["devices"]
        solver = settings(sampling=dict(cfg_scale=1.5, solver_steps=2 if bench.rehearse else 25))
        flags = [f"--config={XL}", *small_network(bench), *solver, f"--num={num}", "--ar_steps=1,8", "--rounds=1"]
        measured = fitting(bench, f"sampler_{num}", "sampler.py", flags)
        if not measured:
            rows.append({"images": num, "fits": False})
            break
        rows += [{**row, "fits": True} for row in measured]
    return rows


PARTS = {"digits": digits, "attention": attention, "step": step, "sampler": sampler}


# --- The command --------------------------------------------------------------------


def run_part(bench: Bench, name: str) -> dict:
    """A part's record, read from the folder if it is there."""
    path = bench.out / "parts" / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    rows = PARTS[name](bench)
    record = {"part": name, **bench.device, "rehearsal": bench.rehearse, "ok": all_ok(rows), "rows": rows}
    write(path, json.dumps(record))
    return record


def all_ok(rows: list[dict]) -> bool:
    """Whether every check passed, and something fits."""
    return all(row.get("ok", True) for row in rows) and any(row.get("fits", True) for row in rows)


def write_results(bench: Bench) -> None:
    """Writes results.md and results.jsonl of the parts measured so far."""
    paths = [bench.out / "parts" / f"{name}.json" for name in PARTS]
    records = [json.loads(path.read_text()) for path in paths if path.is_file()]
    machine = "{devices} x {device}, jax {jax}".format(**bench.device)
    text = f"# {machine}{' (a small rehearsal on a CPU)' if bench.rehearse else ''}\n"
    for record in records:
        text += f"\n## {record['part']}: {'ok' if record['ok'] else 'FAILED'}\n\n{table(record['rows'])}\n"
    write(bench.out / "results.md", text)
    write(bench.out / "results.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def open_folder(bench: Bench) -> None:
    """Records the device; results of two devices, or of a rehearsal and a run, are kept apart."""
    bench.device = json.loads(bench.child("device", "-c", DEVICE).splitlines()[-1])
    if bench.device["platform"] == "cpu" and not bench.rehearse:
        fail(
            "jax finds no accelerator here, only a CPU. Is its plugin installed (. launch/setup_env.sh cuda, or tpu)?"
            " --rehearse runs a small version of everything on a CPU"
        )
    path = bench.out / "device.json"
    record = bench.device | {"rehearsal": bench.rehearse}
    if path.is_file() and json.loads(path.read_text()) != record:
        fail(f"--out={bench.out}: holds results of {path.read_text()}; give another folder")
    write(path, json.dumps(record))


def fail(message: str) -> None:
    """Ends the process with one line and status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message}; see --help")


def main(argv: list[str] | None = None) -> int:
    """Runs the parts; returns the exit status."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", default="accelerator")
    parser.add_argument("--part", choices=[*PARTS])
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    missing = missing_packages(install_requires())
    if missing:
        fail(
            f"{sys.executable} lacks {', '.join(missing)}. Install the project:"
            " `. launch/setup_env.sh cuda` on a machine with NVIDIA GPUs, `. launch/setup_env.sh tpu` on a TPU VM"
        )
    bench = Bench(pathlib.Path(args.out).absolute(), args.rehearse)
    open_folder(bench)
    status = 0
    for name in [args.part] if args.part else PARTS:
        try:
            record = run_part(bench, name)
        except Failed as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
            continue
        status = status or int(not record["ok"])
        write_results(bench)
    print((bench.out / "results.md").read_text() if (bench.out / "results.md").is_file() else "no results")
    return status


if __name__ == "__main__":
    sys.exit(main())
