"""What a preflight says: time bounds, a verdict, a table, one record."""

import dataclasses
from collections.abc import Callable

from causalfusion_jax.common.hardware import GIB, Topology
from causalfusion_jax.compile_ahead.compiler import Compiled, compile_program
from causalfusion_jax.compile_ahead.costs import KINDS, Costs
from causalfusion_jax.compile_ahead.fit import Change, Clock, LargestBatch, find_change, find_largest_batch
from causalfusion_jax.compile_ahead.program import model_flops
from causalfusion_jax.config.slices import Spec


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one call if a single resource were the limit, and it were used fully.

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
        """No call is faster; one that overlaps all three perfectly is as fast."""
        return max(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """What the time is spent on."""
        return max(dataclasses.asdict(self), key=dataclasses.asdict(self).get)


def roofline(costs: Costs, topology: Topology) -> Roofline:
    """Bounds on the time of a call, from what each device does."""
    chip, links = topology.accelerator, topology.link_bandwidth
    return Roofline(
        compute=costs.flops / chip.peak_flops,
        memory=costs.hbm_bytes / chip.hbm_bandwidth,
        network=costs.sent_bytes / links if links else 0.0,
    )


@dataclasses.dataclass(frozen=True)
class Preflight:
    """All that was learned of a program on a slice.

    Attributes:
      spec: the program.
      compiled: what came of it.
      largest: the largest batch that fits, where searched.
      change: where it does not fit, what makes it fit, if anything was found.
    """

    spec: Spec
    compiled: Compiled
    largest: LargestBatch | None = None
    change: Change | None = None


def preflight(
    spec: Spec, seconds: float, search: bool = True, compiler: Callable[[Spec], Compiled] = compile_program
) -> Preflight:
    """Compiles a program; where it does not fit looks for a change; searches the largest batch.

    Args:
      spec: checked (`slices.check`).
      seconds: budget for what is compiled beyond the program itself.
      search: look for the largest batch.
      compiler: `compile_program`, or a stand-in.
    """
    clock = Clock(seconds)
    compiled = compiler(spec)
    change = None if compiled.fits else find_change(spec, compiled, compiler, clock)
    largest = find_largest_batch(spec, compiled, compiler, clock) if search else None
    return Preflight(spec, compiled, largest, change)


def verdict(result: Preflight) -> str:
    """One or two sentences: whether it fits, and what else does."""
    spec, compiled = result.spec, result.compiled
    text = f"{spec.topology.name}: {memory_words(compiled)}."
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
    """Whether a program fits, and what it needs."""
    fits = "fits" if compiled.fits else "does not fit"
    return f"{fits}, {gib(compiled.total_bytes)} of {gib(compiled.limit_bytes)} GiB HBM a device"


def settings_words(spec: Spec) -> str:
    """What tells the programs of one preflight apart."""
    if spec.job == "sample":
        return f"sampler, {spec.batch} images"
    remat, accum = spec.config.model.remat, spec.config.train.grad_accum_steps
    return f"training step, {_mesh_words(spec)}, {spec.batch} images in {accum} parts, remat={remat}"


def _mesh_words(spec: Spec) -> str:
    return " ".join(f"{name}={size}" for name, size in spec.mesh().shape.items() if size > 1) or "1 device"


def largest_batch_words(largest: LargestBatch | None) -> str:
    """The largest batch in a few words, over all devices and on each."""
    if largest is None:
        return "-"
    if largest.exact:
        return f"{largest.batch} ({largest.per_device}/device)" if largest.batch else "none fits"
    least = f"at least {largest.batch} ({largest.per_device}/device)" if largest.batch else "unknown"
    return least if largest.predicted is None else f"{least}, predicted {largest.predicted}"


# --- The record -------------------------------------------------------------------


def record(result: Preflight) -> dict:
    """All numbers, for one line of JSON."""
    spec, largest, change = result.spec, result.largest, result.change
    return {
        "topology": spec.topology.name,
        "devices": spec.topology.devices,
        "mesh": {name: int(size) for name, size in spec.mesh().shape.items()},
        "job": spec.job,
        "batch": spec.batch,
        "fits": result.compiled.fits,
        **_compiled_record(spec, result.compiled),
        "largest_batch": None if largest is None else dataclasses.asdict(largest),
        "change": None
        if change is None
        else {
            "flags": list(change.flags),
            "predicted_bytes": change.predicted_bytes,
            "verified": change.compiled is not None,
            **({} if change.compiled is None else _compiled_record(change.spec, change.compiled)),
        },
    }


def _compiled_record(spec: Spec, compiled: Compiled) -> dict:
    per_image = model_flops(spec)
    numbers = {
        "compile_seconds": round(compiled.seconds, 1),
        "hbm_bytes": compiled.total_bytes,
        "hbm_limit_bytes": compiled.limit_bytes,
        "model_flops_per_image": per_image,
        "model_flops": per_image * spec.batch,
    }
    if not compiled.fits:
        return numbers
    costs, times = compiled.costs, roofline(compiled.costs, spec.topology)
    return numbers | {
        "hbm": dataclasses.asdict(compiled.memory),
        "hardware_flops": costs.flops * spec.topology.devices,
        "hardware_over_model_flops": flops_ratio(spec, costs),
        "hbm_traffic_bytes": costs.hbm_bytes,
        "collectives": {
            kind: {"count": costs.count[kind], "bytes": costs.bytes[kind], "sent_bytes": round(costs.sent[kind])}
            for kind in KINDS
            if costs.count[kind]
        },
        "roofline_seconds": dataclasses.asdict(times),
        "bound": times.bound,
        "images_per_second_at_most": spec.batch / times.seconds,
        "model_flops_utilization_at_most": per_image * spec.batch / times.seconds / peak_flops(spec.topology),
        "not_counted": sorted(costs.unknown),
    }


def flops_ratio(spec: Spec, costs: Costs) -> float:
    """FLOPs the devices execute over those the model's shapes ask for: above 1 by remat."""
    return costs.flops * spec.topology.devices / (model_flops(spec) * spec.batch)


def peak_flops(topology: Topology) -> float:
    """FLOP/s of a whole slice."""
    return topology.accelerator.peak_flops * topology.devices


# --- The table --------------------------------------------------------------------


def table(results: list[Preflight]) -> str:
    """Columns side by side: every slice, and after one that is too small its changed program."""
    columns = []
    for result in results:
        columns.append(_column(result.spec, result.compiled, result.spec.topology.name, result.largest))
        if result.change is not None and result.change.compiled is not None:
            changed = result.change
            columns.append(_column(changed.spec, changed.compiled, "with the change", None))
    names = list(dict.fromkeys(name for column in columns for name in column))
    return aligned([[name, *(column.get(name, "-") for column in columns)] for name in names])


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells below a heading, the first of them."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _column(spec: Spec, compiled: Compiled, title: str, largest: LargestBatch | None) -> dict[str, str]:
    model = spec.config.model
    column = {
        "": title,
        "mesh": _mesh_words(spec),
        "images a call": f"{spec.batch} ({spec.batch // spec.batch_devices}/device)",
    }
    if spec.job == "train":
        column["remat, parts of a batch"] = f"{model.remat}, {spec.config.train.grad_accum_steps}"
    column |= {
        "compile": f"{compiled.seconds:.1f} s",
        "fits": "yes" if compiled.fits else "NO",
        "HBM a device": f"{gib(compiled.total_bytes)} of {gib(compiled.limit_bytes)} GiB",
    }
    if compiled.fits:
        for field in dataclasses.fields(compiled.memory):
            column[f"  {field.name}"] = f"{gib(getattr(compiled.memory, field.name))} GiB"
    column["model FLOPs an image"] = _unit(model_flops(spec), "FLOP")
    column["model FLOPs a call"] = _unit(model_flops(spec) * spec.batch, "FLOP")
    if compiled.fits:
        column |= _cost_rows(spec, compiled.costs)
    if largest is not None:
        column["largest batch"] = largest_batch_words(largest)
    return column


def _cost_rows(spec: Spec, costs: Costs) -> dict[str, str]:
    times = roofline(costs, spec.topology)
    rows = {"hardware / model FLOPs": f"{flops_ratio(spec, costs):.3f}" + (" *" if costs.unknown else "")}
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
        "images/s at most": f"{spec.batch / times.seconds:,.1f}",
        "MFU at most": f"{model_flops(spec) * spec.batch / times.seconds / peak_flops(spec.topology):.1%}",
    }
    if costs.unknown:
        rows["* not counted"] = ", ".join(sorted(costs.unknown))
    return rows


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f}"


def time_words(seconds: float) -> str:
    """A duration."""
    return f"{seconds * 1e3:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def _unit(value: float, unit: str) -> str:
    for prefix, factor in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.2f} {prefix}{unit}"
    return f"{value:.0f} {unit}"
