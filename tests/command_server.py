"""Runs commands in forks of one process that has imported everything already, to save the seconds of importing.

Reads one JSON line for each command from stdin, {"module", "args", "stdout", "stderr", "unset"}: the files for its
output, and the environment variables it runs without. Answers with a line that holds its exit status.
"""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "launch"))
from processes import die_with_parent, import_commands, run_module


def run(request: dict) -> int:
    """Runs the command in this (forked) process and returns its exit status."""
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(request[stream], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    for name in request["unset"]:
        os.environ.pop(name, None)
    return run_module(request["module"], request["args"])


def main() -> None:
    """Serves until stdin ends."""
    import_commands()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            die_with_parent()
            os._exit(run(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
