"""What a network makes of images: the hidden states of its layers, without being told a class."""

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
from causalfusion_jax.core.diffusion import DiffusionConfig
from causalfusion_jax.core.factorization import FactorizationConfig, draw_plan, num_visible_clean, training_layout
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.pipeline import BatchIterator
from causalfusion_jax.data.records import CorruptRecord
from causalfusion_jax.data.source import Source
from causalfusion_jax.models.config import TransformerConfig
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.patches import patchify
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.training.state import place_abstract


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a network reads images, statically.

    Attributes:
      model, factorization, diffusion: the network and the two axes, as trained.
      patch_size: side of a token in pixels (or latents).
      tokens: `clean`, or `noisy`.
      label: row of the label table: that of no class, or that of the only class of a model that was
        always told it.
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
    """Whether anything that the network learned depends on clean tokens of an image."""
    if config.text.is_on and config.joint.image_tokens == "noisy":
        return False
    if config.text.is_on and config.joint.image_to_text > 0:
        return True
    return num_visible_clean(config.factorization, config.transformer.num_tokens) > 0


def make_reading(config: ExperimentConfig, settings: ProbeConfig) -> Reading:
    """How `settings` say that a network of `config` reads images.

    Raises:
      InputError: clean tokens, of which the network saw none in training; or it was never
        trained without a class.
    """
    trained = has_clean_tokens(config)
    tokens = settings.tokens if settings.tokens != "auto" else "clean" if trained else "noisy"
    require(
        trained or tokens == "noisy",
        "config.probe.tokens",
        tokens,
        "must be noisy: the network was trained without clean tokens",
    )
    require(
        config.drops_classes or config.data.num_classes == 1,
        "config.model.class_dropout",
        config.model.class_dropout,
        "the network was always told the class, and cannot read without",
    )
    # The row after the last class is that of no class; without dropout it was never trained.
    label = config.data.num_classes if config.drops_classes else 0
    model = dataclasses.replace(config.transformer, text_vocab=0, text_tokens=0)
    return Reading(
        model,
        config.factorization,
        config.diffusion,
        config.model.patch_size,
        label,
        tokens,
        settings.noise_level if tokens == "noisy" else 0.0,
        settings.ar_steps if tokens == "clean" else "one",
    )


def hidden_states(
    reading: Reading, params: Params, images, keys, branch_scale=None, of_layer: Callable | None = None
) -> tuple[jax.Array, Any]:
    """One pass over images alone: the condition is that of no class.

    Args:
      reading: how.
      params: the Transformer's parameters.
      images: float32 [batch, (frames,) height, width, channels].
      keys: one PRNG key an example, [batch], of noise and drawn AR steps.
      branch_scale, of_layer: as of `Transformer.trunk`; `of_layer` is given the image's tokens alone.

    Returns:
      The last layer's [batch, L, hidden], and what `of_layer` made of each, [layers, ...], or None.
    """
    c = reading.model
    model = nnx.merge(abstract_model(c)[0], params)
    x_0 = patchify(images, reading.patch_size)
    batch, places = x_0.shape[:2]
    labels = jnp.full(batch, reading.label, jnp.int32)
    order = jnp.broadcast_to(jnp.arange(places, dtype=jnp.int32), (batch, places))
    step, condition, begin = jnp.zeros_like(order), None, c.num_condition_tokens
    if reading.tokens == "clean":
        if reading.ar_steps == "trained":
            plan = jax.vmap(lambda key: draw_plan(reading.factorization, c.grid, key))(keys)
            order, step = (jnp.broadcast_to(a, (batch, places)) for a in (plan.order, plan.step))
        tokens = model.embed_tokens(jnp.take_along_axis(x_0, order[..., None], axis=1), order)
        role, step = (a[:, : begin + places] for a in training_layout(begin, step))
    else:
        t = jnp.full((batch, 1), reading.t)
        eps = jax.vmap(lambda key: jax.random.normal(key, x_0.shape[1:]))(keys)
        x_t = noise_axis.add_noise(x_0, eps, *noise_axis.alpha_sigma(reading.diffusion, t))
        tokens, condition = model.embed_tokens(x_t, order, t), model.noise_condition(labels, t)
        role, step = training_layout(begin, step, 0)
    ids = jnp.concatenate([jnp.full((batch, begin), -1, order.dtype), order], axis=1)
    h = jnp.concatenate([model.embed_condition(labels), tokens], axis=1)
    h, each = model.trunk(
        h,
        role,
        step,
        ids,
        condition=condition,
        num_clean=begin,
        branch_scale=branch_scale,
        of_layer=lambda h: None if of_layer is None else of_layer(h[:, begin:]),
    )
    return h[:, begin:], each


def mean_of_tokens(h: jax.Array) -> jax.Array:
    """[batch, L, hidden] to float32 [batch, hidden]."""
    return jnp.mean(h.astype(jnp.float32), axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def pooled(reading: Reading, every_layer: bool, params: Params, images, keys) -> jax.Array:
    """Means over the tokens: float32 [layers, batch, hidden] of every layer, or [1, batch, hidden] of the last."""
    if every_layer:
        return hidden_states(reading, params, images, keys, of_layer=mean_of_tokens)[1]
    return mean_of_tokens(hidden_states(reading, params, images, keys)[0])[None]


def lower_pooled(
    reading: Reading, every_layer: bool, mesh: Mesh, batch_size: int, shape: tuple[int, ...]
) -> jax.stages.Lowered:
    """`pooled` of images of a shape, traced for a mesh as `over_images` runs it."""
    params = abstract_params(reading.model, mesh)
    with jax.set_mesh(mesh):
        return pooled.lower(reading, every_layer, params, *abstract_images(mesh, batch_size, shape))


def first_layers(reading: Reading, params: Params, layers: int) -> tuple[Reading, Params]:
    """The network cut off after its first so many layers."""
    model = dataclasses.replace(reading.model, layers=layers, scan_unroll=min(reading.model.scan_unroll, layers))
    return dataclasses.replace(reading, model=model), {
        name: jax.tree.map(lambda stacked: stacked[:layers], value) if name == "blocks" else value
        for name, value in params.items()
    }


def layer_to_read(model: TransformerConfig, layer: int) -> int:
    """`probe.layer` as a number, 1 is the first. Raises InputError where there is no such layer."""
    require_number("config.probe.layer", layer, 0, model.layers)
    return layer or math.ceil(model.layers / 2)


def abstract_params(model: TransformerConfig, mesh: Mesh) -> Params:
    """Shape, type and place of the Transformer's parameters on a mesh."""
    _, shapes, axes = abstract_model(model)
    return place_abstract(shapes, axes, mesh)


def place_params(params: Params, model: TransformerConfig, mesh: Mesh) -> Params:
    """The Transformer's parameters where training has them on a mesh."""
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model, mesh))
    used = {name: params[name] for name in where}
    return sharding.place(used, where)


# --- A pass over a data set -------------------------------------------------------


class Images(NamedTuple):
    """Examples in their order.

    Attributes:
      image: float32 [batch, (frames,) height, width, channels].
      label: int32 [batch].
      index: int [batch], their places in the source.
    """

    image: np.ndarray
    label: np.ndarray
    index: np.ndarray


class _ReadIndices:
    """Reads a batch, here or in a worker: what can be read of it, and by name what cannot."""

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
) -> Iterator[Images]:
    """All examples of a source once, in batches, read ahead; corrupt ones are printed and left out.

    Args:
      source: the examples.
      data: how they are read.
      batch_size: examples in a batch, before corrupt ones are left out.
      indices: int [num], of which examples; default: all.

    Raises:
      InputError: more are corrupt than `data.max_corrupt`.
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
                where, examples = zip(*batch["read"], strict=True)
                image, label = (np.stack([example[name] for example in examples]) for name in ("image", "label"))
                yield Images(image, label.astype(np.int32), np.array(where))
    finally:
        batches.close()


def chosen(num: int, most: int, seed: int) -> np.ndarray:
    """`most` of `num` places at random, in their order; all where `most` is 0. int [count]."""
    if not 0 < most < num:
        return np.arange(num)
    return np.sort(np.random.default_rng(seed).choice(num, most, replace=False))


@functools.partial(jax.jit, static_argnums=2)
def _index_keys(seed, indices, where):
    """One key an example, by its place in the source: batches do not matter. [batch]"""
    fold = functools.partial(jax.random.fold_in, jax.random.key(seed))
    return jax.lax.with_sharding_constraint(jax.vmap(fold)(indices), where)


def keys_of(seed: int, indices: np.ndarray, mesh: Mesh) -> jax.Array:
    """PRNG keys of examples by their places in the source, on the mesh; [batch]."""
    where = sharding.batch_sharding(mesh)
    seed, indices = sharding.place((np.uint32(seed), indices.astype(np.uint32)), (sharding.replicated(mesh), where))
    return _index_keys(seed, indices, where)


def _computed_size(batch_size: int, mesh: Mesh) -> int:
    """Images in a call: the devices of the batch share them evenly."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-batch_size // devices) * devices


def abstract_images(
    mesh: Mesh, batch_size: int, shape: tuple[int, ...]
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of what `over_images` gives to `compute`: images of a shape, and keys."""
    num, split = _computed_size(batch_size, mesh), sharding.batch_sharding(mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num))
    return (
        jax.ShapeDtypeStruct((num, *shape), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=split),
    )


def over_images(
    compute: Callable[[jax.Array, jax.Array], jax.Array],
    mesh: Mesh,
    images: Iterator[Images],
    batch_size: int,
    seed: int,
    batch_axis: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[np.ndarray, np.ndarray]:
    """`compute` of images, batch by batch, over the devices of a mesh; collective.

    Args:
      compute: from images [batch, ...] and PRNG keys [batch], both on the mesh, to an array.
      mesh: the devices.
      images: all of them, the same on every process.
      batch_size: at most so many images come at a time.
      seed: of the keys, with an image's place in the source.
      batch_axis: of the results.
      progress: called with the number of images done.

    Returns:
      The results as one array, and the images' labels, int32 [num].
    """
    size = _computed_size(batch_size, mesh)
    values, labels, where = [], [], sharding.batch_sharding(mesh)
    for batch in images:
        # Filled up with the last one, so that one program serves all batches.
        filled = np.minimum(np.arange(size), len(batch.label) - 1)
        # Images and keys are placed explicitly; nothing else moves from batch to batch.
        with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
            found = compute(sharding.place(batch.image[filled], where), keys_of(seed, batch.index[filled], mesh))
        values.append(np.take(distributed.everywhere(found), np.arange(len(batch.label)), axis=batch_axis))
        labels.append(batch.label)
        progress(sum(map(len, labels)))
    return np.concatenate(values, axis=batch_axis), np.concatenate(labels)
