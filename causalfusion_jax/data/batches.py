"""Reading of batches: several threads share the examples of one, and memory bounds the batches read ahead."""

import concurrent.futures
import functools
from collections.abc import Callable, Iterable
from typing import Any

import grain
import numpy as np

READ_AHEAD_BYTES = 2 * 2**30
"""Memory for batches that are read ahead, over all worker processes of a host."""


def read_ahead(batch_bytes: int, workers: int, threads: int) -> grain.ReadOptions:
    """The number of batches that a process reads ahead: two for each thread, as READ_AHEAD_BYTES permits.

    Args:
      batch_bytes: size of a batch.
      workers: processes that read; 0: only this one.
      threads: threads of each process that may read a batch.

    Returns:
      Threads and batches of each process, at least one batch.
    """
    fitting = READ_AHEAD_BYTES // max(batch_bytes * max(workers, 1), 1)
    # A worker also holds the batch that it has handed over.
    batches = max(min(fitting - (workers > 0), 2 * threads), 1)
    return grain.ReadOptions(num_threads=min(threads, batches), prefetch_buffer_size=batches)


def num_bytes(values: Any) -> int:
    """Size of all arrays in nested dicts, lists and tuples."""
    if isinstance(values, dict):
        return sum(map(num_bytes, values.values()))
    if isinstance(values, (list, tuple)):
        return sum(map(num_bytes, values))
    return getattr(values, "nbytes", 0)


def _stack(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch, with the corrupt records of all its examples."""
    batch = {name: np.stack([example[name] for example in examples]) for name in examples[0] if name != "corrupt"}
    return batch | {"corrupt": [record for example in examples for record in example.get("corrupt", ())]}


class InThreads:
    """Maps `read` over items with several threads, in order; a pickled copy starts its own threads.

    Args:
      read: reads one item.
      threads: number of threads; 0: the caller's.
    """

    def __init__(self, read: Callable[[Any], Any], threads: int):
        self.read, self.threads = read, threads

    def __reduce__(self):
        return type(self), (self.read, self.threads)

    @functools.cached_property
    def _pool(self) -> concurrent.futures.Executor:
        return concurrent.futures.ThreadPoolExecutor(self.threads, thread_name_prefix="read")

    def __call__(self, items: Iterable[Any]) -> list[Any]:
        """`read` of every item. Raises the first error, in the order of the items."""
        return list((self._pool.map if self.threads else map)(self.read, items))


class _ReadBatch:
    """A batch of consecutive examples by its number; its examples are read in parallel."""

    def __init__(self, examples: grain.MapDataset, size: int, threads: int):
        self.size, self.read = size, InThreads(examples.__getitem__, threads)

    def __call__(self, number: int) -> dict[str, Any]:
        return _stack(self.read(range(number * self.size, (number + 1) * self.size)))


def in_batches(examples: grain.MapDataset, size: int, threads: int) -> grain.MapDataset:
    """Examples in batches of `size`, without an incomplete last batch.

    Threads share the examples of a batch, not batches, so that a few large batches keep all of
    them busy.
    """
    return grain.MapDataset.range(len(examples) // size).map(_ReadBatch(examples, size, threads))
