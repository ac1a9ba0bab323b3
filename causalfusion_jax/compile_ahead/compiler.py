"""Asks the TPU compiler about a program, in a process of its own.

The compiler first optimizes and schedules a program and gives every array its place in
memory, in seconds; then it makes machine code, in minutes. It writes the optimized program
and its memory when the first part is done, and that is all that memory and costs need: the
process is then ended, unless the machine code is wanted too. What does not fit is refused
before, and the refusal says how much would have been needed.
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
from causalfusion_jax.config.slices import Spec, devices


class CompilerError(RuntimeError):
    """The compiler fails for another reason than memory."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one device, in bytes, while the program runs; without its machine code.

    Attributes:
      arguments: state and batch (parameters and keys, when sampling).
      outputs: results that do not take an argument's place.
      temporaries: everything in between.
    """

    arguments: int
    outputs: int
    temporaries: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.outputs + self.temporaries


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program.

    Attributes:
      seconds: it took.
      total_bytes: HBM that the program needs on each device.
      limit_bytes: HBM that there is.
      memory: how the total is made up; None where it does not fit.
      costs: what a call does on each device; None where it does not fit.
    """

    seconds: float
    total_bytes: int
    limit_bytes: int
    memory: Memory | None = None
    costs: Costs | None = None

    @property
    def fits(self) -> bool:
        """Whether there is a program."""
        return self.memory is not None


def compile_program(spec: Spec, machine_code: bool = False) -> Compiled:
    """Compiles a program for its slice, or learns that it does not fit; as `compile_lowered`."""
    return compile_lowered(functools.partial(lower, spec), spec.topology, machine_code)


def compile_lowered(make_lowered: functools.partial, topology: Topology, machine_code: bool = False) -> Compiled:
    """Compiles what `make_lowered` traces for a slice, or learns that it does not fit.

    Args:
      make_lowered: of a function of a module, with arguments that can be pickled: another process calls it.
      topology: the slice.
      machine_code: to the end; else until its memory and its instructions are known.

    Raises:
      CompilerError: the program cannot be traced, or the compiler fails for another reason than HBM.
    """
    limit = hbm_limit(topology)
    # Each process is a fork of one that has the imports, and has not started jax.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([make_lowered.func.__module__])
    said, says = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        worker = context.Process(target=_work, args=(make_lowered, folder, says), daemon=True)
        worker.start()
        says.close()
        try:
            start = _receive(said)
            error = _wait(said, pathlib.Path(folder), machine_code)
            seconds = time.perf_counter() - start
        finally:
            worker.kill()
            worker.join()
        if error:
            needed = parse_out_of_memory(error)
            if needed is None:
                raise CompilerError(error)
            return Compiled(seconds, *needed)
        text, allocations, report = _written(pathlib.Path(folder))
    try:
        memory, module = parse_memory(allocations, report), hlo.parse(text)
    except ValueError as error:
        raise CompilerError(f"what it wrote cannot be read: {error}") from None
    if memory.total > limit:
        # The compiler lets a program through that is over by a hair.
        return Compiled(seconds, memory.total, limit)
    return Compiled(seconds, memory.total, limit, memory, program_costs(module))


_WRITTEN = (
    # The last file that is written before machine code is made, and two before it.
    "after_optimizations_after_buffer_assignment",
    "after_optimizations-buffer-assignment",
    "after_optimizations-memory-usage-report",
)


def _work(make_lowered: functools.partial, folder: str, says) -> None:
    """Compiles, in the process of its own; tells when it begins, and at the end an error or None."""
    try:
        lowered = make_lowered()
        says.send(None)
        lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    except jax.errors.JaxRuntimeError as error:
        says.send(str(error))
    except Exception as error:  # Whatever tracing raises is the program's fault, and is reported under its name.
        says.send(f"{type(error).__name__}: {error}")
    else:
        says.send(None)


def _receive(said) -> float:
    """The time when the compiler begins."""
    try:
        error = said.recv()
    except EOFError:
        error = "its process ended before it began"
    if error:
        raise CompilerError(error)
    return time.perf_counter()


def _wait(said, folder: pathlib.Path, machine_code: bool) -> str | None:
    """Until the compiler is done with what is wanted of it; its error, if any."""
    while not said.poll(0.2):
        if not machine_code and any(hlo.is_complete(path.read_text()) for path in _programs(folder)):
            return None
    try:
        return said.recv()
    except EOFError:
        raise CompilerError("its process ended without a word") from None


def _programs(folder: pathlib.Path) -> list[pathlib.Path]:
    """The optimized programs, whole or being written; without those of parts (`extracted`)."""
    return [path for path in folder.glob(f"*.{_WRITTEN[0]}.txt") if ".extracted." not in path.name]


def _written(folder: pathlib.Path) -> list[str]:
    """What the compiler wrote of the whole program."""
    suffixes = [f".{name}.txt" for name in _WRITTEN]
    programs = [path.name.removesuffix(suffixes[0]) for path in _programs(folder)]
    if len(programs) != 1 or not all((folder / (programs[0] + suffix)).exists() for suffix in suffixes):
        raise CompilerError(f"it wrote {len(programs)} programs {suffixes[0]}, not one; libtpu 0.0.51 is known to")
    return [(folder / (programs[0] + suffix)).read_text() for suffix in suffixes]


# --- What it writes ---------------------------------------------------------------


def parse_memory(allocations: str, report: str) -> Memory:
    """HBM by purpose.

    Args:
      allocations: text of `buffer-assignment`, one line an allocation.
      report: text of `memory-usage-report`, whose first total is that of HBM.

    Raises:
      ValueError: the report has no such total.
    """
    arguments = outputs = 0
    # Other kinds of memory have a colour.
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
    """Bytes (needed, available) in a compiler's complaint about HBM; None for another message."""
    for pattern in _OUT_OF_MEMORY:
        found = pattern.search(message)
        if found:
            needed, unit, available, available_unit = found.groups()
            return int(float(needed) * _UNITS[unit]), int(float(available) * _UNITS[available_unit])
    return None


@functools.cache
def hbm_limit(topology: Topology) -> int:
    """HBM of a chip that programs can use; the compiler says so when asked for far too much."""
    where = SingleDeviceSharding(devices(topology)[0])
    too_much = jax.ShapeDtypeStruct((2**20, 2**18), jnp.float32, sharding=where)
    try:
        jax.jit(jnp.sum).lower(too_much).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = parse_out_of_memory(str(error))
        if needed is not None:
            return needed[1]
    return topology.accelerator.hbm_bytes
