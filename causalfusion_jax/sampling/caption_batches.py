"""Captions of a run, and scores of given ones, in batches."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.config.sampling import CaptionConfig
from causalfusion_jax.core.layouts import NO_TOKEN
from causalfusion_jax.data.tokenizers import from_slots, to_slots
from causalfusion_jax.models.patches import patchify
from causalfusion_jax.sampling.captioning import caption_tokens, score_tokens
from causalfusion_jax.sampling.sampler import image_keys


def _batches(num: int, batch_size: int):
    """Example numbers of each batch; the last one is filled up, so that one program serves all."""
    size = min(batch_size, num)
    for start in range(0, num, size):
        yield np.minimum(np.arange(start, start + size), num - 1)


def _on_device(params):
    """Parameters on one device, where every batch is read."""
    return jax.device_put(params, jax.local_devices()[0])


def _given(config: ExperimentConfig, params, images, indices):
    """Parameters, labels and image tokens of a batch; no class is given."""
    tokens = patchify(jnp.asarray(images[indices]), config.model.patch_size)
    return params, jnp.full(len(indices), config.data.num_classes), tokens


def caption_images(
    config: ExperimentConfig,
    how: CaptionConfig,
    params,
    images: np.ndarray,
    prompts: list[str],
    seed: int,
    batch_size: int = 250,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[str], np.ndarray]:
    """Captions of images. Image i's depends on (seed, i, images[i], prompts[i]) alone.

    Args:
      config: what `params` were trained as.
      how: the search.
      params: the Transformer's parameters.
      images: float32 [num, height, width, channels]; or what has a length and gives them by index.
      prompts: what each caption begins with.
      seed: of what is drawn.
      batch_size: images read at a time.
      progress: called with the number of images done.

    Returns:
      The captions, prompts included, and log-probabilities of what was added, float32 [num].
    """
    slots = np.stack([to_slots(config.text, prompt, ended=False) for prompt in prompts])
    longest = int((slots != NO_TOKEN).sum(axis=1).max())
    model, noisy = config.transformer, config.joint.image_tokens == "noisy"
    params, captions, log_probs = _on_device(params), [], []
    for indices in _batches(len(images), batch_size):
        params, labels, tokens = _given(config, params, images, indices)
        texts = caption_tokens(
            model, how, noisy, params, image_keys(seed, indices), labels, tokens, jnp.asarray(slots[indices, :longest])
        )
        texts = jax.device_get(texts)
        captions += [from_slots(config.text, row) for row in texts.tokens]
        log_probs.append(texts.log_prob)
        progress(min(len(captions), len(images)))
    return captions[: len(images)], np.concatenate(log_probs)[: len(images)]


def score_captions_of_images(
    config: ExperimentConfig, params, images: np.ndarray, captions: Sequence[Sequence[str]], batch_size: int = 250
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of given captions, token by token.

    Args:
      config, params, images, batch_size: as for `caption_images`.
      captions: those of each image, one or more.

    Returns:
      float32 [num, captions, max_tokens - 1] in nats, the end included, and which are counted,
      bool; images with fewer captions than others are filled up with what is not counted.

    Raises:
      InputError: a caption that the tokenizer cannot read, or too long.
    """
    most = max(len(texts) for texts in captions)
    slots = np.full((len(images), most, config.text.max_tokens), NO_TOKEN, np.int32)
    for row, texts in enumerate(captions):
        slots[row, : len(texts)] = [to_slots(config.text, text) for text in texts]
    params, parts = _on_device(params), []
    for indices in _batches(len(images), batch_size):
        params, labels, tokens = _given(config, params, images, indices)
        noisy = config.joint.image_tokens == "noisy"
        scored = score_tokens(config.transformer, noisy, params, labels, tokens, jnp.asarray(slots[indices]))
        parts.append(jax.device_get(scored))
    log_probs, counted = (np.concatenate(a)[: len(images)] for a in zip(*parts, strict=True))
    return log_probs, counted
