"""Times the sampler of a config, cached, and says what share of the matrix-product rate it reaches.

    python launch/bench/sampler.py --config=configs/digits.py [--num=4] [--ar_steps=1,4] [--rounds=3]

Random weights, labels in turn; everything else is a setting of the config: guidance
(`--config.sampling.cfg_scale=1.5`), `--config.sampling.solver_steps=50`, `--config.model.attention=dense`.
Model FLOPs count prefill, every solver row of every AR step against the cache as it then
stands (twice where guided), and the commits; median of interleaved rounds. On accelerators
also the bytes moved to and from device memory as a share of the rate of a copy.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from common import CopyRate, MatmulRate, interleaved, report, seconds
from ml_collections import config_flags

from causalfusion_jax import cli, experiment
from causalfusion_jax.compile_ahead import costs, hlo
from causalfusion_jax.models.transformer import init_params
from causalfusion_jax.sampling.sampler import generate, image_keys, sampling_flops

_CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py")
_NUM = flags.DEFINE_integer("num", 4, "Images at a time.")
_AR_STEPS = flags.DEFINE_list("ar_steps", ["1", "4"], "Numbers of AR steps.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Interleaved rounds.")


def main(argv):
    """Runs the benchmark."""
    del argv
    cli.keep_freed_memory()
    config = experiment.from_dict(_CONFIG.value.to_dict())
    model, num = config.transformer, _NUM.value
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    args = params, image_keys(0, range(num)), jnp.asarray(np.arange(num) % model.num_classes)
    samplers = {
        steps: dataclasses.replace(config.sampling, ar_steps=int(steps), step_sizes=()) for steps in _AR_STEPS.value
    }
    compiled = {
        steps: jax.jit(functools.partial(generate, model, config.diffusion, config.factorization, sampler))
        .lower(*args).compile()
        for steps, sampler in samplers.items()
    }
    rates = {"matmul": MatmulRate(model.dtype)}
    if jax.default_backend() != "cpu":
        rates["copy"] = CopyRate()
    runs = {steps: functools.partial(seconds, functools.partial(run, *args)) for steps, run in compiled.items()}
    found = interleaved(_ROUNDS.value, **runs, **rates)
    rows = []
    for steps, sampler in samplers.items():
        flops = sampling_flops(model, config.diffusion, sampler)
        row = {
            "AR steps": steps,
            "images": num,
            "cfg_scale": sampler.cfg_scale,
            "solver steps": sampler.solver_steps,
            "model GFLOPs an image": round(flops / 1e9, 2),
            "seconds": round(found[steps], 3),
            "images/s": round(num / found[steps], 2),
            "GFLOP/s": round(num * flops / found[steps] / 1e9, 1),
            "matrix product GFLOP/s": round(found["matmul"] / 1e9, 1),
            "share": round(num * flops / found[steps] / found["matmul"], 3),
        }
        if "copy" in found:
            moved = costs.program_costs(hlo.parse(compiled[steps].as_text())).hbm_bytes
            row["GB moved"] = round(moved / 1e9, 2)
            row["copy GB/s"] = round(found["copy"] / 1e9, 1)
            row["share of copy"] = round(moved / found[steps] / found["copy"], 3)
        rows.append(row)
    report(rows)


if __name__ == "__main__":
    app.run(main)
