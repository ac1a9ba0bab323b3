"""Times the sampler of a config, cached, and says what share of the matrix-product rate it reaches.

    python launch/bench/sampler.py --config=configs/digits.py [--num=4] [--ar_steps=1,4] [--rounds=3]

Random weights, labels in turn; guidance as in the config (`--config.sampling.cfg_scale=1.5`). Model
FLOPs count prefill, every solver row of every AR step against the cache as it then stands
(twice where guided), and the commits; median of interleaved rounds.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from common import MatmulRate, interleaved, report, seconds
from ml_collections import config_flags

from causalfusion_jax import cli, experiment
from causalfusion_jax.models.flops import forward_flops
from causalfusion_jax.models.transformer import init_params
from causalfusion_jax.sampling.sampler import image_keys, sample_tokens
from causalfusion_jax.sampling.solvers import solver_table

_CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py")
_NUM = flags.DEFINE_integer("num", 4, "Images at a time.")
_AR_STEPS = flags.DEFINE_list("ar_steps", ["1", "4"], "Numbers of AR steps.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Interleaved rounds.")


def sampling_flops(config, sampler) -> int:
    """Model FLOPs of one image."""
    model = config.transformer
    rows = len(solver_table(sampler.solver_config, config.diffusion).t)
    guided = sampler.cfg_scale != 1.0
    passes, prefixes = (2 if guided else 1), (2 if guided and model.clean_depends_on_class else 1)
    seen, total = model.num_condition_tokens, 0
    if seen:
        total += prefixes * forward_flops(model, seen, noise_levels=0)
    sizes = sampler.sizes(model.num_tokens)
    for index, size in enumerate(sizes):
        total += passes * rows * forward_flops(model, size, seen + size)
        if index < len(sizes) - 1:
            total += prefixes * forward_flops(model, size, seen + size, noise_levels=0)
        seen += size
    return total


def main(argv):
    """Runs the benchmark."""
    del argv
    cli.keep_freed_memory()
    config = experiment.from_dict(_CONFIG.value.to_dict())
    model, num = config.transformer, _NUM.value
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    keys, labels = image_keys(0, range(num)), jnp.asarray(np.arange(num) % model.num_classes)
    samplers = {
        steps: dataclasses.replace(config.sampling, ar_steps=int(steps), step_sizes=()) for steps in _AR_STEPS.value
    }
    runs = {
        steps: functools.partial(
            seconds,
            functools.partial(
                sample_tokens, model, config.diffusion, config.factorization, sampler, params, keys, labels
            ),
        )
        for steps, sampler in samplers.items()
    }
    found = interleaved(_ROUNDS.value, **runs, matmul=MatmulRate(model.dtype))
    report([
        {
            "AR steps": steps,
            "images": num,
            "cfg_scale": sampler.cfg_scale,
            "solver rows": sampler.solver_steps,
            "model GFLOPs an image": round(sampling_flops(config, sampler) / 1e9, 2),
            "seconds": round(found[steps], 3),
            "images/s": round(num / found[steps], 2),
            "GFLOP/s": round(num * sampling_flops(config, sampler) / found[steps] / 1e9, 1),
            "matrix product GFLOP/s": round(found["matmul"] / 1e9, 1),
            "share": round(num * sampling_flops(config, sampler) / found[steps] / found["matmul"], 3),
        }
        for steps, sampler in samplers.items()
    ])


if __name__ == "__main__":
    app.run(main)
