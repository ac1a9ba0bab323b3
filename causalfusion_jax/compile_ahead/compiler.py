"""Runs the TPU compiler on a program, in a separate process.

The compiler first optimizes and schedules a program and assigns its memory, which takes
seconds; then it generates machine code, which takes minutes. It dumps the optimized program and
the memory after the first part, which is all that memory and costs need: the process is then
ended, unless machine code is requested. A program that does not fit fails in the first part, with
an error that gives the memory it needs.
"""

import dataclasses
import functools
import multiprocessing
import pathlib
import re
import tempfile
import time

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from causalfusion_jax.common.hardware import Topology
from causalfusion_jax.compile_ahead import hlo
from causalfusion_jax.compile_ahead.costs import Costs, program_costs
from causalfusion_jax.compile_ahead.program import lower
from causalfusion_jax.config.slices import SliceJob, devices


class CompilerError(RuntimeError):
    """The compiler failed for another reason than memory."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one device in bytes while a program runs, without its machine code.

    Attributes:
      arguments: state and batch (parameters and keys, when sampling).
      outputs: results that do not reuse the memory of an argument.
      temporaries: everything else.
    """

    arguments: int
    outputs: int
    temporaries: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.arguments + self.outputs + self.temporaries


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's result for a program.

    Attributes:
      seconds: time of the compilation.
      total_bytes: HBM that the program needs on each device.
      limit_bytes: HBM that a device has for programs.
      memory: parts of the total; None if it does not fit.
      costs: work of one call on each device; None if it does not fit.
    """

    seconds: float
    total_bytes: int
    limit_bytes: int
    memory: Memory | None = None
    costs: Costs | None = None

    @property
    def fits(self) -> bool:
        """Whether the program fits."""
        return self.memory is not None


def compile_program(job: SliceJob, machine_code: bool = False) -> Compiled:
    """Compiles the program of a job for its slice; see `compile_lowered`."""
    return compile_lowered(functools.partial(lower, job), job.topology, machine_code)


def compile_lowered(make_lowered: functools.partial, topology: Topology, machine_code: bool = False) -> Compiled:
    """Compiles a traced program for a slice.

    Args:
      make_lowered: traces the program. Another process calls it, so it can be pickled: a partial of a
        function of a module.
      topology: the slice.
      machine_code: generate machine code too, not only the optimized program and its memory.

    Raises:
      CompilerError: the program cannot be traced, or the compiler fails for another reason than HBM.
    """
    limit = hbm_limit(topology)
    # Each process is a fork of a server that has imported the module, and has not started jax.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([make_lowered.func.__module__])
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        worker = context.Process(target=trace_and_compile, args=(make_lowered, folder, sender), daemon=True)
        worker.start()
        sender.close()
        try:
            start = _receive_start(receiver)
            error = wait_for_compiler(receiver, pathlib.Path(folder), machine_code)
            seconds = time.perf_counter() - start
        finally:
            worker.kill()
            worker.join()
        if error:
            needed = parse_out_of_memory(error)
            if needed is None:
                raise CompilerError(error)
            return Compiled(seconds, *needed)
        text, allocations, report = _read_dumps(pathlib.Path(folder))
    try:
        memory, module = parse_memory(allocations, report), hlo.parse(text)
    except ValueError as error:
        raise CompilerError(f"its output cannot be parsed: {error}") from None
    if memory.total > limit:
        # The compiler accepts programs that exceed the limit slightly.
        return Compiled(seconds, memory.total, limit)
    return Compiled(seconds, memory.total, limit, memory, program_costs(module))


_DUMPS = (
    # The last dump before machine code is generated, and two earlier ones.
    "after_optimizations_after_buffer_assignment",
    "after_optimizations-buffer-assignment",
    "after_optimizations-memory-usage-report",
)


def trace_and_compile(make_lowered: functools.partial, folder: str, sender) -> None:
    """Traces and compiles in the other process; sends None when compilation starts, and at the end an error or None."""
    try:
        lowered = make_lowered()
        sender.send(None)
        lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    except jax.errors.JaxRuntimeError as error:
        sender.send(str(error))
    except Exception as error:  # Any error of tracing is reported as one of this program.
        sender.send(f"{type(error).__name__}: {error}")
    else:
        sender.send(None)


def _receive_start(receiver) -> float:
    """Waits until the compiler starts, and returns the time. Raises CompilerError if tracing fails."""
    try:
        error = receiver.recv()
    except EOFError:
        error = "its process exited before compilation started"
    if error:
        raise CompilerError(error)
    return time.perf_counter()


def wait_for_compiler(receiver, folder: pathlib.Path, machine_code: bool) -> str | None:
    """Waits for the end of the compiler, or without `machine_code` for its dumps. Returns its error, if any."""
    while not receiver.poll(0.2):
        if not machine_code and any(hlo.is_complete(path.read_text()) for path in _programs(folder)):
            return None
    try:
        return receiver.recv()
    except EOFError:
        raise CompilerError("its process exited without output") from None


def _programs(folder: pathlib.Path) -> list[pathlib.Path]:
    """Dumps of optimized programs, complete or not; without those of parts of a program (`extracted`)."""
    return [path for path in folder.glob(f"*.{_DUMPS[0]}.txt") if ".extracted." not in path.name]


def _read_dumps(folder: pathlib.Path) -> list[str]:
    """The dumps of the whole program."""
    suffixes = [f".{name}.txt" for name in _DUMPS]
    programs = [path.name.removesuffix(suffixes[0]) for path in _programs(folder)]
    if len(programs) != 1 or not all((folder / (programs[0] + suffix)).exists() for suffix in suffixes):
        raise CompilerError(f"it dumped {len(programs)} programs {suffixes[0]} instead of 1, which libtpu 0.0.51 dumps")
    return [(folder / (programs[0] + suffix)).read_text() for suffix in suffixes]


# --- Dumps and errors -------------------------------------------------------------


def parse_memory(allocations: str, report: str) -> Memory:
    """Parses HBM by purpose.

    Args:
      allocations: the dump `buffer-assignment`, with a line for each allocation.
      report: the dump `memory-usage-report`, whose first total is that of HBM.

    Raises:
      ValueError: the report has no such total.
    """
    arguments = outputs = 0
    # Allocations in other memory spaces have a color.
    for size, kind in re.findall(r"^allocation \d+: size (\d+), (?:page \d+, )?(?!color)(.*):", allocations, re.M):
        if "parameter" in kind:
            arguments += int(size)
        elif "output" in kind or "maybe-live-out" in kind:
            outputs += int(size)
    total = re.search(r"\(color=0\)\nTotal bytes: (\d+) \(", report)
    if total is None:
        raise ValueError("a memory usage report without the total of HBM")
    return Memory(arguments, outputs, max(int(total.group(1)) - arguments - outputs, 0))


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_OUT_OF_MEMORY = (
    re.compile(r"required for [^()]*\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
)


def parse_out_of_memory(message: str) -> tuple[int, int] | None:
    """Bytes (needed, available) in an out-of-memory error of the compiler; None for another error."""
    for pattern in _OUT_OF_MEMORY:
        match = pattern.search(message)
        if match:
            needed, unit, available, available_unit = match.groups()
            return int(float(needed) * _UNITS[unit]), int(float(available) * _UNITS[available_unit])
    return None


@functools.cache
def hbm_limit(topology: Topology) -> int:
    """HBM of a chip that programs can use, from the error of the compiler for a program that needs far too much."""
    where = SingleDeviceSharding(devices(topology)[0])
    too_much = jax.ShapeDtypeStruct((2**20, 2**18), jnp.float32, sharding=where)
    try:
        jax.jit(jnp.sum).lower(too_much).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = parse_out_of_memory(str(error))
        if needed is not None:
            return needed[1]
    return topology.accelerator.hbm_bytes
