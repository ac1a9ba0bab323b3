"""The encoder of an autoencoder over the devices of a host: images to the Gaussians of their latents."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from causalfusion_jax.common import sharding
from causalfusion_jax.common.errors import require
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.registry import require_encodable
from causalfusion_jax.models.autoencoder import AutoencoderConfig, abstract_autoencoder, moments
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.store import Converted
from causalfusion_jax.prepare.settings import EncodeConfig


def pixel_data(data: DataConfig, vae: AutoencoderConfig) -> DataConfig:
    """Settings of the images to encode.

    Args:
      data: of a model of latents (`latents` set), whose images are larger by the
        autoencoder's downsampling; or of the images themselves.
      vae: the autoencoder.

    Raises:
      InputError: the model's latents are not the autoencoder's, or the source holds latents already.
    """
    if data.latents:
        require_encodable(data)
        allowed = f"must be {vae.latent_channels}, the channels of the autoencoder's latents"
        require(data.channels == vae.latent_channels, "config.data.channels", data.channels, allowed)
        data = dataclasses.replace(
            data, latents=False, image_size=data.image_size * vae.downsampling, channels=vae.image_channels
        )
    allowed = f"must be {vae.image_channels}, which the autoencoder takes"
    require(data.channels == vae.image_channels, "config.data.channels", data.channels, allowed)
    allowed = f"must be a multiple of {vae.downsampling}, the autoencoder's downsampling"
    require(data.image_size % vae.downsampling == 0, "config.data.image_size", data.image_size, allowed)
    return data


def check_batch_size(settings: EncodeConfig, devices: int) -> None:
    """Raises InputError if a batch does not split evenly over the devices of a host."""
    allowed = f"must be a multiple of the {devices} devices"
    require(settings.batch_size % devices == 0, "--batch_size", settings.batch_size, allowed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode_views(vae: AutoencoderConfig, micro_batch: int, params: Params, images: jax.Array) -> jax.Array:
    """Mean and standard deviation of images, upright and mirrored, as `LatentEncoder` returns them."""
    flat = images.reshape(-1, *images.shape[-3:])
    views = []
    for view in (flat, flat[:, :, ::-1]):
        mean, log_variance = moments(vae, params, view, micro_batch)
        shape = (*images.shape[:-3], *mean.shape[1:])
        views.append(jnp.stack([mean, jnp.exp(0.5 * log_variance)]).reshape(2, *shape))
    return jnp.stack(views, 2).swapaxes(0, 1).astype(jnp.bfloat16)


def lower_encoder(
    vae: AutoencoderConfig, data: DataConfig, settings: EncodeConfig, devices: Sequence[jax.Device], slice_devices: int
) -> jax.stages.Lowered:
    """The lowered program that encodes a batch, or one program's part of it, on the devices of a host.

    Args:
      vae: the autoencoder.
      data: the images, from `pixel_data`.
      settings: batch sizes.
      devices, slice_devices: see `sharding.own_meshes`.
    """
    meshes = sharding.own_meshes(devices, slice_devices)
    mesh, batch_size = meshes[0], settings.batch_size // len(meshes)
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), abstract_autoencoder(vae)[1]
    )
    images = jax.ShapeDtypeStruct((batch_size, *data.shape), np.float32, sharding=split)
    return _encode_views.lower(vae, settings.micro_batch * mesh.size, params, images)


class LatentEncoder:
    """Encodes images upright and mirrored, over the devices of this host.

    Args:
      converted, vae: the autoencoder.
      settings: batch sizes.
      devices: of this process.
    """

    def __init__(
        self, converted: Converted, vae: AutoencoderConfig, settings: EncodeConfig, devices: Sequence[jax.Device]
    ):
        params = jax.device_get(converted.params(abstract_autoencoder(vae)[1]))
        self.batch_size, self._devices = settings.batch_size, sharding.OwnDevices(params, devices)
        devices_per_program = len(devices) // self._devices.count
        self._run = functools.partial(_encode_views, vae, settings.micro_batch * devices_per_program)

    def __call__(self, images: np.ndarray) -> list[jax.Array]:
        """Starts to encode at most `batch_size` images [num, (frames,) height, width, channels].

        Returns:
          Mean and standard deviation, bfloat16 [batch_size, 2 (mean, std), 2 (flips), (frames,) h, w, channels],
          in the parts that `OwnDevices.run` returns; rows after the images are padding.
        """
        padded = np.zeros((self.batch_size, *images.shape[1:]), np.float32)
        padded[: len(images)] = images
        # Only the images of a batch are transferred to the devices.
        with jax.transfer_guard("disallow"):
            return self._devices.run(self._run, padded)
