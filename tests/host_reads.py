"""Guards host reads of device arrays on a CPU as an accelerator does.

    python -m host_reads causalfusion_jax.train --config=... --workdir=...

A CPU array is read in place: no transfer happens, so `jax.transfer_guard` refuses nothing.
`accelerator_reads` has every read of an array count as a transfer: a guard of `disallow` then
refuses `np.asarray(x)`, `float(x)`, `x.copy_to_host_async()`, iteration and printing, and permits
`jax.device_get(x)`. As on an accelerator, an array that was read once keeps its host copy and can
be read again. As a command, this runs a module with implicit reads disallowed on the main thread
throughout, even where the module sets no guard of its own.

Transfers to the device need no such mode: a CPU checks them as an accelerator does.
"""

import contextlib
import ctypes
import runpy
import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax._src.array import ArrayImpl
from jax._src.lib import guard_lib

READ = "_single_device_array_to_np_array_did_copy"
COPY = "_copy_single_device_array_to_host_async"
COPIED = "_copied_to_host"
"""Attribute of an array that has a host copy."""
_TP_AS_BUFFER = 20 * ctypes.sizeof(ctypes.c_void_p)
"""Where CPython 3.11 to 3.13 keeps a type's pointer to its buffer procedures; bf_getbuffer is the first."""


def check_read(array: ArrayImpl) -> None:
    """Applies this thread's device-to-host guard, as jaxlib's CopyToHostAsync does.

    Raises:
      JaxRuntimeError: the guard disallows this read.
    """
    if COPIED in array.__dict__:
        return
    levels, state = guard_lib.TransferGuardLevel, guard_lib.thread_local_state()
    level = guard_lib.global_state().device_to_host if state.device_to_host is None else state.device_to_host
    refused = {levels.DISALLOW_EXPLICIT} if state.explicit_device_get else {levels.DISALLOW, levels.DISALLOW_EXPLICIT}
    if level in refused:
        raise jax.errors.JaxRuntimeError(
            f"INVALID_ARGUMENT: Disallowed device-to-host transfer: {array.aval.str_short()} on {array.devices()}"
        )
    array.__dict__[COPIED] = True


@contextlib.contextmanager
def accelerator_reads() -> Iterator[None]:
    """A context in which reads of arrays are guarded; levels that only log count as `allow`."""
    read, copy = getattr(ArrayImpl, READ), getattr(ArrayImpl, COPY)

    def guarded_read(array):
        check_read(array)
        # A copy: it must not change when the array is donated.
        return np.array(read(array)[0]), True

    def guarded_copy(array):
        check_read(array)

    # numpy prefers the buffer protocol, which only CPU arrays have, to `__array__`.
    procedures = ctypes.c_void_p.from_address(id(ArrayImpl) + _TP_AS_BUFFER).value
    get_buffer = ctypes.c_void_p.from_address(procedures)
    address = get_buffer.value
    setattr(ArrayImpl, READ, guarded_read)
    setattr(ArrayImpl, COPY, guarded_copy)
    get_buffer.value = None
    try:
        yield
    finally:
        get_buffer.value = address
        setattr(ArrayImpl, READ, read)
        setattr(ArrayImpl, COPY, copy)


@contextlib.contextmanager
def no_implicit_reads() -> Iterator[None]:
    """A context in which implicit reads fail on this thread, unless a guard of `allow` is set around them."""
    with accelerator_reads(), jax.transfer_guard_device_to_host("disallow"):
        yield


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with no_implicit_reads():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
