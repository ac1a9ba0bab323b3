"""The input pipeline: global batches that depend on (seed, step) alone.

A Grain MapDataset is random access, so batch k is a pure function of the seed and k: the
same for any number of hosts or workers, and the position to resume from is one number.
Flips and random draws of an example are a function of (seed, index, epoch).

Skipping a corrupt record would shift all records after it, and batches would depend on which
process has met it. So only the corrupt record is replaced, by another record that is also drawn
from (seed, index, epoch). The skipped records are part of the batch, and are counted and printed
by name.
"""

import sys
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from causalfusion_jax.common.errors import require
from causalfusion_jax.data.batches import in_batches, num_bytes, read_ahead
from causalfusion_jax.data.captions import with_text
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.records import CorruptRecord
from causalfusion_jax.data.source import Source
from causalfusion_jax.data.tokenizers import TextConfig

ENDLESS = 2**31
"""Epochs. Grain's own endless repeat has length sys.maxsize, which overflows for batches of one."""


class _Read:
    """The example at a position of the endless stream of indices.

    Args:
      source: the examples.
      config: flip, max_corrupt, and the kind of the source.
      seed: seed of flips, draws and replacements of corrupt records.
    """

    def __init__(self, source: Source, config: DataConfig, seed: int):
        self.source, self.config, self.seed, self.length = source, config, seed, len(source)

    def __call__(self, position: int, index: int) -> dict[str, Any]:
        """The example, and as "corrupt" (name, reason) of each record skipped for it."""
        rng = np.random.default_rng((self.seed, position // self.length, index))
        corrupt: dict[str, str] = {}
        while True:
            try:
                example = self._draw(index, rng)
                return {**example, "corrupt": tuple(corrupt.items())} if corrupt else example
            except CorruptRecord as error:
                corrupt[str(error.value)] = error.allowed
            check_corrupt(corrupt, min(self.config.max_corrupt, self.length - 1))
            # A random record first, then the next ones, so that none is tried twice.
            step = 1 if len(corrupt) > 1 or self.length == 2 else int(rng.integers(1, self.length - 1))
            index = (index + step) % self.length

    def _draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        mirrored = self.config.flip and bool(rng.integers(2))
        if self.config.kind.stores_mirrored:
            return self.source.draw(index, rng, mirrored)
        example = self.source.draw(index, rng) if hasattr(self.source, "draw") else self.source[index]
        return {**example, "image": example["image"][..., ::-1, :]} if mirrored else example


class _ReadRow:
    """The example of a row of this host's batches, numbered consecutively.

    Args:
      read: the example at a position of the endless stream.
      indices: the endless stream of indices.
      batch_size: size of the global batch.
      rows: int [num], this host's rows of it.
    """

    def __init__(self, read: _Read, indices: grain.MapDataset, batch_size: int, rows: np.ndarray):
        self.read, self.indices, self.batch_size, self.rows = read, indices, batch_size, rows

    def __call__(self, number: int) -> dict[str, Any]:
        batch, row = divmod(number, len(self.rows))
        position = batch * self.batch_size + int(self.rows[row])
        return self.read(position, self.indices[position])


def host_batches(
    source: Source,
    config: DataConfig,
    batch_size: int,
    seed: int,
    rows: np.ndarray | None = None,
    text: TextConfig | None = None,
) -> grain.MapDataset:
    """This host's share of an endless sequence of global batches.

    Row r of global batch k is example k * batch_size + r of the endlessly repeated, each time
    newly shuffled source, independent of the hosts that read it.

    Args:
      source: the examples.
      config: flip, max_corrupt, and the kind of the source.
      batch_size: size of the global batch.
      seed: seed of shuffling and augmentation.
      rows: int [num], the rows of a global batch that this host reads, as given by
        `sharding.rows_of_process`; default: all.
      text: the tokenizer; if given and on, the examples must have captions.

    Returns:
      Element k is {"image": float32 [num, ...], "label": int32 [num]}, with a tokenizer also
      "text", int32 [num, max_tokens], and "corrupt", (name, reason) of each skipped record, which
      BatchIterator removes.
    """
    rows = np.arange(batch_size) if rows is None else rows
    indices = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(ENDLESS)
    numbers = grain.MapDataset.range(len(indices) // batch_size * len(rows))
    dataset = numbers.map(_ReadRow(_Read(source, config, seed), indices, batch_size, rows))
    if text is not None and text.is_on:
        dataset = with_text(dataset, text)
    return in_batches(dataset, len(rows), config.kind.reading_threads)


class BatchIterator(Iterator):
    """Batches from a position on. `position` is the whole state to save.

    The first batch is read in the caller's thread; its size determines how many are read ahead.
    Skipped corrupt records are printed, and kept in `corrupt`, reason by name.

    Args:
      batches: random access to this host's batches.
      position: the batch to start with.
      workers: processes that read ahead; 0 reads in this process.
      threads: maximum number of threads that read ahead in each process.
      max_corrupt: maximum number of different corrupt records.

    Raises:
      InputError: at the batch with more corrupt records, or that cannot be read.
    """

    def __init__(
        self, batches: grain.MapDataset, position: int = 0, workers: int = 0, threads: int = 0, max_corrupt: int = 0
    ):
        self.position, self.max_corrupt = position, max_corrupt
        self.corrupt: dict[str, str] = {}
        self._batches, self._workers, self._threads = batches, workers, threads
        self._iterator: Iterator[dict[str, Any]] | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        batch = self.next_raw()
        self.note_corrupt(batch.pop("corrupt", ()))
        return batch

    def next_raw(self) -> dict[str, Any]:
        """The next batch, with the skipped records as "corrupt"."""
        if self._iterator is not None:
            batch = next(self._iterator)
        elif self.position < len(self._batches):
            batch = self._batches[self.position]
            self._iterator = self._read_ahead(self.position + 1, num_bytes(batch))
        else:
            raise StopIteration
        self.position += 1
        return batch

    def _read_ahead(self, position: int, batch_bytes: int) -> Iterator[dict[str, Any]]:
        """Batches from `position` on; starts reading them."""
        if self._workers and not flags.FLAGS.is_parsed():
            # Grain passes parsed absl flags to its workers, even if none uses them.
            flags.FLAGS.mark_as_parsed()
        dataset = self._batches[position:].to_iter_dataset(read_ahead(batch_bytes, self._workers, self._threads))
        if self._workers:
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        iterator = iter(dataset)
        iterator.start_prefetch()
        return iterator

    def note_corrupt(self, records: list[tuple[str, str]]) -> None:
        """Prints and keeps new corrupt records. Raises InputError if there are too many."""
        for name, reason in records:
            if name not in self.corrupt:
                self.corrupt[name] = reason
                print(f"warning: corrupt record skipped: {name} ({reason})", file=sys.stderr, flush=True)
        check_corrupt(self.corrupt, self.max_corrupt)

    def close(self) -> None:
        """Stops the workers."""
        if hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator, self._batches = None, ()


def check_corrupt(corrupt: dict[str, str], limit: int) -> None:
    """Raises InputError if there are more than `limit` corrupt records (reason by name)."""
    name = next(iter(corrupt), "")
    allowed = f"{len(corrupt)} corrupt records, the first {name} ({corrupt.get(name)}); mend them, or allow more"
    require(len(corrupt) <= limit, "config.data.max_corrupt", limit, allowed)
