"""Times the training step of a config, and says where the time goes.

    python launch/bench/train_step.py --config=configs/digits.py [--rounds=10] [--profile] [--nokeep_freed_memory]

Prints the median over interleaved rounds of training steps and of a float32 matrix product
of the same run, the step's share of that rate, and page faults a step; with --profile, the
time of the step's operations by kind. One JSON line ends the output.
"""

import collections
import json
import pathlib
import re
import resource
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from causalfusion_jax import cli, experiment, sharding
from causalfusion_jax.models.transformer import count_params
from causalfusion_jax.training.state import compile_train_step, create_state

_CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Interleaved rounds.")
_STEPS = flags.DEFINE_integer("steps", 4, "Training steps in a round.")
_PROFILE = flags.DEFINE_bool("profile", False, "Also time the operations of a step.")
_KEEP = flags.DEFINE_bool("keep_freed_memory", True, "As the commands do: let glibc reuse freed memory.")


class Step:
    """The compiled step of a config on random data, and the state it carries."""

    def __init__(self, config):
        mesh = sharding.make_mesh(config.mesh)
        rng, shapes = np.random.default_rng(0), config.batch_shapes
        arrays = {
            "image": rng.uniform(-1, 1, shapes["image"][0]).astype(np.float32),
            "label": rng.integers(0, config.data.num_classes, shapes["label"][0]).astype(np.int32),
        }
        self.key = jax.device_put(jax.random.key(1), sharding.replicated(mesh))
        self.batch = jax.device_put(arrays, sharding.batch_sharding(mesh))
        self.state = create_state(config.step, mesh, jax.random.key(0))
        self.compiled = compile_train_step(config.step, mesh, shapes, self.key)

    def run(self, steps: int) -> float:
        """Seconds a step."""
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for _ in range(steps):
            self.state, _ = self.compiled(self.state, self.batch, self.key)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / steps


def matmul_rate(x, product) -> float:
    """FLOP/s of one product of square matrices."""
    start = time.perf_counter()
    product(x).block_until_ready()
    return 2 * len(x) ** 3 / (time.perf_counter() - start)


def profile(step: Step, steps: int = 5) -> dict[str, float]:
    """Milliseconds a step by kind of operation, added over threads, largest first."""
    kinds = {}
    for line in step.compiled.as_text().splitlines():
        found = re.match(r'\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', line)
        if found:
            backward = "backward" if "transpose(jvp" in found.group(2) else "forward"
            kinds[found.group(1)] = f"{backward} {re.sub('[0-9]+$', '', found.group(2).split('/')[-1])}"
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step.run(steps)
        data = jax.profiler.ProfileData.from_file(str(next(pathlib.Path(folder).rglob("*.xplane.pb"))))
        spent = collections.Counter()
        for event in (event for plane in data.planes for line in plane.lines for event in line.events):
            name = dict(pair for pair in event.stats if pair[0]).get("hlo_op")
            if name:
                spent[kinds.get(name, "other")] += event.duration_ns / steps / 1e6
    return dict(spent.most_common(12))


def main(argv):
    """Runs the benchmark."""
    del argv
    if _KEEP.value:
        cli.keep_freed_memory()
    config = experiment.from_dict(_CONFIG.value.to_dict())
    step = Step(config)
    x = jnp.ones((1024, 1024))
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    step.run(2), matmul_rate(x, product)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds, rates = [], []
    for _ in range(_ROUNDS.value):
        seconds.append(step.run(_STEPS.value))
        rates.append(matmul_rate(x, product))
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / (_ROUNDS.value * _STEPS.value)
    median, rate = statistics.median(seconds), statistics.median(rates)
    flops = config.step.objective.flops * config.train.batch_size
    for kind, spent in (profile(step) if _PROFILE.value else {}).items():
        print(f"{spent:8.1f} ms  {kind}")
    print(json.dumps({
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "parameters": count_params(config.transformer),
        "batch": config.train.batch_size, "model_gflops_per_step": round(flops / 1e9, 2),
        "ms_per_step": round(median * 1e3, 1), "best_ms_per_step": round(min(seconds) * 1e3, 1),
        "images_per_second": round(config.train.batch_size / median, 1),
        "matmul_gflops_per_second": round(rate / 1e9, 1), "share_of_matmul_rate": round(flops / median / rate, 3),
        "page_faults_per_step": round(faults),
        "temporaries_mb": round(step.compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
    }))


if __name__ == "__main__":
    app.run(main)
