"""What a person watches: metrics, their files, and the progress line."""

import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from causalfusion_jax import distributed
from causalfusion_jax.hardware import by_device_kind


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


def summarize(totals, steps: int) -> dict[str, float]:
    """Means over `steps` steps from their sums.

    Scalars are averaged over steps; `name/sum` and `name/count` [bins] become
    `name/0`, `name/1`, ... averaged over what fell in each bin (absent where nothing did), and
    without bins `name`.
    """
    totals = jax.device_get(totals)
    means = {name: float(total) / steps for name, total in totals.items() if "/" not in name}
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
      workdir: the run's folder; `metrics.jsonl` there is only ever appended to. After a
        resume steps can repeat: the last line of a step counts.
      total_steps: length of training, for the time that is left.
    """

    def __init__(self, workdir: str, total_steps: int):
        self._workdir, self._total_steps = pathlib.Path(workdir), total_steps
        self._primary = distributed.is_primary()
        # Imported late: TensorFlow, which it brings, takes seconds.
        from clu import metric_writers

        self._writer = metric_writers.create_default_writer(
            str(self._workdir / "tensorboard"), just_logging=not self._primary
        )
        self._jsonl = (self._workdir / "metrics.jsonl").open("a") if self._primary else None

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Records scalars and prints the progress line; on process 0 alone."""
        if not self._primary:
            return
        self._writer.write_scalars(step, scalars)
        self._jsonl.write(json.dumps({"step": step, **scalars}) + "\n")
        self._jsonl.flush()
        print(progress_line(step, self._total_steps, scalars), flush=True)

    def write_scores(self, step: int, scores: dict[str, float], is_best: bool) -> None:
        """Records an evaluation, as a line of its own; on process 0 alone."""
        if not self._primary:
            return
        named = {f"evaluation/{name}": value for name, value in scores.items()}
        self._writer.write_scalars(step, named)
        self._jsonl.write(json.dumps({"step": step, **named}) + "\n")
        self._jsonl.flush()
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
        print(f"evaluated step {step}: {shown}{'  (best so far)' if is_best else ''}", flush=True)

    def write_grid(self, step: int, grid: np.ndarray) -> None:
        """Records a sample grid, uint8 [height, width, channels], in TensorBoard."""
        self._writer.write_images(step, {"samples": grid[None]})

    def close(self) -> None:
        """Until everything is written."""
        self._writer.close()
        if self._jsonl is not None:
            self._jsonl.close()


def progress_line(step: int, total_steps: int, scalars: dict[str, float]) -> str:
    """One line for a terminal: where training stands, how fast, how long still."""
    rate = scalars["steps_per_second"]
    left = int((total_steps - step) / rate)
    eta = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    skipped = f"  skipped {scalars['nonfinite_steps']:.0%}" if scalars["nonfinite_steps"] else ""
    return (
        f"step {step:>{len(str(total_steps))}}/{total_steps}  loss {scalars['loss']:.4f}"
        f"  {rate:.2f} steps/s  {scalars['images_per_second']:.0f} images/s"
        f"  MFU {scalars['model_flops_utilization']:.1%}  ETA {eta}{skipped}"
    )
