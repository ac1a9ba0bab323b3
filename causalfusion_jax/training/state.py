"""The training state, and the one function that advances it."""

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
from causalfusion_jax.training.objective import batch_key, example_keys, training_loss
from causalfusion_jax.training.optimizer import learning_rate_schedule, make_optimizer, updates_applied


class TrainState(NamedTuple):
    """All that training changes.

    Attributes:
      step: int32 [], steps taken.
      params, ema: the Transformer's parameters, and their moving average.
      opt_state: the optimizer's.
      nonfinite_run: int32 [], the last so many steps had a non-finite gradient.
      nonfinite_worst: int32 [], the longest such run so far.
    """

    step: jax.Array
    params: Params
    ema: Params
    opt_state: optax.OptState
    nonfinite_run: jax.Array
    nonfinite_worst: jax.Array


def init_state(config: StepConfig, key: jax.Array) -> TrainState:
    """Fresh parameters, their average, and zero moments."""
    params = init_params(config.objective.model, key)
    opt_state = make_optimizer(config.optimizer, config.total_steps).init(params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, jax.tree.map(jnp.copy, params), opt_state, zero, jnp.zeros((), jnp.int32))


def abstract_state(config: StepConfig, mesh: Mesh) -> TrainState:
    """Shape, type and sharding of every array of the state, without allocating any."""
    shapes = jax.eval_shape(functools.partial(init_state, config), jax.random.key(0))
    return place_abstract(shapes, abstract_model(config.objective.model)[2], mesh)


def place_abstract(shapes, axes, mesh: Mesh):
    """Where the arrays of a state lie: parameters, and what is shaped like them, by their axes; the rest everywhere.

    Args:
      shapes: any tree; every dict in it is nested like the parameters.
      axes: logical axes of the parameters.
      mesh: the mesh.

    Returns:
      jax.ShapeDtypeStruct with sharding for each array.
    """

    def place(leaf, axes):
        where = sharding.sharding(mesh, axes, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    def place_params(tree):
        return jax.tree.map(place, tree, axes)

    def place_scalar(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))

    is_params = lambda tree: isinstance(tree, dict)
    return jax.tree.map(
        lambda tree: place_params(tree) if is_params(tree) else place_scalar(tree), shapes, is_leaf=is_params
    )


def create_state(config: StepConfig, mesh: Mesh, key: jax.Array) -> TrainState:
    """The initial state, every array born where it stays."""
    return _state_maker(config, mesh)(key)


def lower_create_state(config: StepConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The program of `create_state`, to be compiled."""
    return _state_maker(config, mesh).lower(abstract_key(mesh))


def _state_maker(config: StepConfig, mesh: Mesh):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(functools.partial(init_state, config), out_shardings=shardings)


def abstract_key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A run's base key: its type, and where it lies."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))


def train_step(config: StepConfig, state: TrainState, batch, key: jax.Array) -> tuple[TrainState, dict]:
    """One optimizer step. Pure: the same (state, batch, key) give the same result.

    A step whose gradient is not finite leaves parameters, average and moments as they
    were; it counts, and is counted.

    Args:
      config: static settings.
      state: where training stands.
      batch: `image` float32 [batch, (frames,) height, width, channels], `label` int [batch].
      key: the run's base key; the step number is folded in here.

    Returns:
      The next state, and metrics: scalars, and sums and counts by bin; of a step whose gradient is
      not finite all are 0 but `nonfinite_steps`.
    """
    step_key = jax.random.fold_in(key, state.step)
    keys = example_keys(step_key, batch["label"].shape[0])
    grads, metrics = _gradients(config, state.params, batch, keys, batch_key(step_key))
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
    # One step's NaN would hide all others of an interval.
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
    """The moving average after `params`, the result of step number `step`; warmed up as StepConfig says."""
    decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, params)


def _gradients(config: StepConfig, params, batch, keys, shared_key):
    """Gradient and metrics of the batch, in `grad_accum_steps` parts."""
    grad_fn = jax.grad(functools.partial(training_loss, config.objective), has_aux=True)
    parts = config.grad_accum_steps
    if parts == 1:
        return grad_fn(params, batch, keys, shared_key)
    # Part i takes examples i, i + parts, ...: each device keeps its share of every part.
    split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), (batch, keys))

    def accumulate(total, part):
        return jax.tree.map(jnp.add, total, grad_fn(params, *part, shared_key)), None

    shapes = jax.eval_shape(grad_fn, params, *jax.tree.map(lambda a: a[0], split), shared_key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (grads, metrics), _ = jax.lax.scan(accumulate, zeros, split)
    grads = jax.tree.map(lambda g: g / parts, grads)
    return grads, {k: v if "/" in k else v / parts for k, v in metrics.items()}


def compile_train_step(config: StepConfig, mesh: Mesh, batch_shapes, key: jax.Array):
    """Compiles `train_step` ahead of time: one program for a run, by construction.

    Takes what `lower_train_step` takes.

    Returns:
      The compiled function (state, batch, key) -> (state, metrics), which donates the
      state and refuses arguments of any other shape, type or placement.
    """
    return lower_train_step(config, mesh, batch_shapes, key).compile()


def lower_train_step(config: StepConfig, mesh: Mesh, batch_shapes, key: jax.Array) -> jax.stages.Lowered:
    """`train_step` traced for a mesh, to be compiled.

    Args:
      config: static settings.
      mesh: where it runs.
      batch_shapes: (shape, dtype) of each array of a global batch, by name.
      key: the run's base key (its shape and type).
    """
    return lower_step(functools.partial(train_step, config), abstract_state(config, mesh), mesh, batch_shapes, key)


def lower_step(step, state, mesh: Mesh, batch_shapes, key: jax.Array) -> jax.stages.Lowered:
    """Any step (state, batch, key) -> (state, metrics) traced for a mesh; compiled, it donates the state.

    Args:
      step: the function.
      state: its state's shapes, types and shardings.
      mesh: where it runs.
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
