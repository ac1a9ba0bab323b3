"""Leaves out unattended clean tokens, if a batch shares its AR steps.

No other token attends to the clean tokens of the last AR step. Their number is drawn for each training
step from (key, step), so it is known before the step runs. A few sequence-length buckets, each with a
program of its own, leave most of these tokens out.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from causalfusion_jax.common import sharding
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.config.training import ObjectiveConfig, StepConfig
from causalfusion_jax.core.factorization import num_visible_clean_of_batch
from causalfusion_jax.training.draws import batch_key
from causalfusion_jax.training.state import abstract_key, lower_train_step

CHUNK = 1024
"""Number of steps whose lengths are drawn at once."""


def bucket_lengths(config: ObjectiveConfig, buckets: int) -> tuple[int, ...]:
    """Clean tokens of each bucket, ascending: multiples of L / buckets, rounded up."""
    tokens = config.model.num_tokens
    return tuple(sorted({-(-tokens * (i + 1) // buckets) for i in range(buckets)}))


def program_lengths(config: ObjectiveConfig, buckets: int) -> tuple[int, ...]:
    """Clean tokens of each program of a run, ascending; one program without buckets."""
    return bucket_lengths(config, buckets) if buckets > 1 else (config.num_clean,)


def with_length(config: StepConfig, length: int) -> StepConfig:
    """The step for batches with at most `length` attended clean tokens."""
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, most_clean=length))


def lower_training_step(config: ExperimentConfig, mesh: Mesh, length: int | None = None) -> jax.stages.Lowered:
    """Traces the training step of a run for a mesh.

    Args:
      config: all settings.
      mesh: the devices.
      length: clean tokens of the program, one of `program_lengths`; default: the longest.
    """
    length = length or program_lengths(config.step.objective, config.train.length_buckets)[-1]
    return lower_train_step(with_length(config.step, length), mesh, config.batch_shapes, abstract_key(mesh))


@functools.partial(jax.jit, static_argnums=0)
def attended_lengths(config: ObjectiveConfig, key: jax.Array, first_step) -> jax.Array:
    """Number of attended clean tokens of the batches of CHUNK steps; int32 [CHUNK].

    Args:
      config: the objective, with AR steps that are shared by the batch.
      key: the base key of the run.
      first_step: number of steps before the first of them.
    """

    def step_length(step):
        shared = batch_key(jax.random.fold_in(key, step))
        return num_visible_clean_of_batch(config.factorization, config.model.num_tokens, shared)

    return jax.vmap(step_length)(first_step + jnp.arange(CHUNK))


class LengthOfStep:
    """The length of the program of each step.

    Args:
      config: the objective.
      buckets: number of sequence-length buckets; 1: all steps have the full length.
      key: the base key of the run.
    """

    def __init__(self, config: ObjectiveConfig, buckets: int, key: jax.Array):
        self._config, self._key = config, key
        self.lengths = program_lengths(config, buckets)
        self._chunk, self._attended = None, None

    def __call__(self, step: int) -> int:
        """Length of the program for the step that follows `step` steps."""
        if len(self.lengths) == 1:
            return self.lengths[0]
        return next(length for length in self.lengths if length >= self.attended(step))

    def attended(self, step: int) -> int:
        """Attended clean tokens of the batch of the step that follows `step` steps."""
        if step // CHUNK != self._chunk:
            self._chunk = step // CHUNK
            first = sharding.place(np.int32(self._chunk * CHUNK), self._key.sharding)
            self._attended = jax.device_get(attended_lengths(self._config, self._key, first))
        return int(self._attended[step % CHUNK])


def expected_flops(config: ObjectiveConfig, buckets: int, key: jax.Array, chunks: int = 8) -> float:
    """Mean model FLOPs of an image over the steps of a run; with buckets=0, those of the exact lengths."""
    length_of = LengthOfStep(config, max(buckets, 2), key)
    total, steps = 0.0, chunks * CHUNK
    for step in range(steps):
        if buckets == 0:
            length = max(length_of.attended(step), 1)
        else:
            length = config.model.num_tokens if buckets == 1 else length_of(step)
        total += dataclasses.replace(config, most_clean=length).flops
    return total / steps
