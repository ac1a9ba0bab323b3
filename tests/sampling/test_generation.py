"""Where sampling runs: parameters of a training state, of the host, of a mesh; what is compiled for it."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import random_params, tiny_config

from causalfusion_jax.common import sharding
from causalfusion_jax.config import experiment
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.sampling import generation
from causalfusion_jax.sampling.generation import (
    SamplingJob,
    generate_batch,
    generate_images,
    image_batches,
    image_shares,
    lower_sampler,
    replicate,
)
from causalfusion_jax.training.state import place_abstract

CONFIG = experiment.from_dict(tiny_config(model=dict(layers=1), sampling=dict(solver_steps=2)))
FLASH = experiment.from_dict(tiny_config(model=dict(layers=1, attention="flash"), sampling=dict(solver_steps=1)))
JOB = SamplingJob(CONFIG, CONFIG.sampling, Condition(np.arange(5, dtype=np.int32)), seed=3, batch_size=4)


def of_training(config, mesh_config):
    """Random parameters as a training state has them on two devices."""
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:2])
    _, shapes, axes = abstract_model(config.transformer)
    where = jax.tree.map(lambda leaf: leaf.sharding, place_abstract(shapes, axes, mesh))
    return sharding.place(random_params(config.transformer), where)


class Lowered(Exception):
    """Stops sampling where its program would run."""


@pytest.mark.parametrize("mesh", [sharding.MeshConfig("fsdp"), sharding.MeshConfig(data=1, tensor=2)], ids=str)
def test_grid_of_a_split_state_compiles_with_the_kernel_on_a_tpu(mesh, monkeypatch):
    """XLA cannot partition a Mosaic kernel, so no device may be given a part of the parameters."""

    def for_tpu(program):
        def lower(*args, **kwargs):
            raise Lowered(program.trace(*args, **kwargs).lower(lowering_platforms=("tpu",)).as_text())

        return lower

    for name in ("sample_tokens", "sample_tokens_shared"):
        monkeypatch.setattr(generation, name, for_tpu(getattr(generation, name)))
    with pytest.raises(Lowered, match="tpu_custom_call"):
        generate_images(SamplingJob(FLASH, FLASH.sampling, JOB.condition), of_training(FLASH, mesh))


def test_same_images_wherever_the_parameters_are():
    here = random_params(CONFIG.transformer)
    expected = generate_images(JOB, here)
    split = of_training(CONFIG, sharding.MeshConfig("fsdp"))
    assert not split["blocks"]["mlp_in"]["kernel"].is_fully_replicated
    images = generate_images(JOB, split)
    assert np.abs(images.astype(int) - expected).max() <= 1
    parts = list(image_shares(JOB, split))
    np.testing.assert_array_equal(np.concatenate([numbers for numbers, _ in parts]), np.arange(5))
    np.testing.assert_array_equal(np.concatenate([share for _, share in parts]), images)
    # Some batches alone; the last one, which is filled up for two devices, is of one image.
    batches = list(image_batches(JOB, split, wanted=(1, 0)))
    np.testing.assert_array_equal(np.concatenate(batches[::-1]), images)
    with pytest.raises(ValueError, match="whole on every device"):
        generate_batch(JOB.select(np.arange(2)), split, jax.random.split(jax.random.key(0), 2))


def test_devices_that_cannot_share_a_program_generate_a_part_of_each_batch(monkeypatch):
    params, job = jax.device_get(random_params(CONFIG.transformer)), dataclasses.replace(JOB, batch_size=3)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
    shared = generate_images(job, params)
    monkeypatch.setattr(
        sharding,
        "own_meshes",
        lambda devices: [sharding.make_mesh(sharding.MeshConfig(), [device]) for device in devices],
    )
    assert len(generation.for_sampling(params)) == 2
    alone = generate_images(job, params)
    assert alone.shape == shared.shape and np.abs(alone.astype(int) - shared).max() <= 1
    numbers, images = zip(*image_shares(job, params), strict=True)
    np.testing.assert_array_equal(np.concatenate(numbers), np.arange(5))
    np.testing.assert_array_equal(np.concatenate(images), alone)


def test_lowered_sampler_is_the_one_that_runs(monkeypatch):
    program, devices = generation.sample_tokens_shared, jax.devices()[:2]
    lowered = lower_sampler(CONFIG, CONFIG.sampling, devices, batch_size=5).as_text()

    def lower(*args):
        raise Lowered(program.lower(*args).as_text())

    monkeypatch.setattr(generation, "sample_tokens_shared", lower)
    job = dataclasses.replace(JOB, batch_size=5)
    with pytest.raises(Lowered) as run:
        generate_images(job, replicate(random_params(CONFIG.transformer), devices))
    assert str(run.value) == lowered
