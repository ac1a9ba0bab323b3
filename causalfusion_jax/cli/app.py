"""Runs a command: parses its flags, reports wrong input in one line, sets the exit status."""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

import absl.app
from absl import flags, logging

from causalfusion_jax.cli import machine
from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, nearest

INTERRUPTED = 75
"""Exit status (EX_TEMPFAIL) of a command that a signal stopped after it saved its work: the same command continues.
A command exits with 0 only when its work is complete."""


def run(main: Callable[[Sequence[str]], None], required: Sequence[str] = ()) -> None:
    """Parses flags and runs `main`.

    An InputError ends the process with one line on stderr and status 2; a disk that is full or
    fails (`files.DISK_ERRORS`) with one line and status 1.

    Args:
      main: takes the arguments that are not flags.
      required: flags that must be given.
    """
    machine.prepare()

    def guarded(argv):
        if not flags.FLAGS["verbosity"].present:
            # Orbax reports every file at INFO; --verbosity=0 shows it.
            logging.set_verbosity(logging.WARNING)
        with errors_in_one_line():
            if len(argv) > 1:
                raise InputError("argument", argv[1], "not understood; options are given as --name=value")
            main(argv)

    absl.app.run(guarded, flags_parser=lambda argv: parse(argv, required))


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the process with one line on InputError (status 2) and on disk errors (status 1)."""
    try:
        yield
    except InputError as error:
        fail(error)
    except OSError as error:
        if error.errno not in files.DISK_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror}; run the same command again to continue once this is resolved", 1)


def define_processes() -> Callable[[], None]:
    """Defines the flags of a job of several processes.

    Returns:
      A function that joins the processes as the flags say; to be called before anything uses a device.
    """
    address = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0 of several.")
    count = flags.DEFINE_integer("num_processes", None, "Number of processes.")
    number = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
    multihost = flags.DEFINE_bool(
        "multihost", False, "Find the other processes through the cluster's metadata (TPU pod, GKE)."
    )

    def join() -> None:
        from causalfusion_jax.common import distributed

        distributed.initialize(address.value, count.value, number.value, multihost.value)

    return join


@contextlib.contextmanager
def exit_status_of_training(out: TextIO | None = None) -> Iterator[None]:
    """Ends the process with INTERRUPTED if training was stopped, and with 1 if it diverged.

    Args:
      out: stream for the line that says at which step it was stopped; default: stderr.
    """
    from causalfusion_jax.common import distributed
    from causalfusion_jax.training.stopping import Stopped, TrainingDiverged

    try:
        yield
    except Stopped as stopped:
        if distributed.is_primary():
            print(stopped, file=out or sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except TrainingDiverged as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


@contextlib.contextmanager
def as_flags() -> Iterator[None]:
    """Makes an InputError name the flag, --FIELD, if the command has a flag with the name of its field."""
    try:
        yield
    except InputError as error:
        field = f"--{error.field}" if error.field in flags.FLAGS else error.field
        raise InputError(field, error.value, error.allowed) from None


def fail(error: Exception | str, status: int = 2) -> None:
    """Prints the error as one line and ends the process."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(status)


def parse(argv: Sequence[str], required: Sequence[str]) -> list[str]:
    """Parses flags; errors end the process with one line.

    Args:
      argv: the command line.
      required: flags that must be given.

    Returns:
      The arguments that are not flags.
    """
    wants_help = any(arg.lstrip("-") in ("help", "helpfull", "helpshort") for arg in argv[1:])
    try:
        if "config" in flags.FLAGS:
            _check_config(argv)
        rest = flags.FLAGS(list(argv))
        for name in required if not wants_help else ():
            if flags.FLAGS[name].value in (None, ""):
                raise InputError(f"--{name}", flags.FLAGS[name].value, "is required; see --help")
        return rest
    except InputError as error:
        fail(error)
    except flags.Error as error:
        fail(_input_error(error) or error)


def _input_error(error: BaseException | None) -> InputError | None:
    """The InputError of a config file that caused `error`: ml_collections and absl wrap it in errors of their own."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def _check_config(argv: Sequence[str]) -> None:
    """Raises InputError for a config file that does not exist, or an override of an unknown setting.

    Every config starts from `default_config()`, so its keys are known before it is read.
    """
    from causalfusion_jax.config.experiment import default_config

    known = default_config()
    for arg in argv[1:]:
        name, _, value = arg.lstrip("-").partition("=")
        if name == "config" and value:
            path = value.partition(":")[0]
            if not pathlib.Path(path).is_file():
                raise InputError("--config", value, "no such file; give configs/NAME.py or configs/NAME.py:ARG")
        if not arg.startswith("-") or not name.startswith("config."):
            continue
        section, path = known, "config"
        for part in name.split(".")[1:]:
            keys = list(section.keys()) if hasattr(section, "keys") else []
            if part not in keys:
                allowed = f"unknown key{nearest(part, keys)}; {path} has {', '.join(keys) or 'no keys below it'}"
                raise InputError(f"{path}.{part}", value, allowed)
            section, path = section[part], f"{path}.{part}"
