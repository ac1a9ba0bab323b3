"""The training step and the sampler, lowered for a TPU slice.

The functions that `train` and `sample` jit are lowered for the devices of a described slice. The TPU
compiler, which comes with `libtpu`, compiles them without a TPU. `evaluation.programs` lists all
programs of a run.
"""

import jax

from causalfusion_jax.config.slices import SliceJob
from causalfusion_jax.sampling.generation import lower_sampler
from causalfusion_jax.sampling.sampler import sampling_flops
from causalfusion_jax.training.trimming import lower_training_step


def model_flops(job: SliceJob) -> int:
    """Model FLOPs of one image: those of the shapes of the model, whatever the program computes."""
    config = job.config
    if job.kind == "train":
        return config.step.objective.flops
    return sampling_flops(config.transformer, config.diffusion, config.sampling)


def lower(job: SliceJob) -> jax.stages.Lowered:
    """Traces the program of a job for its slice."""
    if job.kind == "sample":
        return lower_sampler(job.config, job.config.sampling, job.mesh().devices.ravel(), job.num)
    return lower_training_step(job.config, job.mesh())
