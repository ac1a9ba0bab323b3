"""Shared by the drills: a tiny run, its processes, whether two runs ended alike, and the report."""

import argparse
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

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from markdown_table import table
from processes import die_with_parent, import_commands, run_module

ROOT = pathlib.Path(__file__).resolve().parents[2]

STEPS, EVERY = 24, 4
"""Steps of a tiny run, and between its checkpoints."""

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
"""Metrics that are timed, and differ between two runs."""


def start(doc: str, **options: dict[str, Any]) -> argparse.Namespace:
    """Parses the flags of a drill, makes its folder, and imports what its processes need.

    Forks of this process import and compile nothing again. To be called before jax is imported;
    starts no device.

    Args:
      doc: the drill's docstring.
      **options: the arguments of `add_argument` for each flag beside --out, by name.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    for name, option in options.items():
        parser.add_argument(f"--{name}", **option)
    args = parser.parse_args()
    args.out = out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(out / "compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    import_commands()
    print(f"in {out}", flush=True)
    return args


class Process:
    """A command in a fork of this process, its output read through a pipe.

    A full disk or a limited file size would cut off output that is written to a file.

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
            die_with_parent()
            if fault is not None:
                fault()
            if isinstance(module, str):
                status = run_module(module, args)
            else:
                print(json.dumps(module()), flush=True)
                status = 0
            # As Python does at its end: waits for threads that are not daemons.
            threading._shutdown()
            return status
        except BaseException:
            # Nothing may propagate into the stack inherited from the parent.
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
        """Reads what is in the pipe, waiting for it at most `timeout` seconds."""
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


def finished(process: Process, description: str) -> Process:
    """Waits for a process. Raises RuntimeError with its output unless it succeeded."""
    if process.wait():
        raise RuntimeError(f"{description}: status {process.returncode}\n{process.output}")
    return process


# --- How a run ended --------------------------------------------------------------


def started_at(output: str) -> int | None:
    """The step that a training process began with, by its first line; None if it ended before."""
    line = re.search(r"^(?:resuming .* at step (\d+):|.* already trained to step (\d+)$|training in )", output, re.M)
    return None if line is None else int(line.group(1) or line.group(2) or 0)


def reached(workdir: pathlib.Path) -> int:
    """The last step that was trained, by the run's metrics; 0 if none was."""
    steps = re.findall(r'^\{"step": (\d+),', _text(workdir / "metrics.jsonl"), re.M)
    return int(steps[-1]) if steps else 0


def _text(path: pathlib.Path) -> str:
    return path.read_text() if path.is_file() else ""


def lost_steps(reached: int, resumed: int, every: int = EVERY) -> int:
    """Steps lost, of those up to the newest checkpoint whose save had begun.

    Saving runs in the background: steps trained meanwhile are repeated too, but the bound of
    `checkpoint.every` does not cover them.
    """
    return max(0, (reached - 1) // every * every - resumed)


def metrics_of(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The metrics in `metrics.jsonl` by step, without times; the last line of a step counts.

    Args:
      lines: of the file; an evaluation is a second line of its step.
    """
    metrics = {}
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        except ValueError:
            metrics[f"broken line {number} of the metrics"] = {"text": line}
            continue
        kind = "evaluation" if any(name.startswith("evaluation/") for name in values) else "training"
        metrics[f"{kind} of step {values['step']}"] = {n: v for n, v in values.items() if n not in TIMES}
    return metrics


def steps_of(workdir: pathlib.Path) -> list[int]:
    """Steps with a checkpoint, whole or not, newest first."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def is_intact(workdir: pathlib.Path, step: int) -> bool:
    """Whether a step can be restored, rather than being refused as damaged."""
    from causalfusion_jax.checkpoints.checkpoint import Checkpoints
    from causalfusion_jax.common.errors import InputError

    try:
        return Checkpoints(workdir, read_only=True).good_step(step) == step
    except InputError:
        return False


def end_of(workdir: pathlib.Path) -> dict[str, Any]:
    """The end of a run as plain values, the same for two runs of the same settings.

    The arrays are read by Orbax alone. Starts jax's device: to be called in a process of its own.
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


def differences(expected: dict[str, Any], end: dict[str, Any]) -> list[str]:
    """Names of the values in which two ends differ, sorted; empty if they are byte-identical."""
    names = sorted(expected.keys() | end.keys())
    return [name for name in names if name not in expected or name not in end or expected[name] != end[name]]


def compared(expected: dict[str, Any], read: Callable[[], dict[str, Any]], survived: bool) -> dict[str, Any]:
    """`differs` and `identical` of a record, for the end that `read` gives of a run that survived."""
    differs = differences(expected, read()) if survived else ["it did not end"]
    return {"differs": differs, "identical": not differs}


def value_of(function: Callable[[], Any]) -> Any:
    """The value of a function called in a process of its own; a plain value."""
    process = finished(Process(function), "a process of the drill")
    return json.loads(process.output.strip().splitlines()[-1])


def read_end(workdir: pathlib.Path) -> dict[str, Any]:
    """`end_of` in a process of its own."""
    return value_of(lambda: end_of(workdir))


def reference(out: pathlib.Path, *flags: str) -> tuple[dict[str, Any], float]:
    """The end of an uninterrupted run, and the seconds that it takes.

    It is trained twice: the second reuses the programs that the first compiled, and both must end alike.

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
    """The records of a drill so far, one JSON line each, so that the same command continues.

    Attributes:
      records: plain values, in order.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self.records = path, [json.loads(line) for line in _text(path).splitlines()]

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Appends records."""
        with self._path.open("a") as file:
            for record in records:
                self.records.append(record)
                file.write(json.dumps(record) + "\n")


# --- The report -------------------------------------------------------------------


def last_line(text: str) -> str:
    """The last line of an output; "" for none."""
    return (text.strip().splitlines() or [""])[-1]


def missed_goal(record: dict[str, Any]) -> str:
    """Why the run of a record, once continued, missed the goal of every drill; "" if it met it."""
    if not record["survived"]:
        return f"not continued: {last_line(record['error'])}"
    if record["lost"] > EVERY:
        return f"{record['lost']} steps lost"
    return "" if record["identical"] else f"the end differs in {', '.join(record['differs'][:5])}"


def continued_columns(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Columns of a table: how the runs of records were continued."""
    return {
        "survived": sum(record["survived"] for record in records),
        "most steps lost": max((record["lost"] for record in records if record.get("lost") is not None), default=""),
    }


def identical_column(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Column of a table: the number of runs that ended as the uninterrupted one."""
    return {"byte-identical at the end": f"{sum(record['identical'] for record in records)} of {len(records)}"}


def machine() -> str:
    """Processor and cores."""
    name = re.search(r"^model name\s*: (.*)$", _text(pathlib.Path("/proc/cpuinfo")), re.M)
    return f"{os.cpu_count()} cores, {name.group(1) if name else 'unknown processor'}"


def commit() -> str:
    """The checkout's commit."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def report(drill: str, rows: Sequence[dict[str, Any]], failures: Sequence[str], **values: Any) -> int:
    """Prints the table, the failures and one JSON line; returns the exit status.

    Args:
      drill: its name.
      rows: of the table.
      failures: a line each; the goal is met if there is none.
      **values: added to the JSON line.
    """
    print("\n" + table(rows) + "\n")
    for failure in failures:
        print(f"missed: {failure}")
    values = {"commit": commit(), "machine": machine(), "every": EVERY, "steps": STEPS, **values}
    print(json.dumps({"drill": drill, "met": not failures, **values, "rows": rows}), flush=True)
    return 1 if failures else 0
