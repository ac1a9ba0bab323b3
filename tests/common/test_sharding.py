"""Meshes, rules, and the training step on more than one device."""

import jax
import numpy as np
import pytest
from helpers import make_batch, tiny_config
from jax.sharding import PartitionSpec

from causalfusion_jax.checkpoints.checkpoint import Checkpoints
from causalfusion_jax.common import sharding
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.sharding import PRESETS, MeshConfig, make_mesh
from causalfusion_jax.config import experiment
from causalfusion_jax.data.pipeline import host_batches
from causalfusion_jax.data.registry import make_source
from causalfusion_jax.models.presets import ACDIT
from causalfusion_jax.training.state import abstract_state, compile_train_step, create_state


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(data=-1, fsdp=2), (4, 2, 1, 1)),
        (MeshConfig(fsdp=-1), (1, 8, 1, 1)),
        (MeshConfig("fsdp"), (1, 8, 1, 1)),
        (MeshConfig("fsdp", data=2), (2, 4, 1, 1)),
        (MeshConfig("fsdp+tp"), (1, 4, 2, 1)),
        (MeshConfig("fsdp+tp", tensor=4), (1, 2, 4, 1)),
        (MeshConfig("fsdp+cp", data=2), (2, 2, 1, 2)),
    ],
    ids=str,
)
def test_an_axis_of_minus_one_takes_the_remaining_devices(config, shape):
    assert tuple(make_mesh(config, jax.devices()[:8]).shape.values()) == shape


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(data=2, fsdp=1), MeshConfig(data=-1, tensor=3)])
def test_mesh_must_fit(config):
    with pytest.raises(InputError):
        make_mesh(config, jax.devices()[:4])


@pytest.mark.parametrize("bad", [dict(preset="tp"), dict(data=-2), dict(preset="fsdp", data=-1)])
def test_bad_meshes_are_refused(bad):
    with pytest.raises(InputError):
        MeshConfig(**bad)


def test_rules():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    assert sharding.sharding(mesh, ("layers", "embed", "mlp")).spec == PartitionSpec(None, "fsdp", "tensor")
    with pytest.raises(InputError, match="embed of size 3 does not split into 2"):
        sharding.sharding(mesh, ("embed",), (3,))
    with pytest.raises(InputError, match="unknown|one of"):
        sharding.sharding(mesh, ("width",))
    with pytest.raises(InputError, match="mesh axis"):
        sharding.sharding(mesh, ("embed", "embed"))


@pytest.mark.parametrize(
    ("mesh", "field", "fix"),
    [
        (MeshConfig(fsdp=8), "config.train.batch_size", "multiple of 8"),
        (MeshConfig("fsdp+tp", data=1, fsdp=2, tensor=4), "config.mesh.tensor", "heads=2; below it, 1, 2 do"),
        (MeshConfig("fsdp+cp", fsdp=1, sequence=8), "config.mesh.sequence", "tokens_in_training=36; below it, 1, 2"),
    ],
)
def test_sizes_that_cannot_be_split_are_refused_with_the_fix(mesh, field, fix):
    config = experiment.from_dict(tiny_config(train=dict(batch_size=4)))
    with pytest.raises(InputError) as error:
        experiment.check_mesh(config, make_mesh(mesh, jax.devices()[:8]))
    assert error.value.field == field and fix in str(error.value)


def losses(config, mesh, steps):
    key = jax.device_put(jax.random.key(1), sharding.replicated(mesh))
    state = create_state(config.step, mesh, jax.random.key(0))
    batch, shapes = make_batch(config, mesh)
    step = compile_train_step(config.step, mesh, shapes, key)
    history = []
    for _ in range(steps):
        state, metrics = jax.block_until_ready(step(state, batch, key))
        history.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(history), state


MODELS = {
    "causalfusion": dict(),
    "in tiles": dict(model=dict(attention="flash")),
    "acdit": dict(
        model=ACDIT,
        diffusion=dict(t_shared_by="step"),
        factorization=dict(order="square_blocks", order_block=4, steps="block", block_size=4, weight="none"),
    ),
}


@pytest.mark.parametrize(
    "model", ["causalfusion", *(pytest.param(name, marks=pytest.mark.slow) for name in ("in tiles", "acdit"))]
)
@pytest.mark.parametrize(
    "devices", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_same_losses_under_every_preset(model, devices):
    """Loss and gradient norm over 20 steps are the same on one device and on several, for every sharding."""
    config = experiment.from_dict(tiny_config(train=dict(batch_size=8), **MODELS[model]))
    alone, _ = losses(config, make_mesh(MeshConfig(), jax.devices()[:1]), 20)
    for preset in PRESETS:
        if preset:
            mesh = make_mesh(MeshConfig(preset), jax.devices()[:devices])
            experiment.check_mesh(config, mesh)
            together, state = losses(config, mesh, 20)
            np.testing.assert_allclose(together[:, 0], alone[:, 0], rtol=1e-5, err_msg=preset)
            np.testing.assert_allclose(together[:, 1], alone[:, 1], rtol=1e-3, err_msg=preset)
            kernel = state.opt_state[1][0].mu["blocks"]["mlp_in"]["kernel"]
            parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
            assert kernel.addressable_shards[0].data.size * parts == kernel.size
            assert state.ema["blocks"]["mlp_in"]["kernel"].sharding == kernel.sharding


def test_a_checkpoint_moves_between_meshes(tmp_path):
    """8 devices to 2 to 8: every array bit for bit, and the data position."""
    config = experiment.from_dict(tiny_config(train=dict(batch_size=8)))
    meshes = [
        make_mesh(MeshConfig(preset), jax.devices()[:devices])
        for preset, devices in (("fsdp+tp", 8), ("dp", 2), ("fsdp", 8))
    ]
    state = create_state(config.step, meshes[0], jax.random.key(3))
    for number, mesh in enumerate(meshes[1:]):
        checkpoints = Checkpoints(tmp_path / str(number), config.checkpoint.keep, config.checkpoint.keep_every)
        checkpoints.save(5, state, 5)
        checkpoints.wait()
        moved, position = checkpoints.restore(checkpoints.good_step(), abstract_state(config.step, mesh))
        checkpoints.close()
        assert position == 5
        jax.tree.map(np.testing.assert_array_equal, moved, state)
        assert moved.params["token_in"]["kernel"].sharding.mesh.shape == mesh.shape
        state = moved
    source = make_source(config.data)
    whole = host_batches(source, config.data, 8, 0)[5]
    halves = [host_batches(source, config.data, 8, 0, rows)[5] for rows in np.split(np.arange(8), 2)]
    np.testing.assert_array_equal(np.concatenate([half["label"] for half in halves]), whole["label"])


def test_a_hosts_devices_compute_a_batch_together_or_each_its_part(monkeypatch):
    devices, params = jax.devices()[:2], {"scale": np.float32(3)}
    batch = np.arange(8, dtype=np.float32).reshape(4, 2)
    together = sharding.OwnDevices(params, devices)
    monkeypatch.setattr(sharding, "WHOLE_SLICE_ONLY", {devices[0].device_kind: jax.device_count()})
    each = sharding.OwnDevices(params, devices)
    assert (together.count, each.count) == (1, 2)
    for own in (together, each):
        parts = own.run(lambda params, x: {"tripled": params["scale"] * x}, batch)
        assert len(parts) == own.count
        np.testing.assert_array_equal(sharding.joined(parts)["tripled"], 3 * batch)
