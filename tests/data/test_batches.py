"""How far batches are read ahead, and by how many threads."""

import threading
import time

import grain
import numpy as np
import pytest

from causalfusion_jax.data import batches
from causalfusion_jax.data.pipeline import BatchIterator

MB = 2**20


@pytest.mark.parametrize(
    ("batch_bytes", "workers", "threads", "expected"),
    [
        (16 * 1024, 0, 16, (16, 32)),  # digits: two for each thread
        (16 * 1024, 0, 0, (0, 1)),
        (200 * MB, 0, 16, (10, 10)),  # 256 images of 256x256 pixels
        (200 * MB, 4, 16, (1, 1)),  # four processes of two each: one ahead, one handed over
        (100 * MB, 4, 16, (4, 4)),
        (50 * MB, 8, 2, (2, 4)),
        (9000 * MB, 2, 16, (1, 1)),  # one at least
    ],
)
def test_read_ahead_fits_the_memory_of_all_workers(batch_bytes, workers, threads, expected):
    options = batches.read_ahead(batch_bytes, workers, threads)
    assert (options.num_threads, options.prefetch_buffer_size) == expected


class _MakeBatch:
    """Batches of 1 MB, which are counted."""

    def __init__(self):
        self.made, self.lock = 0, threading.Lock()

    def __call__(self, index):
        with self.lock:
            self.made += 1
        return {"image": np.full(MB // 4, index, np.float32), "name": [("x", {"y": 1})]}


def test_no_more_is_read_ahead_than_fits(monkeypatch):
    monkeypatch.setattr(batches, "READ_AHEAD_BYTES", 3 * MB)
    make = _MakeBatch()
    iterator = BatchIterator(grain.MapDataset.range(100).map(make), position=5, threads=16)
    try:
        for number in range(3):
            assert next(iterator)["image"][0] == 5 + number
            end = time.monotonic() + 5
            while make.made < number + 4 and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.05)
            assert make.made == number + 4  # three ahead of those that were taken
    finally:
        iterator.close()


def test_iterator_ends_with_its_batches():
    iterator = BatchIterator(grain.MapDataset.range(3).map(lambda i: {"image": np.array(i)}))
    assert [int(batch["image"]) for batch in iterator] == [0, 1, 2] and iterator.position == 3
    assert list(BatchIterator(grain.MapDataset.range(3).map(lambda i: {"image": np.array(i)}), position=3)) == []


def test_examples_of_a_batch_are_read_at_the_same_time():
    together = threading.Barrier(4, timeout=20)

    def read(index):
        together.wait()
        return {"image": np.array(index)}

    dataset = batches.in_batches(grain.MapDataset.range(8).map(read), 4, threads=4)
    assert len(dataset) == 2
    np.testing.assert_array_equal(dataset[1]["image"], [4, 5, 6, 7])
