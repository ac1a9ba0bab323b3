"""The jobs of a sweep: the commands of each run, in order, several runs at a time."""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

from processes import die_with_parent

from causalfusion_jax.cli.app import INTERRUPTED
from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of a run.

    Attributes:
      name: training, sampling ... or scoring ...
      args: what follows `python -m`.
      product: the JSON file that it writes last.
    """

    name: str
    args: tuple[str, ...]
    product: pathlib.Path

    @property
    def is_done(self) -> bool:
        """Whether its file is there, whole."""
        return files.read_json(self.product) is not None


@dataclasses.dataclass
class Job:
    """A run and its commands.

    Attributes:
      name: of the run.
      stages: its commands, in order.
      log: file that receives their output.
      state: waiting, running, finished, failed or interrupted.
      message: why it failed or was interrupted; or the running command.
    """

    name: str
    stages: tuple[Stage, ...]
    log: pathlib.Path
    state: str = "waiting"
    message: str = ""

    @property
    def is_finished(self) -> bool:
        """Whether every score is there."""
        return all(stage.is_done for stage in self.stages if stage.name.startswith("scoring"))

    def enter(self, state: str, message: str = "") -> None:
        """Changes and prints the state."""
        self.state, self.message = state, message
        sys.stdout.write(f"{state:<8}  {self.name}  {message}".rstrip() + "\n")
        sys.stdout.flush()

    def last_line(self) -> str:
        """The last line that its commands printed."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return "" if lines[-1].startswith("$ ") else lines[-1]

    def run(self, processes: "Processes") -> None:
        """Runs the commands that are not done, until one fails or a signal comes."""
        if self.is_finished:
            self.enter("finished", "was there already")
            return
        for stage in self.stages:
            # Training is always started: it alone can tell that its checkpoint is intact.
            if stage.is_done and stage.name != "training":
                continue
            if processes.signals:
                if self.state == "running":
                    self.enter("interrupted", f"before {stage.name}")
                return
            self.enter("running", stage.name)
            # Left by samplers that were killed while they wrote.
            for folder in stage.product.parent.parent.glob(".samples_*"):
                shutil.rmtree(folder, ignore_errors=True)
            status = processes.call(stage.args, self.log)
            if status == 0 and stage.is_done:
                continue
            if processes.signals or status == INTERRUPTED:
                self.enter("interrupted", self.last_line())
            else:
                self.enter("failed", f"{stage.name}: {self.last_line()} (see {self.log})")
            return
        self.enter("finished")


class Processes:
    """The processes that run commands, and the signals that they are sent.

    Attributes:
      signals: numbers of the signals that came; no process is started after the first.
    """

    def __init__(self, lock: TextIO):
        """`lock`: a locked file, which processes keep locked for as long as they live."""
        self.signals: list[int] = []
        self._running: set[subprocess.Popen] = set()
        self._lock = lock
        # Reentrant, as a signal may come while another one is passed on.
        self._mutex = threading.RLock()

    def call(self, args: tuple[str, ...], log: pathlib.Path) -> int | None:
        """Runs `python -m args` with its output appended to `log`; its exit status, or None if a signal came before."""
        with log.open("a") as file:
            file.write(f"$ python -m {shlex.join(args)}\n")
            file.flush()
            with self._mutex:
                if self.signals:
                    return None
                process = subprocess.Popen(
                    [sys.executable, "-m", *args],
                    cwd=ROOT,
                    env=_environment(log.parent.parent),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    # A session of its own: the terminal's Ctrl-C must reach it once, through `pass_on`.
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                    pass_fds=(self._lock.fileno(),),
                )
                self._running.add(process)
        try:
            return process.wait()
        finally:
            with self._mutex:
                self._running.discard(process)

    def pass_on(self, number: int, frame: object = None) -> None:
        """Sends a signal to every process."""
        with self._mutex:
            self.signals.append(number)
            for process in self._running:
                process.send_signal(number)


def _environment(workdir: pathlib.Path) -> dict[str, str]:
    """The environment of commands: the package of this checkout, and one cache of compiled programs for all runs."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {"JAX_COMPILATION_CACHE_DIR": str(workdir / "compiled"), **os.environ, "PYTHONPATH": path}


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[TextIO]:
    """Keeps other sweeps out of `workdir` for as long as this process, or a run it started, lives."""
    with (workdir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = "another sweep is running there, or a run that it started is still saving; wait for it"
            raise InputError("--workdir", str(workdir), message) from None
        except OSError:
            # A file system without locks.
            pass
        yield lock


def run_jobs(jobs: list[Job], parallel: int, lock: TextIO) -> str | None:
    """Runs all jobs, `parallel` at a time, and passes SIGINT and SIGTERM on to their processes.

    Returns:
      The name of the first signal that came; None: none did.
    """
    processes = Processes(lock)
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, processes.pass_on) for number in numbers}
    try:
        with concurrent.futures.ThreadPoolExecutor(parallel) as executor:
            for future in [executor.submit(job.run, processes) for job in jobs]:
                future.result()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return signal.Signals(processes.signals[0]).name if processes.signals else None
