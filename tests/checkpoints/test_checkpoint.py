"""Checkpoints: verification, damaged and interrupted steps, and which steps are kept."""

import contextlib
import errno
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from helpers import tiny_config
from jax.experimental.layout import Format, Layout

from causalfusion_jax.checkpoints import checkpoint
from causalfusion_jax.checkpoints.checkpoint import Checkpoints
from causalfusion_jax.checkpoints.manifests import Manifests, manifest_path, writer
from causalfusion_jax.common import files, sharding
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config import experiment
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.training.state import abstract_state, create_state

CONFIG = experiment.from_dict(tiny_config())
MESH = sharding.make_mesh(CONFIG.mesh, jax.devices()[:1])
SMALL = {"x": np.arange(1000, dtype=np.float32)}


def saved(workdir, steps=(4, 8, 12), state=SMALL, **config):
    checkpoints = Checkpoints(workdir, **config)
    for step in steps:
        checkpoints.save(step, state, position=10 * step)
    checkpoints.wait()
    return checkpoints


def reopened(workdir, **config):
    return Checkpoints(workdir, **config)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A workdir with steps 4, 8 and 12."""
    workdir = tmp_path_factory.mktemp("three")
    saved(workdir).close()
    return workdir


@pytest.fixture
def copied(three, tmp_path):
    """A copy of `three` that a test may change."""
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_round_trip(tmp_path):
    state = create_state(CONFIG.step, MESH, jax.random.key(0))
    saved(tmp_path, (8,), state).close()
    saved(tmp_path, (12,), state._replace(step=state.step + 12)).close()
    checkpoints = reopened(tmp_path)
    assert checkpoints.good_step() == 12
    restored, position = checkpoints.restore(12, abstract_state(CONFIG.step, MESH))
    assert position == 120 and int(restored.step) == 12
    jax.tree.map(np.testing.assert_array_equal, restored._replace(step=state.step), state)
    kernel = restored.params["blocks"]["mlp_in"]["kernel"]
    assert kernel.sharding == state.params["blocks"]["mlp_in"]["kernel"].sharding
    ema = checkpoints.restore_params(8, abstract_model(CONFIG.transformer)[1], "ema")
    jax.tree.map(np.testing.assert_array_equal, ema, state.ema)


def test_arrays_without_a_host_view_are_saved_while_implicit_transfers_are_disallowed(tmp_path):
    """Like an array on an accelerator, an array in another layout has no view on the host."""
    where = Format(Layout(major_to_minor=(1, 0)), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    array = jax.device_put(np.arange(12.0, dtype=np.float32).reshape(3, 4), where)
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="Disallowed"):
            np.asarray(array + 0)
        checkpoints = saved(tmp_path, (1,), {"x": array})
        checkpoints.wait()
    abstract = {"x": jax.ShapeDtypeStruct((3, 4), np.float32, sharding=array.sharding)}
    np.testing.assert_array_equal(checkpoints.restore(1, abstract)[0]["x"], array)


# --- Damage -----------------------------------------------------------------------


def data_file(workdir, step) -> pathlib.Path:
    """The largest file of a step: its arrays."""
    paths = (pathlib.Path(workdir) / "checkpoints" / str(step)).rglob("*")
    return max((path for path in paths if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bit(workdir, step):
    path = data_file(workdir, step)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap_files(workdir, step):
    one, other = (workdir / "checkpoints" / str(step) / name for name in ("data/metadata", "state/_METADATA"))
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1]), other.write_bytes(contents[0])


DAMAGES = {
    "flipped bit": flip_bit,
    "truncated file": lambda w, step: data_file(w, step).write_bytes(data_file(w, step).read_bytes()[:-100]),
    "deleted file": lambda w, step: data_file(w, step).unlink(),
    "swapped files": swap_files,
    "deleted folder": lambda w, step: shutil.rmtree(w / "checkpoints" / str(step) / "state"),
    "broken manifest": lambda w, step: manifest_path(w, step).write_text('{"half'),
    "other manifest": lambda w, step: manifest_path(w, step).write_text('{"processes": 1, "files": [1]}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_falls_back_and_is_set_aside(copied, damage, capsys):
    DAMAGES[damage](copied, 12)
    looking = Checkpoints(copied, read_only=True)
    assert looking.good_step() == 8
    assert "warning: checkpoint 12 is damaged (" in (printed := capsys.readouterr().err)
    assert "using checkpoint 8" in printed
    assert (copied / "checkpoints" / "12").is_dir(), "read-only must not move anything"
    with pytest.raises(InputError, match="no intact checkpoint: step 12"):
        looking.good_step(12)
    checkpoints = reopened(copied)
    assert checkpoints.good_step() == 8
    assert (copied / "damaged_checkpoints" / "12").is_dir()
    assert checkpoints.steps() == [8, 4]
    # The step can be saved again.
    checkpoints.save(12, SMALL, position=1)
    checkpoints.wait()
    assert checkpoints.good_step() == 12


def test_all_damaged_is_an_error_and_none_is_none(tmp_path):
    assert reopened(tmp_path / "new").good_step() is None
    saved(tmp_path, steps=(4,)).close()
    flip_bit(tmp_path, 4)
    with pytest.raises(InputError, match="no intact checkpoint"):
        reopened(tmp_path).good_step()
    assert (tmp_path / "checkpoints" / "4").is_dir()
    with pytest.raises(InputError, match="must be one of 4"):
        reopened(tmp_path).good_step(5)


def test_checkpoints_without_the_folder_of_manifests_are_refused(copied):
    shutil.rmtree(copied / "manifests")
    for read_only in (True, False):
        with pytest.raises(InputError, match="its manifests/ is missing"):
            Checkpoints(copied, read_only=read_only)


# --- Interruptions ----------------------------------------------------------------


class Killed(BaseException):
    """Ends the background thread, like a kill."""


def killed_at(monkeypatch, method, condition=lambda *args: True):
    """Ends the background thread when it calls a method and `condition` holds for the arguments."""
    real, finish = getattr(Checkpoints, method), Checkpoints.finish

    def end(*args):
        if condition(*args):
            raise Killed
        return real(*args)

    def finish_until_killed(self, step):
        with contextlib.suppress(Killed):
            finish(self, step)

    monkeypatch.setattr(Checkpoints, method, end)
    monkeypatch.setattr(Checkpoints, "finish", finish_until_killed)


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("moment", ["write_manifest", "delete_outdated", "delete_files"])
def test_a_kill_after_the_commit_leaves_an_intact_step(tmp_path, monkeypatch, keep, moment, capsys):
    saved(tmp_path, (4, 8), keep=keep).close()
    with monkeypatch.context() as patched:
        # A save of step 12 first deletes what is left of that step.
        killed_at(patched, moment, lambda self, *step: step != (12,) or moment == "write_manifest")
        saved(tmp_path, (12,), keep=keep)
    checkpoints = reopened(tmp_path, keep=keep)
    expected = 8 if moment == "write_manifest" else 12
    assert checkpoints.good_step() == expected
    assert "damaged" not in capsys.readouterr().err and not (tmp_path / "damaged_checkpoints").exists()
    # Later saves delete what is left.
    checkpoints.save(12 if expected == 8 else 16, SMALL, position=0)
    checkpoints.wait()
    newest = 12 if expected == 8 else 16
    assert checkpoints.steps() == checkpoints.complete_steps() and checkpoints.good_step() == newest
    assert len(checkpoints.steps()) == min(keep, newest // 4)


def test_the_first_step_interrupted_starts_from_the_beginning(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        killed_at(patched, "write_manifest")
        saved(tmp_path, (4,))
    checkpoints = reopened(tmp_path)
    assert checkpoints.good_step() is None
    message = "warning: checkpoint 4 was interrupted before it was saved whole; starting from the beginning"
    assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="was interrupted"):
        checkpoints.good_step(4)
    checkpoints.save(4, SMALL, position=0)
    checkpoints.wait()
    assert checkpoints.good_step() == 4


def test_unfinished_folders_are_removed_on_a_restart(copied):
    unfinished = copied / "checkpoints" / "16.orbax-checkpoint-tmp"
    unfinished.mkdir()
    Checkpoints(copied, read_only=True)
    assert unfinished.is_dir()
    assert reopened(copied).good_step() == 12 and not unfinished.exists()


def test_errors_in_the_background_are_raised_by_the_next_call(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in (lambda c: c.save(8, SMALL, position=0), Checkpoints.wait, Checkpoints.close):
        with monkeypatch.context() as patched:
            patched.setattr(files, "write_json", full)
            checkpoints = reopened(tmp_path)
            checkpoints.save(4, SMALL, position=0)
            with pytest.raises(OSError, match="checkpoint 4 was not saved to .*: .*No space left"):
                call(checkpoints)
        checkpoints.wait()
    assert reopened(tmp_path).good_step() is None


# --- Kept steps -------------------------------------------------------------------


def test_keeps_the_newest_and_every_kth(tmp_path):
    checkpoints = saved(tmp_path, steps=range(1, 8), keep=2, keep_every=3)
    assert checkpoints.steps() == [7, 6, 3]
    assert {int(path.name) for path in (tmp_path / "manifests").iterdir()} == {7, 6, 3}
    checkpoints.close()


def test_old_steps_are_kept_until_all_processes_wrote_their_manifest(copied, monkeypatch):
    monkeypatch.setattr(checkpoint, "PARTS_TIMEOUT", 0.0)
    manifest = json.loads(manifest_path(copied, 12).read_text())
    Manifests(copied).write_part(12, 0, 2, manifest["files"])
    checkpoints = reopened(copied, keep=1)
    assert not checkpoints.await_parts(12)
    checkpoints.delete_outdated()
    assert checkpoints.steps() == [12, 8] and checkpoints.good_step() == 8
    Manifests(copied).write_part(12, 1, 2, {})
    assert checkpoints.await_parts(12)
    checkpoints.delete_outdated()
    assert checkpoints.steps() == [12]


# --- Manifests --------------------------------------------------------------------


def test_manifest_describes_every_file(three):
    manifest = json.loads(manifest_path(three, 4).read_text())
    assert manifest["processes"] == 1 and set(manifest["files"]) == set(files.names(three / "checkpoints" / "4"))


def test_each_process_lists_the_files_it_wrote_and_any_number_of_processes_verifies_all(tmp_path, monkeypatch):
    names = ["_CHECKPOINT_METADATA", "state/d/merged", "state/array_metadatas/process_3"]
    names += [f"state/ocdbt.process_{process}/d/0" for process in range(4)]
    folder = tmp_path / "checkpoints" / "5"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (tmp_path / "manifests").mkdir()
    checkpoints = Checkpoints(tmp_path, read_only=True)
    read = []
    describe_file = files.describe_file
    monkeypatch.setattr(files, "describe_file", lambda path: read.append(path) or describe_file(path))
    for process in (3, 1, 0, 2):
        with monkeypatch.context() as patched:
            patched.setattr(jax, "process_index", lambda process=process: process)
            patched.setattr(jax, "process_count", lambda: 4)
            assert not checkpoints.complete_steps()
            checkpoints.write_manifest(5)
    assert sorted(read) == sorted(folder / name for name in names), "every file is read once, by its writer"
    parts = [json.loads((tmp_path / "manifests" / "5" / f"{p}.json").read_text())["files"] for p in range(4)]
    assert [len(part) for part in parts] == [4, 1, 1, 1]
    assert checkpoints.good_step() == 5
    (folder / names[-1]).write_text("state/ocdbt.process_x")
    with pytest.raises(InputError, match="ocdbt.process_3/d/0"):
        checkpoints.good_step()


def test_processes_share_the_verification(copied, monkeypatch):
    checkpoints = reopened(copied)
    expected = Manifests(copied).expected(12)
    shares = []
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(jax, "process_count", lambda: 3)
        shares.append(checkpoints.files_to_verify(expected))
    assert sum(map(len, shares)) == len(expected) and {n for share in shares for n in share} == set(expected)


def test_writers_of_files():
    assert writer("state/ocdbt.process_12/d/af") == 12
    assert writer("state/manifest.ocdbt") == writer("state/array_metadatas/process_3") == 0


def test_manifests_of_one_file_are_read_and_deleted_like_others(copied):
    for step in (4, 8, 12):
        described = json.loads(manifest_path(copied, step).read_text())["files"]
        shutil.rmtree(copied / "manifests" / str(step))
        (copied / "manifests" / f"{step}.json").write_text(json.dumps(described))
    checkpoints = reopened(copied, keep=2)
    assert checkpoints.good_step() == 12 and checkpoints.fingerprint(12) != checkpoints.fingerprint(8)
    checkpoints.save(16, SMALL, position=0)
    checkpoints.wait()
    assert checkpoints.steps() == [16, 12]
    assert sorted(path.name for path in (copied / "manifests").iterdir()) == ["12.json", "16"]
    flip_bit(copied, 16)
    assert checkpoints.good_step() == 12
