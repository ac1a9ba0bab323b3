"""Images and videos in batches, over the devices of a machine or of a mesh."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from causalfusion_jax.common import distributed, sharding
from causalfusion_jax.common.pictures import to_uint8
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.config.sampling import SamplerConfig
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.patches import unpatchify
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.sampling.conditions import condition_shapes
from causalfusion_jax.sampling.sampler import (
    NOTHING,
    Given,
    SamplingSpec,
    image_keys,
    sample_tokens,
    sample_tokens_shared,
)

BATCH_SIZE = 250
"""Default number of images in a batch."""


@dataclasses.dataclass(frozen=True)
class SamplingJob:
    """Images or videos to generate; number i depends on (seed, i, condition i, what is given of it) alone.

    Attributes:
      config: settings that the parameters were trained with.
      sampler: how to sample.
      condition: of all images, arrays [num, ...].
      seed: of the noise and of drawn token orders.
      batch_size: number of images in a batch.
      decode: latents [batch, (frames,) height, width, channels] to pixels in [-1, 1], for a model
        of latents; None: the latents are returned.
      given: what is known of the images, arrays [num, ...].
      grid: token grid to generate; default: that of training.
    """

    config: ExperimentConfig
    sampler: SamplerConfig
    condition: Condition
    seed: int = 0
    batch_size: int = BATCH_SIZE
    decode: Callable[[jax.Array], jax.Array] | None = None
    given: Given = NOTHING
    grid: tuple[int, ...] = ()

    @property
    def num(self) -> int:
        """Number of images."""
        return self.condition.batch

    @property
    def spec(self) -> SamplingSpec:
        """Static arguments of the sampler."""
        config = self.config
        model = config.transformer.on_grid(self.grid or config.transformer.grid)
        return SamplingSpec(model, config.diffusion, config.factorization, self.sampler)

    def select(self, indices: np.ndarray) -> "SamplingJob":
        """The images numbered `indices`, int [batch]."""
        return dataclasses.replace(self, condition=self.condition.select(indices), given=self.given.select(indices))

    def finish(self, images: np.ndarray) -> np.ndarray:
        """Generated images, decoded where there is a decoder: pixels as uint8, latents unchanged."""
        return images if self.config.data.latents and self.decode is None else to_uint8(images)


def replicate(params, devices):
    """Parameters replicated over `devices`, which then share every batch of images.

    They keep their type: a device holds 4 bytes a parameter for float32 ones (2.7 GB for
    CausalFusion-XL), beside a training state, until the caller drops them.

    Args:
      params: host arrays, the same on every process, or arrays of a training state, with any sharding.
      devices: may belong to several processes.
    """
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices)
    return sharding.place(params, sharding.replicated(mesh))


def for_sampling(params) -> tuple:
    """Parameters as `batches` needs them: a copy for each mesh that computes a part of a batch by itself.

    Args:
      params: host arrays, for all devices of this process (one mesh, or several: `sharding.own_meshes`);
        arrays of a training state, for all devices of its mesh (`replicate`); or parameters on
        one device.
    """
    leaves = jax.tree.leaves(params)
    if not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return tuple(replicate(params, mesh.devices.ravel()) for mesh in sharding.own_meshes(jax.local_devices()))
    where = leaves[0].sharding
    return (replicate(params, where.mesh.devices.ravel()) if isinstance(where, NamedSharding) else params,)


def lower_replicate(params, devices) -> jax.stages.Lowered:
    """`replicate` of parameters of a training state, as one traced program.

    Args:
      params: jax.ShapeDtypeStruct of each, with its sharding in training.
      devices: as for `replicate`.
    """
    whole = sharding.replicated(sharding.make_mesh(sharding.MeshConfig(), devices))
    return jax.jit(lambda params: params, out_shardings=whole).lower(params)


class Share(NamedTuple):
    """The part of a batch that one program generates.

    Attributes:
      params: the Transformer's parameters, replicated over the devices that generate it.
      rows: int [share], its rows of the batch.
      keys: PRNG keys [share], split over these devices.
    """

    params: Params
    rows: np.ndarray
    keys: jax.Array


class Batch(NamedTuple):
    """Images that are generated together.

    Attributes:
      indices: int [batch], their numbers; padded with the last image.
      count: number of images without the padding.
      shares: its parts, in order.
    """

    indices: np.ndarray
    count: int
    shares: tuple[Share, ...]


def _mesh_of(params) -> Mesh | None:
    """The mesh whose devices share a batch; None if the parameters are on one device, without a mesh.

    Raises ValueError if they are split: XLA would have to partition the sampler, which it
    cannot if attention is a kernel, and every device would sample every image.
    """
    shardings = [leaf.sharding for leaf in jax.tree.leaves(params)]
    if all(isinstance(s, SingleDeviceSharding) for s in shardings):
        return None
    mesh = shardings[0].mesh if isinstance(shardings[0], NamedSharding) else None
    replicated = all(s.is_fully_replicated for s in shardings)
    if mesh is None or mesh.shape["data"] != mesh.size or not replicated:
        raise ValueError("sampling needs all parameters whole on every device: see generation.for_sampling")
    return mesh


def padded(batch_size: int, devices: int) -> int:
    """`batch_size` rounded up to a multiple of the devices that share a batch."""
    return -(-batch_size // devices) * devices


def batches(job: SamplingJob, params, wanted: Iterable[int] | None = None) -> Iterator[Batch]:
    """The images of a job in batches.

    Args:
      job: the images.
      params: the Transformer's parameters, as for `for_sampling`.
      wanted: numbers of the batches; batch k begins with image k * batch_size. Default: all.

    Raises:
      ValueError: the parameters are split over devices.
    """
    copies, devices, make_keys = for_sampling(params), 0, []
    for copy in copies:
        mesh = _mesh_of(copy)
        devices += 1 if mesh is None else mesh.size
        where = jax.tree.leaves(copy)[0].sharding if mesh is None else sharding.batch_sharding(mesh)
        make_keys.append(jax.jit(image_keys, static_argnums=0, out_shardings=where))
    batch_size = min(job.batch_size, job.num)
    computed = padded(batch_size, devices)
    rows = np.split(np.arange(computed), len(copies))
    for index in range(-(-job.num // batch_size)) if wanted is None else wanted:
        start = index * batch_size
        indices = np.minimum(np.arange(start, start + computed), job.num - 1)
        shares = tuple(
            Share(copy, own, keys_of(job.seed, indices[own]))
            for copy, own, keys_of in zip(copies, rows, make_keys, strict=True)
        )
        yield Batch(indices, min(batch_size, job.num - start), shares)


def generate_batch(job: SamplingJob, params, keys: jax.Array) -> jax.Array:
    """All images of a job in one batch, not decoded.

    Args:
      job: the images.
      params: the Transformer's parameters, as in `Share`.
      keys: PRNG keys [batch], as in `Share`.

    Returns:
      float32 [batch, (frames,) height, width, channels].
    """
    spec, mesh, given = job.spec, _mesh_of(params), job.given
    whole = keys.sharding if mesh is None else sharding.replicated(mesh)
    condition, of_images = sharding.place((job.condition, given._replace(step=None)), keys.sharding)
    given = of_images._replace(step=sharding.place(given.step, whole))
    # All arguments are on the devices by now.
    with jax.transfer_guard("disallow"):
        if mesh is None:
            tokens = sample_tokens(spec, params, keys, condition, given)
        else:
            tokens = sample_tokens_shared(mesh, spec, params, keys, condition, given)
    return unpatchify(tokens, spec.model.grid, job.config.model.patch_size)


def lower_sampler(config: ExperimentConfig, sampler: SamplerConfig, devices, batch_size: int) -> jax.stages.Lowered:
    """The program of `generate_batch` for parameters on a mesh of `devices`, traced.

    Args:
      config, sampler: as in SamplingJob.
      devices: those that share a batch.
      batch_size: number of images in a batch; rounded up to a multiple of the devices, as in `batches`.
    """
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices)
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    size = padded(batch_size, mesh.size)

    def abstract(shape, dtype, where):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    params = jax.tree.map(lambda leaf: abstract(leaf.shape, leaf.dtype, whole), abstract_model(config.transformer)[1])
    keys = jax.eval_shape(lambda: image_keys(0, np.arange(size)))
    condition = jax.tree.map(lambda leaf: abstract(leaf.shape, leaf.dtype, split), condition_shapes(config, size))
    spec = SamplingSpec(config.transformer, config.diffusion, config.factorization, sampler)
    return sample_tokens_shared.lower(mesh, spec, params, abstract(keys.shape, keys.dtype, split), condition, NOTHING)


def collect(batches_of_images: Iterable[np.ndarray], progress: Callable[[int], None]) -> np.ndarray:
    """Batches as one array; `progress` is called with the number of images done."""
    images = []
    for batch in batches_of_images:
        images.append(batch)
        progress(sum(map(len, images)))
    return np.concatenate(images)


def generate_images(job: SamplingJob, params, progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
    """Generates images or videos.

    Args:
      job: the images.
      params: the Transformer's parameters, as for `for_sampling`.
      progress: called with the number of images done.

    Returns:
      uint8 [num, (frames,) height, width, channels]; float32 for latents that are not decoded.
    """
    return collect(image_batches(job, params), progress)


def image_batches(job: SamplingJob, params, wanted: Iterable[int] | None = None) -> Iterator[np.ndarray]:
    """Generates images or videos, batch by batch.

    Args:
      job, params: as for `generate_images`.
      wanted: numbers of the batches, as for `batches`.

    Yields:
      Images of each batch, uint8 [batch, (frames,) height, width, channels]; float32 for
      latents that are not decoded.
    """
    for batch, parts in _generated(job, params, wanted):
        images = np.concatenate([distributed.everywhere(part) for part in parts])
        yield job.finish(images)[: batch.count]


def image_shares(job: SamplingJob, params) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`image_batches` without gathering: each process gets the images that its own devices computed.

    Yields:
      Image numbers, int [num], and these images, as in `image_batches`; num may be 0. All
      processes together get every image once.
    """
    for batch, parts in _generated(job, params):
        for share, images in zip(batch.shares, parts, strict=True):
            own, values = distributed.own_rows(images)
            rows = share.rows[own]
            wanted = rows < batch.count
            yield batch.indices[rows[wanted]], job.finish(values[wanted])


def _generated(job: SamplingJob, params, wanted=None) -> Iterator[tuple[Batch, list[jax.Array]]]:
    """Batches, and for each of their shares the images, decoded, on the devices."""
    for batch in batches(job, params, wanted):
        parts = []
        for share in batch.shares:
            images = generate_batch(job.select(batch.indices[share.rows]), share.params, share.keys)
            parts.append(images if job.decode is None else job.decode(images))
        yield batch, parts
