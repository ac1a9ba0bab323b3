"""Child processes of the sweep runner, the drills and the tests."""

import ctypes
import runpy
import signal
import sys
import traceback

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """In a new child: has it receive SIGTERM, on which commands save, when its parent dies. Linux only."""
    if sys.platform.startswith("linux"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def import_commands() -> None:
    """Imports what the commands import, so that forks of this process need not; starts no device."""
    import causalfusion_jax.evaluation.periodic
    import causalfusion_jax.prepare.conversion
    import causalfusion_jax.prepare.tensors
    import causalfusion_jax.sampling.trained
    import causalfusion_jax.training.loop  # noqa: F401


def run_module(name: str, args: list[str]) -> int:
    """Runs `python -m name args` in this process and returns its exit status."""
    sys.argv = [name, *args]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as exit:
        status = 0 if exit.code is None else exit.code
        if not isinstance(status, int):
            # As Python does at its end.
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status
