"""Runs commands in forks of one process that has imported everything already.

Reads one JSON line a command from stdin, {"module", "args", "stdout", "stderr"}, and
answers with its exit status. The child runs the module as `python -m` does; what it is
spared is the seconds of importing.
"""

import json
import os
import runpy
import sys
import traceback


def run(request: dict) -> int:
    """The command, in this (forked) process; its exit status."""
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(request[stream], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.argv = [request["module"], *request["args"]]
    if request["module"].endswith(".preflight"):
        # The TPU compiler does not know all options of the CPU's.
        del os.environ["XLA_FLAGS"]
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def main() -> None:
    """Serves until stdin ends."""
    import causalfusion_jax.evaluation.scores
    import causalfusion_jax.released.conversion
    import causalfusion_jax.released.tensors
    import causalfusion_jax.sampling.trained
    import causalfusion_jax.training.loop  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run(json.loads(line)))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


if __name__ == "__main__":
    main()
