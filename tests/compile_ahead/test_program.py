"""The real TPU compiler: what is read from its programs against what their shapes ask for."""

import dataclasses
import functools
import json
import math
import os
from types import SimpleNamespace

os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import command, tiny_config
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from causalfusion_jax.common import hardware, sharding
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.hardware import GIB
from causalfusion_jax.common.sharding import MeshConfig
from causalfusion_jax.compile_ahead import compiler, hlo, program
from causalfusion_jax.compile_ahead.costs import program_costs
from causalfusion_jax.config import experiment, slices
from causalfusion_jax.models.transformer import abstract_model

pytest.importorskip("libtpu")
V5E = hardware.topology("v5e:2x2")
LAYERS, WIDTH, ROWS = 6, 512, 1024


def small_job(batch=16, kind="train", **model):
    config = tiny_config(model=dict(hidden=256, heads=4, layers=3, dtype="bfloat16") | model, mesh=dict(preset="fsdp"))
    config["train"]["batch_size"] = batch
    return slices.SliceJob(experiment.from_dict(config), V5E, kind, batch if kind == "sample" else 0)


@pytest.fixture(scope="module")
def scanned():
    """Costs of a stack of square layers, its weights split over four chips, and of its gradient."""
    mesh = sharding.make_mesh(MeshConfig("fsdp"), slices.devices(V5E))
    place = lambda *job: jax.sharding.NamedSharding(mesh, PartitionSpec(*job))
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16, sharding=place(None, "fsdp"))
    rows = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16, sharding=place("fsdp"))

    def loss(weights, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
        return jnp.sum(x.astype(jnp.float32))

    def costs(f):
        with jax.set_mesh(mesh):
            return program_costs(hlo.parse(jax.jit(f).lower(weights, rows).compile().as_text()))

    return costs(loss), costs(jax.grad(loss))


def test_flops_of_a_scan_of_layers(scanned):
    forward, gradient = scanned
    product = 2 * LAYERS * ROWS / 4 * WIDTH**2
    assert forward.flops == pytest.approx(product, rel=0.01) and not forward.unknown
    assert gradient.flops == pytest.approx(3 * product, rel=0.01)


def test_collectives_of_split_parameters(scanned):
    forward, gradient = scanned
    weights = 2 * LAYERS * WIDTH**2
    assert forward.bytes["all-gather"] == weights
    # Again for the backward pass, unless they were kept; gradients are reduced, in bfloat16.
    assert gradient.bytes["all-gather"] in (weights, 2 * weights)
    reduced = gradient.bytes["reduce-scatter"] + gradient.bytes["all-reduce"]
    assert weights <= reduced <= 1.01 * weights


@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:2x2x4"])
def test_tensor_parallel_devices_are_neighbours_on_one_host(name):
    """The hosts may be listed in any order."""
    by_host = np.array(slices.devices(hardware.topology(name))).reshape(-1, 4)
    for parts in (2, 4):
        mesh = sharding.make_mesh(MeshConfig("fsdp+tp", tensor=parts), by_host[::-1].ravel())
        for group in mesh.devices.reshape(-1, parts):
            assert len({device.process_index for device in group}) == 1
            # Two chips are one step apart, four are a square.
            assert np.abs(np.subtract(group[0].coords, group[-1].coords)).sum() == (1 if parts == 2 else 2)


@pytest.mark.parametrize(("name", "meshes"), [("v5e:4x4", 1), ("v5e:4x8", 4), ("v6e:8x8", 1), ("v5p:2x2x4", 1)])
def test_a_host_of_a_slice_has_programs_of_its_own(name, meshes):
    """Some compilers refuse a program of several devices of a slice, but not all."""
    topology = hardware.topology(name)
    own = [device for device in slices.devices(topology) if device.process_index == 0]
    meshes_of_host = sharding.own_meshes(own, topology.devices)
    assert len(meshes_of_host) == meshes and sum(mesh.size for mesh in meshes_of_host) == len(own) == 4
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=sharding.batch_sharding(meshes_of_host[0]))
    jax.jit(lambda x: x + 1).lower(x).compile()


def test_the_memory_of_a_chip_comes_from_the_compiler():
    assert 15 * GIB < compiler.hbm_limit(V5E) < 16 * GIB
    assert compiler.hbm_limit(hardware.topology("v4:2x2x1")) > 30 * GIB, "both cores of a chip are one device"
    assert len(slices.devices(hardware.topology("v5p:2x2x2"))) == 8


@pytest.mark.parametrize("name", ["v5e:3x3", "v5e:32x32"])
def test_unknown_slices_are_refused(name):
    with pytest.raises(InputError, match="topology"):
        slices.devices(hardware.topology(name))


def test_a_program_that_is_too_large_reports_the_memory_it_needs():
    job = small_job(batch=2**21, layers=2)
    compiled = compiler.compile_program(job)
    assert not compiled.fits and compiled.total_bytes > compiled.limit_bytes and compiled.costs is None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--topology=v5e-16",), ["--topology", "did you mean v5e:4x4"]),
        (("--topology=v5e:16x16", "--config.train.batch_size=300"), ["multiple of 256", "give 256 or 512"]),
        (("--topology=v5e:2x2", "--num=4"), ["--num", "--job=sample"]),
        (("--topology=v5e:2x2", "--job=sample", "--num=6"), ["--num", "give 4 or 8"]),
        (("--topology=v5e:2x2", "--config.mesh.tensor=4"), ["config.mesh.tensor", "heads=3"]),
        ((), ["--topology", "required"]),
    ],
)
def test_wrong_input_is_one_line_before_anything_compiles(args, words):
    done = command("preflight", "--config=configs/digits.py", *args)
    assert done.returncode == 2 and "compiling" not in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0], lines[0]


def test_the_sampler_is_the_one_that_a_run_starts():
    """Attention in a kernel, which cannot be partitioned, with weights that training splits."""
    job = small_job(kind="sample", batch=8, attention="flash", layers=1)
    text = program.lower(job).as_text()
    assert "tpu_custom_call" in text and "manual_computation" in text
    with pytest.raises(InputError, match="give 4 or 8"):
        slices.check(dataclasses.replace(job, num=6))


def test_a_program_that_cannot_be_partitioned_is_reported(tmp_path):
    """Both errors of tracing and errors of the compiler."""
    sent = []
    lower = functools.partial(lower_without_shard_map, small_job())
    compiler.trace_and_compile(lower, str(tmp_path), SimpleNamespace(send=sent.append))
    assert "Mosaic kernels cannot be automatically partitioned" in sent[-1]


def lower_without_shard_map(job):
    """A kernel on an array that is split over devices, left to GSPMD."""
    where = sharding.batch_sharding(job.mesh())
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=where)

    def double(x_ref, o_ref):
        o_ref[...] = 2 * x_ref[...]

    kernel = pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))
    return jax.jit(kernel, in_shardings=where, out_shardings=where).lower(x)


# --- Whole programs ---------------------------------------------------------------


@pytest.mark.slow
def test_training_step_of_a_small_model():
    job = small_job()
    compiled = compiler.compile_program(job)
    assert compiled.fits and not compiled.costs.unknown
    costs = compiled.costs
    executed = costs.flops * 4 / (program.model_flops(job) * job.batch)
    assert 1.0 <= executed < 1.1, "the model's own count, and little beside it"
    blocks = abstract_model(job.config.transformer)[1]["blocks"]
    kernels = 2 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(blocks) if len(leaf.shape) > 2)
    # Forward all of them are gathered once; backward again, those that were not kept.
    assert kernels <= costs.bytes["all-gather"] + costs.bytes["all-reduce"]
    assert costs.bytes["all-gather"] >= 0.9 * kernels
    to_the_end = compiler.compile_program(job, machine_code=True)
    assert (to_the_end.memory, to_the_end.costs) == (compiled.memory, compiled.costs)
    remat = compiler.compile_program(job.with_settings("model", remat="full"))
    assert 1.2 < remat.costs.flops / costs.flops < 1.4, "a third more: the forward pass twice"
    assert remat.memory.arguments == compiled.memory.arguments
    longer = compiler.compile_program(job.with_settings("model", layers=6))
    others = job.config.transformer
    assert longer.costs.flops / costs.flops == pytest.approx(
        program.model_flops(job.with_settings("model", layers=2 * others.layers)) / program.model_flops(job), rel=0.03
    )


@pytest.mark.slow
def test_sampler_of_a_small_model():
    job = small_job(kind="sample", batch=8)
    sampling = dataclasses.replace(job.config.sampling, ar_steps=2, solver_steps=5, cfg_scale=2.0)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, sampling=sampling))
    compiled = compiler.compile_program(job)
    executed = compiled.costs.flops * 4 / (program.model_flops(job) * job.batch)
    assert 0.95 < executed < 1.5, "padding and the empty part of the cache come on top"


@pytest.mark.slow
def test_the_command():
    small = ("--config.model.layers=2", "--config.train.batch_size=16", "--nosearch")
    done = command("preflight", "--config=configs/digits.py", "--topology=v5e:2x2,v5e:1x1", *small)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["fits"] and [r["devices"] for r in record["results"]] == [4, 1]
    assert "v5e:1x1: fits" in done.stdout and "hardware / model FLOPs" in done.stdout


@pytest.mark.slow
def test_all_programs_of_a_run_on_a_slice():
    """At a size where a chip cannot hold the fine-tuning step, which alone is named."""
    small = ["--config.model.layers=1", "--config.train.batch_size=64", "--config.evaluation.eval_every=100"]
    args = ["--config=configs/digits.py", "--topology=v5e:2x2", "--job=run", *small]
    done = command("preflight", *args, "--config.finetune.batch_size=8388608")
    assert done.returncode == 1, done.stdout + done.stderr
    record = json.loads(done.stdout.splitlines()[-1])["results"][0]
    assert [p["name"] for p in record["programs"] if not p["fits"]] == ["fine-tuning step"]
    assert "v5e:2x2: fine-tuning step does not fit" in done.stdout
    evaluation = next(p for p in record["programs"] if p["name"] == "evaluation sampler")
    step = next(p for p in record["programs"] if p["name"] == "training step")
    beside = evaluation["resident_bytes"]
    assert beside["training state"] + beside["batch"] == pytest.approx(step["hbm"]["arguments"], rel=0.01)
