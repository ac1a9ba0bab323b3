"""The loss of texts and images in one model: every example draws what is given and what is generated.

Diffusion of the images that are generated, next-token cross-entropy of the texts that are
(CausalFusion section 5; Transfusion, arXiv 2408.11039, is `image_tokens=noisy`).
"""

import jax
import jax.numpy as jnp
import optax

from causalfusion_jax.config.training import JointConfig
from causalfusion_jax.core import diffusion as noise_axis
from causalfusion_jax.core.layouts import (
    LAYOUTS,
    NO_TOKEN,
    WITH_NEW_IMAGE,
    WITH_NEW_TEXT,
    Layout,
    generates,
    pair_layout,
    single_image_layout,
)
from causalfusion_jax.data.tokenizers import BEGIN, END


def draw_layouts(config: JointConfig, keys) -> tuple[jax.Array, jax.Array]:
    """What each example is to learn.

    Args:
      config: the mixture.
      keys: one key an example, [batch].

    Returns:
      layout: int32 [batch]; a text_to_image whose text is dropped is an image alone.
      drop_class: bool [batch], whether an example with a text, dropped or not, goes without its class.
    """

    def draw(key):
        layout_key, prompt_key, class_key = jax.random.split(key, 3)
        layout = jax.random.categorical(layout_key, jnp.log(jnp.asarray(config.mixture)))
        has_text = layout != Layout.IMAGE
        drop = (layout == Layout.TEXT_TO_IMAGE) & jax.random.bernoulli(prompt_key, config.prompt_dropout)
        drop_class = has_text & jax.random.bernoulli(class_key, config.class_dropout)
        return jnp.where(drop, Layout.IMAGE, layout).astype(jnp.int32), drop_class

    return jax.vmap(draw)(keys)


def noise_to_read(config: JointConfig, axes: noise_axis.DiffusionConfig, x_0, keys) -> tuple[jax.Array, jax.Array]:
    """Images as texts are generated from them.

    Args:
      config: read_noise.
      axes: the schedule.
      x_0: [batch, L, token_dim].
      keys: one key an example, [batch].

    Returns:
      x_t [batch, L, token_dim] and its noise level t [batch, 1].
    """

    def draw(key, x_0):
        t_key, eps_key = jax.random.split(key)
        t = config.read_noise * axes.num_timesteps * jax.random.uniform(t_key, (1,))
        t = t if axes.is_continuous else jnp.floor(t).astype(jnp.int32)
        alpha, sigma = noise_axis.alpha_sigma(axes, t)
        return noise_axis.add_noise(x_0, jax.random.normal(eps_key, x_0.shape), alpha, sigma), t

    if not config.read_noise:
        return x_0, jnp.zeros((x_0.shape[0], 1), jnp.float32 if axes.is_continuous else jnp.int32)
    return jax.vmap(draw)(keys, x_0)


def blank_words(config: JointConfig, layout, text, keys) -> jax.Array:
    """Texts int32 [batch, T] as the model sees them: with tokens of generated ones blanked, by BEGIN."""
    if not config.word_dropout:
        return text
    drop = jax.vmap(lambda key: jax.random.bernoulli(key, config.word_dropout, text.shape[1:]))(keys)
    return jnp.where(drop & (text > END) & generates(WITH_NEW_TEXT, layout)[:, None], BEGIN, text)


def predict(config: JointConfig, model, layout, labels, text, x_0, x_t, t, read, plan):
    """Runs the model on a batch in which every example has its own layout.

    Args:
      config: how images stand in the sequence.
      model: the Transformer.
      layout: int32 [batch].
      labels: int [batch].
      text: int32 [batch, T], as the model sees it.
      x_0, x_t: [batch, L, token_dim], in the plan's order.
      t: noise levels of x_t, [batch, groups].
      read: images to read and their noise levels, from `noise_to_read`.
      plan: factorization.Plan.

    Returns:
      Predictions [batch, L, token_dim], and logits [batch, T, vocab].
    """
    c, used = model.config, text != NO_TOKEN
    is_read = layout == Layout.IMAGE_TO_TEXT
    seen, seen_t = read
    if config.image_tokens == "noisy":
        role, step = single_image_layout(layout, c.num_condition_tokens, used, plan.step)
        clean = x_0[:, :0]
        x_t, t = jnp.where(is_read[:, None, None], seen, x_t), jnp.where(is_read[:, None], seen_t, t)
    else:
        clean = jnp.where(is_read[:, None, None], seen, x_0)
        role, step = pair_layout(
            layout, c.num_condition_tokens, used, plan.step, clean.shape[1], config.read_in_one_step
        )
    prediction, hidden = model.sequence(
        labels, text, clean, x_t, t, plan.order[:, : clean.shape[1]], plan.order, role, step
    )
    return prediction, model.text_logits(hidden)


def text_metrics(layout, text, logits) -> tuple[jax.Array, dict]:
    """Cross-entropy of the texts that are generated.

    Args:
      layout: int32 [batch].
      text: int32 [batch, T].
      logits: float32 [batch, T, vocab], of the token after each.

    Returns:
      Nats a token of each example's text, [batch], 0 where it is not generated; and sums and
      counts of `ce` by layout (nats a token), and of texts that were `cut`.
    """
    targets = text[:, 1:]
    counted = (targets != NO_TOKEN) & generates(WITH_NEW_TEXT, layout)[:, None]
    ce = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.maximum(targets, 0))
    ce = jnp.where(counted, ce, 0.0)
    tokens = jnp.sum(counted, axis=1)
    cut = (text[:, 0] == BEGIN) & ~jnp.any(text == END, axis=1)
    metrics = by_layout("ce", layout, jnp.sum(ce, axis=1), tokens)
    metrics |= {"captions_cut/sum": jnp.sum(cut, dtype=jnp.float32), "captions_cut/count": jnp.float32(len(text))}
    return jnp.sum(ce, axis=1) / jnp.maximum(tokens, 1), metrics


def by_layout(name: str, layout, sums, counts) -> dict[str, jax.Array]:
    """Sums and counts [batch] of a metric in every layout, by name."""
    metrics = {}
    for index in {"ce": WITH_NEW_TEXT, "mse": WITH_NEW_IMAGE}[name]:
        is_one = layout == index
        metrics[f"{name}/{LAYOUTS[index]}/sum"] = jnp.sum(jnp.where(is_one, sums, 0.0))
        metrics[f"{name}/{LAYOUTS[index]}/count"] = jnp.sum(jnp.where(is_one, counts, 0), dtype=jnp.float32)
    return metrics
