"""Checkpoints: truth verified, damage passed over, nothing lost."""

import json
import pathlib

import jax
import numpy as np
import pytest
from helpers import tiny_config

from causalfusion_jax import experiment, sharding
from causalfusion_jax.errors import InputError
from causalfusion_jax.training.checkpoint import CheckpointConfig, Checkpoints
from causalfusion_jax.training.state import abstract_state, create_state

CONFIG = experiment.from_dict(tiny_config())
MESH = sharding.make_mesh(CONFIG.mesh, jax.devices()[:1])


@pytest.fixture(scope="module")
def state():
    return create_state(CONFIG.step, MESH, jax.random.key(0))


def saved(workdir, state, steps=(4, 8, 12), **config):
    checkpoints = Checkpoints(workdir, CheckpointConfig(**config))
    for step in steps:
        checkpoints.save(step, state._replace(step=state.step + step), position=10 * step)
    checkpoints.wait()
    return checkpoints


def data_file(workdir, step) -> pathlib.Path:
    """The largest file of a step: its arrays."""
    files = (pathlib.Path(workdir) / "checkpoints" / str(step)).rglob("*")
    return max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bit(workdir, step):
    path = data_file(workdir, step)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped bit": flip_bit,
    "truncated file": lambda w, step: data_file(w, step).write_bytes(data_file(w, step).read_bytes()[:-100]),
    "deleted file": lambda w, step: data_file(w, step).unlink(),
    "no manifest": lambda w, step: (w / "manifests" / f"{step}.json").unlink(),
    "broken manifest": lambda w, step: (w / "manifests" / f"{step}.json").write_text('{"half'),
}


def test_round_trip(tmp_path, state):
    saved(tmp_path, state).close()
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.good_step() == 12
    restored, position = checkpoints.restore(12, abstract_state(CONFIG.step, MESH))
    assert position == 120 and int(restored.step) == 12
    jax.tree.map(np.testing.assert_array_equal, restored._replace(step=state.step), state)
    kernel = restored.params["blocks"]["mlp_in"]["kernel"]
    assert kernel.sharding == state.params["blocks"]["mlp_in"]["kernel"].sharding
    ema = checkpoints.restore_params(8, CONFIG.step, "ema")
    jax.tree.map(np.testing.assert_array_equal, ema, state.ema)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_falls_back_and_is_set_aside(tmp_path, state, damage, caplog):
    saved(tmp_path, state).close()
    DAMAGES[damage](tmp_path, 12)
    looking = Checkpoints(tmp_path, CheckpointConfig(), read_only=True)
    assert looking.good_step() == 8
    assert "checkpoint 12 is damaged" in caplog.text
    assert (tmp_path / "checkpoints" / "12").is_dir(), "read-only must not move anything"
    with pytest.raises(InputError):
        looking.good_step(12)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.good_step() == 8
    assert (tmp_path / "damaged_checkpoints" / "12").is_dir()
    assert checkpoints.steps() == [8, 4]
    # The step can be saved again.
    checkpoints.save(12, state, position=1)
    checkpoints.wait()
    assert checkpoints.good_step() == 12
    checkpoints.close()


def test_all_damaged_is_an_error_and_none_is_none(tmp_path, state):
    assert Checkpoints(tmp_path / "new", CheckpointConfig()).good_step() is None
    saved(tmp_path, state, steps=(4,)).close()
    flip_bit(tmp_path, 4)
    with pytest.raises(InputError, match="no intact checkpoint"):
        Checkpoints(tmp_path, CheckpointConfig()).good_step()
    assert (tmp_path / "checkpoints" / "4").is_dir()
    with pytest.raises(InputError, match="must be one of 4"):
        Checkpoints(tmp_path, CheckpointConfig()).good_step(5)


def test_keeps_the_newest_and_every_kth(tmp_path, state):
    checkpoints = saved(tmp_path, state, steps=range(1, 8), keep=2, keep_every=3)
    assert checkpoints.steps() == [7, 6, 3]
    manifests = {int(path.stem) for path in (tmp_path / "manifests").glob("*.json")}
    assert manifests == {7, 6, 3}
    checkpoints.close()


def test_manifest_describes_every_file(tmp_path, state):
    saved(tmp_path, state, steps=(4,)).close()
    manifest = json.loads((tmp_path / "manifests" / "4.json").read_text())
    folder = tmp_path / "checkpoints" / "4"
    assert set(manifest) == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_failed_save_is_raised(tmp_path, state, monkeypatch):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    monkeypatch.setattr(checkpoints._manager, "save", lambda *args, **kwargs: False)
    checkpoints.save(4, state, position=0)
    with pytest.raises(OSError, match="checkpoint 4 was not written"):
        checkpoints.wait()
