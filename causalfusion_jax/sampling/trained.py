"""Trained weights, of a training run or a converted checkpoint, and the autoencoder of their latents."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from causalfusion_jax.checkpoints.checkpoint import Checkpoints
from causalfusion_jax.common import distributed
from causalfusion_jax.common.errors import require, require_one_of
from causalfusion_jax.common.sharding import partition, place, replicated
from causalfusion_jax.config import experiment
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.config.workdir import load_config
from causalfusion_jax.data.class_names import stored_class_names
from causalfusion_jax.data.registry import class_names
from causalfusion_jax.models.autoencoder import AutoencoderConfig, abstract_autoencoder, decode, encode
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.store import Converted, open_converted
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.prepare.conversion import autoencoder_config
from causalfusion_jax.prepare.exported import TRANSFORMERS

AUTOENCODERS = ("mar_vae", "sd_vae")
DECODED_AT_A_TIME = 4
"""Images that a device decodes at a time, possibly with a training state in memory."""
BEST = "best"
"""Instead of a step: the best checkpoint by the run's evaluations."""
WEIGHTS = ("ema", "params")
"""Averaged weights, and those of the last step."""


class Trained(NamedTuple):
    """A trained transformer.

    Attributes:
      config: all its settings.
      origin: plain values that identify its weights.
      params: reads the weights, as host arrays.
      description: the file or run of the weights, and their step.
      class_names: of the classes it was trained on; () if they were not stored.
    """

    config: ExperimentConfig
    origin: dict[str, Any]
    params: Callable[[], Params]
    description: str
    class_names: tuple[str, ...] = ()

    def read_class_names(self) -> tuple[str, ...]:
        """`class_names`, or those of the data if none were stored. Raises InputError if the data cannot be read."""
        return self.class_names or class_names(self.config.data)

    def announced_params(self, file: TextIO | None = None) -> Params:
        """`params()`; the primary process prints their description to `file` [stdout]."""
        if distributed.is_primary():
            print(f"weights: {self.description}", file=file, flush=True)
        return self.params()


@dataclasses.dataclass(frozen=True)
class WeightsChoice:
    """Which trained weights to use: those of a run, or of a converted checkpoint.

    Attributes:
      workdir: folder of the run; None: a converted checkpoint.
      checkpoint: folder of the converted checkpoint; None: a run.
      weights: of a run, one of WEIGHTS; None: `ema`.
      step: of a run, see `from_run`.

    Raises:
      InputError: neither or both of workdir and checkpoint, or `weights` or `step` of a converted checkpoint.
    """

    workdir: str | None = None
    checkpoint: str | None = None
    weights: str | None = None
    step: int | str | None = None

    def __post_init__(self):
        given = (self.workdir is None) + (self.checkpoint is None)
        require(given == 1, "workdir", self.workdir, "give --workdir, or --checkpoint, and not both")
        for name in ("weights", "step"):
            value = getattr(self, name)
            allowed = "a converted checkpoint has one set of weights; leave it out"
            require(value is None or self.workdir is not None, name, value, allowed)
        if self.weights is not None:
            require_one_of("weights", self.weights, WEIGHTS)

    def open(self) -> Trained:
        """The model. Raises InputError if the run or checkpoint cannot be used."""
        if self.workdir is None:
            return from_converted(self.checkpoint)
        return from_run(self.workdir, self.weights or "ema", self.step)


def from_run(workdir: str, weights: str = "ema", step: int | str | None = None) -> Trained:
    """The weights of a run.

    Args:
      workdir: the run's folder.
      weights: one of WEIGHTS.
      step: step of the checkpoint, or BEST; default: that of the newest intact checkpoint.

    Raises:
      InputError: no run, no intact checkpoint, or BEST of a run that was not evaluated.
    """
    config = load_config(workdir)
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
    """The weights of a converted checkpoint. Raises InputError if `folder` does not hold one."""
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
    """A converted autoencoder and its settings. Raises InputError if `folder` does not hold one."""
    converted = open_converted(field, folder, AUTOENCODERS)
    return converted, autoencoder_config(converted.settings)


def check_autoencoder(settings: AutoencoderConfig, config: ExperimentConfig, field: str, folder: str) -> None:
    """Raises InputError if the model's data are not latents of this autoencoder."""
    require(config.data.latents, field, folder, "the model was trained on pixels; leave it out")
    allowed = f"has {settings.latent_channels} latent channels, the model {config.data.channels}"
    require(config.data.channels == settings.latent_channels, field, folder, allowed)


class LatentCodec(NamedTuple):
    """An autoencoder of a model's latents.

    Attributes:
      fingerprint: checksum of settings and parameters.
      downsampling: side of a latent in pixels.
      encode: pixels in [-1, 1] [batch, H, W, image channels] to latents as the model takes
        them, [batch, H / downsampling, W / downsampling, channels]: the mean, not a sample.
      decode: latents [batch, (frames,) h, w, channels] to pixels; each device decodes the
        latents that it holds.
    """

    fingerprint: str
    downsampling: int
    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]


def make_autoencoder(folder: str, config: ExperimentConfig, field: str = "--vae") -> LatentCodec:
    """The autoencoder of a model's latents.

    Args:
      folder: of a converted autoencoder.
      config: the model's settings.
      field: the option that names the folder, for errors.

    Raises:
      InputError: `folder` holds no autoencoder, or the model's data are not its latents.
    """
    converted, settings = open_autoencoder(folder, field)
    check_autoencoder(settings, config, field, folder)
    params = converted.params(abstract_autoencoder(settings)[1])

    @functools.cache
    def placed_params(latents: Sharding):
        whole = replicated(latents.mesh) if isinstance(latents, NamedSharding) else latents
        return place(params, whole)

    def decode_latents(latents: jax.Array) -> jax.Array:
        sharding = latents.sharding
        if isinstance(sharding, NamedSharding):
            return decode_shared(sharding.mesh, settings, placed_params(sharding), latents)
        return decode_each(settings, placed_params(sharding), latents)

    return LatentCodec(
        converted.fingerprint,
        settings.downsampling,
        lambda pixels: encode(settings, placed_params(SingleDeviceSharding(jax.local_devices()[0])), pixels),
        decode_latents,
    )


def decode_each(settings: AutoencoderConfig, params: Params, latents: jax.Array) -> jax.Array:
    """Latents [..., h, w, channels] to pixels [..., height, width, image channels], on one device."""
    pixels = decode(settings, params, latents.reshape(-1, *latents.shape[-3:]), DECODED_AT_A_TIME)
    return pixels.reshape(*latents.shape[:-3], *pixels.shape[1:])


@functools.partial(jax.jit, static_argnums=(0, 1))
def decode_shared(mesh: Mesh, settings: AutoencoderConfig, params: Params, latents: jax.Array) -> jax.Array:
    """`decode_each` on a mesh: each device has all parameters and decodes its part of the batch by itself."""
    split = partition(("batch",))
    run = jax.shard_map(
        functools.partial(decode_each, settings),
        mesh=mesh,
        in_specs=(PartitionSpec(), split),
        out_specs=split,
        check_vma=False,
    )
    return run(params, latents)
