"""What the benchmarks share: the machine's own rates in the same run, and their output."""

import json
import statistics
import time

import jax
import jax.numpy as jnp


class MatmulRate:
    """FLOP/s of square matrix products, to set other work beside.

    Args:
      dtype: of the factors; what the work computes in.
      size: rows of a factor.
    """

    def __init__(self, dtype: str = "float32", size: int = 1024):
        self.size = size if jax.default_backend() == "cpu" else 8192
        self._x = jnp.ones((self.size, self.size), dtype)
        self._product = jax.jit(lambda x: x @ x).lower(self._x).compile()

    def __call__(self) -> float:
        """Measures once."""
        start = time.perf_counter()
        self._product(self._x).block_until_ready()
        return 2 * self.size**3 / (time.perf_counter() - start)


class CopyRate:
    """Bytes/s of reading and writing one large array in device memory.

    Args:
      size: bytes of the array.
    """

    def __init__(self, size: int = 2**30):
        self.size = size
        self._x = jnp.ones(size // 4, "float32")
        self._add = jax.jit(lambda x: x + 1.0).lower(self._x).compile()

    def __call__(self) -> float:
        """Measures once."""
        start = time.perf_counter()
        self._add(self._x).block_until_ready()
        return 2 * self.size / (time.perf_counter() - start)


def interleaved(rounds: int, **runs) -> dict[str, float]:
    """Median result of each of `runs`, called in turn `rounds` times after one to warm up."""
    for run in runs.values():
        run()
    found = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    return {name: statistics.median(values) for name, values in found.items()}


def seconds(run) -> float:
    """Wall time of one call whose result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def report(rows: list[dict]) -> None:
    """A Markdown table of the rows, then one JSON line."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(str(row.get(name, '')) for name in columns)} |")
    machine = {"device": jax.devices()[0].device_kind, "devices": len(jax.devices()), "jax": jax.__version__}
    print(json.dumps({**machine, "rows": rows}))
