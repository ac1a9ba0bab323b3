"""Fine-tuning: all weights of a generative network are trained to classify images."""

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from causalfusion_jax.checkpoints.checkpoint import Checkpoints
from causalfusion_jax.common import distributed, files, sharding
from causalfusion_jax.common.errors import require
from causalfusion_jax.config.probe import FinetuneConfig, ProbeConfig
from causalfusion_jax.config.training import OptimizerConfig
from causalfusion_jax.data.pipeline import BatchIterator, DataConfig, Source, host_batches, reading_threads
from causalfusion_jax.evaluation.augment import cropped, mixed, shifted, smooth_one_hot
from causalfusion_jax.evaluation.features import (
    Reading,
    abstract_images,
    abstract_params,
    hidden_states,
    images_in_order,
    mean_of_tokens,
    over_images,
)
from causalfusion_jax.evaluation.probe import top_accuracies
from causalfusion_jax.models.layers import drop_path_scale, normalize
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.training.objective import example_keys
from causalfusion_jax.training.optimizer import make_optimizer
from causalfusion_jax.training.state import lower_step, place_abstract, update_ema
from causalfusion_jax.training.stopping import StopSignal, TrainingDiverged

BATCH_SIZE = "config.finetune.batch_size"
CLASSIFIER_AXES = {"kernel": ("embed", "classes"), "bias": ("classes",), "scale": ("embed",), "shift": ("embed",)}


@dataclasses.dataclass(frozen=True)
class FinetuneStep:
    """Static settings of a step.

    Attributes:
      reading: how the network reads images.
      settings: optimizer, augmentation, and the rest of the fine-tuning settings.
      num_classes: number of classes.
      epoch_steps: steps in an epoch.
    """

    reading: Reading
    settings: FinetuneConfig
    num_classes: int
    epoch_steps: int

    @property
    def total_steps(self) -> int:
        """Steps of the whole fine-tuning."""
        return self.settings.epochs * self.epoch_steps


class FinetuneState(NamedTuple):
    """All that fine-tuning changes.

    Attributes:
      step: int32 [], steps taken.
      params: parameters of the Transformer, `network`, and of the `classifier`.
      ema: their moving average, or None.
      opt_state: state of the optimizer.
    """

    step: jax.Array
    params: Params
    ema: Params | None
    opt_state: optax.OptState


# --- One step ---------------------------------------------------------------------


def layer_scales(params: Params, layers: int, decay: float) -> Params:
    """Factors of the learning rate by parameter (Clark et al. 2020, section 3.1).

    1 for the classifier, decay for the last layer, decay^layers for the first, decay^(layers + 1)
    for the embeddings. The layers are stacked, so their factors are [layers, 1, ...].
    """

    def scale(path, leaf):
        part, *inner = (key.key for key in path)
        if part == "classifier":
            return np.float32(1.0)
        if inner[0] != "blocks":
            return np.float32(decay ** (layers + 1))
        factors = np.power(decay, layers - np.arange(layers, dtype=np.float64))
        return factors.reshape(-1, *[1] * (len(leaf.shape) - 1)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(scale, params)


def make_finetune_optimizer(config: FinetuneStep) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine schedule, and smaller updates the closer a layer is to the input."""
    s = config.settings
    adamw = make_optimizer(
        OptimizerConfig(
            learning_rate=s.learning_rate,
            schedule="cosine",
            warmup_steps=round(s.warmup_epochs * config.epoch_steps),
            b1=s.b1,
            b2=s.b2,
            eps=1e-8,
            weight_decay=s.weight_decay,
            clip_norm=s.clip_norm,
        ),
        config.total_steps,
    )

    def scale_by_layer(updates, params):
        scales = layer_scales(params, config.reading.model.layers, s.layer_decay)
        return jax.tree.map(jnp.multiply, updates, scales)

    return optax.chain(adamw, optax.stateless(scale_by_layer))


def init_finetune(config: FinetuneStep, network: Params) -> FinetuneState:
    """Puts an untrained classifier on top of a network."""
    hidden = config.reading.model.hidden
    classifier = {
        "kernel": jnp.zeros((hidden, config.num_classes)),
        "bias": jnp.zeros(config.num_classes),
        "scale": jnp.ones(hidden),
        "shift": jnp.zeros(hidden),
    }
    params = {"network": network, "classifier": classifier}
    ema = jax.tree.map(jnp.copy, params) if config.settings.ema_decay else None
    return FinetuneState(jnp.zeros((), jnp.int32), params, ema, make_finetune_optimizer(config).init(params))


def abstract_finetune(config: FinetuneStep, mesh: Mesh) -> FinetuneState:
    """Shape, type and sharding of every array of the state."""
    _, shapes, axes = abstract_model(config.reading.model)
    state = jax.eval_shape(functools.partial(init_finetune, config), shapes)
    return place_abstract(state, {"network": axes, "classifier": CLASSIFIER_AXES}, mesh)


def logits_of(config: FinetuneStep, params: Params, images, keys, branch_scale=None) -> jax.Array:
    """Logits of a linear classifier on the normalized mean of the last layer's tokens, float32 [batch, classes]."""
    h, _ = hidden_states(config.reading, params["network"], images, keys, branch_scale)
    classifier = params["classifier"]
    x = normalize(mean_of_tokens(h), classifier["scale"], classifier["shift"])
    return x @ classifier["kernel"] + classifier["bias"]


_predict = jax.jit(logits_of, static_argnums=0)


def finetune_loss(config: FinetuneStep, params: Params, batch, keys) -> jax.Array:
    """Cross-entropy loss of augmented images with smoothed and mixed labels, float32 [].

    Args:
      config: static settings.
      params: `network` and `classifier`.
      batch: `image` float32 [batch, (frames,) height, width, channels], `label` int [batch].
      keys: a PRNG key for each example, [batch].
    """
    s = config.settings
    parts = jax.vmap(lambda key: jax.random.split(key, 5))(keys)
    shift_key, crop_key, mix_key, read_key, drop_key = (parts[:, i] for i in range(5))
    images = jax.vmap(functools.partial(shifted, most=s.shift))(batch["image"], shift_key)
    images = jax.vmap(functools.partial(cropped, least_area=s.crop_area))(images, crop_key)
    target = jax.vmap(lambda label: smooth_one_hot(label, config.num_classes, s.label_smoothing))(batch["label"])
    if s.mixup or s.cutmix:
        # The batch is in random order, so the next example is a random one.
        others, other_targets = (jnp.roll(a, -1, axis=0) for a in (images, target))
        mix = functools.partial(mixed, mixup=s.mixup, cutmix=s.cutmix)
        images, target = jax.vmap(mix)(images, others, target, other_targets, mix_key)
    branch_scale = drop_path_scale(s.drop_path, config.reading.model.layers, drop_key)
    logits = logits_of(config, params, images, read_key, branch_scale)
    return jnp.mean(optax.softmax_cross_entropy(logits, target))


def batch_shapes(settings: FinetuneConfig, data: DataConfig) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and type of each array of a global batch."""
    size = settings.batch_size
    return {"image": ((size, *data.shape), np.float32), "label": ((size,), np.int32)}


def finetune_step(config: FinetuneStep, state: FinetuneState, batch, key: jax.Array) -> tuple[FinetuneState, jax.Array]:
    """One step; its number is folded into `key`. Returns the next state and the loss."""
    keys = example_keys(jax.random.fold_in(key, state.step), batch["label"].shape[0])
    loss, grads = jax.value_and_grad(functools.partial(finetune_loss, config))(state.params, batch, keys)
    updates, opt_state = make_finetune_optimizer(config).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = update_ema(ema, params, state.step, config.settings.ema_decay)
    return FinetuneState(state.step + 1, params, ema, opt_state), loss


def compile_finetune_step(config: FinetuneStep, mesh: Mesh, shapes, key: jax.Array):
    """Compiles `finetune_step`: a function (state, batch, key) -> (state, loss) that donates the state.

    The arguments are those of `lower_finetune_step`.
    """
    return lower_finetune_step(config, mesh, shapes, key).compile()


def lower_finetune_step(config: FinetuneStep, mesh: Mesh, shapes, key: jax.Array) -> jax.stages.Lowered:
    """Traces `finetune_step` for a mesh.

    Args:
      config: static settings.
      mesh: the devices.
      shapes: (shape, dtype) of each array of a global batch, by name.
      key: a PRNG key, or its shape and type.
    """
    step = functools.partial(finetune_step, config)
    return lower_step(step, abstract_finetune(config, mesh), mesh, shapes, key)


def lower_begin(config: FinetuneStep, mesh: Mesh) -> jax.stages.Lowered:
    """Traces `init_finetune` for a mesh."""
    return _state_maker(config, mesh).lower(abstract_params(config.reading.model, mesh))


def _state_maker(config: FinetuneStep, mesh: Mesh):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_finetune(config, mesh))
    return jax.jit(functools.partial(init_finetune, config), out_shardings=shardings)


def lower_predict(config: FinetuneStep, mesh: Mesh, batch_size: int, shape: tuple[int, ...]) -> jax.stages.Lowered:
    """Traces the fine-tuned network on images of a shape for a mesh, as `over_images` runs it."""
    params = abstract_finetune(config, mesh).params
    with jax.set_mesh(mesh):
        return _predict.lower(config, params, *abstract_images(mesh, batch_size, shape))


@jax.jit
def _all_finite(params: Params) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


# --- A whole fine-tuning ----------------------------------------------------------


def check_batch(settings: FinetuneConfig, mesh: Mesh) -> None:
    """Raises InputError if a batch cannot be split over the devices."""
    size, devices = settings.batch_size, mesh.shape["data"] * mesh.shape["fsdp"]
    require(size % devices == 0, BATCH_SIZE, size, f"must be a multiple of {devices}, the devices of the batch")


class Finetuning:
    """Fine-tunes a network on a data set, and tests it.

    Args:
      reading, settings: see `FinetuneStep`.
      data, source: the training images.
      mesh: the devices.
      folder: folder of the checkpoints and metrics.jsonl; the same call resumes from there.
      progress: called with a line of text after each epoch.

    Raises:
      InputError: the batch cannot be split over the devices, or is larger than the data.
    """

    def __init__(
        self,
        reading: Reading,
        settings: FinetuneConfig,
        data: DataConfig,
        source: Source,
        mesh: Mesh,
        folder: pathlib.Path,
        progress: Callable[[str], None] = lambda line: None,
    ):
        size = settings.batch_size
        require(size <= len(source), BATCH_SIZE, size, f"must be <= {len(source)}, the training images")
        check_batch(settings, mesh)
        self.step = FinetuneStep(reading, settings, data.num_classes, len(source) // size)
        self.settings, self.data, self.source, self.mesh = settings, data, source, mesh
        self.folder, self.progress = folder, progress
        self.share = sharding.BatchShare(mesh, size)
        make_key = jax.jit(lambda: jax.random.key(settings.seed), out_shardings=sharding.replicated(mesh))
        self.key = make_key()

    def _begin(self, network: Callable[[], Params], checkpoints: Checkpoints) -> tuple[FinetuneState, int, list]:
        """State, position in the data and losses of the epoch, of the newest intact checkpoint or a new classifier."""
        step = checkpoints.good_step()
        distributed.on_primary(lambda: self._remove_epochs_after(step or 0))
        abstract = abstract_finetune(self.step, self.mesh)
        if step is not None:
            state, position = checkpoints.restore(step, abstract)
            return state, position, (checkpoints.partial(step) or {}).get("losses", [])
        return _state_maker(self.step, self.mesh)(network()), 0, []

    def _remove_epochs_after(self, step: int) -> None:
        """Removes the metrics of epochs that are trained again."""
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            files.drop_torn_line(path)
            kept = [json.loads(line) for line in path.read_text().split("\n") if line]
            kept = [line for line in kept if line["epoch"] * self.step.epoch_steps <= step]
            files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def train(self, network: Callable[[], Params]) -> Params:
        """Fine-tunes to the end.

        Args:
          network: reads the parameters of the Transformer, placed on the mesh.

        Returns:
          Parameters of `network` and `classifier`: their moving average if there is one.

        Raises:
          InputError: another job runs in the folder.
          Stopped: by a signal; the state is saved.
          TrainingDiverged: the loss is not finite; the last checkpoint is intact.
        """
        with distributed.held_folder(self.folder, "--out") as lock:
            checkpoints = Checkpoints(str(self.folder), keep=1, lock=lock)
            state, position, losses = self._begin(network, checkpoints)
            batches = host_batches(
                self.source, self.data, self.settings.batch_size, self.settings.seed, self.share.rows
            )
            threads = reading_threads(self.data.source)
            iterator = BatchIterator(batches, position, self.data.workers, threads, self.data.max_corrupt)
            try:
                with StopSignal() as stop, jax.transfer_guard("disallow"):
                    state = self._steps(state, iterator, checkpoints, stop, losses)
                    checkpoints.wait()
            finally:
                iterator.close()
                checkpoints.close()
        return state.params if state.ema is None else state.ema

    def _steps(
        self, state: FinetuneState, iterator: BatchIterator, checkpoints: Checkpoints, stop: StopSignal, losses: list
    ) -> FinetuneState:
        step, total = int(jax.device_get(state.step)), self.step.total_steps
        if step >= total:
            return state
        shapes = batch_shapes(self.settings, self.data)
        with jax.transfer_guard("allow"):
            run = compile_finetune_step(self.step, self.mesh, shapes, self.key)
        clock = time.perf_counter()
        while step < total:
            batch = next(iterator)
            state, loss = run(state, self.share.place({name: batch[name] for name in shapes}), self.key)
            losses.append(loss)
            step += 1
            stopping = stop.poll()
            epoch, rest = divmod(step, self.step.epoch_steps)
            save = step == total or stopping or (rest == 0 and epoch % self.settings.checkpoint_epochs == 0)
            if save or rest == 0:
                losses = [float(loss) for loss in jax.device_get(losses)]
                self._check_finite(epoch if rest == 0 else epoch + 1, losses, state)
            if rest == 0:
                self._report(epoch, float(np.mean(losses)), time.perf_counter() - clock)
                losses, clock = [], time.perf_counter()
            if save:
                # A copy, because the save writes it in the background.
                checkpoints.save(step, state, iterator.position, {"losses": list(losses)})
            if stopping and step < total:
                checkpoints.wait()
                raise stop.stopped(step, total, self.folder)
        return state

    def _check_finite(self, epoch: int, losses: list[float], state: FinetuneState) -> None:
        """Raises TrainingDiverged before anything is saved in place of the last checkpoint."""
        if not np.isfinite(losses).all() or not jax.device_get(_all_finite(state.params)):
            worst = next((loss for loss in losses if not math.isfinite(loss)), losses[-1])
            raise TrainingDiverged(
                f"in epoch {epoch} of fine-tuning the loss is {worst} or a weight is not finite;"
                f" lower config.finetune.learning_rate. {self.folder} keeps the last checkpoint"
            )

    def _report(self, epoch: int, loss: float, seconds: float) -> None:
        """Logs an epoch."""
        if distributed.is_primary():
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"epoch": epoch, "loss": loss, "seconds": seconds}, allow_nan=False) + "\n")
        self.progress(f"epoch {epoch}/{self.settings.epochs}: loss {loss:.4f}, {seconds:.1f} s")

    def test(self, params: Params, held_out: Source, probe: ProbeConfig) -> dict[str, float]:
        """Accuracies on all images of `held_out`; `probe` sets the batch size and the seed."""
        predict = functools.partial(_predict, self.step, params)
        images = images_in_order(held_out, self.data, probe.read_batch_size)
        return top_accuracies(*over_images(predict, self.mesh, images, probe.read_batch_size, probe.seed))
