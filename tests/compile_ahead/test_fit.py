"""Search and verdict, with a substitute for the compiler that computes memory by a formula."""

import dataclasses
import json
import math
from collections import Counter
from types import SimpleNamespace

import jax
import pytest
from helpers import tiny_config

from causalfusion_jax.common import hardware
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.hardware import GIB
from causalfusion_jax.compile_ahead import compiler, fit, report
from causalfusion_jax.compile_ahead.compiler import Compiled, Memory
from causalfusion_jax.compile_ahead.costs import Costs
from causalfusion_jax.compile_ahead.fit import Clock, changes, estimated_bytes, find_change, find_largest_batch
from causalfusion_jax.config import experiment, slices
from causalfusion_jax.config.slices import SliceJob

LIMIT = 16 * GIB


@pytest.fixture(autouse=True)
def no_tpu(monkeypatch):
    """Slices of the devices there are."""
    monkeypatch.setattr(slices, "devices", lambda topology: jax.devices()[: topology.devices])


def make_job(batch=16, kind="train", **sections):
    config = tiny_config(**sections)
    config["train"]["batch_size"] = batch
    return SliceJob(experiment.from_dict(config), hardware.topology("v5e:2x2"), kind, batch if kind == "sample" else 0)


class Compiler:
    """Needs `fixed` GiB, and `each` for an image on a device at a time; remembers what it was asked."""

    def __init__(self, fixed, each, saved=None, seconds=1.0):
        self.fixed, self.each, self.saved, self.seconds = fixed, each, saved or {}, seconds
        self.jobs = []

    def __call__(self, job):
        self.jobs.append(job)
        images = job.batch / job.quantum
        share = self.saved.get(job.config.model.remat, 1.0)
        state = self.fixed * GIB / job.mesh().shape["fsdp"]
        total = int(state + share * self.each * GIB * images)
        if total > LIMIT:
            return Compiled(self.seconds / 4, total, LIMIT)
        memory = Memory(int(state), 0, total - int(state))
        return Compiled(self.seconds, total, LIMIT, memory, Costs(flops=1e12, hbm_bytes=1e9))

    def estimate(self, job):
        """An estimate from shapes whose part that grows with the batch is off by 20%."""
        share = self.saved.get(job.config.model.remat, 1.0)
        return self.fixed * GIB / job.mesh().shape["fsdp"], 0.8 * share * self.each * GIB * job.batch / job.quantum


def forever():
    return Clock(math.inf)


@pytest.mark.parametrize("each", [0.37, 1.0, 3.1, 20.0])
@pytest.mark.parametrize("batch", [4, 16, 400])
def test_the_largest_batch_is_found_and_checked(each, batch):
    compiler = Compiler(4.0, each)
    job = make_job(batch)
    largest = find_largest_batch(job, compiler(job), compiler, forever())
    n = math.floor((16 - 4) / each)
    assert (largest.batch, largest.per_device, largest.exact) == (4 * n, n, True)
    assert len(compiler.jobs) <= 5, "a line is known after two points"


def test_memory_that_is_no_line_takes_steps_back():
    def bent(job):
        images = job.batch / job.quantum
        total = int((2 + images + (3 if images > 9 else 0)) * GIB)
        return Compiled(1.0, total, LIMIT, Memory(total, 0, 0) if total <= LIMIT else None, Costs())

    largest = find_largest_batch(make_job(16), bent(make_job(16)), bent, forever())
    assert (largest.batch, largest.exact) == (44, True)


def test_a_spent_budget_gives_a_lower_bound():
    compiler, ticks = Compiler(4.0, 1.0), iter(range(100))
    job = make_job(16)
    largest = find_largest_batch(job, compiler(job), compiler, Clock(2.6, now=lambda: next(ticks)))
    assert (largest.batch, largest.exact, largest.predicted) == (16, False, 48)
    assert report.largest_batch_words(largest) == "at least 16 (4/device), predicted 48"
    none = find_largest_batch(job, Compiler(99.0, 1.0)(job), compiler, Clock(-1.0))
    assert (none.batch, none.exact) == (0, False) and report.largest_batch_words(none) == "unknown"


def test_changes_come_cheapest_first():
    candidates = [change.flags for change in changes(make_job(32))]
    assert candidates[:6] == [
        ("--config.model.remat=dots",), ("--config.model.remat=full",), ("--config.train.grad_accum_steps=2",),
        ("--config.train.grad_accum_steps=4",), ("--config.train.grad_accum_steps=8",), ("--config.mesh.preset=fsdp",),
    ]  # fmt: skip
    assert len(set(candidates)) == len(candidates)
    assert candidates.index(("--config.train.batch_size=16",)) > max(
        i for i, flags in enumerate(candidates) if not any("batch_size" in flag for flag in flags)
    )
    assert all(change.job != make_job(32) for change in changes(make_job(32)))
    fsdp = [c.flags for c in changes(make_job(32, mesh=dict(preset="fsdp"), model=dict(remat="full")))]
    assert fsdp[0] == ("--config.train.grad_accum_steps=2",) and not any("mesh" in f for flags in fsdp for f in flags)
    assert [c.flags for c in changes(make_job(16, "sample"))] == [("--num=8",), ("--num=4",)]


@pytest.mark.parametrize(
    ("fixed", "each", "flags"),
    [
        (4.0, 2.0, ("--config.model.remat=dots",)),
        (4.0, 5.0, ("--config.model.remat=full",)),
        (4.0, 11.0, ("--config.train.grad_accum_steps=8",)),
        (40.0, 0.5, ("--config.mesh.preset=fsdp",)),
        (40.0, 4.0, ("--config.train.grad_accum_steps=8", "--config.mesh.preset=fsdp")),
        (40.0, 11.0, ("--config.model.remat=dots", "--config.train.grad_accum_steps=8", "--config.mesh.preset=fsdp")),
        (4.0, 30.0, ("--config.model.remat=full", "--config.train.grad_accum_steps=8")),
        (600.0, 1.0, None),
    ],
)  # fmt: skip
def test_the_cheapest_change_is_compiled(fixed, each, flags):
    compiler = Compiler(fixed, each, saved={"dots": 0.5, "full": 0.25})
    job = make_job(32)
    failed = compiler(job)
    change = find_change(job, failed, compiler, forever(), compiler.estimate)
    if flags is None:
        assert change is None and len(compiler.jobs) == 1, "a change that is predicted not to fit is not compiled"
        assert "use more chips" in report.verdict(report.Preflight(job, failed))
        return
    assert change.flags == flags and change.compiled.fits
    result = report.Preflight(job, failed, change=change)
    assert " ".join(flags) in report.verdict(result) and "(compiled)" in report.verdict(result)
    assert json.loads(json.dumps(report.record(result)))["change"]["verified"]
    assert "with the change" in report.table([result])


def test_a_wrong_prediction_is_corrected_and_a_spent_budget_is_reported():
    compiler = Compiler(4.0, 5.0, saved={"dots": 0.5, "full": 0.25})
    job = make_job(32)
    hopeful = Compiler(4.0, 5.0, saved={"dots": 0.2, "full": 0.2}).estimate
    change = find_change(job, compiler(job), compiler, forever(), hopeful)
    assert change.flags != ("--config.model.remat=dots",) and change.compiled.fits
    change = find_change(job, compiler(job), compiler, Clock(-1.0), compiler.estimate)
    assert change.compiled is None and change.flags == ("--config.model.remat=full",)
    assert "not compiled" in report.verdict(report.Preflight(job, compiler(job), change=change))


def test_a_smaller_batch_when_nothing_else_helps():
    compiler = Compiler(0.4, 11.0)
    job = make_job(32, mesh=dict(preset="fsdp"), model=dict(remat="full"), train=dict(grad_accum_steps=4))
    change = find_change(job, compiler(job), compiler, forever(), compiler.estimate)
    assert change.flags == ("--config.train.grad_accum_steps=8",)
    job = make_job(32, "sample")
    change = find_change(job, compiler(job), compiler, forever(), compiler.estimate)
    assert change.flags == ("--num=4",) and change.job.num == 4


def test_memory_estimated_from_shapes():
    job = make_job(16, model=dict(layers=4))
    fixed, none = estimated_bytes(job)
    params = 4 * sum(math.prod(s.shape) for s in jax.tree.leaves(fit.abstract_model(job.config.transformer)[1]))
    assert 5.5 * params <= fixed <= 5.5 * params + 100, "parameters, average, two moments, gradient, compute copy"
    dots, full = (estimated_bytes(make_job(16, model=dict(layers=4, remat=r)))[1] for r in ("dots", "full"))
    assert full < dots < none
    assert estimated_bytes(make_job(16, model=dict(layers=4), train=dict(grad_accum_steps=2)))[1] == none / 2
    split, _ = estimated_bytes(make_job(16, model=dict(layers=4), mesh=dict(preset="fsdp")))
    assert split < 0.3 * fixed


# --- The report -------------------------------------------------------------------


def test_roofline_by_hand():
    slice_of_16 = hardware.topology("v5e:4x4")
    sent = Counter({"all-gather": 5e9, "all-reduce": 5e9})
    times = report.roofline(Costs(flops=197e12, hbm_bytes=0.819e12 / 4, sent=sent), slice_of_16)
    assert dataclasses.astuple(times) == pytest.approx((1.0, 0.25, 0.1))
    assert (times.seconds, times.bound) == (1.0, "compute")
    assert report.roofline(Costs(flops=1.0, sent=sent), slice_of_16).bound == "network"
    assert report.roofline(Costs(flops=1.0, sent=sent), hardware.topology("v5e:1x1")).network == 0


def test_the_record_has_the_numbers_of_the_table():
    job, compiler = make_job(16), Compiler(1.0, 0.1)
    result = report.preflight(job, 1e9, compiler=compiler)
    record = json.loads(json.dumps(report.record(result)))
    flops = job.config.step.objective.flops
    assert record["model_flops"] == 16 * flops and record["hardware_flops"] == 4e12
    assert record["hardware_over_model_flops"] == pytest.approx(4e12 / (16 * flops))
    assert record["largest_batch"] == {"batch": 600, "per_device": 150, "predicted": 600, "exact": True}
    assert record["images_per_second_at_most"] == pytest.approx(16 * 197)
    text = report.table([result, result])
    assert text.count("v5e:2x2") == 2 and "600 (150/device)" in text
    assert report.verdict(result).startswith("v5e:2x2: fits")
    assert report.preflight(job, 0.0, search=False, compiler=compiler).largest is None


# --- Inputs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (make_job(14), "multiple of 4, the 4 devices of the batch on v5e:2x2: give 12 or 16"),
        (make_job(12, train=dict(grad_accum_steps=2)), "times grad_accum_steps=2: give 8 or 16"),
        (make_job(3, "sample"), "give 4"),
        (make_job(16, mesh=dict(tensor=4)), "heads=2"),
        (make_job(16, mesh=dict(data=3)), "must fit the 4 devices"),
    ],
    ids=["batch", "accumulation", "sample", "heads", "mesh"],
)  # fmt: skip
def test_jobs_that_cannot_be_split_are_refused(job, words):
    with pytest.raises(InputError) as error:
        slices.check(job)
    assert words in str(error.value)


def test_out_of_memory_errors_are_parsed():
    parse = compiler.parse_out_of_memory
    assert parse(
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (283.50G) exceeds available HBM (15.75G). HLO module: jit_train_step."
    ) == (283.5 * GIB, 15.75 * GIB)
    old = "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded"
    assert parse(old) == (20.5 * GIB, 15.75 * GIB)
    assert parse("INVALID_ARGUMENT: vmem") is None


def test_memory_by_purpose():
    allocations = """\
BufferAssignment:
allocation 0: size 4096, page 0, thread-local:
 value: <608 add.5679 @0> (size=4096,offset=0): s32[]
allocation 1: size 1000, page 0, parameter 15, shape |f32[250]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 500, page 0, parameter 3, shape |f32[125]| at ShapeIndex {}:
allocation 3: size 24, page 0, output shape is |f32[6]|, maybe-live-out:
allocation 4: size 9000, page 0, preallocated-temp:
allocation 5: size 512, color 6, page 0, parameter 7, shape |f32[1]| at ShapeIndex {}:
"""
    report = "Memory Space: default (color=0)\nTotal bytes: 9524 (9.3KiB)\nMemory Space: vmem (color=1)\nTotal bytes: 7"
    with pytest.raises(ValueError, match="total"):
        compiler.parse_memory(allocations, report[: report.index(" (9.3")])
    assert compiler.parse_memory(allocations, report) == Memory(arguments=1500, outputs=24, temporaries=8000)


def test_a_dump_is_read_once_it_is_complete(tmp_path):
    """On a busy machine an incomplete dump may not grow for a while."""
    whole = "HloModule m\n\nENTRY %main (x: f32[8]) -> f32[8] {\n  ROOT %x = f32[8] parameter(0)\n}\n"
    dump = tmp_path / "module_0.jit_m.after_optimizations_after_buffer_assignment.txt"
    texts = iter([whole[:20]] * 4 + [whole[:-3]] * 4 + [whole])

    class Compiling:
        polled = 0

        def poll(self, seconds):
            self.polled += 1
            dump.write_text(next(texts))
            return False

    process = Compiling()
    assert compiler.wait_for_compiler(process, tmp_path, machine_code=False) is None
    assert process.polled == 9


def test_errors_of_tracing_are_reported_and_not_raised():
    def lower():
        raise NotImplementedError("Mosaic kernels cannot be automatically partitioned")

    sent = []
    compiler.trace_and_compile(lower, "", SimpleNamespace(send=sent.append))
    assert sent == ["NotImplementedError: Mosaic kernels cannot be automatically partitioned"]
