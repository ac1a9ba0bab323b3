"""What a training step draws for its images: both factorizations, and class dropout."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from causalfusion_jax.config.training import ObjectiveConfig
from causalfusion_jax.core import diffusion as noise_axis
from causalfusion_jax.core.factorization import Plan, draw_plan
from causalfusion_jax.models.patches import patchify


def example_keys(key: jax.Array, batch: int) -> jax.Array:
    """PRNG keys [batch], one for each example, so that parts of a batch draw what the whole batch does."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch, dtype=jnp.uint32))


def batch_key(key: jax.Array) -> jax.Array:
    """The PRNG key of what all examples of a step share, distinct from `example_keys`."""
    return jax.random.fold_in(key, np.uint32(2**32 - 1))


class Drawn(NamedTuple):
    """Factorizations of the images of a batch, and the network's inputs and targets.

    Attributes:
      plan: factorization over the sequence axis, arrays [batch, L].
      t: noise levels [batch, groups].
      token_t: noise level of each position, [batch, L].
      x_0, x_t: clean and noisy tokens in the plan's order, [batch, L, token_dim].
      target: prediction target, [batch, L, token_dim].
      weight: weight of the squared error at each position, [batch, L].
      drop_class: bool [batch], whether an image is trained without its class.
    """

    plan: Plan
    t: jax.Array
    token_t: jax.Array
    x_0: jax.Array
    x_t: jax.Array
    target: jax.Array
    weight: jax.Array
    drop_class: jax.Array


def draw(config: ObjectiveConfig, images, keys, shared_key) -> Drawn:
    """Draws both factorizations for every image; arguments as for `objective.diffusion_loss`."""
    diffusion = config.diffusion
    x_0 = patchify(images, config.patch_size)

    def draw_one(key):
        plan_key, t_key, eps_key, label_key = jax.random.split(key, 4)
        plan = draw_plan(config.factorization, config.model.grid, plan_key, shared_key)
        t = noise_axis.sample_t(diffusion, t_key, plan.step[:: config.places_per_t])
        eps = jax.random.normal(eps_key, x_0.shape[1:])
        return plan, t, eps, jax.random.bernoulli(label_key, config.class_dropout)

    plan, t, eps, drop = jax.vmap(draw_one)(keys)
    x_0 = jnp.take_along_axis(x_0, plan.order[..., None], axis=1)
    token_t = jnp.repeat(t, config.model.num_tokens // t.shape[1], axis=1)
    alpha, sigma = noise_axis.alpha_sigma(diffusion, token_t)
    x_t = noise_axis.add_noise(x_0, eps, alpha, sigma)
    target = noise_axis.make_target(diffusion.target, x_0, eps, alpha, sigma)
    weight = plan.weight * noise_axis.loss_weight(diffusion, alpha, sigma)
    return Drawn(plan, t, token_t, x_0, x_t, target=target, weight=weight, drop_class=drop)
