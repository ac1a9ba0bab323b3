"""Images of a run, in batches, from the run's averaged weights."""

from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from causalfusion_jax import distributed, sharding
from causalfusion_jax.experiment import ExperimentConfig
from causalfusion_jax.models.patches import unpatchify
from causalfusion_jax.sampling.images import to_uint8
from causalfusion_jax.sampling.sampler import SamplerConfig, image_keys, sample_tokens, sample_tokens_shared


def replicate(params, devices):
    """Parameters whole on each of `devices`, which then share every batch of images."""
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices)
    return jax.device_put(params, sharding.replicated(mesh))


def generate_images(
    config: ExperimentConfig,
    sampler: SamplerConfig,
    params,
    labels: np.ndarray,
    seed: int,
    batch_size: int = 250,
    progress: Callable[[int], None] = lambda done: None,
    decode: Callable[[jax.Array], jax.Array] | None = None,
) -> np.ndarray:
    """Generates one image or video a label. Image i depends on (seed, i, labels[i]) alone.

    Args:
      config, sampler, params, labels, seed, batch_size, decode: as of `image_batches`.
      progress: called with the number of images done.

    Returns:
      uint8 [num, (frames,) height, width, channels]; float32 for latents not decoded.
    """
    images = []
    for batch in image_batches(config, sampler, params, labels, seed, batch_size, decode):
        images.append(batch)
        progress(sum(map(len, images)))
    return np.concatenate(images)


def image_batches(
    config: ExperimentConfig,
    sampler: SamplerConfig,
    params,
    labels: np.ndarray,
    seed: int,
    batch_size: int = 250,
    decode: Callable[[jax.Array], jax.Array] | None = None,
    wanted: Iterable[int] | None = None,
) -> Iterator[np.ndarray]:
    """Generates one image or video a label, batch by batch.

    Args:
      config: what `params` were trained as.
      sampler: how to sample.
      params: the Transformer's parameters. Where they are whole on every device of a mesh
        (`replicate`), the devices share every batch.
      labels: int [num]; num_classes stands for no class.
      seed: of all noise and orders.
      batch_size: images sampled at a time; the last batch is filled up, and cut.
      decode: latents [batch, height, width, channels] to pixels in [-1, 1], for a model of
        latents; without it the latents themselves are returned.
      wanted: numbers of the batches to generate; batch k begins with image k * batch_size.
        Default: all.

    Yields:
      Images of each batch, uint8 [batch, (frames,) height, width, channels]; float32 for
      latents not decoded.
    """
    model, num = config.transformer, len(labels)
    static = model, config.diffusion, config.factorization, sampler
    # Beside the parameters, which may lie on a mesh of several processes.
    where = jax.tree.leaves(params)[0].sharding
    mesh = where.mesh if isinstance(where, jax.sharding.NamedSharding) else None
    shared = mesh is not None and mesh.shape["data"] == mesh.size
    where = where if mesh is None else sharding.batch_sharding(mesh) if shared else sharding.replicated(mesh)
    make_keys = jax.jit(image_keys, static_argnums=0, out_shardings=where)
    batch_size = min(batch_size, num)
    computed = -(-batch_size // mesh.size) * mesh.size if shared else batch_size
    for index in range(-(-num // batch_size)) if wanted is None else wanted:
        start = index * batch_size
        indices = np.minimum(np.arange(start, start + computed), num - 1)
        of_images = {"keys": make_keys(seed, indices), "labels": jax.device_put(labels[indices], where)}
        if shared:
            tokens = sample_tokens_shared(mesh, *static, params, of_images)
        else:
            tokens = sample_tokens(*static, params, **of_images)
        batch = unpatchify(tokens, model.grid, config.model.patch_size)
        if decode is not None:
            pixels = decode(batch.reshape(-1, *batch.shape[-3:]))
            batch = pixels.reshape(*batch.shape[:-3], *pixels.shape[1:])
        batch = distributed.everywhere(batch)[:min(batch_size, num - start)]
        yield batch if config.data.latents and decode is None else to_uint8(batch)
