"""Runs commands in forks of one process that has imported everything already.

Reads one JSON line a command from stdin, {"module", "args", "stdout", "stderr"}, and answers
with its process id, and once it has ended, its exit status, a line each. The child runs the
module as `python -m` does; what it is spared is the seconds of importing. It appends to the
files that it is given for its output where {"append": true}, else it writes them anew, and
goes without the environment variables named in "unset".
"""

import ctypes
import json
import os
import pathlib
import runpy
import select
import signal
import subprocess
import sys
import traceback


def die_with_parent() -> None:
    """In a new child: SIGTERM, so that it saves, should its parent be killed."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def run(request: dict) -> int:
    """The command, in this (forked) process; its exit status."""
    mode = os.O_APPEND if request.get("append") else os.O_TRUNC
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(request[stream], os.O_WRONLY | os.O_CREAT | mode)
        os.dup2(file, descriptor)
    for name in request.get("unset", ()):
        os.environ.pop(name, None)
    return run_module(request["module"], request["args"])


def run_module(name: str, args: list[str]) -> int:
    """`python -m name args` in this process; its exit status."""
    sys.argv = [name, *args]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as exit:
        status = 0 if exit.code is None else exit.code
        if not isinstance(status, int):
            # As Python does at the end.
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


class Forked:
    """A command in a fork of a command server; as much of subprocess.Popen as a job needs.

    Attributes:
      server: this file, running, its pipes unbuffered; it serves one command at a time.
      returncode: exit status; None while it runs.
    """

    def __init__(self, server: subprocess.Popen, args: tuple[str, ...], log: pathlib.Path):
        self.server, self.returncode = server, None
        module, *rest = args
        request = {"module": module, "args": rest, "stdout": str(log), "stderr": str(log), "append": True}
        server.stdin.write((json.dumps(request) + "\n").encode())
        # Whatever pipe it has ended with, the log of the servers says why.
        self._pid = int(server.stdout.readline() or 0)
        self.returncode = None if self._pid else 1

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        if self.returncode is None and select.select([self.server.stdout], [], [], 0)[0]:
            self.returncode = int(self.server.stdout.readline() or 1)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends it a signal."""
        os.kill(self._pid, number)


def import_all() -> None:
    """Imports what commands import; starts no device."""
    import causalfusion_jax.evaluation.periodic
    import causalfusion_jax.prepare.conversion
    import causalfusion_jax.prepare.tensors
    import causalfusion_jax.sampling.trained
    import causalfusion_jax.training.loop  # noqa: F401


def main() -> None:
    """Serves until stdin ends."""
    import_all()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            die_with_parent()
            os._exit(run(json.loads(line)))
        print(child, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


if __name__ == "__main__":
    main()
