"""What the commands share: one clear line for a wrong input, and exit status 2."""

import contextlib
import ctypes
import glob
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from absl import app, flags, logging

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, nearest

INTERRUPTED = 75
"""Exit status (EX_TEMPFAIL) of a command that a signal stopped before its work was complete, which is saved: run it
again. A command exits with 0 only when its work is complete."""


def run(main: Callable[[Sequence[str]], None], required: Sequence[str] = ()) -> None:
    """Parses flags and runs `main`.

    InputError, from anywhere, ends the process with one line on stderr and status 2; a disk
    that is full or fails (`files.DISK_ERRORS`), with one line and status 1.

    Args:
      main: takes the arguments that are not flags.
      required: flags that must be given.
    """
    # Libraries below report on their own start-up otherwise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

    leave_out_absent_tpu()
    if computes_on_cpu():
        keep_freed_memory()
    allow_many_open_files()

    def guarded(argv):
        if not flags.FLAGS["verbosity"].present:
            # Orbax reports every file at INFO; --verbosity=0 shows it.
            logging.set_verbosity(logging.WARNING)
        with errors_in_one_line():
            if len(argv) > 1:
                raise InputError("argument", argv[1], "not understood; options are given as --name=value")
            main(argv)

    app.run(guarded, flags_parser=lambda argv: _parse(argv, required))


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the process with one line on InputError (status 2) and on errors of the disk (status 1)."""
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
      What joins the processes as those flags say, to be called before anything touches a device.
    """
    address = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where there are several.")
    count = flags.DEFINE_integer("num_processes", None, "Number of processes.")
    number = flags.DEFINE_integer("process_id", None, "Which of them this one is.")
    multihost = flags.DEFINE_bool(
        "multihost", False, "Find the other processes by the cluster's metadata (TPU pod, GKE)."
    )

    def join() -> None:
        from causalfusion_jax.common import distributed

        distributed.initialize(address.value, count.value, number.value, multihost.value)

    return join


@contextlib.contextmanager
def exit_status_of_training(out: TextIO | None = None):
    """Ends the process with INTERRUPTED where training was stopped, and with 1 where it diverged.

    Args:
      out: where one line says how far it came; default: stderr.
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


def keep_freed_memory() -> None:
    """Tells glibc to reuse freed memory rather than give it back to the system; for processes that compute on the CPU.

    XLA:CPU allocates a program's temporaries anew at every call. By default large ones are
    fresh pages each time, and zeroing those takes a good part of a small model's step
    (launch/bench/RESULTS.md). The one arena that this takes is shared by all threads: beside an
    accelerator, where memory is allocated by many reading threads instead, it makes them wait.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8
        mallopt(m_arena_max, 1)
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 2**26)


def leave_out_absent_tpu() -> None:
    """Keeps jax from starting a TPU that is not there, where libtpu is installed for its compiler alone.

    Nothing happens where JAX_PLATFORMS is set, or any accelerator can be seen.
    """
    if "JAX_PLATFORMS" not in os.environ and importlib.util.find_spec("libtpu") and not _has_accelerator():
        os.environ["JAX_PLATFORMS"] = "cpu"


def computes_on_cpu() -> bool:
    """Whether jax, which has yet to start, will compute on the CPU of this machine."""
    platforms = os.environ.get("JAX_PLATFORMS")
    # The first one named is where programs run.
    return platforms.split(",")[0].strip() == "cpu" if platforms else not _has_accelerator()


def allow_many_open_files() -> None:
    """Raises this process's limit of open files to what the system allows.

    Readers of ArrayRecord keep a file open for each shard, and 1,024 is a common limit as well as a
    common number of shards.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < allowed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


MAX_OPEN_FILES = 65536
"""Enough for any data set; without a bound, some programs close every possible descriptor one by one."""


def _has_accelerator() -> bool:
    """Whether the system shows a TPU or GPU."""
    devices = [path for pattern in _ACCELERATOR_FILES for path in glob.glob(pattern)]
    vendors = {pathlib.Path(path).read_text().strip() for path in glob.glob("/sys/bus/pci/devices/*/vendor")}
    return bool(devices) or bool(vendors & _ACCELERATOR_VENDORS)


_ACCELERATOR_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/kfd")
_ACCELERATOR_VENDORS = {"0x1ae0", "0x10de", "0x1002"}
"""Google, NVIDIA, AMD."""


@contextlib.contextmanager
def as_flags() -> Iterator[None]:
    """Names the flag that an InputError is about, where the command has one of that name."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"--{error.field}" if error.field in flags.FLAGS else error.field, error.value, error.allowed
        ) from None


def fail(error: Exception | str, status: int = 2) -> None:
    """Prints the error as one line and ends the process."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(status)


def _parse(argv: Sequence[str], required: Sequence[str]) -> list[str]:
    """Flag parsing whose errors are one line."""
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
    """The InputError that led to `error`: a config file's, which ml_collections and absl raise again as their own."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def _check_config(argv: Sequence[str]) -> None:
    """Raises InputError for a config file that is not there, or an override of nothing.

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
