"""The training state, and the training step."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from causalfusion_jax.common import sharding
from causalfusion_jax.config.training import StepConfig
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.transformer import abstract_model, init_params
from causalfusion_jax.training.draws import batch_key, example_keys
from causalfusion_jax.training.objective import training_loss
from causalfusion_jax.training.optimizer import learning_rate_schedule, make_optimizer, updates_applied


class TrainState(NamedTuple):
    """The state of training.

    Attributes:
      step: int32 [], number of steps taken.
      params, ema: the Transformer's parameters, and their exponential moving average.
      opt_state: the optimizer's state.
      nonfinite_run: int32 [], number of consecutive last steps with a non-finite gradient.
      nonfinite_worst: int32 [], the largest `nonfinite_run` so far.
    """

    step: jax.Array
    params: Params
    ema: Params
    opt_state: optax.OptState
    nonfinite_run: jax.Array
    nonfinite_worst: jax.Array


def init_state(config: StepConfig, key: jax.Array) -> TrainState:
    """Initial parameters, their average, and zero moments."""
    params = init_params(config.objective.model, key)
    opt_state = make_optimizer(config.optimizer, config.total_steps).init(params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, jax.tree.map(jnp.copy, params), opt_state, zero, jnp.zeros((), jnp.int32))


def abstract_state(config: StepConfig, mesh: Mesh) -> TrainState:
    """Shape, type and sharding of every array of the state, without allocating any."""
    shapes = jax.eval_shape(functools.partial(init_state, config), jax.random.key(0))
    return place_abstract(shapes, abstract_model(config.objective.model)[2], mesh)


def place_abstract(shapes, axes, mesh: Mesh):
    """Shardings of a state: parameters and moments are sharded by their axes, other arrays are replicated.

    Args:
      shapes: any tree; every dict in it has the structure of the parameters.
      axes: logical axes of the parameters.
      mesh: the mesh.

    Returns:
      jax.ShapeDtypeStruct with sharding for each array.
    """

    def place(leaf, axes):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.sharding(mesh, axes, leaf.shape))

    def place_params(tree):
        return jax.tree.map(place, tree, axes)

    def place_scalar(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))

    is_params = lambda tree: isinstance(tree, dict)
    return jax.tree.map(
        lambda tree: place_params(tree) if is_params(tree) else place_scalar(tree), shapes, is_leaf=is_params
    )


def create_state(config: StepConfig, mesh: Mesh, key: jax.Array) -> TrainState:
    """The initial state, every array created with its sharding."""
    return _state_maker(config, mesh)(key)


def lower_create_state(config: StepConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The program of `create_state`, traced."""
    return _state_maker(config, mesh).lower(abstract_key(mesh))


def _state_maker(config: StepConfig, mesh: Mesh):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(functools.partial(init_state, config), out_shardings=shardings)


def abstract_key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Shape, type and sharding of a run's base key."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))


def train_step(config: StepConfig, state: TrainState, batch, key: jax.Array) -> tuple[TrainState, dict]:
    """One optimizer step. Pure: the same (state, batch, key) give the same result.

    A step with a non-finite gradient leaves parameters, average and moments unchanged, and is
    counted in `nonfinite_run`.

    Args:
      config: static settings.
      state: the state before the step.
      batch: `image` float32 [batch, (frames,) height, width, channels], `label` int [batch].
      key: the run's base key; the step number is folded in here.

    Returns:
      The next state, and metrics: scalars, and sums and counts by bin; with a non-finite gradient
      all are 0 except `nonfinite_steps`.
    """
    step_key = jax.random.fold_in(key, state.step)
    keys = example_keys(step_key, batch["label"].shape[0])
    grads, metrics = batch_gradients(config, state.params, batch, keys, batch_key(step_key))
    grad_norm = optax.global_norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])
    optimizer = make_optimizer(config.optimizer, config.total_steps)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = update_ema(state.ema, params, state.step, config.ema_decay)

    def keep_if_finite(new, old):
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

    run = jnp.where(finite, 0, state.nonfinite_run + 1)
    schedule = learning_rate_schedule(config.optimizer, config.total_steps)
    metrics |= {"grad_norm": grad_norm, "learning_rate": schedule(updates_applied(state.opt_state))}
    # A NaN would make the mean over a logging interval NaN.
    metrics = jax.tree.map(lambda metric: jnp.where(finite, metric, 0), metrics)
    metrics["nonfinite_steps"] = 1.0 - finite
    return TrainState(
        step=state.step + 1,
        params=keep_if_finite(params, state.params),
        ema=keep_if_finite(ema, state.ema),
        opt_state=keep_if_finite(opt_state, state.opt_state),
        nonfinite_run=run,
        nonfinite_worst=jnp.maximum(run, state.nonfinite_worst),
    ), metrics


def update_ema(ema, params, step: jax.Array, ema_decay: float):
    """The moving average, given the `params` after step number `step`; warmed up as in StepConfig."""
    decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, params)


def batch_gradients(config: StepConfig, params, batch, keys, shared_key):
    """Gradient and metrics of the batch, in `grad_accum_steps` parts."""
    grad_fn = jax.grad(functools.partial(training_loss, config.objective), has_aux=True)
    parts = config.grad_accum_steps
    if parts == 1:
        return grad_fn(params, batch, keys, shared_key)
    # Part i has examples i, i + parts, ..., so that each device keeps its share of every part.
    split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), (batch, keys))

    def accumulate(total, part):
        return jax.tree.map(jnp.add, total, grad_fn(params, *part, shared_key)), None

    shapes = jax.eval_shape(grad_fn, params, *jax.tree.map(lambda a: a[0], split), shared_key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (grads, metrics), _ = jax.lax.scan(accumulate, zeros, split)
    grads = jax.tree.map(lambda g: g / parts, grads)
    return grads, {k: v if "/" in k else v / parts for k, v in metrics.items()}


def compile_train_step(config: StepConfig, mesh: Mesh, batch_shapes, key: jax.Array):
    """Compiles `train_step` ahead of time, so that a run has one program.

    Args: as for `lower_train_step`.

    Returns:
      The compiled function (state, batch, key) -> (state, metrics), which donates the
      state and raises for arguments of another shape, type or sharding.
    """
    return lower_train_step(config, mesh, batch_shapes, key).compile()


def lower_train_step(config: StepConfig, mesh: Mesh, batch_shapes, key: jax.Array) -> jax.stages.Lowered:
    """`train_step` traced for a mesh.

    Args:
      config: static settings.
      mesh: the devices.
      batch_shapes: (shape, dtype) of each array of a global batch, by name.
      key: the run's base key (its shape and type).
    """
    return lower_step(functools.partial(train_step, config), abstract_state(config, mesh), mesh, batch_shapes, key)


def lower_step(step, state, mesh: Mesh, batch_shapes, key: jax.Array) -> jax.stages.Lowered:
    """A function (state, batch, key) -> (state, metrics) traced for a mesh; it donates the state.

    Args:
      step: the function.
      state: shapes, types and shardings of its state.
      mesh: the devices.
      batch_shapes: (shape, dtype) of each array of a global batch, by name.
      key: PRNG key (its shape and type).
    """
    where = sharding.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, (shape, dtype) in batch_shapes.items()}
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
    in_shardings = jax.tree.map(lambda leaf: leaf.sharding, (state, batch, key))
    jitted = jax.jit(
        step, in_shardings=in_shardings, out_shardings=(in_shardings[0], sharding.replicated(mesh)), donate_argnums=0
    )
    with jax.set_mesh(mesh):
        return jitted.lower(state, batch, key)
