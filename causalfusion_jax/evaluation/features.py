"""Features of images: hidden states of a network's layers, without a class."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from causalfusion_jax.common import distributed, sharding
from causalfusion_jax.common.errors import require, require_number
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.config.probe import ProbeConfig
from causalfusion_jax.core import diffusion as noise_axis
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.core.diffusion import DiffusionConfig
from causalfusion_jax.core.factorization import FactorizationConfig, Role, draw_plan, num_visible_clean
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.pipeline import BatchIterator
from causalfusion_jax.data.records import CorruptRecord
from causalfusion_jax.data.source import Source
from causalfusion_jax.models.config import TransformerConfig
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.patches import patchify
from causalfusion_jax.models.sequence import ImageTokens, join
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.training.state import place_abstract


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a network reads images, static.

    Attributes:
      model, factorization, diffusion: the network and the two axes, as trained.
      patch_size: side of a token in pixels (or latents).
      label: row of the label table: of no class, or of the only class of a model that was trained
        without class dropout.
      tokens: `clean`, or `noisy`.
      noise_level: of noisy tokens, t / num_timesteps.
      ar_steps: of clean tokens: `one`, or order and AR steps as `trained`.
    """

    model: TransformerConfig
    factorization: FactorizationConfig
    diffusion: DiffusionConfig
    patch_size: int
    label: int
    tokens: str = "clean"
    noise_level: float = 0.0
    ar_steps: str = "one"

    @property
    def t(self) -> float | int:
        """The noise level in the network's units."""
        t = self.noise_level * self.diffusion.num_timesteps
        return t if self.diffusion.is_continuous else min(round(t), self.diffusion.num_timesteps - 1)


def has_clean_tokens(config: ExperimentConfig) -> bool:
    """Whether the network was trained with clean tokens that others attend to."""
    if config.text.is_on and config.joint.image_tokens == "noisy":
        return False
    if config.text.is_on and config.joint.image_to_text > 0:
        return True
    return num_visible_clean(config.factorization, config.transformer.num_tokens) > 0


def make_reading(config: ExperimentConfig, settings: ProbeConfig) -> Reading:
    """How a network of `config` reads images under `settings`.

    Raises:
      InputError: clean tokens for a network trained without them; or a network that was never
        trained without a class.
    """
    trained = has_clean_tokens(config)
    tokens = settings.tokens if settings.tokens != "auto" else "clean" if trained else "noisy"
    allowed = "must be noisy: the network was trained without clean tokens"
    require(trained or tokens == "noisy", "config.probe.tokens", tokens, allowed)
    require(
        config.drops_classes or config.data.num_classes == 1,
        "config.model.class_dropout",
        config.model.class_dropout,
        "the network was never trained without a class",
    )
    # The row after the last class stands for no class; it is trained by class dropout alone.
    label = config.data.num_classes if config.drops_classes else 0
    model = dataclasses.replace(config.transformer, text_vocab=0, text_tokens=0)
    return Reading(
        model,
        config.factorization,
        config.diffusion,
        config.model.patch_size,
        label,
        tokens=tokens,
        noise_level=settings.noise_level if tokens == "noisy" else 0.0,
        ar_steps=settings.ar_steps if tokens == "clean" else "one",
    )


def hidden_states(
    reading: Reading, params: Params, images, keys, branch_scale=None, layer_output: Callable | None = None
) -> tuple[jax.Array, Any]:
    """One pass over images without text; the class is `reading.label`.

    Args:
      reading: how the network reads images.
      params: the Transformer's parameters.
      images: float32 [batch, (frames,) height, width, channels].
      keys: PRNG keys [batch], one for each example, of noise and drawn AR steps.
      branch_scale: as for `Transformer.trunk`.
      layer_output: as for `Transformer.trunk`, of the image's tokens alone.

    Returns:
      The last layer's [batch, L, hidden], and the results of `layer_output`, [layers, ...], or None.
    """
    c = reading.model
    model = nnx.merge(abstract_model(c)[0], params)
    x_0 = patchify(images, reading.patch_size)
    batch, length = x_0.shape[:2]
    condition = Condition(jnp.full(batch, reading.label, jnp.int32))
    order = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    step, noise_embedding, begin = jnp.zeros_like(order), None, c.num_condition_tokens
    if reading.tokens == "clean":
        if reading.ar_steps == "trained":
            plan = jax.vmap(lambda key: draw_plan(reading.factorization, c.grid, key))(keys)
            order, step = (jnp.broadcast_to(a, (batch, length)) for a in (plan.order, plan.step))
        image = ImageTokens(jnp.take_along_axis(x_0, order[..., None], axis=1), order)
        tokens = model.image_tokens(image, Role.CLEAN, step)
    else:
        t = jnp.full((batch, 1), reading.t)
        eps = jax.vmap(lambda key: jax.random.normal(key, x_0.shape[1:]))(keys)
        x_t = noise_axis.add_noise(x_0, eps, *noise_axis.alpha_sigma(reading.diffusion, t))
        tokens = model.image_tokens(ImageTokens(x_t, order, t), Role.NOISY, step)
        noise_embedding = model.embed_noise(condition, t)
    h, outputs = model.trunk(
        join([*model.condition_tokens(condition), tokens]),
        noise_embedding=noise_embedding,
        num_clean=begin,
        branch_scale=branch_scale,
        layer_output=lambda h: None if layer_output is None else layer_output(h[:, begin:]),
    )
    return h[:, begin:], outputs


def mean_of_tokens(h: jax.Array) -> jax.Array:
    """[batch, L, hidden] to float32 [batch, hidden]."""
    return jnp.mean(h.astype(jnp.float32), axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def pooled(reading: Reading, every_layer: bool, params: Params, images, keys) -> jax.Array:
    """Means over the tokens: float32 [layers, batch, hidden] of every layer, or [1, batch, hidden] of the last."""
    if every_layer:
        return hidden_states(reading, params, images, keys, layer_output=mean_of_tokens)[1]
    return mean_of_tokens(hidden_states(reading, params, images, keys)[0])[None]


def lower_pooled(
    reading: Reading, every_layer: bool, mesh: Mesh, batch_size: int, shape: tuple[int, ...]
) -> jax.stages.Lowered:
    """`pooled` of images of a shape, traced for a mesh as `over_images` runs it."""
    params = abstract_params(reading.model, mesh)
    with jax.set_mesh(mesh):
        return pooled.lower(reading, every_layer, params, *abstract_images(mesh, batch_size, shape))


def first_layers(reading: Reading, params: Params, layers: int) -> tuple[Reading, Params]:
    """The network truncated after its first `layers` layers."""
    model = dataclasses.replace(reading.model, layers=layers, scan_unroll=min(reading.model.scan_unroll, layers))
    return dataclasses.replace(reading, model=model), {
        name: jax.tree.map(lambda stacked: stacked[:layers], value) if name == "blocks" else value
        for name, value in params.items()
    }


def layer_to_read(model: TransformerConfig, layer: int) -> int:
    """`probe.layer` as a number from 1; 0 is the middle layer. Raises InputError if there is no such layer."""
    require_number("config.probe.layer", layer, 0, model.layers)
    return layer or math.ceil(model.layers / 2)


def abstract_params(model: TransformerConfig, mesh: Mesh) -> Params:
    """Shape, type and sharding of the Transformer's parameters on a mesh."""
    _, shapes, axes = abstract_model(model)
    return place_abstract(shapes, axes, mesh)


def place_params(params: Params, model: TransformerConfig, mesh: Mesh) -> Params:
    """The Transformer's parameters on a mesh, sharded as in training."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model, mesh))
    return sharding.place({name: params[name] for name in shardings}, shardings)


# --- A pass over a data set -------------------------------------------------------


class ExampleBatch(NamedTuple):
    """Examples of a source, in its order.

    Attributes:
      image: float32 [batch, (frames,) height, width, channels].
      label: int32 [batch].
      index: int [batch], their indices in the source.
    """

    image: np.ndarray
    label: np.ndarray
    index: np.ndarray


class _ReadIndices:
    """Reads a batch, here or in a worker: its readable examples, and the names of the corrupt ones."""

    def __init__(self, source: Source):
        self.source = source

    def __call__(self, indices: np.ndarray) -> dict[str, Any]:
        read, corrupt = [], []
        for index in map(int, indices):
            try:
                read.append((index, self.source[index]))
            except CorruptRecord as error:
                corrupt.append((str(error.value), error.allowed))
        return {"read": read, "corrupt": corrupt}


def images_in_order(
    source: Source, data: DataConfig, batch_size: int, indices: np.ndarray | None = None
) -> Iterator[ExampleBatch]:
    """All examples of a source once, in batches, read ahead; corrupt ones are printed and skipped.

    Args:
      source: the examples.
      data: settings of the source.
      batch_size: number of examples in a batch, with corrupt ones.
      indices: int [num], indices of the examples; default: all.

    Raises:
      InputError: more than `data.max_corrupt` examples are corrupt.
    """
    indices = np.arange(len(source)) if indices is None else indices
    parts = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    # A thread reads a whole batch here, not one example.
    threads = min(data.kind.reading_threads, 4)
    reads = grain.MapDataset.source(parts).map(_ReadIndices(source))
    batches = BatchIterator(reads, 0, data.workers, threads, data.max_corrupt)
    try:
        for _ in parts:
            batch = batches.next_raw()
            batches.note_corrupt(batch["corrupt"])
            if batch["read"]:
                read, examples = zip(*batch["read"], strict=True)
                image, label = (np.stack([example[name] for example in examples]) for name in ("image", "label"))
                yield ExampleBatch(image, label.astype(np.int32), np.array(read))
    finally:
        batches.close()


def random_subset(num: int, most: int, seed: int) -> np.ndarray:
    """At most `most` of the indices 0..num-1, drawn at random and sorted; all if `most` is 0. int [count]."""
    if not 0 < most < num:
        return np.arange(num)
    return np.sort(np.random.default_rng(seed).choice(num, most, replace=False))


@functools.partial(jax.jit, static_argnums=2)
def _index_keys(seed, indices, where):
    """PRNG keys [batch] of examples by their indices in the source."""
    fold = functools.partial(jax.random.fold_in, jax.random.key(seed))
    return jax.lax.with_sharding_constraint(jax.vmap(fold)(indices), where)


def keys_of(seed: int, indices: np.ndarray, mesh: Mesh) -> jax.Array:
    """PRNG keys [batch] of examples by their indices in the source, on the mesh: independent of batches."""
    where = sharding.batch_sharding(mesh)
    seed, indices = sharding.place((np.uint32(seed), indices.astype(np.uint32)), (sharding.replicated(mesh), where))
    return _index_keys(seed, indices, where)


def _computed_size(batch_size: int, mesh: Mesh) -> int:
    """`batch_size` rounded up to a multiple of the devices that share a batch."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-batch_size // devices) * devices


def abstract_images(
    mesh: Mesh, batch_size: int, shape: tuple[int, ...]
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of the arguments of `compute` in `over_images`: images of a shape, and keys."""
    num, split = _computed_size(batch_size, mesh), sharding.batch_sharding(mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num))
    return (
        jax.ShapeDtypeStruct((num, *shape), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=split),
    )


def over_images(
    compute: Callable[[jax.Array, jax.Array], jax.Array],
    mesh: Mesh,
    images: Iterator[ExampleBatch],
    batch_size: int,
    seed: int,
    batch_axis: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Applies `compute` to images, batch by batch, over the devices of a mesh; collective.

    Args:
      compute: from images [batch, ...] and PRNG keys [batch], both on the mesh, to an array.
      mesh: the devices.
      images: batches of all images, the same on every process.
      batch_size: the greatest number of images in a batch.
      seed: of the keys, with an image's index in the source.
      batch_axis: of the results.
      progress: called with the number of images done.

    Returns:
      The results as one array, and the images' labels, int32 [num].
    """
    size = _computed_size(batch_size, mesh)
    values, labels, where = [], [], sharding.batch_sharding(mesh)
    for batch in images:
        # Padded with the last image, so that one program serves all batches.
        padded = np.minimum(np.arange(size), len(batch.label) - 1)
        # Images and keys are placed explicitly; nothing else is transferred.
        with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
            result = compute(sharding.place(batch.image[padded], where), keys_of(seed, batch.index[padded], mesh))
        values.append(np.take(distributed.everywhere(result), np.arange(len(batch.label)), axis=batch_axis))
        labels.append(batch.label)
        progress(sum(map(len, labels)))
    return np.concatenate(values, axis=batch_axis), np.concatenate(labels)
