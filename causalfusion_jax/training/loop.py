"""The training loop: compile once, step, log, save, stop when asked.

What judges the weights is given to the loop as callables: an evaluator that scores samples, and a
preview that draws a grid of them.
"""

import contextlib
import dataclasses
import pathlib
import time
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
from causalfusion_jax.data.pipeline import BatchIterator, host_batches
from causalfusion_jax.data.registry import describe, make_source
from causalfusion_jax.data.source import Source
from causalfusion_jax.models.transformer import count_params
from causalfusion_jax.training import metric_log as metrics_lib
from causalfusion_jax.training.state import TrainState, abstract_state, compile_train_step, create_state
from causalfusion_jax.training.stopping import Interrupted, Stopped, StopSignal, TrainingDiverged
from causalfusion_jax.training.trimming import LengthOfStep, with_length

Watch = Callable[[int, dict[str, float]], None]


class Evaluator(Protocol):
    """Scores the averaged weights; `evaluation.periodic.Evaluator` is one.

    Attributes:
      settings: what makes scores comparable, as plain values.
    """

    settings: dict[str, Any]

    def __call__(self, ema, between_batches: Callable[[], None]) -> dict[str, float]: ...


class Preview(Protocol):
    """Draws samples of the averaged weights, uint8 [height, width, channels]; `sampling.preview.Preview` is one."""

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
      workdir: the run's folder: config, checkpoints, metrics, sample grids.
      watch: called with (step, metrics) whenever metrics are written, and once more after
        each sample grid with (step, {}).
      make_evaluator: makes the evaluator of the run from its settings, mesh and training data; needed
        where config.evaluation.eval_every is set.
      make_preview: likewise the preview; needed where config.logging.sample_every is set.

    Returns:
      The state at the end.

    Raises:
      InputError: the settings do not fit the data, the devices or the workdir, or another
        job trains there; nothing was touched.
      Stopped: by a signal; the state is saved, and the same call continues.
      TrainingDiverged: the gradient stayed non-finite; the last checkpoint is intact.
    """
    source = make_source(config.data, captions=config.text.is_on)
    if config.text.is_on:
        check_captions(source, config.text)
    mesh = sharding.make_mesh(config.mesh)
    experiment.check_mesh(config, mesh)
    evaluate = _make("evaluation.eval_every", config.evaluation.eval_every, make_evaluator, (config, mesh, source))
    preview = _make("logging.sample_every", config.logging.sample_every, make_preview, (config, mesh, source))
    with distributed.held_folder(workdir, "workdir") as lock:
        changes: experiment.Changes = {}
        distributed.on_primary(lambda: changes.update(_claim(workdir, config, tuple(source.class_names))), None)
        checkpoints = Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.keep_every, lock=lock)
        # Made by one program on all processes, where they are to lie.
        make_keys = jax.jit(
            lambda: tuple(jax.random.split(jax.random.key(config.train.seed))), out_shardings=sharding.replicated(mesh)
        )
        init_key, step_key = make_keys()
        start = checkpoints.good_step()
        position = 0
        if start is None:
            state = create_state(config.step, mesh, init_key)
        else:
            state, position = checkpoints.restore(start, abstract_state(config.step, mesh))
        start = start or 0
        distributed.on_primary(lambda: _continue_from(checkpoints, config, workdir, changes, start), None)
        with StopSignal() as stop:
            run = _Run(
                config, pathlib.Path(workdir), mesh, source, checkpoints, stop, step_key, evaluate, preview, watch
            )
            try:
                state = run.to_the_end(state, start, position)
                checkpoints.wait()
                # A process that goes on finds the manifest of all.
                distributed.wait_for_all("trained")
            finally:
                run.close()
    return state


def _make(name: str, every: int, make: Callable | None, args: tuple):
    """What `make` makes of `args`; None where it is not needed. Raises ValueError where it is needed and not given."""
    if not every:
        return None
    if make is None:
        raise ValueError(f"config.{name}={every} needs a callable that the caller of train() gives")
    return make(*args)


def _claim(workdir: str, config: ExperimentConfig, class_names: tuple[str, ...]) -> experiment.Changes:
    """Makes `workdir` this run's, or checks that it is; keeps the names of its classes. Raises InputError."""
    check_class_names(workdir, class_names)
    changes = experiment.claim_workdir(workdir, config)
    store_class_names(workdir, class_names)
    return changes


def _continue_from(checkpoints: Checkpoints, config, workdir: str, changes: experiment.Changes, step: int) -> None:
    """Notes from which step the run goes on, and with what changed; on process 0."""
    for name, (old, new) in changes.items():
        print(f"changed from step {step} on: {name} {old!r} -> {new!r}", flush=True)
    experiment.record_changes(workdir, config, changes, step)
    checkpoints.go_back(step)


def _describe(config: ExperimentConfig, mesh, workdir: pathlib.Path, start: int) -> None:
    """Prints what is about to happen."""
    devices = mesh.devices.ravel()
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    _say(
        f"{f'resuming {workdir} at step {start}' if start else f'training in {workdir}'}:"
        f" {count_params(config.transformer):,} parameters, batch {config.train.batch_size},"
        f" {config.train.steps} steps, {len(devices)} x {devices[0].device_kind}{hosts}"
    )


def _say(line: str) -> None:
    """Prints a line, once for all processes."""
    if distributed.is_primary():
        print(line, flush=True)


@dataclasses.dataclass
class _Run:
    """What stays the same from step to step of a run."""

    config: ExperimentConfig
    workdir: pathlib.Path
    mesh: Mesh
    source: Source
    checkpoints: Checkpoints
    stop: StopSignal
    step_key: jax.Array
    evaluate: Evaluator | None
    preview: Preview | None
    watch: Watch | None

    def __post_init__(self):
        config = self.config
        self.watch = self.watch or (lambda step, metrics: None)
        self.batch_shapes = config.batch_shapes
        self.length_of = LengthOfStep(config.step.objective, config.train.length_buckets, self.step_key)
        # One program, or one for each length, compiled when a step first needs it.
        self.programs = {}
        self.share = sharding.BatchShare(self.mesh, config.train.batch_size)
        self.log = self.iterator = None

    def to_the_end(self, state: TrainState, start: int, position: int) -> TrainState:
        """Continues from a step. Raises Stopped where a signal ends it before all is done."""
        config, step, total = self.config, start, self.config.train.steps
        pending = self._pending(start)
        if start >= total and not any(pending):
            _say(f"{self.workdir} is already trained to step {start}")
            return state
        _say(describe(self.source, config.data))
        _describe(config, self.mesh, self.workdir, start)
        self.log = metrics_lib.MetricsLog(str(self.workdir), total)
        try:
            self._review(start, state, *pending)
            if start < total:
                self._open(position)
                state, step = self.steps(state, start)
        except Interrupted:
            # The step is saved already.
            pass
        if self.stop.stopping and (step < total or any(self._pending(step))):
            self.checkpoints.wait()
            raise Stopped(
                f"{self.stop.name}: saved step {step} of {total} in {self.workdir};"
                " run the same command again to continue"
            )
        return state

    def _open(self, position: int) -> None:
        """Prepares to step: the data from a position on, and the compiled step. Raises Interrupted by a signal."""
        config = self.config
        batches = host_batches(
            self.source, config.data, config.train.batch_size, config.train.seed, self.share.rows, config.text
        )
        threads = config.data.kind.reading_threads
        self.iterator = BatchIterator(batches, position, config.data.workers, threads, config.data.max_corrupt)
        self._program(self.length_of.lengths[-1])
        self.peak_flops = metrics_lib.peak_flops(self.mesh.devices.flat[0]) * self.mesh.devices.size
        # Compilation may have taken minutes.
        self.stop.interrupt()

    def close(self) -> None:
        """Lets go of everything, also where some of it fails; what was saved is on disk then."""
        with contextlib.ExitStack() as closing:
            for opened in (self.checkpoints, self.log, self.iterator):
                if opened is not None:
                    closing.callback(opened.close)

    def _program(self, length: int):
        """The compiled training step for batches with `length` attended clean tokens."""
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
        totals, since = self._restored_totals(start)
        first, waited, flops = start, 0.0, 0
        clock = time.perf_counter()
        with jax.transfer_guard("disallow"):
            for step in range(start + 1, config.train.steps + 1):
                before = time.perf_counter()
                batch = self._next_batch()
                waited += time.perf_counter() - before
                train_step, step_flops = self._program(self.length_of(step - 1))
                state, metrics = train_step(state, batch, self.step_key)
                flops += step_flops
                if totals is None or totals.keys() != metrics.keys():
                    # Also where another version of the code saved sums of other metrics.
                    totals, since = metrics, step - 1
                else:
                    totals = metrics_lib.add(totals, metrics)
                last = step == config.train.steps
                if last or step % config.logging.every == 0:
                    scalars = metrics_lib.summarize(totals, step - since)
                    scalars |= self._speed(step - first, time.perf_counter() - clock, waited, flops)
                    self._log(step, scalars)
                    self._check_finite(state, step)
                    totals, since, first, waited, flops = None, step, step, 0.0, 0
                stopping = self.stop.poll()
                save = last or stopping or step % config.checkpoint.every == 0 or self._evaluation_is_due(step)
                if save:
                    self._save(step, state, totals, since)
                if stopping:
                    break
                reviewed = time.perf_counter()
                try:
                    self._review(step, state, self._evaluation_is_due(step), self._grid_is_due(step))
                except Interrupted:
                    if not save:
                        self._save(step, state, totals, since)
                    break
                clock = time.perf_counter() if totals is None else clock + time.perf_counter() - reviewed
        return state, step

    def _log(self, step: int, scalars: dict[str, float | None]) -> None:
        with jax.transfer_guard("allow"):
            scalars["corrupt_records"] = distributed.total(len(self.iterator.corrupt))
            self.log.write(step, scalars)
            self.watch(step, scalars)

    def _next_batch(self):
        """The next global batch, on the mesh."""
        return self.share.place(next(self.iterator))

    def _speed(self, steps: int, seconds: float, waited: float, flops: int) -> dict[str, float]:
        """Rates over the last `steps` steps."""
        images = steps * self.config.train.batch_size / seconds
        return {
            "steps_per_second": steps / seconds,
            "images_per_second": images,
            "model_flops_utilization": flops / seconds / self.peak_flops,
            "data_wait_fraction": waited / seconds,
        }

    def _check_finite(self, state: TrainState, step: int) -> None:
        worst, limit = int(jax.device_get(state.nonfinite_worst)), self.config.train.max_nonfinite_steps
        if worst >= limit:
            raise TrainingDiverged(
                f"at step {step}: {worst} steps in a row had a non-finite gradient (max_nonfinite_steps={limit});"
                f" lower optimizer.learning_rate, or look at the data. {self.workdir} keeps the last checkpoint"
            )

    def _save(self, step: int, state: TrainState, totals, since: int) -> None:
        """Saves the state, and the metrics that were not written yet. Raises TrainingDiverged instead where it did."""
        self._check_finite(state, step)
        partial = None if totals is None else {"since": since, "totals": metrics_lib.to_plain(totals)}
        self.checkpoints.save(step, state, self.iterator.position, partial)

    def _restored_totals(self, start: int):
        """Sums of metrics that were saved before they were written, or None, and the step that they begin after."""
        partial = self.checkpoints.partial(start) if start else None
        if partial is None:
            return None, start
        where = sharding.replicated(self.mesh)
        totals = {name: np.asarray(value, np.float32) for name, value in partial["totals"].items()}
        return sharding.place(totals, where), partial["since"]

    # --- Evaluation and samples ---------------------------------------------------

    def _evaluation_is_due(self, step: int) -> bool:
        every = self.config.evaluation.eval_every
        return self.evaluate is not None and (step == self.config.train.steps or step % every == 0)

    def _grid_is_due(self, step: int) -> bool:
        every = self.config.logging.sample_every
        return bool(every) and (step == self.config.train.steps or step % every == 0)

    def _grid_path(self, step: int) -> pathlib.Path:
        return self.workdir / "samples" / f"{step:08d}.png"

    def _pending(self, step: int) -> tuple[bool, bool]:
        """Whether the evaluation, and the grid, of a saved step are due and were not made; collective."""

        def unscored() -> int:
            return int(not self.checkpoints.is_evaluated(step, self.evaluate.settings))

        evaluation = step > 0 and self._evaluation_is_due(step) and distributed.on_primary(unscored, 0)
        grid = step > 0 and self._grid_is_due(step)
        return bool(evaluation), grid and bool(
            distributed.on_primary(lambda: int(not self._grid_path(step).is_file()), 0)
        )

    def _review(self, step: int, state: TrainState, evaluation: bool, grid: bool) -> None:
        """Makes the evaluation and the sample grid of a step. Raises Interrupted by a signal."""
        with jax.transfer_guard("allow"):
            if evaluation:
                self._evaluate(step, state)
            if grid:
                self._sample(step, state)

    def _evaluate(self, step: int, state: TrainState) -> None:
        """Scores images from the averaged weights, which are saved, and records whether they are the best so far."""
        scores = self.evaluate(state.ema, self.stop.interrupt)
        if distributed.is_primary():
            value = scores[self.config.evaluation.metric]
            is_best = self.checkpoints.is_best(step, value, self.evaluate.settings)
            self.log.write_scores(step, scores, is_best)
            # Last: a step without a record is evaluated again after a resume.
            self.checkpoints.record_evaluation(step, value, self.evaluate.settings)

    def _sample(self, step: int, state: TrainState) -> None:
        """Draws a grid of samples from the averaged weights."""
        grid = self.preview(state.ema, self.stop.interrupt)
        if distributed.is_primary():
            path = self._grid_path(step)
            path.parent.mkdir(exist_ok=True)
            save_png(path, grid)
            self.log.write_grid(step, grid)
            with jax.transfer_guard("allow"):
                self.watch(step, {})
