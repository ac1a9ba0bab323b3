"""Shared by the benchmarks: rates of the machine measured in the same run, and the output."""

import collections
import functools
import json
import pathlib
import re
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from causalfusion_jax.common.hardware import Topology, by_device_kind
from causalfusion_jax.compile_ahead import costs, hlo
from causalfusion_jax.compile_ahead.report import roofline

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from markdown_table import table

RATE_SECONDS = 0.5
"""Duration of one measurement of a rate, comparable to that of the measured programs."""


def sustained(run, work: float) -> float:
    """`work` per second of `run()`, repeated for RATE_SECONDS."""
    repeats = max(1, round(RATE_SECONDS / seconds(run)))
    return repeats * work / seconds(lambda: [run() for _ in range(repeats)][-1])


def matmul_rate(dtype: str = "float32"):
    """A function that measures the FLOP/s per device of square matrix products of a type.

    The devices of a CPU share its cores: one of them is measured with all cores, and the rate is divided.
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
    """Both rates by name, for `interleaved`; on a CPU only that of matrix products."""
    rates = {"matmul": matmul_rate(dtype)}
    return rates if jax.default_backend() == "cpu" else {**rates, "copy": copy_rate()}


def shares(rates: dict[str, float], time: float, flops: float, compiled) -> dict:
    """Columns that compare a program with the rates of the same run.

    Args:
      rates: from `interleaved`, with `machine_rates`.
      time: seconds of one call.
      flops: model FLOPs of one call per device.
      compiled: the program, whose memory traffic is counted if the rate of copies was measured.
    """
    columns = {
        "GFLOP/s a device": round(flops / time / 1e9, 1),
        "matrix product GFLOP/s": round(rates["matmul"] / 1e9, 1),
        "share": round(flops / time / rates["matmul"], 3),
    }
    if "copy" in rates:
        moved = costs.program_costs(hlo.parse(compiled.as_text())).hbm_bytes
        columns["GB moved a device"] = round(moved / 1e9, 2)
        columns["copy GB/s"] = round(rates["copy"] / 1e9, 1)
        columns["share of copy"] = round(moved / time / rates["copy"], 3)
    return columns


def topology_of(devices) -> Topology | None:
    """The TPU slice that the devices form; None for other devices."""
    accelerator = by_device_kind(devices[0].device_kind)
    if accelerator is None or not accelerator.axes:
        return None
    axes = list(zip(*(device.coords for device in devices), strict=True))[: accelerator.axes]
    return Topology(accelerator, tuple(max(axis) - min(axis) + 1 for axis in axes))


def utilization(time: float, flops: float, compiled) -> dict:
    """Columns that compare a program with the vendor's figures; none for an unknown device.

    Args:
      time: seconds of one call.
      flops: model FLOPs of one call per device.
      compiled: the program; on a TPU, preflight gives its bound by compute, memory and network.
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
        operation = re.match(r'\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', line)
        if operation:
            backward = "backward" if "transpose(jvp" in operation.group(2) else "forward"
            kinds[operation.group(1)] = f"{backward} {re.sub('[0-9]+$', '', operation.group(2).split('/')[-1])}"
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
    """Median result of each of `runs`, which are called in turn `rounds` times after a warm-up."""
    for run in runs.values():
        run()
    results = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            results[name].append(run())
    return {name: statistics.median(values) for name, values in results.items()}


def seconds(run) -> float:
    """Wall time of one call until its result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def report(rows: list[dict]) -> None:
    """Prints the rows as a Markdown table, then as one JSON line."""
    print(table(rows))
    machine = {"device": jax.devices()[0].device_kind, "devices": len(jax.devices()), "jax": jax.__version__}
    print(json.dumps({**machine, "rows": rows}))
