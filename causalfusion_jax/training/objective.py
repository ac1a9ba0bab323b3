"""The training loss: both factorizations drawn afresh for every image."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causalfusion_jax import diffusion as noise_axis
from causalfusion_jax.diffusion import DiffusionConfig
from causalfusion_jax.factorization import (
    FactorizationConfig,
    draw_plan,
    num_visible_clean,
    places_per_t,
    step_start,
)
from causalfusion_jax.models.flops import training_flops
from causalfusion_jax.models.patches import patchify
from causalfusion_jax.models.transformer import Params, TransformerConfig, abstract_model

NUM_BINS = 4
"""Quarters of the noise schedule, and of the image known when an AR step begins, in which
the error is reported."""


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned, statically.

    Attributes:
      model, factorization, diffusion: the network and the two axes.
      patch_size: side of a token in pixels (or latents).
      class_dropout: probability that an image is trained without its class.
      most_clean: the batch is known to look at no more than so many clean tokens, the
        first; 0: it is not.
    """

    model: TransformerConfig
    factorization: FactorizationConfig
    diffusion: DiffusionConfig
    patch_size: int
    class_dropout: float
    most_clean: int = 0

    @property
    def num_clean(self) -> int:
        """Places with a clean token in the training sequence."""
        return self.most_clean or num_visible_clean(self.factorization, self.model.num_tokens)

    @property
    def places_per_t(self) -> int:
        """Consecutive places for which one t is drawn, where AR steps or tokens have their own."""
        shared = self.diffusion.t_shared_by == "step"
        return places_per_t(self.factorization, self.model.num_tokens) if shared else 1

    @property
    def flops(self) -> int:
        """Model FLOPs of one image in a training step."""
        own_t = self.diffusion.t_shared_by != "image"
        levels = self.model.num_tokens // self.places_per_t if own_t else 1
        return training_flops(self.model, self.num_clean, levels)


def example_keys(key: jax.Array, batch: int) -> jax.Array:
    """One key for each example, so that splitting the batch changes nothing; [batch]."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch, dtype=jnp.uint32))


def batch_key(key: jax.Array) -> jax.Array:
    """The key of what all examples of a step share, apart from those of `example_keys`."""
    return jax.random.fold_in(key, np.uint32(2**32 - 1))


def diffusion_loss(config: ObjectiveConfig, params: Params, batch, keys, shared_key=None) -> tuple[jax.Array, dict]:
    """Weighted mean squared error of the prediction over all places of all images.

    Args:
      config: what is learned.
      params: the Transformer's parameters.
      batch: `image` float32 [batch, (frames,) height, width, channels]; `label` int [batch].
      keys: one key an example, [batch].
      shared_key: from `batch_key`, for AR steps that the batch shares.

    Returns:
      The scalar loss, and metrics: scalars, and [NUM_BINS] sums and counts.
    """
    axes = config.diffusion
    x_0 = patchify(batch["image"], config.patch_size)
    num_tokens = config.model.num_tokens

    def draw(key):
        plan_key, t_key, eps_key, label_key = jax.random.split(key, 4)
        plan = draw_plan(config.factorization, config.model.grid, plan_key, shared_key)
        t = noise_axis.sample_t(axes, t_key, plan.step[:: config.places_per_t])
        eps = jax.random.normal(eps_key, x_0.shape[1:])
        return plan, t, eps, jax.random.bernoulli(label_key, config.class_dropout)

    plan, t, eps, drop = jax.vmap(draw)(keys)
    labels = jnp.where(drop, config.model.num_classes, batch["label"])
    x_0 = jnp.take_along_axis(x_0, plan.order[..., None], axis=1)
    place_t = jnp.repeat(t, num_tokens // t.shape[1], axis=1)
    alpha, sigma = noise_axis.alpha_sigma(axes, place_t)
    x_t = noise_axis.add_noise(x_0, eps, alpha, sigma)
    model = nnx.merge(abstract_model(config.model)[0], params)
    prediction = model(labels, x_0[:, : config.num_clean], x_t, t, plan.order, plan.step)
    target = noise_axis.make_target(axes.target, x_0, eps, alpha, sigma)
    error = jnp.mean(jnp.square(prediction - target), axis=-1)
    loss = jnp.mean(plan.weight * noise_axis.loss_weight(axes, alpha, sigma) * error)
    return loss, {
        "loss": loss,
        "mse": jnp.mean(error),
        "ar_steps": jnp.mean(plan.step[:, -1] + 1.0),
        **_binned("mse_by_t", error, place_t / axes.num_timesteps),
        **_binned("mse_by_ar_step", error, step_start(plan.step) / plan.step.shape[-1]),
    }


def _binned(name: str, error: jax.Array, position: jax.Array) -> dict[str, jax.Array]:
    """Sum and count of `error` [batch, L] in equal bins of `position` in [0, 1)."""
    position = jnp.broadcast_to(position, error.shape)
    index = jnp.clip(jnp.floor(position * NUM_BINS), 0, NUM_BINS - 1)
    member = index[..., None] == jnp.arange(NUM_BINS)
    return {
        f"{name}/sum": jnp.sum(jnp.where(member, error[..., None], 0.0), axis=(0, 1)),
        f"{name}/count": jnp.sum(member, axis=(0, 1), dtype=jnp.float32),
    }
