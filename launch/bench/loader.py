"""Times the input pipeline of a config alone: batches a second, by number of workers.

    python launch/bench/loader.py --config=configs/digits.py [--workers=0,1,2] [--batches=100]
"""

import dataclasses
import time

from absl import app, flags
from common import report
from ml_collections import config_flags

from causalfusion_jax import experiment
from causalfusion_jax.data.pipeline import BatchIterator, host_batches, make_source

_CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py")
_WORKERS = flags.DEFINE_list("workers", ["0", "1", "2"], "Numbers of worker processes.")
_BATCHES = flags.DEFINE_integer("batches", 100, "Batches timed, after as many tenths to warm up.")


def main(argv):
    """Runs the benchmark."""
    del argv
    config = experiment.from_dict(_CONFIG.value.to_dict())
    source, batch = make_source(config.data), config.train.batch_size
    rows = []
    for workers in map(int, _WORKERS.value):
        batches = host_batches(source, dataclasses.replace(config.data, workers=workers), batch, config.train.seed)
        iterator = BatchIterator(batches, 0, workers, 0 if config.data.source == "digits" else 16)
        for _ in range(max(_BATCHES.value // 10, 1)):
            next(iterator)
        start = time.perf_counter()
        for _ in range(_BATCHES.value):
            next(iterator)
        spent = (time.perf_counter() - start) / _BATCHES.value
        iterator.close()
        rows.append({
            "source": config.data.source, "workers": workers, "batch": batch, "ms a batch": round(spent * 1e3, 2),
            "examples/s": round(batch / spent),
        })
    report(rows)


if __name__ == "__main__":
    app.run(main)
