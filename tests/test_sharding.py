"""Meshes, rules, and the training step on more than one device."""

import jax
import numpy as np
import pytest
from helpers import make_batch, tiny_config
from jax.sharding import PartitionSpec

from causalfusion_jax import experiment, sharding
from causalfusion_jax.errors import InputError
from causalfusion_jax.sharding import MeshConfig, make_mesh
from causalfusion_jax.training.state import compile_train_step, create_state


def test_mesh_takes_what_is_left():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2), jax.devices()[:4])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(data=2, fsdp=1), MeshConfig(data=-1, tensor=3)])
def test_mesh_must_fit(config):
    with pytest.raises(InputError):
        make_mesh(config, jax.devices()[:4])


def test_rules():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    assert sharding.sharding(mesh, ("layers", "embed", "mlp")).spec == PartitionSpec(None, "fsdp", "tensor")
    assert sharding.sharding(mesh, ("embed",), (3,)).spec == PartitionSpec(None)
    with pytest.raises(InputError, match="unknown|one of"):
        sharding.sharding(mesh, ("width",))
    with pytest.raises(InputError, match="mesh axis"):
        sharding.sharding(mesh, ("embed", "embed"))


def losses(mesh_config, devices, steps=3):
    config = experiment.from_dict(tiny_config(train=dict(batch_size=8)))
    mesh = make_mesh(mesh_config, devices)
    key = jax.device_put(jax.random.key(1), sharding.replicated(mesh))
    state = create_state(config.step, mesh, jax.random.key(0))
    batch, shapes = make_batch(config, mesh)
    step = compile_train_step(config.step, mesh, shapes, key)
    found = []
    for _ in range(steps):
        state, metrics = step(state, batch, key)
        found.append(float(metrics["loss"]))
    return found, state


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(data=4), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, fsdp=4), marks=pytest.mark.slow),
        MeshConfig(data=1, fsdp=2, tensor=2),
    ],
    ids=str,
)
def test_same_losses_on_four_devices(mesh):
    alone, _ = losses(MeshConfig(), jax.devices()[:1])
    together, state = losses(mesh, jax.devices()[:4])
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    kernel = state.opt_state[1][0].mu["blocks"]["mlp_in"]["kernel"]
    assert kernel.addressable_shards[0].data.size * mesh.fsdp * mesh.tensor == kernel.size
