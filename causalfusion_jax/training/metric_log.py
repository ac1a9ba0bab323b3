"""Metric logging: sums over an interval of steps, files, and the progress line."""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from causalfusion_jax.common import distributed, files
from causalfusion_jax.common.hardware import by_device_kind

T = TypeVar("T")


def peak_flops(device: jax.Device) -> float:
    """Peak FLOP/s of a device, the reference of model FLOPs utilization.

    The vendor's figure for bfloat16 if the device is known; else (a CPU) the measured rate of a
    float32 matrix product.
    """
    known = by_device_kind(device.device_kind)
    if known is not None:
        return known.peak_flops
    n = 1024
    x = jax.device_put(jnp.ones((n, n)), device)
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    product(x).block_until_ready()
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        rates.append(2 * n**3 / (time.perf_counter() - start))
    return max(rates)


@jax.jit
def add(totals, metrics):
    """Sum of two metric trees, on the device."""
    return jax.tree.map(jnp.add, totals, metrics)


def to_plain(totals) -> dict[str, Any]:
    """Sums of metrics as numbers and lists, for JSON; float32 values are kept exactly."""
    return {name: np.asarray(total, np.float64).tolist() for name, total in jax.device_get(totals).items()}


def summarize(totals, steps: int) -> dict[str, float | None]:
    """Means over `steps` steps from their sums.

    Steps with a non-finite gradient add only their number to the sums, `nonfinite_steps`, which
    becomes their fraction of all steps. Other scalars are averaged over the finite steps, None if
    there are none; `name/sum` and `name/count` [bins] become `name/0`, `name/1`, ..., the mean of
    each bin (absent for an empty bin), or `name` if there are no bins.
    """
    totals = jax.device_get(totals)
    finite = steps - round(float(totals.get("nonfinite_steps", 0.0)))
    means = {name: float(total) / finite if finite else None for name, total in totals.items() if "/" not in name}
    if "nonfinite_steps" in totals:
        means["nonfinite_steps"] = float(totals["nonfinite_steps"]) / steps
    for name in (key.removesuffix("/sum") for key in totals if key.endswith("/sum")):
        sums, counts = totals[f"{name}/sum"], totals[f"{name}/count"]
        if not np.ndim(sums):
            means |= {name: float(sums / counts)} if counts else {}
            continue
        means |= {f"{name}/{i}": float(s / c) for i, (s, c) in enumerate(zip(sums, counts, strict=True)) if c}
    return means


class Interval:
    """The steps since the last line of the log: the sums of their metrics, and the time they took.

    Args:
      step: the interval begins after this step.
      totals: sums of metrics that were saved before they were logged; None: there are none.
      since: the sums begin after this step; default: `step`.
    """

    def __init__(self, step: int, totals=None, since: int | None = None):
        self._begin, self._totals, self._since = step, totals, step if since is None else since
        self._waited, self._flops, self._clock = 0.0, 0, time.perf_counter()

    def wait(self, load: Callable[[], T]) -> T:
        """`load()`; the time it takes counts as waiting for data."""
        start = time.perf_counter()
        loaded = load()
        self._waited += time.perf_counter() - start
        return loaded

    def add(self, step: int, metrics, flops: int) -> None:
        """Adds the metrics of a step and its model FLOPs."""
        self._flops += flops
        if self._totals is None or self._totals.keys() != metrics.keys():
            # Keys differ if another version of the code saved the sums.
            self._totals, self._since = metrics, step - 1
        else:
            self._totals = add(self._totals, metrics)

    def summarize(self, step: int, batch_size: int, peak_flops: float) -> dict[str, float | None]:
        """Means of the metrics and rates, up to a step; `peak_flops` is that of all devices."""
        means = summarize(self._totals, step - self._since)
        steps, seconds = step - self._begin, time.perf_counter() - self._clock
        return means | {
            "steps_per_second": steps / seconds,
            "images_per_second": steps * batch_size / seconds,
            "model_flops_utilization": self._flops / seconds / peak_flops,
            "data_wait_fraction": self._waited / seconds,
        }

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes what runs inside from the rates, and in an empty interval all that was before."""
        start = time.perf_counter()
        yield
        now = time.perf_counter()
        self._clock = now if self._totals is None else self._clock + now - start

    def to_plain(self) -> dict[str, Any] | None:
        """The sums for JSON, to be saved with a checkpoint; None for an empty interval."""
        return None if self._totals is None else {"since": self._since, "totals": to_plain(self._totals)}


class MetricsLog:
    """Writes metrics to TensorBoard, `metrics.jsonl` and the terminal.

    Args:
      workdir: the folder of the run. `metrics.jsonl` in it is only appended to; an incomplete last
        line, left by a kill, is removed. After a resume steps can repeat: the last line of a step counts.
      total_steps: length of training, for the remaining time.
    """

    def __init__(self, workdir: str, total_steps: int):
        self._workdir, self._total_steps = pathlib.Path(workdir), total_steps
        self._primary = distributed.is_primary()
        # Imported here because it imports TensorFlow, which takes seconds.
        from clu import metric_writers

        self._events = self._workdir / "tensorboard"
        self._writer = metric_writers.create_default_writer(str(self._events), just_logging=not self._primary)
        self._jsonl = None
        self._path = self._workdir / "metrics.jsonl"
        if self._primary:
            files.drop_torn_line(self._path)
            self._jsonl = self._path.open("a")

    def write(self, step: int, scalars: dict[str, float | None]) -> None:
        """Records scalars and prints the progress line; on process 0 alone."""
        if self._primary:
            self._record(step, scalars)
            print(progress_line(step, self._total_steps, scalars), flush=True)

    def _record(self, step: int, scalars: dict[str, float | None]) -> None:
        """Writes one line of `metrics.jsonl`, null for a value that is not finite, and the same to TensorBoard."""
        finite = {name: value for name, value in scalars.items() if value is not None and math.isfinite(value)}
        with files.writing(self._events):
            self._writer.write_scalars(step, finite)
        line = {"step": step, **{name: finite.get(name) for name in scalars}}
        with files.writing(self._path):
            self._jsonl.write(json.dumps(line, allow_nan=False) + "\n")
            self._jsonl.flush()

    def write_scores(self, step: int, scores: dict[str, float], is_best: bool) -> None:
        """Records an evaluation, as a line of its own; on process 0 alone."""
        if not self._primary:
            return
        self._record(step, {f"evaluation/{name}": value for name, value in scores.items()})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
        print(f"evaluated step {step}: {shown}{'  (best so far)' if is_best else ''}", flush=True)

    def write_grid(self, step: int, grid: np.ndarray) -> None:
        """Records a sample grid, uint8 [height, width, channels], in TensorBoard."""
        with files.writing(self._events):
            self._writer.write_images(step, {"samples": grid[None]})

    def close(self) -> None:
        """Writes what is left, and closes the files."""
        with files.writing(self._events):
            self._writer.close()
        if self._jsonl is not None:
            with files.writing(self._path):
                self._jsonl.close()


def progress_line(step: int, total_steps: int, scalars: dict[str, float | None]) -> str:
    """One line for the terminal: step, loss, rates, remaining time."""
    rate = scalars["steps_per_second"]
    seconds = int((total_steps - step) / rate)
    eta = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    skipped = f"  skipped {scalars['nonfinite_steps']:.0%}" if scalars["nonfinite_steps"] else ""
    loss = "not finite" if scalars["loss"] is None else f"{scalars['loss']:.4f}"
    return (
        f"step {step:>{len(str(total_steps))}}/{total_steps}  loss {loss}"
        f"  {rate:.2f} steps/s  {scalars['images_per_second']:.0f} images/s"
        f"  MFU {scalars['model_flops_utilization']:.1%}  ETA {eta}{skipped}"
    )
