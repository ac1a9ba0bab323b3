"""Models to sample from: of a training run, or a converted checkpoint; and their autoencoders."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from causalfusion_jax.checkpoints.checkpoint import Checkpoints
from causalfusion_jax.common import distributed
from causalfusion_jax.common.errors import require
from causalfusion_jax.common.sharding import partition, place, replicated
from causalfusion_jax.config import experiment
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.data.class_names import stored_class_names
from causalfusion_jax.data.pipeline import class_names
from causalfusion_jax.models.autoencoder import AutoencoderConfig, abstract_autoencoder, decode, encode
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.store import Converted, open_converted
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.prepare.exported import TRANSFORMERS

AUTOENCODERS = ("mar_vae", "sd_vae")
DECODED_AT_A_TIME = 4
"""Number of images decoded at a time on a device, which may also hold a training state."""
BEST = "best"
"""In place of a step: the best checkpoint."""


class Trained(NamedTuple):
    """A trained transformer.

    Attributes:
      config: all its settings.
      origin: plain values that identify its weights.
      params: reads the weights, as host arrays.
      description: the file or run of the weights, and their step.
      class_names: names of the classes it was trained on; () if they were not kept.
    """

    config: ExperimentConfig
    origin: dict[str, Any]
    params: Callable[[], Params]
    description: str
    class_names: tuple[str, ...] = ()

    def read_class_names(self) -> tuple[str, ...]:
        """`class_names`, or if they were not kept, those of the data. Raises InputError if the data are gone."""
        return self.class_names or class_names(self.config.data)

    def announced_params(self, file: TextIO | None = None) -> Params:
        """`params()`; the primary process prints `description` to `file` [stdout]."""
        if distributed.is_primary():
            print(f"weights: {self.description}", file=file, flush=True)
        return self.params()


def from_run(workdir: str, weights: str = "ema", step: int | str | None = None) -> Trained:
    """The weights of a run.

    Args:
      workdir: the run's folder.
      weights: `ema` or `params`.
      step: of the checkpoint, or `best`: the best by the run's evaluations; default: the
        newest intact one.

    Raises:
      InputError: no run, no intact checkpoint, or none that was evaluated.
    """
    config = experiment.load(workdir)
    checkpoints = Checkpoints(workdir, read_only=True)
    if step == BEST:
        best = checkpoints.best()
        require(best is not None, "step", step, "the run was not evaluated; see config.evaluation.eval_every")
        step = best["step"]
    step = checkpoints.good_step(step)
    require(step is not None, "--workdir", workdir, "holds no checkpoint yet; train first")
    origin = {"step": step, "checkpoint": checkpoints.fingerprint(step), "weights": weights}
    return Trained(
        config,
        origin,
        lambda: checkpoints.restore_params(step, abstract_model(config.transformer)[1], weights),
        f"{weights} of step {step} of {workdir}",
        stored_class_names(workdir),
    )


def from_converted(folder: str) -> Trained:
    """The weights of a converted checkpoint. Raises InputError where it is none."""
    converted = open_converted("--checkpoint", folder, TRANSFORMERS)
    config = experiment.from_dict(converted.settings)
    shapes = abstract_model(config.transformer)[1]
    return Trained(
        config,
        {"checkpoint": converted.fingerprint},
        lambda: converted.params(shapes),
        converted.description,
        converted.class_names,
    )


def open_autoencoder(folder: str, field: str = "--vae") -> tuple[Converted, AutoencoderConfig]:
    """A converted autoencoder and its settings. Raises InputError where it is none."""
    converted = open_converted(field, folder, AUTOENCODERS)
    listed = {name: tuple(v) if isinstance(v, list) else v for name, v in converted.settings.items()}
    return converted, AutoencoderConfig(**listed)


def check_autoencoder(settings: AutoencoderConfig, config: ExperimentConfig, field: str, folder: str) -> None:
    """Raises InputError where a model's data are not the autoencoder's latents."""
    require(config.data.latents, field, folder, "the model was trained on pixels; leave it out")
    require(
        config.data.channels == settings.latent_channels,
        field,
        folder,
        f"has {settings.latent_channels} latent channels, the model {config.data.channels}",
    )


class Autoencoder(NamedTuple):
    """An autoencoder of a model's latents.

    Attributes:
      fingerprint: checksum of settings and parameters.
      downsampling: side of a latent in pixels.
      encode: pixels in [-1, 1] [batch, H, W, image channels] to latents in the model's range,
        [batch, H / downsampling, W / downsampling, channels]: the mean, not a sample.
      decode: latents [batch, (frames,) h, w, channels] to pixels; each device decodes its own
        latents.
    """

    fingerprint: str
    downsampling: int
    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]


def make_autoencoder(folder: str, config: ExperimentConfig, field: str = "--vae") -> Autoencoder:
    """The autoencoder of a model's latents.

    Args:
      folder: a converted autoencoder.
      config: the model's settings.
      field: the option that names it, for errors.

    Raises:
      InputError: not an autoencoder, or not that of the model's data.
    """
    converted, settings = open_autoencoder(folder, field)
    check_autoencoder(settings, config, field, folder)
    params = converted.params(abstract_autoencoder(settings)[1])

    @functools.cache
    def beside(where: Sharding):
        whole = replicated(where.mesh) if isinstance(where, NamedSharding) else where
        return place(params, whole)

    def decode_latents(latents: jax.Array) -> jax.Array:
        where = latents.sharding
        if isinstance(where, NamedSharding):
            return decode_shared(where.mesh, settings, beside(where), latents)
        return decode_each(settings, beside(where), latents)

    return Autoencoder(
        converted.fingerprint,
        settings.downsampling,
        lambda pixels: encode(settings, beside(SingleDeviceSharding(jax.local_devices()[0])), pixels),
        decode_latents,
    )


def decode_each(settings: AutoencoderConfig, params: Params, latents: jax.Array) -> jax.Array:
    """Latents [..., h, w, channels] to pixels [..., height, width, image channels], on one device."""
    pixels = decode(settings, params, latents.reshape(-1, *latents.shape[-3:]), DECODED_AT_A_TIME)
    return pixels.reshape(*latents.shape[:-3], *pixels.shape[1:])


@functools.partial(jax.jit, static_argnums=(0, 1))
def decode_shared(mesh: Mesh, settings: AutoencoderConfig, params: Params, latents: jax.Array) -> jax.Array:
    """`decode_each` on a mesh whose devices share the latents and have all parameters, without communication."""
    split = partition(("batch",))
    run = jax.shard_map(
        functools.partial(decode_each, settings),
        mesh=mesh,
        in_specs=(PartitionSpec(), split),
        out_specs=split,
        check_vma=False,
    )
    return run(params, latents)
