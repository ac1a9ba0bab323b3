"""Images of a run, in batches, from the run's averaged weights."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from causalfusion_jax import distributed, sharding
from causalfusion_jax.experiment import ExperimentConfig
from causalfusion_jax.models.patches import unpatchify
from causalfusion_jax.models.transformer import TransformerConfig
from causalfusion_jax.sampling.images import to_uint8
from causalfusion_jax.sampling.sampler import SamplerConfig, image_keys, sample_tokens


class Known(NamedTuple):
    """What is known of images before they are generated.

    Attributes:
      model: the network, on the grid generated.
      order: int32 [num, L], the token order of each image, known tokens first.
      tokens: float32 [num, K, token_dim], at the first K places of it.
      step: int32 [K], their AR steps.
    """

    model: TransformerConfig
    order: np.ndarray
    tokens: np.ndarray
    step: np.ndarray


def generate_batch(
    config: ExperimentConfig, sampler: SamplerConfig, params, keys: jax.Array, labels, known: Known | None = None
) -> jax.Array:
    """One batch of images or videos, as the model makes them.

    Args:
      config: what `params` were trained as.
      sampler: how to sample.
      params: the Transformer's parameters.
      keys: PRNG keys [batch], one an image.
      labels: int [batch].
      known: tokens of these images that stay as they are; default: none.

    Returns:
      float32 [batch, (frames,) height, width, channels].
    """
    model = known.model if known else config.transformer
    given = {"order": known.order, "known": known.tokens, "known_step": known.step} if known else {}
    labels, given = jax.device_put((labels, given), keys.sharding)
    tokens = sample_tokens(model, config.diffusion, config.factorization, sampler, params, keys, labels, **given)
    return unpatchify(tokens, model.grid, config.model.patch_size)


def finish(config: ExperimentConfig, batch: jax.Array, decode: Callable[[jax.Array], jax.Array] | None) -> np.ndarray:
    """What `generate_batch` made, decoded; as `generate_images` returns it."""
    if decode is not None:
        pixels = decode(batch.reshape(-1, *batch.shape[-3:]))
        batch = pixels.reshape(*batch.shape[:-3], *pixels.shape[1:])
    batch = distributed.everywhere(batch)
    return batch if config.data.latents and decode is None else to_uint8(batch)


def key_maker(params) -> Callable[..., jax.Array]:
    """`image_keys`, which lie beside the parameters, maybe on a mesh of several processes."""
    where = jax.tree.leaves(params)[0].sharding
    where = sharding.replicated(where.mesh) if isinstance(where, jax.sharding.NamedSharding) else where
    return jax.jit(image_keys, static_argnums=0, out_shardings=where)


def generate_images(
    config: ExperimentConfig,
    sampler: SamplerConfig,
    params,
    labels: np.ndarray,
    seed: int,
    batch_size: int = 250,
    progress: Callable[[int], None] = lambda done: None,
    decode: Callable[[jax.Array], jax.Array] | None = None,
    known: Known | None = None,
) -> np.ndarray:
    """Generates one image or video a label. Image i depends on (seed, i, labels[i]) alone.

    Args:
      config: what `params` were trained as.
      sampler: how to sample.
      params: the Transformer's parameters.
      labels: int [num]; num_classes stands for no class.
      seed: of all noise and orders.
      batch_size: images sampled at a time; the last batch is filled up, and cut.
      progress: called with the number of images done.
      decode: latents [batch, height, width, channels] to pixels in [-1, 1], for a model of
        latents; without it the latents themselves are returned.
      known: tokens that stay as they are; default: none.

    Returns:
      uint8 [num, (frames,) height, width, channels]; float32 for latents not decoded.
    """
    num, make_keys, images = len(labels), key_maker(params), []
    batch_size = min(batch_size, num)
    for start in range(0, num, batch_size):
        indices = np.minimum(np.arange(start, start + batch_size), num - 1)
        part = known and known._replace(order=known.order[indices], tokens=known.tokens[indices])
        batch = generate_batch(config, sampler, params, make_keys(seed, indices), labels[indices], part)
        images.append(finish(config, batch, decode))
        progress(min(start + batch_size, num))
    return np.concatenate(images)[:num]
