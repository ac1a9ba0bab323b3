"""Host reads of device arrays: the test mode against jax's own guard, and whole runs with it."""

import json
import pickle
import runpy
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import command
from host_reads import accelerator_reads
from jax.experimental.layout import Format, Layout

DISALLOWED = "Disallowed device-to-host transfer"

READS = {
    "np.asarray": np.asarray,
    "np.stack": lambda x: np.stack([x, x]),
    "tolist": lambda x: x.tolist(),
    "str": str,
    "pickle": pickle.dumps,
    "copy_to_host_async": lambda x: x.copy_to_host_async(),
    "shard": lambda x: np.asarray(x.addressable_shards[0].data),
    "device_get": jax.device_get,
    "asarray after device_get": lambda x: (jax.device_get(x), np.asarray(x)),
    "other thread": lambda x: _in_thread(np.asarray, x),
    "allowed": lambda x: _within("allow", np.asarray, x),
    "explicitly disallowed": lambda x: _within("disallow_explicit", jax.device_get, x),
    "device only": lambda x: jax.block_until_ready(_double(x)),
}


@jax.jit
def _double(x):
    return 2 * x


def _within(level, read, x):
    with jax.transfer_guard_device_to_host(level):
        return read(x)


def _in_thread(read, x):
    errors = []

    def run():
        try:
            read(x)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in errors:
        raise error


def refused(read, x) -> bool:
    """Whether the guard stops `read(x)`."""
    try:
        with jax.transfer_guard_device_to_host("disallow"):
            read(x)
        return False
    except jax.errors.JaxRuntimeError as error:
        assert DISALLOWED in str(error)
        return True


def make_array(devices: int):
    """float32 [2, 4], its columns split over the devices."""
    where = jax.sharding.NamedSharding(jax.make_mesh((devices,), ("x",)), jax.P(None, "x"))
    return jax.device_put(jnp.arange(8.0).reshape(2, 4), where)


def in_another_layout(x):
    """`x` where a CPU cannot read it in place, so that jax's own guard sees each of its transfers."""
    return jax.device_put(x, Format(Layout(major_to_minor=(1, 0)), x.sharding))


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("name", READS)
def test_reads_are_refused_as_jax_refuses_those_of_an_array_not_in_place(name, devices):
    x, read = make_array(devices), READS[name]
    expected = refused(read, in_another_layout(x))
    with accelerator_reads():
        assert refused(read, x) == expected


@pytest.mark.parametrize("read", [float, int, bool, lambda x: f"{x:.1f}", lambda x: [*x[None]][0].item()])
def test_scalars_are_refused_unless_read_explicitly_before(read):
    with accelerator_reads():
        assert refused(read, jnp.ones(()))
        x = jnp.ones(())
        assert not refused(lambda x: read(jax.device_get(x)), x) and not refused(float, x)
    assert not refused(read, jnp.ones(())), "the mode ends"


def test_what_was_read_outlives_a_donation():
    with accelerator_reads():
        x = jnp.ones(3)
        read = jax.device_get(x)
        jax.jit(lambda x: x + 1, donate_argnums=0)(x)
        np.testing.assert_array_equal(read, np.ones(3))


def test_transfers_to_the_device_need_no_mode():
    """A CPU checks them as an accelerator does: arguments of a program must be placed explicitly."""
    x = np.ones((2, 4), np.float32)
    _double(x)
    with jax.transfer_guard("disallow"):
        assert _double(jax.device_put(x)).shape == (2, 4)
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
            _double(x)


# --- Whole runs -------------------------------------------------------------------
#
# All commands and processes that tests start by `helpers` run in this mode, and so do the runs
# of `test_evaluation`; those of several processes are in `test_whole_runs_multihost`.

TRAIN = (
    "--config=configs/digits.py", "--config.model.hidden=32", "--config.model.heads=2", "--config.train.steps=12",
    "--config.train.batch_size=8", "--config.optimizer.warmup_steps=3", "--config.checkpoint.every=4",
    "--config.logging.every=4", "--config.logging.sample_every=6", "--config.evaluation.eval_every=6",
    "--config.evaluation.num_images=20", "--config.sampling.solver_steps=4",
)  # fmt: skip


@pytest.mark.slow
def test_training_saves_samples_and_evaluates_without_implicit_reads(tmp_path):
    done = command("train", *TRAIN, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {"8", "12"}
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"00000006.png", "00000012.png"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation/fd" in line] == [6, 12] and "(best so far)" in done.stdout
    best = command("sample", f"--workdir={tmp_path}", "--step=best", "--num=4", f"--out={tmp_path / 'best'}")
    assert best.returncode == 0, best.stderr


def test_a_command_that_reads_implicitly_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["host_reads", "implicit_read"])
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "implicit_read.py").write_text("import jax.numpy as jnp\nprint(float(jnp.ones(())))\n")
    with pytest.raises(jax.errors.JaxRuntimeError, match=DISALLOWED):
        runpy.run_module("host_reads", run_name="__main__")
