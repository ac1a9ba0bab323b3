"""The training loss: both factorizations drawn afresh for every image."""

import jax
import jax.numpy as jnp
from flax import nnx

from causalfusion_jax.config.training import ObjectiveConfig
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.core.factorization import step_start
from causalfusion_jax.core.layouts import WITH_NEW_IMAGE, WITH_NEW_TEXT, generates
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.training.draws import Drawn, draw
from causalfusion_jax.training.joint import blank_words, by_task, draw_tasks, noise_to_read, predict, text_metrics

NUM_BINS = 4
"""Number of bins in which the error is reported: by noise level, and by the part of the image
generated before an AR step."""


def diffusion_loss(config: ObjectiveConfig, params: Params, batch, keys, shared_key=None) -> tuple[jax.Array, dict]:
    """Weighted mean squared error of the prediction over all positions of all images.

    Args:
      config: settings of the loss.
      params: the Transformer's parameters.
      batch: `image` float32 [batch, (frames,) height, width, channels]; `label` int [batch].
      keys: PRNG keys [batch], one for each example.
      shared_key: from `draws.batch_key`, for AR steps that the batch shares.

    Returns:
      The scalar loss, and metrics: scalars, and [NUM_BINS] sums and counts.
    """
    drawn = draw(config, batch["image"], keys, shared_key)
    condition = Condition(batch["label"]).without_class(drawn.drop_class, config.model.num_classes)
    model = nnx.merge(abstract_model(config.model)[0], params)
    clean = drawn.x_0[:, : config.num_clean]
    prediction = model(condition, clean, drawn.x_t, drawn.t, drawn.plan.order, drawn.plan.step)
    error = jnp.mean(jnp.square(prediction - drawn.target), axis=-1)
    loss = jnp.mean(drawn.weight * error)
    return loss, {
        "loss": loss,
        "mse": jnp.mean(error),
        **_image_metrics(config, drawn, error, jnp.ones_like(error, bool)),
    }


def joint_loss(config: ObjectiveConfig, params: Params, batch, keys, shared_key=None) -> tuple[jax.Array, dict]:
    """Diffusion of the images that are generated, plus `text_weight` times cross-entropy of the texts.

    Both are divided by the expected number of examples that have them, so that the loss of a
    batch is the mean of the losses of its parts.

    Args:
      config: settings of the loss, with `joint`.
      params, keys, shared_key: as for `diffusion_loss`.
      batch: as for `diffusion_loss`, with `text` int32 [batch, T], token ids, NO_TOKEN in empty slots.

    Returns:
      The scalar loss, and metrics: scalars, [NUM_BINS] sums and counts, and sums and counts by task.
    """
    joint, text = config.joint, batch["text"]
    drawn = draw(config, batch["image"], keys, shared_key)
    fold = jax.vmap(jax.random.fold_in, (0, None))
    task_keys, read_keys, word_keys = (fold(keys, i) for i in (1, 2, 3))
    task, drop_text_class = draw_tasks(joint, task_keys)
    condition = Condition(batch["label"], blank_words(joint, task, text, word_keys))
    condition = condition.without_class(drawn.drop_class | drop_text_class, config.model.num_classes)
    model = nnx.merge(abstract_model(config.model)[0], params)
    read = noise_to_read(joint, config.diffusion, drawn.x_0, read_keys)
    prediction, logits = predict(joint, model, task, condition, drawn, read)
    counted = jnp.broadcast_to(generates(WITH_NEW_IMAGE, task)[:, None], drawn.weight.shape)
    error = jnp.where(counted, jnp.mean(jnp.square(prediction - drawn.target), axis=-1), 0.0)
    ce, metrics = text_metrics(task, text, logits)
    # Tasks that are not in the mixture contribute 0.
    diffusion = jnp.mean(drawn.weight * error) / (joint.part(WITH_NEW_IMAGE) or 1.0)
    cross_entropy = jnp.mean(ce) / (joint.part(WITH_NEW_TEXT) or 1.0)
    loss = diffusion + joint.text_weight * cross_entropy
    return loss, {
        "loss": loss,
        "diffusion": diffusion,
        "cross_entropy": cross_entropy,
        **metrics,
        **by_task("mse", task, jnp.sum(error, axis=1), jnp.sum(counted, axis=1)),
        **_image_metrics(config, drawn, error, counted),
    }


def _image_metrics(config, drawn: Drawn, error, counted) -> dict[str, jax.Array]:
    """The `counted` errors [batch, L] by their positions on both axes."""
    step = drawn.plan.step
    return {
        "ar_steps": jnp.mean(step[:, -1] + 1.0),
        **_binned("mse_by_t", error, counted, drawn.token_t / config.diffusion.num_timesteps),
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
    """`joint_loss` for a text-conditioned model, else `diffusion_loss`."""
    loss = diffusion_loss if config.joint is None else joint_loss
    return loss(config, params, batch, keys, shared_key)
