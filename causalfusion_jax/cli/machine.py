"""Prepares a command's process for its machine: which accelerator JAX starts, memory on a CPU, open files."""

import contextlib
import ctypes
import glob
import importlib.util
import os
import pathlib
import sys

MAX_OPEN_FILES = 65536
"""Enough for any data set; bounded, because some programs close every possible descriptor one by one."""
_ACCELERATOR_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/kfd")
_ACCELERATOR_VENDORS = {"0x1ae0", "0x10de", "0x1002"}
"""PCI vendors: Google, NVIDIA, AMD."""


def prepare() -> None:
    """Everything that a command needs before JAX starts its backends."""
    # Otherwise libraries report their own start-up.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    leave_out_absent_tpu()
    if computes_on_cpu():
        keep_freed_memory()
    allow_many_open_files()


def leave_out_absent_tpu() -> None:
    """Keeps JAX from starting a TPU that does not exist, if libtpu is installed for its compiler alone.

    Does nothing if JAX_PLATFORMS is set or the system shows an accelerator.
    """
    if "JAX_PLATFORMS" not in os.environ and importlib.util.find_spec("libtpu") and not _has_accelerator():
        os.environ["JAX_PLATFORMS"] = "cpu"
        if "jax" in sys.modules:
            # JAX reads the variable when it is imported.
            sys.modules["jax"].config.update("jax_platforms", "cpu")


def computes_on_cpu() -> bool:
    """Whether JAX, whose backends have not started yet, will compute on the CPU."""
    platforms = os.environ.get("JAX_PLATFORMS")
    # Programs run on the first platform that is named.
    return platforms.split(",")[0].strip() == "cpu" if platforms else not _has_accelerator()


def keep_freed_memory() -> None:
    """Makes glibc reuse freed memory instead of returning it to the system; for processes that compute on the CPU.

    XLA:CPU allocates a program's temporaries anew at every call. By default large ones are
    fresh pages each time, and zeroing them takes a considerable part of a small model's step
    (launch/bench/RESULTS.md). This requires a single arena for all threads: with an accelerator,
    where many reading threads allocate memory instead, it would make them wait.
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


def allow_many_open_files() -> None:
    """Raises this process's limit of open files to what the system allows.

    Readers of ArrayRecord keep one file open for each shard; 1,024 is a common limit and also a
    common number of shards.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < allowed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _has_accelerator() -> bool:
    """Whether the system shows a TPU or GPU."""
    devices = [path for pattern in _ACCELERATOR_FILES for path in glob.glob(pattern)]
    vendors = {pathlib.Path(path).read_text().strip() for path in glob.glob("/sys/bus/pci/devices/*/vendor")}
    return bool(devices) or bool(vendors & _ACCELERATOR_VENDORS)
