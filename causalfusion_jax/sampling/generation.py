"""Images of a run, in batches, from the run's averaged weights."""

from collections.abc import Callable

import jax
import numpy as np

from causalfusion_jax import distributed, sharding
from causalfusion_jax.experiment import ExperimentConfig
from causalfusion_jax.models.patches import unpatchify
from causalfusion_jax.sampling.images import to_uint8
from causalfusion_jax.sampling.sampler import SamplerConfig, image_keys, sample_tokens


def generate_images(
    config: ExperimentConfig,
    sampler: SamplerConfig,
    params,
    labels: np.ndarray,
    seed: int,
    batch_size: int = 250,
    progress: Callable[[int], None] = lambda done: None,
    decode: Callable[[jax.Array], jax.Array] | None = None,
    text: np.ndarray | None = None,
) -> np.ndarray:
    """Generates one image or video a label. Image i depends on (seed, i, labels[i], text[i]) alone.

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
      text: prompts, int32 [num, T], NO_TOKEN in empty slots, for a model that knows text.

    Returns:
      uint8 [num, (frames,) height, width, channels]; float32 for latents not decoded.
    """
    model, num = config.transformer, len(labels)
    # Beside the parameters, which may lie on a mesh of several processes.
    where = jax.tree.leaves(params)[0].sharding
    where = sharding.replicated(where.mesh) if isinstance(where, jax.sharding.NamedSharding) else where
    make_keys = jax.jit(image_keys, static_argnums=0, out_shardings=where)
    batch_size = min(batch_size, num)
    images = []
    for start in range(0, num, batch_size):
        indices = np.minimum(np.arange(start, start + batch_size), num - 1)
        tokens = sample_tokens(
            model, config.diffusion, config.factorization, sampler, params,
            make_keys(seed, indices), jax.device_put(labels[indices], where),
            text=None if text is None else jax.device_put(text[indices], where),
        )
        batch = unpatchify(tokens, model.grid, config.model.patch_size)
        if decode is not None:
            pixels = decode(batch.reshape(-1, *batch.shape[-3:]))
            batch = pixels.reshape(*batch.shape[:-3], *pixels.shape[1:])
        batch = distributed.everywhere(batch)
        images.append(batch if config.data.latents and decode is None else to_uint8(batch))
        progress(min(start + batch_size, num))
    return np.concatenate(images)[:num]
