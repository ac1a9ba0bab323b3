"""The main programs that a TPU slice would run: the training step and the sampler.

The functions that `train` and `sample` jit are lowered for the devices of a described slice, to be
compiled by the TPU compiler, which comes with `libtpu` and needs no TPU. `evaluation.programs` lists
all programs of a run.
"""

import jax

from causalfusion_jax.config.slices import Spec
from causalfusion_jax.sampling.generation import lower_sampler
from causalfusion_jax.sampling.sampler import sampling_flops
from causalfusion_jax.training.trimming import lower_training_step


def model_flops(spec: Spec) -> int:
    """FLOPs of one image that the model's shapes ask for, however it is computed."""
    config = spec.config
    if spec.job == "train":
        return config.step.objective.flops
    return sampling_flops(config.transformer, config.diffusion, config.sampling)


def lower(spec: Spec) -> jax.stages.Lowered:
    """The program, traced for its slice."""
    if spec.job == "sample":
        return lower_sampler(spec.config, spec.config.sampling, spec.mesh().devices.ravel(), spec.num)
    return lower_training_step(spec.config, spec.mesh())
