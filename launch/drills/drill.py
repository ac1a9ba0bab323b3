"""What the drills share: a tiny run, its processes, and whether two runs ended alike."""

import hashlib
import json
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]

import command_server  # noqa: E402

STEPS, EVERY = 24, 4
"""Length of a tiny run, and the steps between its checkpoints."""

TINY = (
    f"--config={ROOT / 'configs' / 'digits.py'}", "--config.model.hidden=32", "--config.model.heads=2",
    "--config.model.layers=2", f"--config.train.steps={STEPS}", "--config.train.batch_size=8",
    "--config.optimizer.warmup_steps=3", f"--config.checkpoint.every={EVERY}", "--config.logging.every=1",
    f"--config.logging.sample_every={2 * EVERY}", "--config.logging.num_samples=20", "--config.sampling.ar_steps=2",
    "--config.sampling.solver_steps=3", "--config.data.workers=0",
    # Between two checkpoints, so that one is saved because it is the best.
    f"--config.evaluation.eval_every={2 * EVERY - 1}", "--config.evaluation.num_images=20",
)  # fmt: skip
"""Flags of a run on digits with checkpoints, grids and evaluations, in about two seconds."""

TIMES = ("steps_per_second", "images_per_second", "model_flops_utilization", "data_wait_fraction")
"""Metrics that are measured, and differ between two runs."""


def prepare(out: pathlib.Path) -> None:
    """Makes `out`, and this process one whose forks need not import or compile anything again.

    To be called before jax is imported; starts no device.
    """
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(out / "compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command_server.import_all()


class Process:
    """A command in a fork of this process, its output read through a pipe.

    A pipe, because a full disk or a limited file size must not take what it says.

    Args:
      module, args: as of `python -m`; or a function without arguments, whose value is printed as JSON.
      fault: called in the new process before the command.

    Attributes:
      returncode: exit status, negative for a signal; None while it runs.
      output: standard output and error.
      was_killed: whether `wait` sent it a signal while it ran.
    """

    def __init__(
        self, module: str | Callable[[], Any], args: Iterable[str] = (), fault: Callable[[], None] | None = None
    ):
        self.returncode, self.was_killed = None, False
        self._bytes, self._started = b"", time.monotonic()
        self._pipe, write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._pipe)
            os.dup2(write, 1)
            os.dup2(write, 2)
            os._exit(self._run(module, list(args), fault))
        os.close(write)

    @staticmethod
    def _run(module, args: list[str], fault) -> int:
        """In the new process: the command; its exit status."""
        try:
            command_server.die_with_parent()
            if fault is not None:
                fault()
            if isinstance(module, str):
                status = command_server.run_module(module, args)
            else:
                print(json.dumps(module()), flush=True)
                status = 0
            # As Python does at the end: waits for threads that are no daemons.
            threading._shutdown()
            return status
        except BaseException:
            # Nothing may reach the stack that this process has inherited.
            traceback.print_exc()
            return 1

    @property
    def output(self) -> str:
        return self._bytes.decode(errors="replace")

    def wait(self, kill_after: float | None = None, number: int = signal.SIGKILL, timeout: float = 300.0) -> int:
        """The exit status, once it has ended.

        Args:
          kill_after: seconds from its start until it is sent signal `number`; None is never.
          timeout: seconds from its start after which it is killed, and RuntimeError raised.
        """
        while self.returncode is None:
            now = time.monotonic() - self._started
            if kill_after is not None and now >= kill_after:
                os.kill(self._pid, number)
                kill_after, self.was_killed = None, True
            if now >= timeout:
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                raise RuntimeError(f"still running after {timeout:.0f} s:\n{self.output}")
            self._read(0.01)
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._read(0)
                os.close(self._pipe)
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def _read(self, timeout: float) -> None:
        """Whatever is in the pipe, waiting for it `timeout` seconds."""
        while select.select([self._pipe], [], [], timeout)[0]:
            read = os.read(self._pipe, 65536)
            if not read:
                # Its end has closed; the process may still run.
                time.sleep(timeout)
                return
            self._bytes, timeout = self._bytes + read, 0


def train(workdir: pathlib.Path, *flags: str, fault: Callable[[], None] | None = None) -> Process:
    """A training process of the tiny run, started."""
    return Process("causalfusion_jax.train", (*TINY, f"--workdir={workdir}", *flags), fault)


def finished(process: Process, what: str) -> Process:
    """`process`, ended. Raises RuntimeError with its output unless it succeeded."""
    if process.wait():
        raise RuntimeError(f"{what}: status {process.returncode}\n{process.output}")
    return process


# --- How a run ended --------------------------------------------------------------


def started_at(output: str) -> int | None:
    """The step that a training process began with, by its own first line; None where it did not come so far."""
    found = re.search(r"^(?:resuming .* at step (\d+):|.* already trained to step (\d+)$|training in )", output, re.M)
    return None if found is None else int(found.group(1) or found.group(2) or 0)


def reached(workdir: pathlib.Path) -> int:
    """The last step that was trained, by the run's metrics; 0 where none was."""
    steps = re.findall(r'^\{"step": (\d+),', _text(workdir / "metrics.jsonl"), re.M)
    return int(steps[-1]) if steps else 0


def _text(path: pathlib.Path) -> str:
    return path.read_text() if path.is_file() else ""


def lost_steps(reached: int, resumed: int, every: int = EVERY) -> int:
    """Steps lost, of those up to the newest checkpoint whose save had begun.

    Saving goes on in the background: steps trained meanwhile are repeated too, but are not
    what `checkpoint.every` promises.
    """
    return max(0, (reached - 1) // every * every - resumed)


def metrics_of(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What `metrics.jsonl` says by step: the last line of a step counts, and times do not.

    Args:
      lines: of the file; those of evaluations are a step's own second line.
    """
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        except ValueError:
            found[f"broken line {number} of the metrics"] = {"text": line}
            continue
        kind = "evaluation" if any(name.startswith("evaluation/") for name in values) else "training"
        found[f"{kind} of step {values['step']}"] = {n: v for n, v in values.items() if n not in TIMES}
    return found


def steps_of(workdir: pathlib.Path) -> list[int]:
    """Steps of which something is saved, newest first."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def is_intact(workdir: pathlib.Path, step: int) -> bool:
    """Whether a step is given where it is asked for, rather than refused as damaged."""
    from causalfusion_jax.checkpoints.checkpoint import Checkpoints
    from causalfusion_jax.common.errors import InputError

    try:
        return Checkpoints(workdir, read_only=True).good_step(step) == step
    except InputError:
        return False


def end_of(workdir: pathlib.Path) -> dict[str, Any]:
    """What must be the same at the end of two runs of the same settings, as plain values.

    The arrays are read by Orbax alone. Starts jax's device: for a process of its own.
    """
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from causalfusion_jax.checkpoints.checkpoint import Checkpoints

    steps = steps_of(workdir)
    folder = workdir / "checkpoints" / str(steps[0])
    state = ocp.StandardCheckpointer().restore(folder / "state")
    arrays = {
        f"array{jax.tree_util.keystr(path)}": _digest(np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    left = [path.name for path in workdir.rglob("*") if re.search(r"orbax-checkpoint-tmp|\.part$|\.half$", path.name)]
    grids = {f"grid {path.name}": _digest(path.read_bytes()) for path in sorted((workdir / "samples").glob("*.png"))}
    return {
        "step": steps[0],
        "data position": json.loads((folder / "data" / "metadata").read_text())["position"],
        "best": Checkpoints(workdir, read_only=True).best(steps[0]),
        "checkpoints that are not whole": [step for step in steps if not is_intact(workdir, step)],
        "files left behind": left,
        **arrays,
        **grids,
        **metrics_of(_text(workdir / "metrics.jsonl").splitlines()),
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digests(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): _digest(path.read_bytes()) for path in paths}


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of what differs between two ends, sorted; empty where they are byte-identical."""
    names = sorted(expected.keys() | found.keys())
    return [name for name in names if name not in expected or name not in found or expected[name] != found[name]]


def value_of(function: Callable[[], Any]) -> Any:
    """What a function returns, called in a process of its own, as plain values."""
    process = finished(Process(function), "a process of the drill")
    return json.loads(process.output.strip().splitlines()[-1])


def read_end(workdir: pathlib.Path) -> dict[str, Any]:
    """`end_of` in a process of its own."""
    return value_of(lambda: end_of(workdir))


def reference(out: pathlib.Path, *flags: str) -> tuple[dict[str, Any], float]:
    """The end of the run that nothing interrupts, and the seconds that it takes.

    It is trained twice: what the first one compiled, the second reuses, and both must end alike.

    Raises:
      RuntimeError: they do not.
    """
    ends = []
    for name in ("reference", "reference_again"):
        start = time.monotonic()
        finished(train(out / name, *flags), "the uninterrupted run")
        seconds = time.monotonic() - start
        ends.append(read_end(out / name))
    differing = differences(*ends)
    if differing:
        raise RuntimeError(f"two uninterrupted runs differ in {', '.join(differing)}")
    return ends[0], seconds


def remove(folder: pathlib.Path) -> None:
    """Removes a folder, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


class Records:
    """What a drill has done so far: one JSON line each, so that the same command continues.

    Attributes:
      records: plain values, in order.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self.records = path, [json.loads(line) for line in _text(path).splitlines()]

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Keeps them."""
        with self._path.open("a") as file:
            for record in records:
                self.records.append(record)
                file.write(json.dumps(record) + "\n")


# --- Tables -----------------------------------------------------------------------


def machine() -> str:
    """Processor and cores."""
    found = re.search(r"^model name\s*: (.*)$", _text(pathlib.Path("/proc/cpuinfo")), re.M)
    return f"{os.cpu_count()} cores, {found.group(1) if found else 'unknown processor'}"


def commit() -> str:
    """The checkout's commit."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table; a column for each name."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join(head + [f"| {' | '.join(str(row.get(name, '')) for name in columns)} |" for row in rows])


def report(drill: str, rows: Sequence[dict[str, Any]], failures: Sequence[str], **values: Any) -> int:
    """Prints the table, what missed the goal, and one JSON line; the exit status.

    Args:
      drill: its name.
      rows: of the table.
      failures: each a line; the goal is met where there is none.
      **values: also for the JSON line.
    """
    print("\n" + table(rows) + "\n")
    for failure in failures:
        print(f"missed: {failure}")
    print(
        json.dumps(
            {"drill": drill, "met": not failures, "commit": commit(), "machine": machine(), **values, "rows": rows}
        ),
        flush=True,
    )
    return 1 if failures else 0
