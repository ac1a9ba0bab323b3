"""The joint loss of texts and images: every example draws a task.

Diffusion loss of generated images, next-token cross-entropy of generated texts (CausalFusion
section 5; Transfusion, arXiv 2408.11039, is `image_tokens=noisy`).
"""

import jax
import jax.numpy as jnp
import optax

from causalfusion_jax.config.training import JointConfig
from causalfusion_jax.core import diffusion as noise_axis
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.core.layouts import (
    NO_TOKEN,
    TASKS,
    WITH_NEW_IMAGE,
    WITH_NEW_TEXT,
    Task,
    generates,
    pair_layout,
    single_image_layout,
)
from causalfusion_jax.data.tokenizers import BEGIN, END
from causalfusion_jax.models.sequence import ImageTokens
from causalfusion_jax.models.transformer import Transformer
from causalfusion_jax.training.draws import Drawn


def draw_tasks(config: JointConfig, keys) -> tuple[jax.Array, jax.Array]:
    """Draws the task of each example.

    Args:
      config: the mixture.
      keys: PRNG keys [batch], one for each example.

    Returns:
      task: int32 [batch]; text_to_image without its text is `IMAGE`.
      drop_class: bool [batch], whether an example with a text, dropped or not, drops its class.
    """

    def draw(key):
        task_key, prompt_key, class_key = jax.random.split(key, 3)
        task = jax.random.categorical(task_key, jnp.log(jnp.asarray(config.mixture)))
        has_text = task != Task.IMAGE
        drop = (task == Task.TEXT_TO_IMAGE) & jax.random.bernoulli(prompt_key, config.prompt_dropout)
        drop_class = has_text & jax.random.bernoulli(class_key, config.class_dropout)
        return jnp.where(drop, Task.IMAGE, task).astype(jnp.int32), drop_class

    return jax.vmap(draw)(keys)


def noise_to_read(config: JointConfig, diffusion: noise_axis.DiffusionConfig, x_0, keys) -> tuple[jax.Array, jax.Array]:
    """Images that texts are generated from, with noise where `read_noise` asks for it.

    Args:
      config: for read_noise.
      diffusion: the noise schedule.
      x_0: [batch, L, token_dim].
      keys: PRNG keys [batch], one for each example.

    Returns:
      x_t [batch, L, token_dim] and its noise level t [batch, 1].
    """

    def draw(key, x_0):
        t_key, eps_key = jax.random.split(key)
        t = config.read_noise * diffusion.num_timesteps * jax.random.uniform(t_key, (1,))
        t = t if diffusion.is_continuous else jnp.floor(t).astype(jnp.int32)
        alpha, sigma = noise_axis.alpha_sigma(diffusion, t)
        return noise_axis.add_noise(x_0, jax.random.normal(eps_key, x_0.shape), alpha, sigma), t

    if not config.read_noise:
        return x_0, jnp.zeros((x_0.shape[0], 1), jnp.float32 if diffusion.is_continuous else jnp.int32)
    return jax.vmap(draw)(keys, x_0)


def blank_words(config: JointConfig, task, text, keys) -> jax.Array:
    """Texts int32 [batch, T] with word dropout: some tokens of generated texts are replaced by BEGIN."""
    if not config.word_dropout:
        return text
    drop = jax.vmap(lambda key: jax.random.bernoulli(key, config.word_dropout, text.shape[1:]))(keys)
    return jnp.where(drop & (text > END) & generates(WITH_NEW_TEXT, task)[:, None], BEGIN, text)


def predict(
    config: JointConfig, model: Transformer, task, condition: Condition, drawn: Drawn, read
) -> tuple[jax.Array, jax.Array]:
    """Runs the model on a batch in which every example has its own task.

    Args:
      config: how images enter the sequence.
      model: the Transformer.
      task: int32 [batch].
      condition: classes, and texts [batch, T] with their blanked words.
      drawn: the images to generate, noisy tokens and factorization.
      read: the images to generate texts from, and their noise levels, from `noise_to_read`.

    Returns:
      Predictions [batch, L, token_dim], and logits [batch, T, vocab].
    """
    num_condition, used = model.config.num_condition_tokens, condition.text != NO_TOKEN
    is_read = task == Task.IMAGE_TO_TEXT
    x_0, x_t, t, (order, step, _) = drawn.x_0, drawn.x_t, drawn.t, drawn.plan
    x_read, t_read = read
    if config.image_tokens == "noisy":
        role, step = single_image_layout(task, num_condition, used, step)
        clean = x_0[:, :0]
        x_t, t = jnp.where(is_read[:, None, None], x_read, x_t), jnp.where(is_read[:, None], t_read, t)
    else:
        clean = jnp.where(is_read[:, None, None], x_read, x_0)
        role, step = pair_layout(task, num_condition, used, step, clean.shape[1], config.read_in_one_step)
    clean, noisy = ImageTokens(clean, order[:, : clean.shape[1]]), ImageTokens(x_t, order, t)
    prediction, hidden = model.sequence(condition, clean, noisy, role, step)
    return prediction, model.text_logits(hidden)


def text_metrics(task, text, logits) -> tuple[jax.Array, dict]:
    """Cross-entropy of generated texts.

    Args:
      task: int32 [batch].
      text: int32 [batch, T].
      logits: float32 [batch, T, vocab], of the token after each.

    Returns:
      Cross-entropy of each example's text in nats per token, [batch], 0 where it is not generated;
      and sums and counts of `ce` by task (nats per token), and of `captions_cut`, truncated texts.
    """
    targets = text[:, 1:]
    counted = (targets != NO_TOKEN) & generates(WITH_NEW_TEXT, task)[:, None]
    ce = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.maximum(targets, 0))
    ce = jnp.where(counted, ce, 0.0)
    tokens = jnp.sum(counted, axis=1)
    cut = (text[:, 0] == BEGIN) & ~jnp.any(text == END, axis=1)
    metrics = by_task("ce", task, jnp.sum(ce, axis=1), tokens)
    metrics |= {"captions_cut/sum": jnp.sum(cut, dtype=jnp.float32), "captions_cut/count": jnp.float32(len(text))}
    return jnp.sum(ce, axis=1) / jnp.maximum(tokens, 1), metrics


def by_task(name: str, task, sums, counts) -> dict[str, jax.Array]:
    """Sums and counts [batch] of a metric, added up for each task that has it."""
    metrics = {}
    for index in {"ce": WITH_NEW_TEXT, "mse": WITH_NEW_IMAGE}[name]:
        selected = task == index
        metrics[f"{name}/{TASKS[index]}/sum"] = jnp.sum(jnp.where(selected, sums, 0.0))
        metrics[f"{name}/{TASKS[index]}/count"] = jnp.sum(jnp.where(selected, counts, 0), dtype=jnp.float32)
    return metrics
