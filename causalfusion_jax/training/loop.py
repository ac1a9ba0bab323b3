"""The training loop: compile once, step, log, save, evaluate, stop on a signal.

The caller gives the loop an evaluator, which scores samples of the averaged weights, and a preview,
which draws a grid of them.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from causalfusion_jax.checkpoints.checkpoint import Checkpoints
from causalfusion_jax.common import distributed, sharding
from causalfusion_jax.common.pictures import save_png
from causalfusion_jax.config import experiment
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.data.captions import check_captions
from causalfusion_jax.data.class_names import check_class_names, store_class_names
from causalfusion_jax.data.pipeline import BatchIterator, Source, describe, host_batches, make_source, reading_threads
from causalfusion_jax.models.transformer import count_params
from causalfusion_jax.training import metric_log
from causalfusion_jax.training.metric_log import Interval, MetricsLog
from causalfusion_jax.training.state import TrainState, abstract_state, compile_train_step, create_state
from causalfusion_jax.training.stopping import Interrupted, StopSignal, TrainingDiverged
from causalfusion_jax.training.trimming import LengthOfStep, with_length

Watch = Callable[[int, dict[str, float]], None]


class Evaluator(Protocol):
    """Scores the averaged weights; see `evaluation.periodic.Evaluator`.

    Attributes:
      settings: the settings under which scores can be compared, as plain values.
    """

    settings: dict[str, Any]

    def __call__(self, ema, between_batches: Callable[[], None]) -> dict[str, float]: ...


class Preview(Protocol):
    """Draws samples of the averaged weights, uint8 [height, width, channels]; see `sampling.preview.Preview`."""

    def __call__(self, ema, between_batches: Callable[[], None]) -> np.ndarray: ...


def train(
    config: ExperimentConfig,
    workdir: str,
    watch: Watch | None = None,
    *,
    make_evaluator: Callable[[ExperimentConfig, Mesh, Source], Evaluator] | None = None,
    make_preview: Callable[[ExperimentConfig, Mesh, Source], Preview] | None = None,
) -> TrainState:
    """Trains, or continues training, until `config.train.steps`.

    Args:
      config: all settings.
      workdir: the folder of the run: config, checkpoints, metrics, sample grids.
      watch: called with (step, metrics) whenever metrics are logged, and with (step, {}) after
        each sample grid.
      make_evaluator: makes the evaluator from the settings, the mesh and the training data; needed
        if config.evaluation.eval_every is set.
      make_preview: makes the preview from the same; needed if config.logging.sample_every is set.

    Returns:
      The final state.

    Raises:
      InputError: the settings do not fit the data, the devices or the workdir, or another
        job trains there; nothing was changed.
      Stopped: by a signal; the state is saved, and the same call continues.
      TrainingDiverged: the gradient stayed non-finite; the last checkpoint is intact.
    """
    source = make_source(config.data, captions=config.text.is_on)
    if config.text.is_on:
        check_captions(source, config.text)
    mesh = sharding.make_mesh(config.mesh)
    experiment.check_mesh(config, mesh)
    run = TrainingRun(
        config=config,
        workdir=pathlib.Path(workdir),
        mesh=mesh,
        source=source,
        evaluator=_make("evaluation.eval_every", config.evaluation.eval_every, make_evaluator, (config, mesh, source)),
        preview=_make("logging.sample_every", config.logging.sample_every, make_preview, (config, mesh, source)),
        watch=watch,
    )
    with distributed.held_folder(workdir, "workdir") as lock:
        changes = distributed.on_primary(lambda: _claim(workdir, config, tuple(source.class_names)), {})
        run.checkpoints = Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.keep_every, lock=lock)
        state, start, position = run.begin()
        distributed.on_primary(lambda: _continue_from(run, changes, start))
        with StopSignal() as stop:
            try:
                state = run.to_the_end(state, start, position, stop)
                run.checkpoints.wait()
                # The manifests of all processes are complete before any process goes on.
                distributed.wait_for_all("trained")
            finally:
                run.close()
    return state


def _make(name: str, every: int, make: Callable | None, args: tuple):
    """`make(*args)`; None if it is not needed. Raises ValueError if it is needed and missing."""
    if not every:
        return None
    if make is None:
        raise ValueError(f"config.{name}={every} needs a callable from the caller of train()")
    return make(*args)


def _claim(workdir: str, config: ExperimentConfig, class_names: tuple[str, ...]) -> experiment.Changes:
    """Makes `workdir` that of this run, or checks that it is; stores the class names. Raises InputError."""
    check_class_names(workdir, class_names)
    changes = experiment.claim_workdir(workdir, config)
    store_class_names(workdir, class_names)
    return changes


def _continue_from(run: "TrainingRun", changes: experiment.Changes, step: int) -> None:
    """Records from which step, and with which changed settings, the run continues; on process 0."""
    for name, (old, new) in changes.items():
        print(f"changed from step {step} on: {name} {old!r} -> {new!r}", flush=True)
    experiment.record_changes(str(run.workdir), run.config, changes, step)
    run.checkpoints.go_back(step)


def _say(line: str) -> None:
    """Prints a line, once for all processes."""
    if distributed.is_primary():
        print(line, flush=True)


@dataclasses.dataclass
class TrainingRun:
    """A run: its settings, and what it holds open while it trains.

    Attributes:
      config, workdir, mesh, source, watch: see `train`.
      evaluator, preview: None if they are not needed.
      checkpoints: set once the workdir is locked.
      log, iterator: metrics and data; None until training begins.
    """

    config: ExperimentConfig
    workdir: pathlib.Path
    mesh: Mesh
    source: Source
    evaluator: Evaluator | None
    preview: Preview | None
    watch: Watch | None
    checkpoints: Checkpoints | None = None
    log: MetricsLog | None = None
    iterator: BatchIterator | None = None

    def __post_init__(self):
        # One program computes them on all processes, with their final placement.
        make_keys = jax.jit(
            lambda: tuple(jax.random.split(jax.random.key(self.config.train.seed))),
            out_shardings=sharding.replicated(self.mesh),
        )
        self.init_key, self.step_key = make_keys()
        self.batch_shapes = self.config.batch_shapes
        self.length_of = LengthOfStep(self.config.step.objective, self.config.train.length_buckets, self.step_key)
        # One program for each sequence length, compiled when a step first needs it.
        self.programs = {}
        self.share = sharding.BatchShare(self.mesh, self.config.train.batch_size)

    def begin(self) -> tuple[TrainState, int, int]:
        """The state of the newest intact checkpoint, or a new one; its step, and the position in the data."""
        step = self.checkpoints.good_step()
        if step is None:
            return create_state(self.config.step, self.mesh, self.init_key), 0, 0
        state, position = self.checkpoints.restore(step, abstract_state(self.config.step, self.mesh))
        return state, step, position

    def to_the_end(self, state: TrainState, start: int, position: int, stop: StopSignal) -> TrainState:
        """Trains from step `start` to the last one. Raises Stopped if a signal ends training before it is complete."""
        self.stop, step, total = stop, start, self.config.train.steps
        pending = self._pending(start)
        if start >= total and not any(pending):
            _say(f"{self.workdir} is already trained to step {start}")
            return state
        self._announce(start)
        self.log = MetricsLog(str(self.workdir), total)
        try:
            self._review(start, state, *pending)
            if start < total:
                self._open_data(position)
                self._program(self.length_of.lengths[-1])
                # Compilation may have taken minutes.
                stop.interrupt()
                state, step = self.steps(state, start)
        except Interrupted:
            # This step is saved already.
            pass
        if stop.stopping and (step < total or any(self._pending(step))):
            self.checkpoints.wait()
            raise stop.stopped(step, total, self.workdir)
        return state

    def _announce(self, start: int) -> None:
        """Prints what is about to run."""
        config, devices = self.config, self.mesh.devices.ravel()
        hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
        _say(describe(self.source, config.data))
        _say(
            f"{f'resuming {self.workdir} at step {start}' if start else f'training in {self.workdir}'}:"
            f" {count_params(config.transformer):,} parameters, batch {config.train.batch_size},"
            f" {config.train.steps} steps, {len(devices)} x {devices[0].device_kind}{hosts}"
        )

    def _open_data(self, position: int) -> None:
        """Opens the training data at a position."""
        data, train = self.config.data, self.config.train
        batches = host_batches(self.source, data, train.batch_size, train.seed, self.share.rows, self.config.text)
        threads = reading_threads(data.source)
        self.iterator = BatchIterator(batches, position, data.workers, threads, data.max_corrupt)

    def close(self) -> None:
        """Closes everything, even if closing a part of it fails; what was saved is on disk then."""
        with contextlib.ExitStack() as closing:
            for opened in (self.checkpoints, self.log, self.iterator):
                if opened is not None:
                    closing.callback(opened.close)

    def _program(self, length: int):
        """The compiled training step for batches with at most `length` attended clean tokens, and its model FLOPs."""
        if length not in self.programs:
            step = with_length(self.config.step, length)
            flops = step.objective.flops * self.config.train.batch_size
            with jax.transfer_guard("allow"):
                compiled = compile_train_step(step, self.mesh, self.batch_shapes, self.step_key)
            self.programs[length] = (compiled, flops)
        return self.programs[length]

    def steps(self, state: TrainState, start: int) -> tuple[TrainState, int]:
        """Steps from `start` to the end, or to a stop signal. Returns the state and its step, which is saved."""
        config, step = self.config, start
        peak_flops = metric_log.peak_flops(self.mesh.devices.flat[0]) * self.mesh.devices.size
        interval = self._restored_interval(start)
        with jax.transfer_guard("disallow"):
            for step in range(start + 1, config.train.steps + 1):
                batch = interval.wait(self._next_batch)
                train_step, flops = self._program(self.length_of(step - 1))
                state, metrics = train_step(state, batch, self.step_key)
                interval.add(step, metrics, flops)
                last = step == config.train.steps
                if last or step % config.logging.every == 0:
                    self._log(step, interval.summarize(step, config.train.batch_size, peak_flops))
                    self._check_finite(state, step)
                    interval = Interval(step)
                evaluation, grid = self._evaluation_is_due(step), self._grid_is_due(step)
                stopping = self.stop.poll()
                save = last or stopping or step % config.checkpoint.every == 0 or evaluation
                if save:
                    self._save(step, state, interval)
                if stopping:
                    break
                try:
                    with interval.paused():
                        self._review(step, state, evaluation, grid)
                except Interrupted:
                    if not save:
                        self._save(step, state, interval)
                    break
        return state, step

    def _log(self, step: int, scalars: dict[str, float | None]) -> None:
        with jax.transfer_guard("allow"):
            scalars["corrupt_records"] = distributed.total(len(self.iterator.corrupt))
            self.log.write(step, scalars)
            self._notify(step, scalars)

    def _notify(self, step: int, scalars: dict[str, float | None]) -> None:
        if self.watch is not None:
            self.watch(step, scalars)

    def _next_batch(self):
        """The next global batch, on the mesh."""
        return self.share.place(next(self.iterator))

    def _check_finite(self, state: TrainState, step: int) -> None:
        worst, limit = int(jax.device_get(state.nonfinite_worst)), self.config.train.max_nonfinite_steps
        if worst >= limit:
            raise TrainingDiverged(
                f"at step {step}: {worst} steps in a row had a non-finite gradient (max_nonfinite_steps={limit});"
                f" lower optimizer.learning_rate, or check the data. {self.workdir} keeps the last checkpoint"
            )

    def _save(self, step: int, state: TrainState, interval: Interval) -> None:
        """Saves the state, and the metrics that are not logged yet. Raises TrainingDiverged instead if it diverged."""
        self._check_finite(state, step)
        self.checkpoints.save(step, state, self.iterator.position, interval.to_plain())

    def _restored_interval(self, start: int) -> Interval:
        """The interval of step `start`, with the metrics that were saved before they were logged."""
        partial = self.checkpoints.partial(start) if start else None
        if partial is None:
            return Interval(start)
        totals = {name: np.asarray(value, np.float32) for name, value in partial["totals"].items()}
        return Interval(start, sharding.place(totals, sharding.replicated(self.mesh)), partial["since"])

    # --- Evaluation and samples ---------------------------------------------------

    def _evaluation_is_due(self, step: int) -> bool:
        every = self.config.evaluation.eval_every
        return self.evaluator is not None and (step == self.config.train.steps or step % every == 0)

    def _grid_is_due(self, step: int) -> bool:
        every = self.config.logging.sample_every
        return bool(every) and (step == self.config.train.steps or step % every == 0)

    def _grid_path(self, step: int) -> pathlib.Path:
        return self.workdir / "samples" / f"{step:08d}.png"

    def _pending(self, step: int) -> tuple[bool, bool]:
        """Whether the evaluation and the grid of a saved step are due and missing; collective."""
        evaluation, grid = step > 0 and self._evaluation_is_due(step), step > 0 and self._grid_is_due(step)
        if evaluation:
            settings = self.evaluator.settings
            evaluation = distributed.on_primary(lambda: not self.checkpoints.is_evaluated(step, settings))
        if grid:
            grid = distributed.on_primary(lambda: not self._grid_path(step).is_file())
        return evaluation, grid

    def _review(self, step: int, state: TrainState, evaluation: bool, grid: bool) -> None:
        """Evaluates a step and draws its sample grid, as asked. Raises Interrupted on a signal."""
        with jax.transfer_guard("allow"):
            if evaluation:
                self.evaluate(step, state)
            if grid:
                self.draw_grid(step, state)

    def evaluate(self, step: int, state: TrainState) -> None:
        """Scores the averaged weights, which are saved, and records whether they are the best so far."""
        scores = self.evaluator(state.ema, self.stop.interrupt)
        if distributed.is_primary():
            value = scores[self.config.evaluation.metric]
            is_best = self.checkpoints.is_best(step, value, self.evaluator.settings)
            self.log.write_scores(step, scores, is_best)
            # Last, because a resumed run evaluates a step without a record again.
            self.checkpoints.record_evaluation(step, value, self.evaluator.settings)

    def draw_grid(self, step: int, state: TrainState) -> None:
        """Draws a grid of samples of the averaged weights."""
        grid = self.preview(state.ema, self.stop.interrupt)
        if distributed.is_primary():
            path = self._grid_path(step)
            path.parent.mkdir(exist_ok=True)
            save_png(path, grid)
            self.log.write_grid(step, grid)
            self._notify(step, {})
