"""The device programs of a whole run, and what lies in memory beside each of them.

A run starts many programs: the initial state, a training step for each length, the sampler of
the grid and of the evaluator, the decoder, Inception; probes and fine-tuning come after it.
Each is lowered here by its owner's own `lower_*`, from shapes alone. What stays in HBM while a
program runs without being its argument (the training state during an evaluation, the networks
of the evaluator during a step) is counted with it.

Weights of the autoencoder and of Inception need not be there yet: only their shapes count.
Small programs that move or add up arrays (keys, sums of metrics, reshapes) are not listed.
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
from causalfusion_jax.config.slices import Listing, Program, Spec, devices
from causalfusion_jax.evaluation import features, finetune, inception_metrics, periodic, probe, video_metrics
from causalfusion_jax.metrics.distribution import lower_precision_recall
from causalfusion_jax.metrics.registry import NUM_NEIGHBORS, POOLED_FEATURES
from causalfusion_jax.models import i3d, inception
from causalfusion_jax.models.autoencoder import MAR_VAE, SD_VAE, AutoencoderConfig, abstract_autoencoder
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.prepare import encoding
from causalfusion_jax.sampling.generation import BATCH_SIZE, lower_replicate, lower_sampler, padded
from causalfusion_jax.sampling.trained import check_autoencoder, decode_shared, open_autoencoder
from causalfusion_jax.training.state import abstract_key, abstract_state, lower_create_state
from causalfusion_jax.training.trimming import lower_training_step, program_lengths

AUTOENCODERS = {"mar_vae": MAR_VAE, "sd_vae": SD_VAE}
"""Released autoencoders, by the kind that `convert` gives them."""
EPOCH_STEPS = 1000
"""Of fine-tuning on data that are not looked at: it sets the learning rate's course, no shape."""


def run_programs(spec: Spec) -> Listing:
    """Every program of a training run, then those of the probes and of fine-tuning.

    Args:
      spec: settings and slice, checked (`slices.check`).

    Raises:
      InputError: the evaluation does not fit the data, as the run itself would say.
    """
    config, programs, notes = spec.config, [], []
    networks = {}
    if config.evaluation.eval_every:
        periodic.check_evaluation(config)
        networks, notes = _evaluator_networks(spec)
    programs += _training(spec, networks)
    programs += _scoring(spec, networks)
    impossible = {}
    for name, later in {"probe": _probes, "fine-tuning": _finetuning, "I3D": _i3d}.items():
        try:
            programs += later(spec)
        except InputError as error:
            impossible[name] = str(error)
    return Listing(tuple(programs), impossible, tuple(notes))


def encode_programs(spec: Spec, settings: encoding.EncodeConfig) -> Listing:
    """The program of `encode`, on the devices of one host. Raises InputError as `encode` does."""
    data, evaluation = spec.config.data, spec.config.evaluation
    vae, notes = autoencoder_settings(evaluation.vae, data.channels if data.latents else None)
    encoding.check_batch_size(settings, len(_host(spec)))
    pixels = encoding.pixel_data(data, vae)
    lower = functools.partial(_lower_encoder, spec, vae, pixels, settings)
    return Listing((Program("encoder", lower),), notes=tuple(notes))


# --- Sizes ------------------------------------------------------------------------


def device_bytes(tree) -> int:
    """HBM on each device of arrays, given as jax.ShapeDtypeStruct with shardings.

    The compiler says so of a program that does nothing with them: it pads what does not fill its tiles.
    """
    nothing = jax.jit(lambda tree: (), keep_unused=True).lower(tree).compile()
    return nothing.memory_analysis().argument_size_in_bytes


def _placed(shapes, where):
    """Shapes on a mesh, all at the same place."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes)


def _shared(spec: Spec) -> Mesh:
    """All devices, which share a batch and hold all weights, as samplers and networks of the evaluation have it."""
    return sharding.make_mesh(sharding.MeshConfig(), spec.mesh().devices.ravel())


def _host(spec: Spec) -> list:
    """The devices of one host."""
    return [device for device in devices(spec.topology) if device.process_index == 0]


def _of_host(spec: Spec, num: int, shape: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, Mesh]:
    """A batch of `num` uint8 images that a process scores on its own devices, or a part of it; and where it lies."""
    own = _host(spec)
    meshes = sharding.own_meshes(own, spec.topology.devices)
    size = -(-num // len(own)) * len(own) // len(meshes)
    return jax.ShapeDtypeStruct((size, *shape), np.uint8, sharding=sharding.batch_sharding(meshes[0])), meshes[0]


def autoencoder_settings(folder: str, channels: int | None) -> tuple[AutoencoderConfig, list[str]]:
    """The autoencoder of `config.evaluation.vae`; where it is not there yet, a released one.

    Args:
      folder: a converted autoencoder; or a name, `mar_vae` or `sd_vae`; or a folder that does not exist yet.
      channels: of the model's latents, by which the last is recognised; None: a model of pixels.

    Returns:
      Its settings, and what was assumed.

    Raises:
      InputError: the folder holds something else, or no released autoencoder has such latents.
    """
    field = "config.evaluation.vae"
    if pathlib.Path(folder or "/nowhere").exists():
        return open_autoencoder(folder, field)[1], []
    kind = pathlib.Path(folder).name
    if kind not in AUTOENCODERS:
        kind = next((name for name, vae in AUTOENCODERS.items() if vae.latent_channels == channels), None)
    require(
        kind is not None, field, folder, f"is not there to be read; name the kind instead, {' or '.join(AUTOENCODERS)}"
    )
    return AUTOENCODERS[kind], [f"{field}={folder or repr('')} is not there: taken as {kind}"]


# --- Training ---------------------------------------------------------------------


def _pixels(config: ExperimentConfig) -> tuple[int, ...]:
    """Shape of an image, or video, as it is scored: RGB."""
    factor = 1
    if config.data.latents:
        factor = autoencoder_settings(config.evaluation.vae, config.data.channels)[0].downsampling
    *frames, height, width, _ = config.data.shape
    return (*frames, height * factor, width * factor, 3)


def _evaluator_networks(spec: Spec) -> tuple[dict[str, int], list[str]]:
    """HBM of the networks that an evaluator holds as long as the run lasts, by name; and what was assumed."""
    config, whole = spec.config, sharding.replicated(_shared(spec))
    networks, notes = {}, []
    if config.evaluation.vae:
        vae, notes = autoencoder_settings(config.evaluation.vae, config.data.channels)
        check_autoencoder(vae, config, "config.evaluation.vae", config.evaluation.vae)
        weights = _placed(abstract_autoencoder(vae)[1], whole)
        decoder = {name: weights[name] for name in ("decoder", "post_quant_conv")}
        networks["decoder weights"] = device_bytes(decoder)
        networks["encoder weights"] = device_bytes(weights) - networks["decoder weights"]
    if config.evaluation.needs_inception:
        networks["Inception weights"] = device_bytes(_placed(inception.abstract_inception()[1], whole))
        if not pathlib.Path(config.evaluation.inception).exists():
            notes.append(f"config.evaluation.inception={config.evaluation.inception} is not there: Inception is known")
    return networks, notes


def _training(spec: Spec, networks: dict[str, int]) -> Iterator[Program]:
    """The initial state, and the step for each length."""
    yield Program("initial state", functools.partial(_lower_state, spec), networks)
    lengths = program_lengths(spec.config.step.objective, spec.config.train.length_buckets)
    for length in lengths:
        name = "training step" + (f", {length} clean tokens" if len(lengths) > 1 else "")
        yield Program(name, functools.partial(_lower_step, spec, length), networks)


def _scoring(spec: Spec, networks: dict[str, int]) -> Iterator[Program]:
    """The grid, and the evaluation, while the training state waits."""
    config, mesh = spec.config, spec.mesh()
    batch = {
        name: jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding.batch_sharding(mesh))
        for name, (shape, dtype) in config.batch_shapes.items()
    }
    state = abstract_state(config.step, mesh)
    beside = {"training state": device_bytes(state), "batch": device_bytes(batch)} | networks
    evaluation = config.evaluation
    if config.logging.sample_every or evaluation.eval_every:
        rest = {"rest of the state": device_bytes(state._replace(ema=None))}
        without_state = {name: size for name, size in beside.items() if name != "training state"}
        yield Program("weights for sampling", functools.partial(_lower_replicate, spec), rest | without_state)
    if config.logging.sample_every:
        size = min(config.logging.num_samples, BATCH_SIZE)
        yield Program("grid sampler", functools.partial(_lower_sample, spec, size), beside)
    if not evaluation.eval_every:
        return
    size = min(evaluation.sample_batch_size, evaluation.num_images)
    yield Program("evaluation sampler", functools.partial(_lower_sample, spec, size), beside)
    weights = _placed(abstract_model(config.transformer)[1], sharding.replicated(_shared(spec)))
    beside = beside | {"replicated weights": device_bytes(weights)}
    without = lambda name: {key: value for key, value in beside.items() if key != name}
    if evaluation.vae:
        yield Program("decoder", functools.partial(_lower_decoder, spec, size), without("decoder weights"))
    if evaluation.needs_inception:
        size = min(inception_metrics.BATCH_SIZE, evaluation.num_images)
        yield Program("Inception, resizing", functools.partial(_lower_inception, spec, size, "resize"), beside)
        lower = functools.partial(_lower_inception, spec, size, "features")
        yield Program("Inception", lower, without("Inception weights"))
    if evaluation.metric in ("precision", "recall"):
        for part in ("radii", "coverage"):
            lower = functools.partial(_lower_precision_recall, spec, part)
            yield Program(f"precision and recall, {part}", lower, beside)


def _lower_state(spec: Spec):
    return lower_create_state(spec.config.step, spec.mesh())


def _lower_step(spec: Spec, length: int):
    return lower_training_step(spec.config, spec.mesh(), length)


def _lower_sample(spec: Spec, num: int):
    return lower_sampler(spec.config, spec.config.sampling, spec.mesh().devices.ravel(), num)


def _lower_replicate(spec: Spec):
    mesh = spec.mesh()
    return lower_replicate(abstract_state(spec.config.step, mesh).ema, mesh.devices.ravel())


def _lower_decoder(spec: Spec, num: int):
    config, mesh = spec.config, _shared(spec)
    vae, _ = autoencoder_settings(config.evaluation.vae, config.data.channels)
    params = _placed(abstract_autoencoder(vae)[1], sharding.replicated(mesh))
    latents = jax.ShapeDtypeStruct(
        (padded(num, mesh.size), *config.data.shape), np.float32, sharding=sharding.batch_sharding(mesh)
    )
    return decode_shared.lower(mesh, vae, params, latents)


def _lower_inception(spec: Spec, num: int, part: str):
    images, mesh = _of_host(spec, num, _pixels(spec.config))
    if part == "resize":
        return inception.lower_resize(images)
    return inception.lower_features(_placed(inception.abstract_inception()[1], sharding.replicated(mesh)), images)


def _lower_precision_recall(spec: Spec, part: str):
    num, of_reference = spec.config.evaluation.num_images, inception_metrics.NUM_REFERENCE_IMAGES
    device = devices(spec.topology)[0]
    return lower_precision_recall(of_reference, num, POOLED_FEATURES.dim, device, NUM_NEIGHBORS)[part]


def _lower_encoder(spec: Spec, vae: AutoencoderConfig, pixels, settings: encoding.EncodeConfig):
    return encoding.lower_encoder(vae, pixels, settings, _host(spec), spec.topology.devices)


# --- After training ---------------------------------------------------------------


def _reading(spec: Spec) -> features.Reading:
    """How a probe reads images. Raises InputError where there is no way."""
    config, mesh = spec.config, spec.mesh()
    model = config.transformer
    check_model_mesh(model, mesh, tokens=model.num_condition_tokens + model.num_tokens)
    return features.make_reading(config, config.probe)


def _probes(spec: Spec) -> Iterator[Program]:
    """Features of one layer and of all, the step of the linear classifier, nearest neighbours."""
    config, reading = spec.config, _reading(spec)
    layer = features.layer_to_read(config.transformer, config.probe.layer)
    one = features.first_layers(reading, {}, layer)[0]
    yield Program("probe, features", functools.partial(_lower_features, spec, one, False))
    ways = {"clean": {}} if features.has_clean_tokens(config) else {}
    for tokens, level in (ways | {"noisy": dict(noise_level=max(config.probe.map_noise_levels, default=0.0))}).items():
        way = features.make_reading(config, dataclasses.replace(config.probe, tokens=tokens, **level))
        yield Program(f"probe, map of {tokens} tokens", functools.partial(_lower_features, spec, way, True))
    yield Program("probe, linear step", functools.partial(_lower_linear, spec))
    yield Program("probe, nearest neighbours", functools.partial(_lower_nearer, spec))


def _finetuning(spec: Spec) -> Iterator[Program]:
    """The classifier on top of the network, the step, the test."""
    config = spec.config
    step = finetune.FinetuneStep(_reading(spec), config.finetune, config.data.num_classes, EPOCH_STEPS)
    finetune.check_batch(config.finetune, spec.mesh())
    yield Program("fine-tuning, initial state", functools.partial(_lower_begin, spec, step))
    yield Program("fine-tuning step", functools.partial(_lower_finetune, spec, step))
    yield Program("fine-tuning, test", functools.partial(_lower_predict, spec, step))


def _i3d(spec: Spec) -> Iterator[Program]:
    """I3D, as `evaluate` scores videos with it."""
    if spec.config.data.frames == 1:
        return
    for name, part in {"I3D, resizing": "resize", "I3D": "logits"}.items():
        yield Program(name, functools.partial(_lower_i3d, spec, part))


def _lower_features(spec: Spec, reading: features.Reading, every_layer: bool):
    config = spec.config
    return features.lower_pooled(reading, every_layer, spec.mesh(), config.probe.read_batch_size, config.data.shape)


def _lower_linear(spec: Spec):
    config = spec.config
    return probe.lower_linear_step(
        config.probe, config.transformer.hidden, config.data.num_classes, devices(spec.topology)[0]
    )


def _lower_nearer(spec: Spec):
    return probe.lower_nearer(spec.config.probe, spec.config.transformer.hidden, devices(spec.topology)[0])


def _lower_begin(spec: Spec, step: finetune.FinetuneStep):
    return finetune.lower_begin(step, spec.mesh())


def _lower_finetune(spec: Spec, step: finetune.FinetuneStep):
    mesh = spec.mesh()
    shapes = finetune.batch_shapes(step.settings, spec.config.data)
    return finetune.lower_finetune_step(step, mesh, shapes, abstract_key(mesh))


def _lower_predict(spec: Spec, step: finetune.FinetuneStep):
    config = spec.config
    return finetune.lower_predict(step, spec.mesh(), config.probe.read_batch_size, config.data.shape)


def _lower_i3d(spec: Spec, part: str):
    _, *size = _pixels(spec.config)
    videos, mesh = _of_host(spec, video_metrics.BATCH_SIZE, (video_metrics.VideoProtocol().frames, *size))
    if part == "resize":
        return i3d.lower_resize(videos)
    return i3d.lower_logits(_placed(i3d.abstract_i3d()[1], sharding.replicated(mesh)), videos)
