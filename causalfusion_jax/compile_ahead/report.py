"""Preflight of a training step or a sampler: lower bounds on the time, verdict, table, JSON record."""

import dataclasses
from collections.abc import Callable

from causalfusion_jax.common.hardware import GIB, Topology
from causalfusion_jax.compile_ahead.compiler import Compiled, compile_program
from causalfusion_jax.compile_ahead.costs import KINDS, Costs
from causalfusion_jax.compile_ahead.fit import Change, Clock, LargestBatch, find_change, find_largest_batch
from causalfusion_jax.compile_ahead.program import model_flops
from causalfusion_jax.config.slices import SliceJob


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds on the seconds of one call, each from one resource that is used fully.

    Attributes:
      compute: matrix products at the peak rate.
      memory: bytes to and from HBM at its bandwidth.
      network: bytes sent to other chips at the bandwidth of all links.
    """

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """Lower bound from all three: the time of a call that overlaps them perfectly."""
        return max(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """The resource that limits the time."""
        return max(dataclasses.asdict(self), key=dataclasses.asdict(self).get)


def roofline(costs: Costs, topology: Topology) -> Roofline:
    """Lower bounds on the time of a call, from the work of each device."""
    chip, links = topology.accelerator, topology.link_bandwidth
    return Roofline(
        compute=costs.flops / chip.peak_flops,
        memory=costs.hbm_bytes / chip.hbm_bandwidth,
        network=costs.sent_bytes / links if links else 0.0,
    )


@dataclasses.dataclass(frozen=True)
class Preflight:
    """The result for a job.

    Attributes:
      job: the job.
      compiled: the compiler's result.
      largest: the largest batch that fits; None: not searched.
      change: settings with which it fits, if it does not fit and such settings are known.
    """

    job: SliceJob
    compiled: Compiled
    largest: LargestBatch | None = None
    change: Change | None = None


def preflight(
    job: SliceJob, seconds: float, search: bool = True, compiler: Callable[[SliceJob], Compiled] = compile_program
) -> Preflight:
    """Compiles the program of a job; searches settings with which it fits, and the largest batch.

    Args:
      job: a job that passes `slices.check`.
      seconds: time budget for compilations beyond that of the job itself.
      search: search the largest batch.
      compiler: `compile_program`, or a substitute.
    """
    clock = Clock(seconds)
    compiled = compiler(job)
    change = None if compiled.fits else find_change(job, compiled, compiler, clock)
    largest = find_largest_batch(job, compiled, compiler, clock) if search else None
    return Preflight(job, compiled, largest, change)


def verdict(result: Preflight) -> str:
    """One or two sentences: whether it fits, and with which settings it does."""
    job, compiled = result.job, result.compiled
    text = f"{job.topology.name}: {memory_words(compiled)}."
    if compiled.fits:
        return text
    change = result.change
    if change is None:
        return text + " No remat, accumulation, mesh or smaller batch is predicted to fit: use more chips."
    flags = " ".join(change.flags)
    if change.compiled is None:
        return text + f" Try {flags}: predicted {gib(change.predicted_bytes)} GiB, not compiled for lack of time."
    return text + f" The cheapest change that fits: {flags}, {gib(change.compiled.total_bytes)} GiB (compiled)."


def memory_words(compiled: Compiled) -> str:
    """Whether a program fits, and its memory."""
    fits = "fits" if compiled.fits else "does not fit"
    return f"{fits}, {gib(compiled.total_bytes)} of {gib(compiled.limit_bytes)} GiB HBM a device"


def settings_words(job: SliceJob) -> str:
    """The settings in which the programs of a preflight differ."""
    if job.kind == "sample":
        return f"sampler, {job.batch} images"
    remat, accum = job.config.model.remat, job.config.train.grad_accum_steps
    return f"training step, {_mesh_words(job)}, {job.batch} images in {accum} parts, remat={remat}"


def _mesh_words(job: SliceJob) -> str:
    return " ".join(f"{name}={size}" for name, size in job.mesh().shape.items() if size > 1) or "1 device"


def largest_batch_words(largest: LargestBatch | None) -> str:
    """The largest batch, over all devices and on each."""
    if largest is None:
        return "-"
    if largest.exact:
        return f"{largest.batch} ({largest.per_device}/device)" if largest.batch else "none fits"
    least = f"at least {largest.batch} ({largest.per_device}/device)" if largest.batch else "unknown"
    return least if largest.predicted is None else f"{least}, predicted {largest.predicted}"


# --- The record -------------------------------------------------------------------


def record(result: Preflight) -> dict:
    """All results, for one line of JSON."""
    job, largest, change = result.job, result.largest, result.change
    return {
        "topology": job.topology.name,
        "devices": job.topology.devices,
        "mesh": {name: int(size) for name, size in job.mesh().shape.items()},
        "job": job.kind,
        "batch": job.batch,
        "fits": result.compiled.fits,
        **_compiled_record(job, result.compiled),
        "largest_batch": None if largest is None else dataclasses.asdict(largest),
        "change": None
        if change is None
        else {
            "flags": list(change.flags),
            "predicted_bytes": change.predicted_bytes,
            "verified": change.compiled is not None,
            **({} if change.compiled is None else _compiled_record(change.job, change.compiled)),
        },
    }


def _compiled_record(job: SliceJob, compiled: Compiled) -> dict:
    per_image = model_flops(job)
    numbers = {
        "compile_seconds": round(compiled.seconds, 1),
        "hbm_bytes": compiled.total_bytes,
        "hbm_limit_bytes": compiled.limit_bytes,
        "model_flops_per_image": per_image,
        "model_flops": per_image * job.batch,
    }
    if not compiled.fits:
        return numbers
    costs, times = compiled.costs, roofline(compiled.costs, job.topology)
    return numbers | {
        "hbm": dataclasses.asdict(compiled.memory),
        "hardware_flops": costs.flops * job.topology.devices,
        "hardware_over_model_flops": flops_ratio(job, costs),
        "hbm_traffic_bytes": costs.hbm_bytes,
        "collectives": {
            kind: {"count": costs.count[kind], "bytes": costs.bytes[kind], "sent_bytes": round(costs.sent[kind])}
            for kind in KINDS
            if costs.count[kind]
        },
        "roofline_seconds": dataclasses.asdict(times),
        "bound": times.bound,
        "images_per_second_at_most": job.batch / times.seconds,
        "model_flops_utilization_at_most": per_image * job.batch / times.seconds / peak_flops(job.topology),
        "not_counted": sorted(costs.unknown),
    }


def flops_ratio(job: SliceJob, costs: Costs) -> float:
    """Ratio of the FLOPs that the devices execute to the model FLOPs; above 1 with remat."""
    return costs.flops * job.topology.devices / (model_flops(job) * job.batch)


def peak_flops(topology: Topology) -> float:
    """Peak FLOP/s of a slice."""
    return topology.accelerator.peak_flops * topology.devices


# --- The table --------------------------------------------------------------------


def table(results: list[Preflight]) -> str:
    """A column for each slice, and after a slice that is too small one for the changed settings."""
    columns = []
    for result in results:
        columns.append(_column(result.job, result.compiled, result.job.topology.name, result.largest))
        if result.change is not None and result.change.compiled is not None:
            columns.append(_column(result.change.job, result.change.compiled, "with the change", None))
    names = list(dict.fromkeys(name for column in columns for name in column))
    return aligned([[name, *(column.get(name, "-") for column in columns)] for name in names])


def aligned(rows: list[list[str]]) -> str:
    """Lines of text of rows of cells; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _column(job: SliceJob, compiled: Compiled, title: str, largest: LargestBatch | None) -> dict[str, str]:
    model = job.config.model
    column = {
        "": title,
        "mesh": _mesh_words(job),
        "images a call": f"{job.batch} ({job.batch // job.batch_devices}/device)",
    }
    if job.kind == "train":
        column["remat, parts of a batch"] = f"{model.remat}, {job.config.train.grad_accum_steps}"
    column |= {
        "compile": f"{compiled.seconds:.1f} s",
        "fits": "yes" if compiled.fits else "NO",
        "HBM a device": f"{gib(compiled.total_bytes)} of {gib(compiled.limit_bytes)} GiB",
    }
    if compiled.fits:
        for field in dataclasses.fields(compiled.memory):
            column[f"  {field.name}"] = f"{gib(getattr(compiled.memory, field.name))} GiB"
    column["model FLOPs an image"] = _unit(model_flops(job), "FLOP")
    column["model FLOPs a call"] = _unit(model_flops(job) * job.batch, "FLOP")
    if compiled.fits:
        column |= _cost_rows(job, compiled.costs)
    if largest is not None:
        column["largest batch"] = largest_batch_words(largest)
    return column


def _cost_rows(job: SliceJob, costs: Costs) -> dict[str, str]:
    times = roofline(costs, job.topology)
    rows = {"hardware / model FLOPs": f"{flops_ratio(job, costs):.3f}" + (" *" if costs.unknown else "")}
    rows |= {
        f"{kind}s": f"{costs.count[kind]} x, {_unit(costs.bytes[kind], 'B')}, sends {_unit(costs.sent[kind], 'B')}"
        for kind in KINDS
        if costs.count[kind]
    }
    rows |= {
        "time at least": f"{time_words(times.seconds)} ({times.bound} bound)",
        "  compute": time_words(times.compute),
        "  memory": f"{time_words(times.memory)} ({_unit(costs.hbm_bytes, 'B')})",
        "  network": f"{time_words(times.network)} ({_unit(costs.sent_bytes, 'B')})",
        "images/s at most": f"{job.batch / times.seconds:,.1f}",
        "MFU at most": f"{model_flops(job) * job.batch / times.seconds / peak_flops(job.topology):.1%}",
    }
    if costs.unknown:
        rows["* not counted"] = ", ".join(sorted(costs.unknown))
    return rows


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f}"


def time_words(seconds: float) -> str:
    """A duration in ms or s."""
    return f"{seconds * 1e3:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def _unit(value: float, unit: str) -> str:
    for prefix, factor in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.2f} {prefix}{unit}"
    return f"{value:.0f} {unit}"
