"""The training loop around its step: saves, evaluations, sample grids, signals, and resuming."""

import dataclasses
import errno
import functools
import json
import os
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config

from causalfusion_jax.checkpoints.checkpoint import Checkpoints
from causalfusion_jax.cli import command as cli
from causalfusion_jax.common import files, sharding
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.lock import FolderLock
from causalfusion_jax.config import experiment
from causalfusion_jax.training import loop, metric_log
from causalfusion_jax.training.state import abstract_state, compile_train_step
from causalfusion_jax.training.stopping import Stopped

CONFIG = experiment.from_dict(tiny_config(
    train=dict(steps=8, batch_size=4), checkpoint=dict(every=3, keep=1), logging=dict(every=3, sample_every=2),
    evaluation=dict(eval_every=4), model=dict(hidden=8, layers=1),
))  # fmt: skip
EVERYTHING = [
    "grid 2",
    "save 3",
    "save 4",
    "evaluation 4",
    "grid 4",
    "save 6",
    "grid 6",
    "save 8",
    "evaluation 8",
    "grid 8",
]


@functools.cache
def compiled(step, mesh):
    return compile_train_step(step, mesh, CONFIG.batch_shapes, jax.random.key(0))


class Course:
    """Trains with an evaluator and a preview of three batches each, and sends signals at chosen events.

    Attributes:
      events: what has begun, in order, such as "save 4".
      signals: events in which SIGTERM arrives.
    """

    def __init__(self, monkeypatch):
        self.events, self.signals = [], set()
        mesh = sharding.make_mesh(CONFIG.mesh, jax.devices()[:1])
        monkeypatch.setattr(sharding, "make_mesh", lambda config: mesh)
        monkeypatch.setattr(metric_log, "peak_flops", lambda device: 1.0)
        monkeypatch.setattr(loop, "compile_train_step", lambda step, mesh, shapes, key: compiled(step, mesh))
        course, save = self, Checkpoints.save

        def recorded(self, step, *args):
            course.begin(f"save {step}")
            save(self, step, *args)

        monkeypatch.setattr(Checkpoints, "save", recorded)
        for method, name in (("evaluate", "evaluation"), ("draw_grid", "grid")):
            recorded_method = self.recorded(name, getattr(loop.TrainingRun, method))
            monkeypatch.setattr(loop.TrainingRun, method, recorded_method)

    settings = {"metric": "fd"}

    def recorded(self, name, method):
        def record(run, step, state):
            self.begin(f"{name} {step}")
            method(run, step, state)

        return record

    def begin(self, event):
        self.events.append(event)
        if event in self.signals:
            self.signals.remove(event)
            os.kill(os.getpid(), signal.SIGTERM)

    def __call__(self, ema, between_batches):
        for _ in range(3):
            between_batches()
        # Later scores are worse.
        return {"fd": float(jnp.sum(jnp.abs(ema["token_in"]["kernel"])))}

    @staticmethod
    def preview(ema, between_batches):
        for _ in range(3):
            between_batches()
        return np.full((16, 16, 1), int(1000 * float(jnp.sum(ema["positions"]))) % 256, np.uint8)

    def train(self, workdir, config=CONFIG):
        return loop.train(
            config, str(workdir), make_evaluator=lambda *args: self, make_preview=lambda *args: self.preview
        )


@pytest.fixture
def course(monkeypatch):
    return Course(monkeypatch)


def outcome(workdir):
    """What a run writes that must not depend on when it was stopped."""
    merged = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        measured = {name: value for name, value in record.items() if "per_second" not in name}
        measured = {n: v for n, v in measured.items() if n not in ("model_flops_utilization", "data_wait_fraction")}
        merged.setdefault(record["step"], {}).update(measured)
    grids = {path.name: path.read_bytes() for path in (workdir / "samples").iterdir()}
    checkpoints = Checkpoints(workdir, read_only=True)
    mesh = sharding.make_mesh(CONFIG.mesh)
    state = Checkpoints(workdir, keep=100).restore(checkpoints.good_step(), abstract_state(CONFIG.step, mesh))[0]
    values = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    return merged, grids, checkpoints.steps(), checkpoints.best(), values


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The workdir of an uninterrupted run, and its outcome."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        course = Course(monkeypatch)
        course.train(workdir)
        assert course.events == EVERYTHING
        return workdir, outcome(workdir)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("event", "before", "after"),
    [
        # Not saved at this step otherwise.
        ("grid 2", ["grid 2", "save 2"], ["grid 2", "save 3", "save 4", "evaluation 4", "grid 4", *EVERYTHING[5:]]),
        # At the step of an evaluation: noticed at the next poll, which is in the evaluation.
        slow("save 4", EVERYTHING[:4], EVERYTHING[3:]),
        ("evaluation 4", EVERYTHING[:4], EVERYTHING[3:]),
        # The evaluation was recorded, and is not repeated.
        slow("grid 4", EVERYTHING[:5], EVERYTHING[4:]),
        slow("save 3", EVERYTHING[:2] + ["save 4"], EVERYTHING[3:]),
        slow("evaluation 8", EVERYTHING[:9], EVERYTHING[8:]),
        ("grid 8", EVERYTHING[:10], EVERYTHING[9:]),
    ],
)  # fmt: skip
def test_a_run_stopped_by_a_signal_and_resumed_ends_like_an_uninterrupted_one(
    course, uninterrupted, tmp_path, event, before, after
):
    course.signals = {event}
    with pytest.raises(Stopped, match="SIGTERM: saved step .* of 8 in .*; run the same command again to continue"):
        course.train(tmp_path / "run")
    assert course.events == before
    course.events.clear()
    course.train(tmp_path / "run")
    assert course.events == after
    assert outcome(tmp_path / "run") == uninterrupted[1]
    course.events.clear()
    course.train(tmp_path / "run")
    assert course.events == []


def test_a_state_that_diverged_is_not_saved(course, tmp_path, monkeypatch):
    """Resumed from such a state, the run would end at once, whatever the learning rate."""

    def diverging(step, mesh, shapes, key):
        def run(state, batch, key):
            state, metrics = compiled(step, mesh)(state, batch, key)
            worst = jax.device_put(np.int32(99), state.step.sharding)
            return state._replace(nonfinite_worst=worst) if jax.device_get(state.step) == 4 else state, metrics

        return run

    monkeypatch.setattr(loop, "compile_train_step", diverging)
    with pytest.raises(loop.TrainingDiverged, match="at step 4: 99 steps in a row"):
        course.train(tmp_path)
    assert Checkpoints(tmp_path, read_only=True).good_step() == 3
    monkeypatch.setattr(loop, "compile_train_step", lambda step, mesh, shapes, key: compiled(step, mesh))
    course.train(tmp_path, dataclasses.replace(
        CONFIG, train=dataclasses.replace(CONFIG.train, max_nonfinite_steps=30),
    ))  # fmt: skip
    assert outcome(tmp_path)[2][0] == 8


def test_a_stopped_command_exits_with_75(capsys):
    for error, status in ((Stopped("saved step 2 of 8"), 75), (loop.TrainingDiverged("lower it"), 1)):
        with pytest.raises(SystemExit) as ended, cli.exit_status_of_training():
            raise error
        assert ended.value.code == status and str(error) in capsys.readouterr().err


def test_a_second_training_in_a_workdir_is_refused(course, tmp_path):
    with FolderLock(tmp_path, "workdir"), pytest.raises(InputError, match="is in use by process"):
        course.train(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_settings_that_may_change_are_reported_and_recorded(course, uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted[0], tmp_path, dirs_exist_ok=True)
    moved = dataclasses.replace(
        CONFIG, train=dataclasses.replace(CONFIG.train, grad_accum_steps=2),
        optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate=5e-5),
        logging=dataclasses.replace(CONFIG.logging, sample_every=0),
    )  # fmt: skip
    course.train(tmp_path, moved)
    printed = capsys.readouterr().out
    assert "changed from step 8 on: optimizer.learning_rate 0.0001 -> 5e-05" in printed
    assert "changed from step 8 on: train.grad_accum_steps 1 -> 2" in printed
    history = [json.loads(line) for line in (tmp_path / "config_history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history] == [8]
    assert history[0]["changed"]["optimizer.learning_rate"] == {"old": 1e-4, "new": 5e-5}
    changed = {"optimizer.learning_rate", "train.grad_accum_steps", "logging.sample_every"}
    assert set(history[0]["changed"]) == changed
    assert experiment.load(str(tmp_path)) == moved
    with pytest.raises(InputError, match=r"model.hidden=16 \(the run has 8\)"):
        course.train(tmp_path, dataclasses.replace(moved, model=dataclasses.replace(moved.model, hidden=16)))


# --- Metrics ----------------------------------------------------------------------


def test_means_are_over_the_finite_steps():
    totals = {"loss": 6.0, "nonfinite_steps": 1.0, "mse/sum": np.array([2.0, 0.0]), "mse/count": np.array([4.0, 0.0])}
    assert metric_log.summarize(totals, 4) == {"loss": 2.0, "nonfinite_steps": 0.25, "mse/0": 0.5}
    assert metric_log.summarize({"loss": 0.0, "nonfinite_steps": 2.0}, 2) == {"loss": None, "nonfinite_steps": 1.0}


def test_the_metrics_file_is_always_valid_json(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    log = metric_log.MetricsLog(str(tmp_path), 10)
    speed = dict(steps_per_second=1.0, images_per_second=1.0, model_flops_utilization=0.5)
    log.write(2, {"loss": None, "nonfinite_steps": 1.0, "grad_norm": np.inf, **speed})
    log.write_scores(2, {"fd": float("nan")}, False)
    log.close()
    invalid = lambda name: pytest.fail(name)
    lines = [json.loads(line, parse_constant=invalid) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert lines[1]["loss"] is None and lines[1]["grad_norm"] is None and lines[2]["evaluation/fd"] is None
    assert "loss not finite" in capsys.readouterr().out


def test_partial_sums_are_saved_exactly():
    totals = {"loss": jnp.float32(0.1), "mse/sum": jnp.float32([0.2, 1e-30])}
    plain = json.loads(json.dumps(metric_log.to_plain(totals)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(b, np.float32), a), totals, plain)


def test_a_torn_line_is_dropped(tmp_path):
    for content, kept in (("", ""), ("half", ""), ("a\n", "a\n"), ("a\nb\nhal", "a\nb\n")):
        (tmp_path / "lines").write_text(content)
        files.drop_torn_line(tmp_path / "lines")
        assert (tmp_path / "lines").read_text() == kept
    files.drop_torn_line(tmp_path / "none")


def test_everything_is_closed_also_where_the_log_cannot_be():
    closed = []

    class Opened:
        def __init__(self, name):
            self.name = name

        def close(self):
            closed.append(self.name)
            if self.name == "log":
                raise OSError(errno.ENOSPC, "No space left on device")

    run = types.SimpleNamespace(**{name: Opened(name) for name in ("iterator", "log", "checkpoints")})
    with pytest.raises(OSError, match="No space left"):
        loop.TrainingRun.close(run)
    assert closed == ["iterator", "log", "checkpoints"]
