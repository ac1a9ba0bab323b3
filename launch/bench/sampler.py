"""Times the sampler of a config, cached, and says what share of the matrix-product rate it reaches.

    python launch/bench/sampler.py --config=configs/digits.py [--num=4] [--ar_steps=1,4] [--rounds=3]

The devices share the images; with `JAX_NUM_CPU_DEVICES=2` two cores are two of them. Random
weights, labels in turn; everything else is a setting of the config: guidance
(`--config.sampling.cfg_scale=1.5`), `--config.sampling.solver_steps=50`, `--config.model.attention=dense`.
Model FLOPs count prefill, every solver row of every AR step against the cache as it then
stands (twice where guided), and the commits; median of interleaved rounds. On accelerators
also the bytes moved to and from device memory as a share of the rate of a copy, the MFU, and
on a TPU the bound of preflight. With --profile, the time of the sampler's operations by kind.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from common import interleaved, machine_rates, print_profile, report, seconds, shares, utilization
from ml_collections import config_flags

from causalfusion_jax.cli import machine
from causalfusion_jax.common import sharding
from causalfusion_jax.config import experiment
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.models.transformer import init_params
from causalfusion_jax.sampling.sampler import SamplingSpec, image_keys, sample_tokens_shared, sampling_flops

_CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py")
_NUM = flags.DEFINE_integer("num", 4, "Images at a time.")
_AR_STEPS = flags.DEFINE_list("ar_steps", ["1", "4"], "Numbers of AR steps.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Interleaved rounds.")
_PROFILE = flags.DEFINE_bool("profile", False, "Also time the operations.")


def main(argv):
    """Runs the benchmark."""
    del argv
    machine.keep_freed_memory()
    config = experiment.from_dict(_CONFIG.value.to_dict())
    model, num = config.transformer, _NUM.value
    mesh = sharding.make_mesh(sharding.MeshConfig())
    params = jax.jit(init_params, static_argnums=0, out_shardings=sharding.replicated(mesh))(model, jax.random.key(0))
    labels = jnp.asarray(np.arange(num) % model.num_classes)
    args = params, *jax.device_put((image_keys(0, range(num)), Condition(labels)), sharding.batch_sharding(mesh))
    samplers = {
        steps: dataclasses.replace(config.sampling, ar_steps=int(steps), step_sizes=()) for steps in _AR_STEPS.value
    }
    compiled = {
        steps: sample_tokens_shared.lower(
            mesh, SamplingSpec(model, config.diffusion, config.factorization, sampler), *args
        ).compile()
        for steps, sampler in samplers.items()
    }
    runs = {steps: functools.partial(run, *args) for steps, run in compiled.items()}
    timed = {steps: functools.partial(seconds, run) for steps, run in runs.items()}
    times = interleaved(_ROUNDS.value, **timed, **machine_rates(model.dtype))
    rows = []
    for steps, sampler in samplers.items():
        flops = sampling_flops(model, config.diffusion, sampler)
        rows.append(
            {
                "AR steps": steps,
                "images": num,
                "cfg_scale": sampler.cfg_scale,
                "solver steps": sampler.solver_steps,
                "model GFLOPs an image": round(flops / 1e9, 2),
                "seconds": round(times[steps], 3),
                "images/s": round(num / times[steps], 2),
                **shares(times, times[steps], num * flops / mesh.size, compiled[steps]),
                **utilization(times[steps], num * flops / mesh.size, compiled[steps]),
            }
        )
    report(rows)
    for steps in runs if _PROFILE.value else ():
        print_profile(f"S={steps}", compiled[steps], runs[steps])


if __name__ == "__main__":
    app.run(main)
