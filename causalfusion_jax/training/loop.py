"""The training loop: compile once, step, watch, save, stop when asked."""

import contextlib
import pathlib
import signal
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from causalfusion_jax import distributed, experiment, sharding
from causalfusion_jax.data.captions import check_captions, example_texts
from causalfusion_jax.data.pipeline import BatchIterator, host_batches, make_source, reading_threads
from causalfusion_jax.evaluation.periodic import Evaluator
from causalfusion_jax.evaluation.settings import is_better
from causalfusion_jax.experiment import ExperimentConfig
from causalfusion_jax.models.transformer import count_params
from causalfusion_jax.sampling.generation import generate_images
from causalfusion_jax.sampling.images import balanced_labels, frames_in_rows, make_grid, save_png
from causalfusion_jax.training import metrics as metrics_lib
from causalfusion_jax.training.checkpoint import Checkpoints
from causalfusion_jax.training.state import TrainState, abstract_state, compile_train_step, create_state
from causalfusion_jax.training.trimming import LengthOfStep, with_length


class TrainingDiverged(RuntimeError):
    """Too many steps in a row without a finite gradient."""


class StopSignal:
    """Notes SIGTERM and SIGINT, so that training can stop between two steps.

    Of several processes, jax's runtime watches SIGTERM; it stays with it.
    """

    def __init__(self):
        self.received: str | None = None

    def __enter__(self) -> "StopSignal":
        watched = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._previous = {s: signal.signal(s, self._note) for s in watched}
        return self

    def _note(self, number, frame):
        self.received = signal.Signals(number).name
        # A second one ends the process at once.
        signal.signal(number, self._previous[number])

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


Watch = Callable[[int, dict[str, float]], None]


def train(config: ExperimentConfig, workdir: str, watch: Watch | None = None) -> TrainState:
    """Trains, or goes on training, until `config.train.steps` or a stop signal.

    Args:
      config: all settings.
      workdir: the run's folder: config, checkpoints, metrics, sample grids.
      watch: called with (step, metrics) whenever metrics are written, and once more after
        each sample grid with (step, {}).

    Returns:
      The state at the end.

    Raises:
      InputError: the settings do not fit the data, the devices or the workdir; nothing
        was touched.
      TrainingDiverged: the gradient stayed non-finite; the last checkpoint is intact.
    """
    source = make_source(config.data, captions=config.text.is_on)
    if config.text.is_on:
        check_captions(source, config.text)
    mesh = sharding.make_mesh(config.mesh)
    experiment.check_mesh(config, mesh)
    evaluate = Evaluator(config, mesh) if config.evaluation.eval_every else None
    distributed.on_primary(lambda: experiment.claim_workdir(workdir, config), None)
    checkpoints = Checkpoints(workdir, config.checkpoint)
    # Made by one program on all processes, where they are to lie.
    make_keys = jax.jit(
        lambda: tuple(jax.random.split(jax.random.key(config.train.seed))), out_shardings=sharding.replicated(mesh)
    )
    init_key, step_key = make_keys()
    state, position = _restore_or_create(config, mesh, checkpoints, init_key)
    start, total = int(state.step), config.train.steps
    if start >= total:
        _say(f"{workdir} is already trained to step {start}")
        checkpoints.close()
        return state
    _describe(config, mesh, workdir, start)
    share = sharding.BatchShare(mesh, config.train.batch_size)
    batches = host_batches(
        source, config.data, config.train.batch_size, config.train.seed, share.rows, config.text
    )
    threads = reading_threads(config.data.source)
    iterator = BatchIterator(batches, position, config.data.workers, threads, config.data.max_corrupt)
    text = example_texts(source, config.text, config.logging.num_samples) if config.text.is_on else None
    run = _Run(config, workdir, mesh, checkpoints, iterator, step_key, watch, evaluate, start, text, share)
    try:
        return run.steps(state, start)
    finally:
        iterator.close()
        run.log.close()
        checkpoints.close()


def _restore_or_create(config, mesh, checkpoints, init_key) -> tuple[TrainState, int]:
    """The newest intact checkpoint with its data position, or a fresh state."""
    step = distributed.on_primary(checkpoints.good_step, None)
    checkpoints.reload()
    if step is None:
        return create_state(config.step, mesh, init_key), 0
    return checkpoints.restore(step, abstract_state(config.step, mesh))


def _describe(config: ExperimentConfig, mesh, workdir: str, start: int) -> None:
    """Prints what is about to happen."""
    devices = mesh.devices.ravel()
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    _say(
        f"{'resuming ' + workdir + f' at step {start}' if start else 'training in ' + workdir}:"
        f" {count_params(config.transformer):,} parameters, batch {config.train.batch_size},"
        f" {config.train.steps} steps, {len(devices)} x {devices[0].device_kind}{hosts}"
    )


def _say(line: str) -> None:
    """Prints a line, once for all processes."""
    if distributed.is_primary():
        print(line, flush=True)


class _Run:
    """What stays the same from step to step of a run."""

    def __init__(self, config, workdir, mesh, checkpoints, iterator, step_key, watch, evaluate, start, text, share):
        self.config, self.workdir, self.mesh, self.text = config, pathlib.Path(workdir), mesh, text
        self.share = share
        self.checkpoints, self.iterator, self.step_key = checkpoints, iterator, step_key
        self.watch = watch or (lambda step, metrics: None)
        self.evaluate, self.best = evaluate, checkpoints.best(start) if start else None
        self.log = metrics_lib.MetricsLog(workdir, config.train.steps)
        self.batch_shapes = config.batch_shapes
        self.length_of = LengthOfStep(config.step.objective, config.train.length_buckets, step_key)
        # One program, or one for each length, compiled when a step first needs it.
        self.programs = {}
        self._program(self.length_of.lengths[-1])
        self.peak_flops = metrics_lib.peak_flops(mesh.devices.flat[0]) * mesh.devices.size

    def _program(self, length: int):
        """The compiled training step for batches that look at so many clean tokens."""
        if length not in self.programs:
            step = with_length(self.config.step, length)
            flops = step.objective.flops * self.config.train.batch_size
            with jax.transfer_guard("allow"):
                compiled = compile_train_step(step, self.mesh, self.batch_shapes, self.step_key)
            self.programs[length] = (compiled, flops)
        return self.programs[length]

    def steps(self, state: TrainState, start: int) -> TrainState:
        """Steps from `start` to the end, or to a stop signal."""
        config, step = self.config, start
        totals, since, waited, flops = None, start, 0.0, 0
        clock = time.perf_counter()
        with StopSignal() as stop, jax.transfer_guard("disallow"):
            for step in range(start + 1, config.train.steps + 1):
                before = time.perf_counter()
                batch = self._next_batch()
                waited += time.perf_counter() - before
                train_step, step_flops = self._program(self.length_of(step - 1))
                state, metrics = train_step(state, batch, self.step_key)
                flops += step_flops
                totals = metrics if totals is None else metrics_lib.add(totals, metrics)
                last = step == config.train.steps
                if last or step % config.logging.every == 0:
                    scalars = metrics_lib.summarize(totals, step - since)
                    seconds = time.perf_counter() - clock
                    scalars |= self._speed(step - since, seconds, waited, flops)
                    with jax.transfer_guard("allow"):
                        scalars["corrupt_records"] = distributed.total(len(self.iterator.corrupt))
                    self.log.write(step, scalars)
                    with jax.transfer_guard("allow"):
                        self.watch(step, scalars)
                    self._check_finite(state, step)
                    totals, since, waited, flops = None, step, 0.0, 0
                # Read once: a signal during the grid below stops at the next step, saved.
                stopping = distributed.should_stop(step, bool(stop.received)) and (stop.received or "SIGTERM")
                is_best = False
                if self.evaluate is not None and (last or step % config.evaluation.eval_every == 0):
                    before = time.perf_counter()
                    is_best = self._evaluate(step, state)
                    clock += time.perf_counter() - before
                if last or step % config.checkpoint.every == 0 or stopping or is_best:
                    self._save(step, state)
                if config.logging.sample_every and (last or step % config.logging.sample_every == 0):
                    self._sample(step, state)
                if totals is None:
                    clock = time.perf_counter()
                if stopping:
                    break
        if stopping and step < config.train.steps:
            self.checkpoints.wait()
            _say(
                f"{stopping}: saved step {step} of {config.train.steps} in {self.workdir};"
                " run the same command again to continue"
            )
        return state

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

    def _save(self, step: int, state: TrainState) -> None:
        self.checkpoints.save(step, state, self.iterator.position, self.best)

    def _evaluate(self, step: int, state: TrainState) -> bool:
        """Scores images from the averaged weights. Whether they are the best so far."""
        metric, of = self.config.evaluation.metric, self.evaluate.settings
        with jax.transfer_guard("allow"):
            scores = self.evaluate(state.ema)
        value = scores[metric]
        is_best = self.best is None or self.best["of"] != of or is_better(metric, value, self.best["value"])
        if is_best:
            self.best = {"step": step, "value": value, "of": of}
        self.log.write_scores(step, scores, is_best)
        return is_best

    def _sample(self, step: int, state: TrainState) -> None:
        """A grid of samples from the averaged weights, by the sampler that users call."""
        config = self.config
        labels = balanced_labels(config.logging.num_samples, config.data.num_classes)
        # Beside a text, a class would have to be its own.
        labels = labels if self.text is None else np.full_like(labels, config.data.num_classes)
        with jax.transfer_guard("allow"):
            images = generate_images(config, config.sampling, state.ema, labels, config.train.seed, text=self.text)
        grid = make_grid(*frames_in_rows(images, config.data.num_classes if config.data.num_classes <= 20 else 8))
        if distributed.is_primary():
            folder = self.workdir / "samples"
            folder.mkdir(exist_ok=True)
            save_png(folder / f"{step:08d}.png", grid)
            self.log.write_grid(step, grid)
            with jax.transfer_guard("allow"):
                self.watch(step, {})


@contextlib.contextmanager
def diverged_is_one_line():
    """Ends the process with one line and status 1 where training diverges."""
    try:
        yield
    except TrainingDiverged as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
