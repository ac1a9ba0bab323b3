"""Images of a run, in batches, from the run's averaged weights."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from causalfusion_jax import distributed, sharding
from causalfusion_jax.experiment import ExperimentConfig
from causalfusion_jax.models.patches import unpatchify
from causalfusion_jax.models.transformer import TransformerConfig, abstract_model
from causalfusion_jax.sampling.images import to_uint8
from causalfusion_jax.sampling.sampler import SamplerConfig, image_keys, sample_tokens, sample_tokens_shared


def replicate(params, devices):
    """Parameters whole on each of `devices`, which then share every batch of images."""
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices)
    return jax.device_put(params, sharding.replicated(mesh))


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


class Batch(NamedTuple):
    """Images that are generated together.

    Attributes:
      indices: int [batch], their numbers; a last batch is filled up with the last image.
      count: how many of them are wanted, the first ones.
      keys: PRNG keys [batch], split over the devices that share the batch.
    """

    indices: np.ndarray
    count: int
    keys: jax.Array


def padded(batch_size: int, mesh: Mesh) -> int:
    """Images that are computed for a batch: a multiple of the devices that share it."""
    return -(-batch_size // mesh.size) * mesh.size


def batches(params, num: int, seed: int, batch_size: int, wanted: Iterable[int] | None = None) -> Iterator[Batch]:
    """Images 0..num-1 in batches.

    Args:
      params: the Transformer's parameters. Where they are whole on every device of a mesh
        (`replicate`), the devices share every batch.
      num: images in all.
      seed: of their keys.
      batch_size: images in a batch.
      wanted: numbers of the batches; batch k begins with image k * batch_size. Default: all.
    """
    # Beside the parameters, which may lie on a mesh of several processes.
    where = jax.tree.leaves(params)[0].sharding
    mesh = where.mesh if isinstance(where, NamedSharding) else None
    shared = mesh is not None and mesh.shape["data"] == mesh.size
    where = where if mesh is None else sharding.batch_sharding(mesh) if shared else sharding.replicated(mesh)
    make_keys = jax.jit(image_keys, static_argnums=0, out_shardings=where)
    batch_size = min(batch_size, num)
    computed = -(-batch_size // mesh.size) * mesh.size if shared else batch_size
    for index in range(-(-num // batch_size)) if wanted is None else wanted:
        start = index * batch_size
        indices = np.minimum(np.arange(start, start + computed), num - 1)
        yield Batch(indices, min(batch_size, num - start), make_keys(seed, indices))


def generate_batch(
    config: ExperimentConfig, sampler: SamplerConfig, params, keys: jax.Array, labels, known: Known | None = None,
    text: np.ndarray | None = None,
) -> jax.Array:
    """One batch of images or videos, as the model makes them.

    Args:
      config: what `params` were trained as.
      sampler: how to sample.
      params: the Transformer's parameters.
      keys: PRNG keys [batch], one an image, split over the devices that are to share them.
      labels: int [batch].
      known: tokens of these images that stay as they are; default: none.
      text: their prompts, int32 [batch, T]; default: none.

    Returns:
      float32 [batch, (frames,) height, width, channels].
    """
    model = known.model if known else config.transformer
    static = model, config.diffusion, config.factorization, sampler
    of_images = {"labels": labels, **({"order": known.order, "known": known.tokens} if known else {})}
    of_images |= {} if text is None else {"text": text}
    of_images = {"keys": keys, **jax.device_put(of_images, keys.sharding)}
    of_all = {"known_step": known.step} if known else {}
    if isinstance(keys.sharding, NamedSharding) and not keys.sharding.is_fully_replicated:
        tokens = sample_tokens_shared(keys.sharding.mesh, *static, params, of_images, of_all)
    else:
        tokens = sample_tokens(*static, params, **of_images, **of_all)
    return unpatchify(tokens, model.grid, config.model.patch_size)


def lower_sampler(
    config: ExperimentConfig, sampler: SamplerConfig, devices, batch_size: int, text_tokens: int = 0
) -> jax.stages.Lowered:
    """The program that `generate_batch` runs on parameters of `replicate`, traced.

    Args:
      config, sampler: as of `generate_batch`.
      devices: those that share a batch.
      batch_size: images in a batch; filled up to a multiple of the devices, as in `batches`.
      text_tokens: slots of a prompt; 0: none are given.
    """
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices)
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    size = padded(batch_size, mesh)

    def abstract(shape, dtype, where):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    params = jax.tree.map(lambda leaf: abstract(leaf.shape, leaf.dtype, whole), abstract_model(config.transformer)[1])
    keys = jax.eval_shape(lambda: image_keys(0, np.arange(size)))
    of_images = {"keys": abstract(keys.shape, keys.dtype, split), "labels": abstract((size,), np.int32, split)}
    if text_tokens:
        of_images["text"] = abstract((size, text_tokens), np.int32, split)
    static = config.transformer, config.diffusion, config.factorization, sampler
    return sample_tokens_shared.lower(mesh, *static, params, of_images, {})


def finish(config: ExperimentConfig, batch: jax.Array, decode: Callable[[jax.Array], jax.Array] | None) -> np.ndarray:
    """What `generate_batch` made, decoded; as `generate_images` returns it."""
    if decode is not None:
        pixels = decode(batch.reshape(-1, *batch.shape[-3:]))
        batch = pixels.reshape(*batch.shape[:-3], *pixels.shape[1:])
    batch = distributed.everywhere(batch)
    return batch if config.data.latents and decode is None else to_uint8(batch)


def collect(made: Iterable[np.ndarray], progress: Callable[[int], None]) -> np.ndarray:
    """Batches as one array; `progress` is called with the number of images done."""
    images = []
    for batch in made:
        images.append(batch)
        progress(sum(map(len, images)))
    return np.concatenate(images)


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
    text: np.ndarray | None = None,
) -> np.ndarray:
    """Generates one image or video a label. Image i depends on (seed, i, labels[i], text[i]) alone.

    Args:
      config, sampler, params, labels, seed, batch_size, decode, known, text: as of `image_batches`.
      progress: called with the number of images done.

    Returns:
      uint8 [num, (frames,) height, width, channels]; float32 for latents not decoded.
    """
    made = image_batches(config, sampler, params, labels, seed, batch_size, decode, known=known, text=text)
    return collect(made, progress)


def image_batches(
    config: ExperimentConfig,
    sampler: SamplerConfig,
    params,
    labels: np.ndarray,
    seed: int,
    batch_size: int = 250,
    decode: Callable[[jax.Array], jax.Array] | None = None,
    wanted: Iterable[int] | None = None,
    known: Known | None = None,
    text: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Generates one image or video a label, batch by batch.

    Args:
      config: what `params` were trained as.
      sampler: how to sample.
      params, seed, batch_size, wanted: as of `batches`.
      labels: int [num]; num_classes stands for no class.
      decode: latents [batch, height, width, channels] to pixels in [-1, 1], for a model of
        latents; without it the latents themselves are returned.
      known: tokens that stay as they are; default: none.
      text: prompts, int32 [num, T], NO_TOKEN in empty slots, for a model that knows text.

    Yields:
      Images of each batch, uint8 [batch, (frames,) height, width, channels]; float32 for
      latents not decoded.
    """
    for batch in batches(params, len(labels), seed, batch_size, wanted):
        indices = batch.indices
        part = known and known._replace(order=known.order[indices], tokens=known.tokens[indices])
        prompts = None if text is None else text[indices]
        made = generate_batch(config, sampler, params, batch.keys, labels[indices], part, prompts)
        yield finish(config, made, decode)[: batch.count]
