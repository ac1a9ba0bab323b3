"""The training loss: both factorizations drawn afresh for every image."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causalfusion_jax.config.training import ObjectiveConfig
from causalfusion_jax.core import diffusion as noise_axis
from causalfusion_jax.core.factorization import Plan, draw_plan, step_start
from causalfusion_jax.core.layouts import WITH_NEW_IMAGE, WITH_NEW_TEXT, generates
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.patches import patchify
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.training.joint import blank_words, by_layout, draw_layouts, noise_to_read, predict, text_metrics

NUM_BINS = 4
"""Quarters of the noise schedule, and of the image known when an AR step begins, in which
the error is reported."""


def example_keys(key: jax.Array, batch: int) -> jax.Array:
    """One key for each example, so that splitting the batch changes nothing; [batch]."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch, dtype=jnp.uint32))


def batch_key(key: jax.Array) -> jax.Array:
    """The key of what all examples of a step share, apart from those of `example_keys`."""
    return jax.random.fold_in(key, np.uint32(2**32 - 1))


class Drawn(NamedTuple):
    """What is drawn for the images of a batch, and what follows from it.

    Attributes:
      plan: their factorization, arrays [batch, L].
      t: noise levels [batch, groups].
      place_t: the same for every place, [batch, L].
      x_0, x_t: clean and noisy tokens in the plan's order, [batch, L, token_dim].
      target: what the network should predict, likewise.
      weight: of the squared error at every place, [batch, L].
      drop_class: bool [batch], which images go without their class.
    """

    plan: Plan
    t: jax.Array
    place_t: jax.Array
    x_0: jax.Array
    x_t: jax.Array
    target: jax.Array
    weight: jax.Array
    drop_class: jax.Array


def draw(config: ObjectiveConfig, images, keys, shared_key) -> Drawn:
    """Draws both factorizations for every image; arguments as for `diffusion_loss`."""
    axes = config.diffusion
    x_0 = patchify(images, config.patch_size)

    def draw_one(key):
        plan_key, t_key, eps_key, label_key = jax.random.split(key, 4)
        plan = draw_plan(config.factorization, config.model.grid, plan_key, shared_key)
        t = noise_axis.sample_t(axes, t_key, plan.step[:: config.places_per_t])
        eps = jax.random.normal(eps_key, x_0.shape[1:])
        return plan, t, eps, jax.random.bernoulli(label_key, config.class_dropout)

    plan, t, eps, drop = jax.vmap(draw_one)(keys)
    x_0 = jnp.take_along_axis(x_0, plan.order[..., None], axis=1)
    place_t = jnp.repeat(t, config.model.num_tokens // t.shape[1], axis=1)
    alpha, sigma = noise_axis.alpha_sigma(axes, place_t)
    x_t = noise_axis.add_noise(x_0, eps, alpha, sigma)
    target = noise_axis.make_target(axes.target, x_0, eps, alpha, sigma)
    weight = plan.weight * noise_axis.loss_weight(axes, alpha, sigma)
    return Drawn(plan, t, place_t, x_0, x_t, target, weight, drop)


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
    drawn = draw(config, batch["image"], keys, shared_key)
    labels = jnp.where(drawn.drop_class, config.model.num_classes, batch["label"])
    model = nnx.merge(abstract_model(config.model)[0], params)
    clean = drawn.x_0[:, : config.num_clean]
    prediction = model(labels, clean, drawn.x_t, drawn.t, drawn.plan.order, drawn.plan.step)
    error = jnp.mean(jnp.square(prediction - drawn.target), axis=-1)
    loss = jnp.mean(drawn.weight * error)
    return loss, {
        "loss": loss,
        "mse": jnp.mean(error),
        **_image_metrics(config, drawn, error, jnp.ones_like(error, bool)),
    }


def joint_loss(config: ObjectiveConfig, params: Params, batch, keys, shared_key=None) -> tuple[jax.Array, dict]:
    """Diffusion of the images that are generated, plus `text_weight` times cross-entropy of the texts.

    Both are means over as many examples as the mixture lets expect, so that the loss of a
    batch is the mean of those of its parts.

    Args:
      config: what is learned, with `joint`.
      params, keys, shared_key: as for `diffusion_loss`.
      batch: as there, with `text` int32 [batch, T], token ids, NO_TOKEN in empty slots.

    Returns:
      The scalar loss, and metrics: scalars, [NUM_BINS] sums and counts, and those by layout.
    """
    joint, text = config.joint, batch["text"]
    drawn = draw(config, batch["image"], keys, shared_key)
    fold = jax.vmap(jax.random.fold_in, (0, None))
    layout_keys, read_keys, word_keys = (fold(keys, i) for i in (1, 2, 3))
    layout, drop_text_class = draw_layouts(joint, layout_keys)
    labels = jnp.where(drawn.drop_class | drop_text_class, config.model.num_classes, batch["label"])
    model = nnx.merge(abstract_model(config.model)[0], params)
    read = noise_to_read(joint, config.diffusion, drawn.x_0, read_keys)
    seen = blank_words(joint, layout, text, word_keys)
    prediction, logits = predict(joint, model, layout, labels, seen, drawn.x_0, drawn.x_t, drawn.t, read, drawn.plan)
    counted = jnp.broadcast_to(generates(WITH_NEW_IMAGE, layout)[:, None], drawn.weight.shape)
    error = jnp.where(counted, jnp.mean(jnp.square(prediction - drawn.target), axis=-1), 0.0)
    ce, metrics = text_metrics(layout, text, logits)
    # Where a layout has no part in the mixture there is nothing to divide.
    diffusion = jnp.mean(drawn.weight * error) / (joint.part(WITH_NEW_IMAGE) or 1.0)
    cross_entropy = jnp.mean(ce) / (joint.part(WITH_NEW_TEXT) or 1.0)
    loss = diffusion + joint.text_weight * cross_entropy
    return loss, {
        "loss": loss,
        "diffusion": diffusion,
        "cross_entropy": cross_entropy,
        **metrics,
        **by_layout("mse", layout, jnp.sum(error, axis=1), jnp.sum(counted, axis=1)),
        **_image_metrics(config, drawn, error, counted),
    }


def _image_metrics(config, drawn: Drawn, error, counted) -> dict[str, jax.Array]:
    """Where on both axes the `counted` errors [batch, L] lie."""
    step = drawn.plan.step
    return {
        "ar_steps": jnp.mean(step[:, -1] + 1.0),
        **_binned("mse_by_t", error, counted, drawn.place_t / config.diffusion.num_timesteps),
        **_binned("mse_by_ar_step", error, counted, step_start(step) / step.shape[-1]),
    }


def _binned(name: str, error: jax.Array, counted: jax.Array, position: jax.Array) -> dict[str, jax.Array]:
    """Sum and count of the `counted` of `error` [batch, L] in equal bins of `position` in [0, 1)."""
    position = jnp.broadcast_to(position, error.shape)
    index = jnp.clip(jnp.floor(position * NUM_BINS), 0, NUM_BINS - 1)
    member = (index[..., None] == jnp.arange(NUM_BINS)) & counted[..., None]
    return {
        f"{name}/sum": jnp.sum(jnp.where(member, error[..., None], 0.0), axis=(0, 1)),
        f"{name}/count": jnp.sum(member, axis=(0, 1), dtype=jnp.float32),
    }


def training_loss(config: ObjectiveConfig, params: Params, batch, keys, shared_key=None) -> tuple[jax.Array, dict]:
    """`joint_loss` for a model that knows text, else `diffusion_loss`."""
    loss = diffusion_loss if config.joint is None else joint_loss
    return loss(config, params, batch, keys, shared_key)
