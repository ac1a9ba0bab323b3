"""Images of a run, in batches, from the run's averaged weights."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from causalfusion_jax.common import distributed, sharding
from causalfusion_jax.common.pictures import to_uint8
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.config.sampling import SamplerConfig
from causalfusion_jax.models.config import TransformerConfig
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.patches import unpatchify
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.sampling.sampler import image_keys, sample_tokens, sample_tokens_shared

BATCH_SIZE = 250
"""Images in a batch where nothing else is said."""


def replicate(params, devices):
    """Parameters whole on each of `devices`, which then share every batch of images.

    They are copied as they are: each device holds 4 bytes a parameter for float32 ones (2.7 GB
    for CausalFusion-XL), beside a training state, until the caller drops them.

    Args:
      params: host arrays, the same on every process, or arrays of a training state, however split.
      devices: which may be of several processes.
    """
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices)
    return sharding.place(params, sharding.replicated(mesh))


def for_sampling(params) -> tuple:
    """Parameters placed as `batches` needs them: a copy for each mesh that computes a part of a batch by itself.

    Args:
      params: host arrays, for all devices of this process (one mesh, or as of `sharding.own_meshes`);
        arrays of a training state, for all devices of its mesh (as of `replicate`); or what is
        placed so already.
    """
    leaves = jax.tree.leaves(params)
    if not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return tuple(replicate(params, mesh.devices.ravel()) for mesh in sharding.own_meshes(jax.local_devices()))
    where = leaves[0].sharding
    return (replicate(params, where.mesh.devices.ravel()) if isinstance(where, NamedSharding) else params,)


def lower_replicate(params, devices) -> jax.stages.Lowered:
    """What `replicate` does to parameters of a training state, as one program, traced.

    Args:
      params: jax.ShapeDtypeStruct of each, with the sharding that training has it in.
      devices: as of `replicate`.
    """
    whole = sharding.replicated(sharding.make_mesh(sharding.MeshConfig(), devices))
    return jax.jit(lambda params: params, out_shardings=whole).lower(params)


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


class Share(NamedTuple):
    """The part of a batch that one program generates.

    Attributes:
      params: the Transformer's parameters, whole on the devices that generate it.
      places: int [share], places in the batch.
      keys: PRNG keys [share], split over these devices.
    """

    params: Params
    places: np.ndarray
    keys: jax.Array


class Batch(NamedTuple):
    """Images that are generated together.

    Attributes:
      indices: int [batch], their numbers; a last batch is filled up with the last image.
      count: how many of them are wanted, the first ones.
      shares: its parts, in order.
    """

    indices: np.ndarray
    count: int
    shares: tuple[Share, ...]


def _mesh_of(params) -> Mesh | None:
    """The mesh whose devices share a batch; None where the parameters lie on one device, without a mesh.

    Raises ValueError where they are split: XLA would have to partition the sampler, which it
    cannot where attention is a kernel, and every device would sample every image.
    """
    placed = [leaf.sharding for leaf in jax.tree.leaves(params)]
    if all(isinstance(where, SingleDeviceSharding) for where in placed):
        return None
    mesh = placed[0].mesh if isinstance(placed[0], NamedSharding) else None
    if mesh is None or mesh.shape["data"] != mesh.size or not all(where.is_fully_replicated for where in placed):
        raise ValueError("sampling needs all parameters whole on every device: see generation.for_sampling")
    return mesh


def padded(batch_size: int, devices: int) -> int:
    """Images that are computed for a batch: a multiple of the devices that share it."""
    return -(-batch_size // devices) * devices


def batches(
    copies: tuple, num: int, seed: int, batch_size: int, wanted: Iterable[int] | None = None
) -> Iterator[Batch]:
    """Images 0..num-1 in batches.

    Args:
      copies: the Transformer's parameters, from `for_sampling`. Where a copy lies on a mesh, its
        devices divide a share of every batch among them.
      num: images in all.
      seed: of their keys.
      batch_size: images in a batch.
      wanted: numbers of the batches; batch k begins with image k * batch_size. Default: all.

    Raises:
      ValueError: the parameters are split over devices.
    """
    devices, makers = 0, []
    for params in copies:
        mesh = _mesh_of(params)
        devices += 1 if mesh is None else mesh.size
        where = jax.tree.leaves(params)[0].sharding if mesh is None else sharding.batch_sharding(mesh)
        makers.append(jax.jit(image_keys, static_argnums=0, out_shardings=where))
    batch_size = min(batch_size, num)
    computed = padded(batch_size, devices)
    places = np.split(np.arange(computed), len(copies))
    for index in range(-(-num // batch_size)) if wanted is None else wanted:
        start = index * batch_size
        indices = np.minimum(np.arange(start, start + computed), num - 1)
        shares = zip(copies, places, makers, strict=True)
        yield Batch(
            indices,
            min(batch_size, num - start),
            tuple(Share(params, part, make_keys(seed, indices[part])) for params, part, make_keys in shares),
        )


def generate_batch(
    config: ExperimentConfig,
    sampler: SamplerConfig,
    params,
    keys: jax.Array,
    labels,
    known: Known | None = None,
    text: np.ndarray | None = None,
) -> jax.Array:
    """One batch of images or videos, as the model makes them.

    Args:
      config: what `params` were trained as.
      sampler: how to sample.
      params: the Transformer's parameters, as of `batches`.
      keys: PRNG keys [batch], one an image, as of `batches`.
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
    of_images = {"keys": keys, **sharding.place(of_images, keys.sharding)}
    mesh = _mesh_of(params)
    whole = keys.sharding if mesh is None else sharding.replicated(mesh)
    of_all = sharding.place({"known_step": known.step}, whole) if known else {}
    # What it takes is placed by now.
    with jax.transfer_guard("disallow"):
        if mesh is None:
            tokens = sample_tokens(*static, params, **of_images, **of_all)
        else:
            tokens = sample_tokens_shared(mesh, *static, params, of_images, of_all)
    return unpatchify(tokens, model.grid, config.model.patch_size)


def lower_sampler(config: ExperimentConfig, sampler: SamplerConfig, devices, batch_size: int) -> jax.stages.Lowered:
    """The program that `generate_batch` runs on parameters of a mesh of `devices`, traced.

    Args:
      config, sampler: as of `generate_batch`.
      devices: those that share a batch.
      batch_size: images in a batch; filled up to a multiple of the devices, as in `batches`.
    """
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices)
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    size = padded(batch_size, mesh.size)

    def abstract(shape, dtype, where):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    params = jax.tree.map(lambda leaf: abstract(leaf.shape, leaf.dtype, whole), abstract_model(config.transformer)[1])
    keys = jax.eval_shape(lambda: image_keys(0, np.arange(size)))
    of_images = {"keys": abstract(keys.shape, keys.dtype, split), "labels": abstract((size,), np.int32, split)}
    if config.text.is_on:
        of_images["text"] = abstract((size, config.text.max_tokens), np.int32, split)
    static = config.transformer, config.diffusion, config.factorization, sampler
    return sample_tokens_shared.lower(mesh, *static, params, of_images, {})


def finish(config: ExperimentConfig, batch: np.ndarray, decoded: bool) -> np.ndarray:
    """Images as `generate_images` returns them, of what `generate_batch` made, `decoded` or not, on the host."""
    return batch if config.data.latents and not decoded else to_uint8(batch)


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
    batch_size: int = BATCH_SIZE,
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
    batch_size: int = BATCH_SIZE,
    decode: Callable[[jax.Array], jax.Array] | None = None,
    wanted: Iterable[int] | None = None,
    known: Known | None = None,
    text: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Generates one image or video a label, batch by batch.

    Args:
      config: what `params` were trained as.
      sampler: how to sample.
      params: the Transformer's parameters, wherever they lie, as of `for_sampling`.
      seed, batch_size, wanted: as of `batches`.
      labels: int [num]; num_classes stands for no class.
      decode: latents [batch, (frames,) height, width, channels] to pixels in [-1, 1], for a
        model of latents; without it the latents themselves are returned.
      known: tokens that stay as they are; default: none.
      text: prompts, int32 [num, T], NO_TOKEN in empty slots, for a model that knows text.

    Yields:
      Images of each batch, uint8 [batch, (frames,) height, width, channels]; float32 for
      latents not decoded.
    """
    made = _made(config, sampler, params, labels, (seed, batch_size, wanted), decode, known, text)
    for batch, parts in made:
        images = np.concatenate([distributed.everywhere(part) for part in parts])
        yield finish(config, images, decode is not None)[: batch.count]


def image_shares(
    config: ExperimentConfig,
    sampler: SamplerConfig,
    params,
    labels: np.ndarray,
    seed: int,
    batch_size: int = BATCH_SIZE,
    decode: Callable[[jax.Array], jax.Array] | None = None,
    text: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As `image_batches`, but each process gets only what its own devices make; nothing is gathered.

    Yields:
      Image numbers, int [num], and these images, as of `image_batches`; num may be 0. All
      processes together get every image once.
    """
    for batch, parts in _made(config, sampler, params, labels, (seed, batch_size, None), decode, None, text):
        for share, images in zip(batch.shares, parts, strict=True):
            rows, values = distributed.own_rows(images)
            places = share.places[rows]
            wanted = places < batch.count
            yield batch.indices[places[wanted]], finish(config, values[wanted], decode is not None)


def _made(config, sampler, params, labels, how, decode, known, text) -> Iterator[tuple[Batch, list[jax.Array]]]:
    """Batches, and what was generated and decoded for each share, on the devices; `how`: as of `batches`."""
    for batch in batches(for_sampling(params), len(labels), *how):
        parts = []
        for share in batch.shares:
            indices = batch.indices[share.places]
            part = known and known._replace(order=known.order[indices], tokens=known.tokens[indices])
            prompts = None if text is None else text[indices]
            images = generate_batch(config, sampler, share.params, share.keys, labels[indices], part, prompts)
            parts.append(images if decode is None else decode(images))
        yield batch, parts
