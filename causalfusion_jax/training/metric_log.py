"""What a person watches: metrics, their files, and the progress line."""

import json
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causalfusion_jax.common import distributed, files
from causalfusion_jax.common.hardware import by_device_kind


def peak_flops(device: jax.Device) -> float:
    """FLOP/s that utilisation is measured against.

    The vendor's bfloat16 figure where it is known; else (a CPU) the rate of a float32
    matrix product, measured now.
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

    Steps with a non-finite gradient add nothing to the sums but their number, `nonfinite_steps`,
    which becomes their part of all steps. Other scalars are averaged over the finite steps, None
    where there is none; `name/sum` and `name/count` [bins] become `name/0`, `name/1`, ... averaged
    over what fell in each bin (absent where nothing did), and without bins `name`.
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


class MetricsLog:
    """Writes metrics to TensorBoard, the log, `metrics.jsonl` and the terminal.

    Args:
      workdir: the run's folder; `metrics.jsonl` there is only ever appended to, but for a last line
        that a kill cut short. After a resume steps can repeat: the last line of a step counts.
      total_steps: length of training, for the time that is left.
    """

    def __init__(self, workdir: str, total_steps: int):
        self._workdir, self._total_steps = pathlib.Path(workdir), total_steps
        self._primary = distributed.is_primary()
        # Imported late: TensorFlow, which it brings, takes seconds.
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
        """One line of `metrics.jsonl`, null where a value is not a finite number, and the same for TensorBoard."""
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
        """Until everything is written."""
        with files.writing(self._events):
            self._writer.close()
        if self._jsonl is not None:
            with files.writing(self._path):
                self._jsonl.close()


def progress_line(step: int, total_steps: int, scalars: dict[str, float | None]) -> str:
    """One line for a terminal: where training stands, how fast, how long still."""
    rate = scalars["steps_per_second"]
    left = int((total_steps - step) / rate)
    eta = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    skipped = f"  skipped {scalars['nonfinite_steps']:.0%}" if scalars["nonfinite_steps"] else ""
    loss = "not finite" if scalars["loss"] is None else f"{scalars['loss']:.4f}"
    return (
        f"step {step:>{len(str(total_steps))}}/{total_steps}  loss {loss}"
        f"  {rate:.2f} steps/s  {scalars['images_per_second']:.0f} images/s"
        f"  MFU {scalars['model_flops_utilization']:.1%}  ETA {eta}{skipped}"
    )
