"""Leaving out the clean tokens that nobody looks at, where a batch shares its AR steps.

The clean tokens of the last AR step are seen by no other token. How many those are is drawn
anew for every step, from (key, step) alone, so it is known before the step runs; a few
lengths, each a program of its own, let the step leave most of them out.
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
"""Steps whose lengths are drawn at once."""


def bucket_lengths(config: ObjectiveConfig, buckets: int) -> tuple[int, ...]:
    """Clean tokens of each program: equal parts of L, from the shortest up."""
    tokens = config.model.num_tokens
    return tuple(sorted({-(-tokens * (i + 1) // buckets) for i in range(buckets)}))


def program_lengths(config: ObjectiveConfig, buckets: int) -> tuple[int, ...]:
    """Clean tokens of each program of a run, from the shortest up; one where there are no buckets."""
    return bucket_lengths(config, buckets) if buckets > 1 else (config.num_clean,)


def with_length(config: StepConfig, length: int) -> StepConfig:
    """The step for batches that look at no more than `length` clean tokens."""
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, most_clean=length))


def lower_training_step(config: ExperimentConfig, mesh: Mesh, length: int | None = None) -> jax.stages.Lowered:
    """The training step of a run, traced for a mesh.

    Args:
      config: all settings.
      mesh: where it runs.
      length: of the step's program in clean tokens; default: of the longest.
    """
    length = length or program_lengths(config.step.objective, config.train.length_buckets)[-1]
    return lower_train_step(with_length(config.step, length), mesh, config.batch_shapes, abstract_key(mesh))


@functools.partial(jax.jit, static_argnums=0)
def visible_lengths(config: ObjectiveConfig, key: jax.Array, first_step) -> jax.Array:
    """Clean tokens that the batches of CHUNK steps look at; int32 [CHUNK].

    Args:
      config: the objective, with AR steps that the batch shares.
      key: the run's base key.
      first_step: number of steps taken before the first of them.
    """

    def one(step):
        shared = batch_key(jax.random.fold_in(key, step))
        return num_visible_clean_of_batch(config.factorization, config.model.num_tokens, shared)

    return jax.vmap(one)(first_step + jnp.arange(CHUNK))


class LengthOfStep:
    """The length of each step's program, drawn ahead.

    Args:
      config: the objective.
      buckets: number of lengths; 1: all steps have the whole length.
      key: the run's base key.
    """

    def __init__(self, config: ObjectiveConfig, buckets: int, key: jax.Array):
        self._config, self._key = config, key
        self.lengths = program_lengths(config, buckets)
        self._chunk, self._visible = None, None

    def __call__(self, step: int) -> int:
        """Length for the step after `step` steps were taken."""
        if len(self.lengths) == 1:
            return self.lengths[0]
        if step // CHUNK != self._chunk:
            self._chunk = step // CHUNK
            first = sharding.place(np.int32(self._chunk * CHUNK), self._key.sharding)
            self._visible = jax.device_get(visible_lengths(self._config, self._key, first))
        visible = int(self._visible[step % CHUNK])
        return next(length for length in self.lengths if length >= visible)


def expected_flops(config: ObjectiveConfig, buckets: int, key: jax.Array, chunks: int = 8) -> float:
    """Model FLOPs of one image, averaged over the steps of a run; exact lengths for buckets=0."""
    length_of = LengthOfStep(config, max(buckets, 2), key)
    total, steps = 0.0, chunks * CHUNK
    for step in range(steps):
        length = length_of(step)
        if buckets == 0:
            length = max(int(length_of._visible[step % CHUNK]), 1)
        elif buckets == 1:
            length = config.model.num_tokens
        total += dataclasses.replace(config, most_clean=length).flops
    return total / steps
