"""Captions of images, and scores of given captions, in batches."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.config.sampling import CaptionConfig
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.core.layouts import NO_TOKEN
from causalfusion_jax.data.tokenizers import from_slots, to_slots
from causalfusion_jax.models.patches import patchify
from causalfusion_jax.sampling.captioning import GREEDY, CaptionSpec, caption_tokens, score_tokens
from causalfusion_jax.sampling.sampler import image_keys


def _batches(num: int, batch_size: int):
    """Example numbers of each batch; the last batch is padded, so that one program serves all."""
    size = min(batch_size, num)
    for start in range(0, num, size):
        yield np.minimum(np.arange(start, start + size), num - 1)


def _spec(config: ExperimentConfig, search: CaptionConfig = GREEDY) -> CaptionSpec:
    return CaptionSpec(config.transformer, config.joint.image_tokens == "noisy", search)


def _on_device(params):
    """Parameters on one device, which computes every batch."""
    return jax.device_put(params, jax.local_devices()[0])


def _read(config: ExperimentConfig, images, indices) -> tuple[Condition, jax.Array]:
    """Condition (no class) and image tokens of a batch."""
    tokens = patchify(jnp.asarray(images[indices]), config.model.patch_size)
    return Condition(jnp.full(len(indices), config.data.num_classes)), tokens


def caption_images(
    config: ExperimentConfig,
    search: CaptionConfig,
    params,
    images: np.ndarray,
    prompts: list[str],
    seed: int,
    batch_size: int = 250,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[str], np.ndarray]:
    """Captions of images. The caption of image i depends on (seed, i, images[i], prompts[i]) alone.

    Args:
      config: settings that `params` were trained with.
      search: how captions are generated.
      params: the Transformer's parameters.
      images: float32 [num, height, width, channels]; or `images.ImagesOnDemand`.
      prompts: the beginning of each caption.
      seed: of sampling with a temperature.
      batch_size: number of images in a batch.
      progress: called with the number of images done.

    Returns:
      The captions, prompts included, and log-probabilities of the tokens after the prompts,
      float32 [num], nats.
    """
    slots = np.stack([to_slots(config.text, prompt, ended=False) for prompt in prompts])
    longest = int((slots != NO_TOKEN).sum(axis=1).max())
    spec, params, captions, log_probs = _spec(config, search), _on_device(params), [], []
    for indices in _batches(len(images), batch_size):
        condition, tokens = _read(config, images, indices)
        keys, given = image_keys(seed, indices), jnp.asarray(slots[indices, :longest])
        texts = jax.device_get(caption_tokens(spec, params, keys, condition, tokens, given))
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
      captions: one or more for each image.

    Returns:
      float32 [num, captions, max_tokens - 1] in nats, the end included, and which tokens are
      counted, bool; rows of images with fewer captions than others are padded.

    Raises:
      InputError: a caption that the tokenizer cannot read, or too long.
    """
    most = max(len(texts) for texts in captions)
    slots = np.full((len(images), most, config.text.max_tokens), NO_TOKEN, np.int32)
    for row, texts in enumerate(captions):
        slots[row, : len(texts)] = [to_slots(config.text, text) for text in texts]
    params, parts = _on_device(params), []
    for indices in _batches(len(images), batch_size):
        condition, tokens = _read(config, images, indices)
        scored = score_tokens(_spec(config), params, condition, tokens, jnp.asarray(slots[indices]))
        parts.append(jax.device_get(scored))
    log_probs, counted = (np.concatenate(a)[: len(images)] for a in zip(*parts, strict=True))
    return log_probs, counted
