"""Times the training step of a config on random data, and says where the time goes.

    python launch/bench/train_step.py --config=configs/digits.py [--rounds=10] [--profile] [--nokeep_freed_memory]
    python launch/bench/train_step.py --config=configs/imagenet_causalfusion.py:XL --config.train.batch_size=64 \\
        --attention=auto,dense

Median over interleaved rounds of training steps (with each implementation of attention, on one state)
and of a matrix product in the model's type; model FLOPs, their share of that rate, and on
accelerators the bytes moved to and from device memory as a share of the rate of a copy; of
devices whose figures are known also the MFU, and on a TPU the bound of preflight.
With --profile, the time of the step's operations by kind. A Markdown table and one JSON line.
"""

import dataclasses
import functools
import resource

import jax
import numpy as np
from absl import app, flags
from common import interleaved, machine_rates, print_profile, report, seconds, shares, utilization
from ml_collections import config_flags

from causalfusion_jax.cli import machine
from causalfusion_jax.common import sharding
from causalfusion_jax.config import experiment
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.training.state import compile_train_step, create_state

_CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py")
_ATTENTION = flags.DEFINE_list("attention", [], "Values of model.attention to compare; default: the config's.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Interleaved rounds.")
_STEPS = flags.DEFINE_integer("steps", 4, "Training steps in a round.")
_PROFILE = flags.DEFINE_bool("profile", False, "Also time the operations of a step.")
_KEEP = flags.DEFINE_bool("keep_freed_memory", True, "As the commands do: let glibc reuse freed memory.")


class Steps:
    """Compiled training steps of a config, one for each implementation of attention, and the state they advance.

    Args:
      config: all settings.
      attentions: values of `model.attention`.
    """

    def __init__(self, config: ExperimentConfig, attentions: list[str]):
        mesh = sharding.make_mesh(config.mesh)
        rng, shapes = np.random.default_rng(0), config.batch_shapes
        arrays = {
            "image": rng.uniform(-1, 1, shapes["image"][0]).astype(np.float32),
            "label": rng.integers(0, config.data.num_classes, shapes["label"][0]).astype(np.int32),
        }
        self.key = jax.device_put(jax.random.key(1), sharding.replicated(mesh))
        self.batch = jax.device_put(arrays, sharding.batch_sharding(mesh))
        self.compiled = {}
        for attention in attentions:
            model = dataclasses.replace(config.model, attention=attention)
            step = dataclasses.replace(config, model=model).step
            self.compiled[attention] = compile_train_step(step, mesh, shapes, self.key)
        self.state = create_state(config.step, mesh, jax.random.key(0))

    def run(self, attention: str, steps: int) -> float:
        """Seconds a step."""
        jax.block_until_ready(self.state)
        return seconds(functools.partial(self.several, attention, steps)) / steps

    def several(self, attention: str, steps: int):
        """The state after `steps` steps."""
        for _ in range(steps):
            self.state, _ = self.compiled[attention](self.state, self.batch, self.key)
        return self.state


def main(argv):
    """Runs the benchmark."""
    del argv
    if _KEEP.value:
        machine.keep_freed_memory()
    config = experiment.from_dict(_CONFIG.value.to_dict())
    attentions = _ATTENTION.value or [config.model.attention]
    steps = Steps(config, attentions)
    runs = {attention: functools.partial(steps.run, attention, _STEPS.value) for attention in attentions}
    interleaved(1, **runs)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    times = interleaved(_ROUNDS.value, **runs, **machine_rates(config.model.dtype))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    batch, devices = config.train.batch_size, len(jax.devices())
    flops = config.step.objective.flops * batch
    rows = []
    for attention in attentions:
        row = {
            "attention": attention,
            "batch": batch,
            "model GFLOPs a step": round(flops / 1e9, 2),
            "ms a step": round(times[attention] * 1e3, 1),
            "images/s": round(batch / times[attention], 1),
            **shares(times, times[attention], flops / devices, steps.compiled[attention]),
            **utilization(times[attention], flops / devices, steps.compiled[attention]),
            "temporaries MB": round(steps.compiled[attention].memory_analysis().temp_size_in_bytes / 1e6, 1),
        }
        if jax.default_backend() == "cpu":
            row["page faults a step"] = round(faults / ((_ROUNDS.value + 1) * _STEPS.value * len(attentions)))
        rows.append(row)
    report(rows)
    for attention in attentions if _PROFILE.value else ():
        print_profile(attention, steps.compiled[attention], functools.partial(steps.several, attention, 1))


if __name__ == "__main__":
    app.run(main)
