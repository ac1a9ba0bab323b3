"""What the benchmarks share: the machine's own rates in the same run, and their output."""

import collections
import functools
import json
import pathlib
import re
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from causalfusion_jax.common.hardware import Topology, by_device_kind
from causalfusion_jax.compile_ahead import costs, hlo
from causalfusion_jax.compile_ahead.report import roofline

RATE_SECONDS = 0.5
"""A rate is measured for so long at a time, as what is set beside it is not over in a moment either."""


def sustained(run, work: float) -> float:
    """`work` a second, of `run()` repeated for RATE_SECONDS."""
    repeats = max(1, round(RATE_SECONDS / seconds(run)))
    return repeats * work / seconds(lambda: [run() for _ in range(repeats)][-1])


def matmul_rate(dtype: str = "float32"):
    """A function that measures the FLOP/s a device of square matrix products of a type.

    The devices of a CPU share its cores: one of them gets all cores, and its rate is divided.
    """
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    sharing = len(jax.devices()) if jax.default_backend() == "cpu" else 1
    return functools.partial(sustained, lambda: product(x), 2 * size**3 / sharing)


def copy_rate(size: int = 2**30):
    """A function that measures the bytes/s of reading and writing one array of `size` bytes in device memory."""
    x = jnp.ones(size // 4, "float32")
    add = jax.jit(lambda x: x + 1.0).lower(x).compile()
    return functools.partial(sustained, lambda: add(x), 2 * size)


def machine_rates(dtype: str) -> dict:
    """Both, by name, for `interleaved`; on a CPU the matrix products alone."""
    rates = {"matmul": matmul_rate(dtype)}
    return rates if jax.default_backend() == "cpu" else {**rates, "copy": copy_rate()}


def shares(found: dict[str, float], time: float, flops: float, compiled) -> dict:
    """Columns that set `time` beside the rates of the same run.

    Args:
      found: from `interleaved`, with `machine_rates`.
      time: seconds of one call.
      flops: model FLOPs of it, a device.
      compiled: its program, whose traffic with device memory is counted where that rate was measured.
    """
    columns = {
        "GFLOP/s a device": round(flops / time / 1e9, 1),
        "matrix product GFLOP/s": round(found["matmul"] / 1e9, 1),
        "share": round(flops / time / found["matmul"], 3),
    }
    if "copy" in found:
        moved = costs.program_costs(hlo.parse(compiled.as_text())).hbm_bytes
        columns["GB moved a device"] = round(moved / 1e9, 2)
        columns["copy GB/s"] = round(found["copy"] / 1e9, 1)
        columns["share of copy"] = round(moved / time / found["copy"], 3)
    return columns


def topology_of(devices) -> Topology | None:
    """The TPU slice that jax devices are; None for anything else."""
    accelerator = by_device_kind(devices[0].device_kind)
    if accelerator is None or not accelerator.axes:
        return None
    axes = list(zip(*(device.coords for device in devices), strict=True))[: accelerator.axes]
    return Topology(accelerator, tuple(max(places) - min(places) + 1 for places in axes))


def utilization(time: float, flops: float, compiled) -> dict:
    """Columns that set `time` beside the vendor's figures: nothing for a device without known ones.

    Args:
      time: seconds of one call.
      flops: model FLOPs of it, a device.
      compiled: its program, whose bound by compute, memory and network is that of preflight, on a TPU.
    """
    accelerator, topology = by_device_kind(jax.devices()[0].device_kind), topology_of(jax.devices())
    columns = {} if accelerator is None else {"MFU": round(flops / time / accelerator.peak_flops, 3)}
    if topology is not None:
        least = roofline(costs.program_costs(hlo.parse(compiled.as_text())), topology)
        columns["ms at least"], columns["bound by"] = round(least.seconds * 1e3, 1), least.bound
    return columns


def profile(compiled, run) -> dict[str, float]:
    """Milliseconds of `run()` by kind of operation of `compiled`, added over threads, largest first."""
    kinds = {}
    for line in compiled.as_text().splitlines():
        found = re.match(r'\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', line)
        if found:
            backward = "backward" if "transpose(jvp" in found.group(2) else "forward"
            kinds[found.group(1)] = f"{backward} {re.sub('[0-9]+$', '', found.group(2).split('/')[-1])}"
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        data = jax.profiler.ProfileData.from_file(str(next(pathlib.Path(folder).rglob("*.xplane.pb"))))
        spent = collections.Counter()
        for event in (event for plane in data.planes for line in plane.lines for event in line.events):
            operation = dict(pair for pair in event.stats if pair[0]).get("hlo_op")
            if operation:
                spent[kinds.get(operation, "other")] += event.duration_ns / 1e6
    return dict(spent.most_common(12))


def print_profile(name: str, compiled, run) -> None:
    """Prints `profile`."""
    for kind, milliseconds in profile(compiled, run).items():
        print(f"{name}: {milliseconds:8.1f} ms  {kind}")


def interleaved(rounds: int, **runs) -> dict[str, float]:
    """Median result of each of `runs`, called in turn `rounds` times after one to warm up."""
    for run in runs.values():
        run()
    found = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    return {name: statistics.median(values) for name, values in found.items()}


def seconds(run) -> float:
    """Wall time of one call whose result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def table(rows: list[dict]) -> str:
    """A Markdown table of the rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([str(row.get(name, "")) for name in columns] for row in rows)]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([lines[0], f"|{'---|' * len(columns)}", *lines[1:]])


def report(rows: list[dict]) -> None:
    """A Markdown table of the rows, then one JSON line."""
    print(table(rows))
    machine = {"device": jax.devices()[0].device_kind, "devices": len(jax.devices()), "jax": jax.__version__}
    print(json.dumps({**machine, "rows": rows}))
