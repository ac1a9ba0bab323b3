"""All device programs of a run, with the arrays that are in HBM while each of them runs.

These are the initial state, a training step for each sequence length, the samplers of the grid and
of the evaluator, the decoder and Inception; then probes and fine-tuning. Each is lowered from shapes
by the `lower_*` function of its module. Arrays that are in HBM while a program runs and are not its
arguments (the training state during an evaluation, the networks of the evaluator during a training
step) are counted as resident.

The weights of the autoencoder and of Inception may be missing, because only their shapes matter.
Small programs that move or add arrays (keys, sums of metrics, reshapes) are not listed.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from causalfusion_jax.common import sharding
from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.config.experiment import ExperimentConfig, check_model_mesh
from causalfusion_jax.config.slices import Listing, Program, SliceJob, devices
from causalfusion_jax.evaluation import features, finetune, inception_metrics, periodic, probe, video_metrics
from causalfusion_jax.metrics.distribution import lower_precision_recall
from causalfusion_jax.metrics.registry import NUM_NEIGHBORS, POOLED_FEATURES
from causalfusion_jax.models import i3d, inception
from causalfusion_jax.models.autoencoder import MAR_VAE, SD_VAE, AutoencoderConfig, abstract_autoencoder
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.prepare import encoder
from causalfusion_jax.prepare.settings import EncodeConfig
from causalfusion_jax.sampling.generation import BATCH_SIZE, lower_replicate, lower_sampler, padded
from causalfusion_jax.sampling.trained import check_autoencoder, decode_shared, open_autoencoder
from causalfusion_jax.training.state import abstract_key, abstract_state, lower_create_state
from causalfusion_jax.training.trimming import lower_training_step, program_lengths

AUTOENCODERS = {"mar_vae": MAR_VAE, "sd_vae": SD_VAE}
"""Settings of the released autoencoders, by their kind in `convert`."""
EPOCH_STEPS = 1000
"""Assumed steps in an epoch of fine-tuning, whose data are not read: no shape depends on it."""


def run_programs(job: SliceJob) -> Listing:
    """Lists the programs of a training run, then those of probes and of fine-tuning.

    Args:
      job: settings and slice; passes `slices.check`.

    Raises:
      InputError: the evaluation does not fit the data.
    """
    config, programs, notes = job.config, [], []
    networks = {}
    if config.evaluation.eval_every:
        periodic.check_evaluation(config)
        networks, notes = _evaluator_networks(job)
    programs += _training(job, networks)
    programs += _scoring(job, networks)
    impossible = {}
    for name, list_programs in {"probe": _probes, "fine-tuning": _finetuning, "I3D": _i3d}.items():
        try:
            programs += list_programs(job)
        except InputError as error:
            impossible[name] = str(error)
    return Listing(tuple(programs), impossible, tuple(notes))


def encode_programs(job: SliceJob, settings: EncodeConfig) -> Listing:
    """Lists the program of `encode`, for the devices of one host. Raises InputError like `encode`."""
    data, evaluation = job.config.data, job.config.evaluation
    vae, notes = autoencoder_settings(evaluation.vae, data.channels if data.latents else None)
    encoder.check_batch_size(settings, len(_host(job)))
    pixels = encoder.pixel_data(data, vae)
    lower = functools.partial(_lower_encoder, job, vae, pixels, settings)
    return Listing((Program("encoder", lower),), notes=tuple(notes))


# --- Sizes ------------------------------------------------------------------------


def device_bytes(tree) -> int:
    """HBM in bytes on each device of arrays, given as jax.ShapeDtypeStruct with shardings.

    Computed by the compiler, for a program that ignores its arguments, because it pads arrays to tiles.
    """
    compiled = jax.jit(lambda tree: (), keep_unused=True).lower(tree).compile()
    return compiled.memory_analysis().argument_size_in_bytes


def _placed(shapes, where):
    """Shapes with a sharding."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes)


def _shared(job: SliceJob) -> Mesh:
    """The mesh of samplers and evaluation networks: the batch split over all devices, the weights replicated."""
    return sharding.make_mesh(sharding.MeshConfig(), job.mesh().devices.ravel())


def _host(job: SliceJob) -> list:
    """The devices of one host."""
    return [device for device in devices(job.topology) if device.process_index == 0]


def _of_host(job: SliceJob, num: int, shape: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, Mesh]:
    """uint8 images that one program of a host gets of a batch of `num` images, and its mesh."""
    own = _host(job)
    meshes = sharding.own_meshes(own, job.topology.devices)
    size = -(-num // len(own)) * len(own) // len(meshes)
    return jax.ShapeDtypeStruct((size, *shape), np.uint8, sharding=sharding.batch_sharding(meshes[0])), meshes[0]


def autoencoder_settings(folder: str, channels: int | None) -> tuple[AutoencoderConfig, list[str]]:
    """Settings of the autoencoder `config.evaluation.vae`; those of a released one if the folder is missing.

    Args:
      folder: a converted autoencoder; a kind, `mar_vae` or `sd_vae`; or a folder that does not exist yet.
      channels: channels of the latents of the model, which identify the autoencoder of a folder that
        does not exist; None: a model of pixels.

    Returns:
      The settings, and notes on assumptions.

    Raises:
      InputError: the folder holds something else, or no released autoencoder has such latents.
    """
    field = "config.evaluation.vae"
    if pathlib.Path(folder or "/nowhere").exists():
        return open_autoencoder(folder, field)[1], []
    kind = pathlib.Path(folder).name
    if kind not in AUTOENCODERS:
        kind = next((name for name, vae in AUTOENCODERS.items() if vae.latent_channels == channels), None)
    require(kind is not None, field, folder, f"does not exist; name the kind instead, {' or '.join(AUTOENCODERS)}")
    return AUTOENCODERS[kind], [f"{field}={folder or repr('')} is not there: taken as {kind}"]


# --- Training ---------------------------------------------------------------------


def _pixels(config: ExperimentConfig) -> tuple[int, ...]:
    """Shape of a scored image or video in RGB pixels."""
    factor = 1
    if config.data.latents:
        factor = autoencoder_settings(config.evaluation.vae, config.data.channels)[0].downsampling
    *frames, height, width, _ = config.data.shape
    return (*frames, height * factor, width * factor, 3)


def _evaluator_networks(job: SliceJob) -> tuple[dict[str, int], list[str]]:
    """HBM of the networks that the evaluator keeps during the whole run, by name; and notes on assumptions."""
    config, replicated = job.config, sharding.replicated(_shared(job))
    networks, notes = {}, []
    if config.evaluation.vae:
        vae, notes = autoencoder_settings(config.evaluation.vae, config.data.channels)
        check_autoencoder(vae, config, "config.evaluation.vae", config.evaluation.vae)
        weights = _placed(abstract_autoencoder(vae)[1], replicated)
        decoder = {name: weights[name] for name in ("decoder", "post_quant_conv")}
        networks["decoder weights"] = device_bytes(decoder)
        networks["encoder weights"] = device_bytes(weights) - networks["decoder weights"]
    if config.evaluation.needs_inception:
        networks["Inception weights"] = device_bytes(_placed(inception.abstract_inception()[1], replicated))
        if not pathlib.Path(config.evaluation.inception).exists():
            notes.append(f"config.evaluation.inception={config.evaluation.inception} is not there: Inception is known")
    return networks, notes


def _training(job: SliceJob, networks: dict[str, int]) -> Iterator[Program]:
    """The initial state, and the training step for each sequence length."""
    yield Program("initial state", functools.partial(_lower_state, job), networks)
    lengths = program_lengths(job.config.step.objective, job.config.train.length_buckets)
    for length in lengths:
        name = "training step" + (f", {length} clean tokens" if len(lengths) > 1 else "")
        yield Program(name, functools.partial(_lower_step, job, length), networks)


def _scoring(job: SliceJob, networks: dict[str, int]) -> Iterator[Program]:
    """The sample grid and the evaluation, while the training state stays in HBM."""
    config, mesh = job.config, job.mesh()
    batch = {
        name: jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding.batch_sharding(mesh))
        for name, (shape, dtype) in config.batch_shapes.items()
    }
    state = abstract_state(config.step, mesh)
    resident = {"training state": device_bytes(state), "batch": device_bytes(batch)} | networks
    evaluation = config.evaluation
    without = lambda name: {key: value for key, value in resident.items() if key != name}
    if config.logging.sample_every or evaluation.eval_every:
        rest = {"rest of the state": device_bytes(state._replace(ema=None))}
        yield Program(
            "weights for sampling", functools.partial(_lower_replicate, job), rest | without("training state")
        )
    if config.logging.sample_every:
        size = min(config.logging.num_samples, BATCH_SIZE)
        yield Program("grid sampler", functools.partial(_lower_sample, job, size), resident)
    if not evaluation.eval_every:
        return
    size = min(evaluation.sample_batch_size, evaluation.num_images)
    yield Program("evaluation sampler", functools.partial(_lower_sample, job, size), resident)
    weights = _placed(abstract_model(config.transformer)[1], sharding.replicated(_shared(job)))
    resident = resident | {"replicated weights": device_bytes(weights)}
    if evaluation.vae:
        yield Program("decoder", functools.partial(_lower_decoder, job, size), without("decoder weights"))
    if evaluation.needs_inception:
        size = min(inception_metrics.BATCH_SIZE, evaluation.num_images)
        yield Program("Inception, resizing", functools.partial(_lower_inception, job, size, "resize"), resident)
        lower = functools.partial(_lower_inception, job, size, "features")
        yield Program("Inception", lower, without("Inception weights"))
    if evaluation.metric in ("precision", "recall"):
        for part in ("radii", "coverage"):
            lower = functools.partial(_lower_precision_recall, job, part)
            yield Program(f"precision and recall, {part}", lower, resident)


def _lower_state(job: SliceJob):
    return lower_create_state(job.config.step, job.mesh())


def _lower_step(job: SliceJob, length: int):
    return lower_training_step(job.config, job.mesh(), length)


def _lower_sample(job: SliceJob, num: int):
    return lower_sampler(job.config, job.config.sampling, job.mesh().devices.ravel(), num)


def _lower_replicate(job: SliceJob):
    mesh = job.mesh()
    return lower_replicate(abstract_state(job.config.step, mesh).ema, mesh.devices.ravel())


def _lower_decoder(job: SliceJob, num: int):
    config, mesh = job.config, _shared(job)
    vae, _ = autoencoder_settings(config.evaluation.vae, config.data.channels)
    params = _placed(abstract_autoencoder(vae)[1], sharding.replicated(mesh))
    latents = jax.ShapeDtypeStruct(
        (padded(num, mesh.size), *config.data.shape), np.float32, sharding=sharding.batch_sharding(mesh)
    )
    return decode_shared.lower(mesh, vae, params, latents)


def _lower_inception(job: SliceJob, num: int, part: str):
    images, mesh = _of_host(job, num, _pixels(job.config))
    if part == "resize":
        return inception.lower_resize(images)
    return inception.lower_features(_placed(inception.abstract_inception()[1], sharding.replicated(mesh)), images)


def _lower_precision_recall(job: SliceJob, part: str):
    num, of_reference = job.config.evaluation.num_images, inception_metrics.NUM_REFERENCE_IMAGES
    device = devices(job.topology)[0]
    return lower_precision_recall(of_reference, num, POOLED_FEATURES.dim, device, NUM_NEIGHBORS)[part]


def _lower_encoder(job: SliceJob, vae: AutoencoderConfig, pixels, settings: EncodeConfig):
    return encoder.lower_encoder(vae, pixels, settings, _host(job), job.topology.devices)


# --- After training ---------------------------------------------------------------


def _reading(job: SliceJob) -> features.Reading:
    """How a probe reads images. Raises InputError if it cannot."""
    config, mesh = job.config, job.mesh()
    model = config.transformer
    check_model_mesh(model, mesh, tokens=model.num_condition_tokens + model.num_tokens)
    return features.make_reading(config, config.probe)


def _probes(job: SliceJob) -> Iterator[Program]:
    """Features of one layer and of all layers, the step of the linear classifier, nearest neighbours."""
    config, reading = job.config, _reading(job)
    layer = features.layer_to_read(config.transformer, config.probe.layer)
    one = features.first_layers(reading, {}, layer)[0]
    yield Program("probe, features", functools.partial(_lower_features, job, one, False))
    columns = {"clean": {}} if features.has_clean_tokens(config) else {}
    columns["noisy"] = dict(noise_level=max(config.probe.map_noise_levels, default=0.0))
    for tokens, level in columns.items():
        column = features.make_reading(config, dataclasses.replace(config.probe, tokens=tokens, **level))
        yield Program(f"probe, map of {tokens} tokens", functools.partial(_lower_features, job, column, True))
    yield Program("probe, linear step", functools.partial(_lower_linear, job))
    yield Program("probe, nearest neighbours", functools.partial(_lower_nearer, job))


def _finetuning(job: SliceJob) -> Iterator[Program]:
    """The initial state, the training step and the test of fine-tuning."""
    config = job.config
    step = finetune.FinetuneStep(_reading(job), config.finetune, config.data.num_classes, EPOCH_STEPS)
    finetune.check_batch(config.finetune, job.mesh())
    yield Program("fine-tuning, initial state", functools.partial(_lower_begin, job, step))
    yield Program("fine-tuning step", functools.partial(_lower_finetune, job, step))
    yield Program("fine-tuning, test", functools.partial(_lower_predict, job, step))


def _i3d(job: SliceJob) -> Iterator[Program]:
    """I3D, with which `evaluate` scores videos."""
    if job.config.data.frames == 1:
        return
    for name, part in {"I3D, resizing": "resize", "I3D": "logits"}.items():
        yield Program(name, functools.partial(_lower_i3d, job, part))


def _lower_features(job: SliceJob, reading: features.Reading, every_layer: bool):
    config = job.config
    return features.lower_pooled(reading, every_layer, job.mesh(), config.probe.read_batch_size, config.data.shape)


def _lower_linear(job: SliceJob):
    config = job.config
    return probe.lower_linear_step(
        config.probe, config.transformer.hidden, config.data.num_classes, devices(job.topology)[0]
    )


def _lower_nearer(job: SliceJob):
    return probe.lower_nearer(job.config.probe, job.config.transformer.hidden, devices(job.topology)[0])


def _lower_begin(job: SliceJob, step: finetune.FinetuneStep):
    return finetune.lower_begin(step, job.mesh())


def _lower_finetune(job: SliceJob, step: finetune.FinetuneStep):
    mesh = job.mesh()
    shapes = finetune.batch_shapes(step.settings, job.config.data)
    return finetune.lower_finetune_step(step, mesh, shapes, abstract_key(mesh))


def _lower_predict(job: SliceJob, step: finetune.FinetuneStep):
    config = job.config
    return finetune.lower_predict(step, job.mesh(), config.probe.read_batch_size, config.data.shape)


def _lower_i3d(job: SliceJob, part: str):
    _, *size = _pixels(job.config)
    videos, mesh = _of_host(job, video_metrics.BATCH_SIZE, (video_metrics.VideoProtocol().frames, *size))
    if part == "resize":
        return i3d.lower_resize(videos)
    return i3d.lower_logits(_placed(i3d.abstract_i3d()[1], sharding.replicated(mesh)), videos)
