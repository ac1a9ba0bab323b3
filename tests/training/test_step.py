"""The training step: exactness, averaging, guards, and one program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import make_batch, random_params, tiny_config

from causalfusion_jax.common import sharding
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config import experiment
from causalfusion_jax.config.training import OptimizerConfig
from causalfusion_jax.core.diffusion import DiffusionConfig
from causalfusion_jax.core.factorization import FactorizationConfig, draw_plan, num_visible_clean_of_batch
from causalfusion_jax.training import state as state_lib
from causalfusion_jax.training.draws import example_keys
from causalfusion_jax.training.objective import diffusion_loss
from causalfusion_jax.training.optimizer import learning_rate_schedule, make_optimizer
from causalfusion_jax.training.state import TrainState, compile_train_step, create_state, init_state, train_step
from causalfusion_jax.training.trimming import LengthOfStep, expected_flops, with_length

CONFIG = experiment.from_dict(tiny_config())
MESH = sharding.make_mesh(CONFIG.mesh, jax.devices()[:1])
KEY = jax.random.key(1)


def start(config=CONFIG):
    state = create_state(config.step, MESH, jax.random.key(0))
    return state._replace(params=random_params(config.transformer)), make_batch(config, MESH)[0]


@functools.cache
def step_of(config):
    return jax.jit(functools.partial(train_step, config.step))


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_step_is_a_pure_function():
    state, batch = start()
    assert_trees_equal(step_of(CONFIG)(state, batch, KEY), step_of(CONFIG)(state, batch, KEY))
    other = step_of(CONFIG)(state._replace(step=state.step + 1), batch, KEY)[1]
    assert float(other["loss"]) != float(step_of(CONFIG)(state, batch, KEY)[1]["loss"])


def test_the_update_is_optax_on_the_gradient():
    state, batch = start()
    keys = example_keys(jax.random.fold_in(KEY, 0), 16)
    grad_fn = jax.jit(jax.grad(functools.partial(diffusion_loss, CONFIG.step.objective), has_aux=True))
    grads, _ = grad_fn(state.params, batch, keys)
    optimizer = make_optimizer(CONFIG.optimizer, CONFIG.train.steps)
    updates, moments = optimizer.update(grads, state.opt_state, state.params)
    new, step_metrics = step_of(CONFIG)(state, batch, KEY)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-7), new.opt_state, moments)
    # Adam's first step is the gradient's sign, which rounding decides for the smallest ones.
    expected = optax.apply_updates(state.params, updates)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-4), new.params, expected)
    np.testing.assert_allclose(step_metrics["grad_norm"], optax.global_norm(grads), rtol=1e-4)
    # Warmed-up average: decay (1 + 0) / (10 + 0) at the first step.
    ema = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * new, state.ema, new.params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), new.ema, ema)


@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_accumulated_gradients_are_those_of_the_batch(parts):
    state, batch = start()
    split = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, grad_accum_steps=parts))
    (whole, whole_metrics), (sum_of, metrics) = (step_of(c)(state, batch, KEY) for c in (CONFIG, split))
    for name in metrics:
        np.testing.assert_allclose(metrics[name], whole_metrics[name], rtol=2e-5, err_msg=name)
    moments = [s.opt_state[1][0].mu for s in (sum_of, whole)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), *moments)


def test_nonfinite_gradients_are_skipped_and_counted():
    state, batch = start()
    bad = batch | {"image": batch["image"].at[0, 0, 0, 0].set(jnp.nan)}
    after, metrics = step_of(CONFIG)(state, bad, KEY)
    assert float(metrics.pop("nonfinite_steps")) == 1
    # Nothing that would hide the other steps of an interval.
    assert not any(np.any(np.asarray(value)) for value in metrics.values())
    for name in ("params", "ema", "opt_state"):
        assert_trees_equal(getattr(after, name), getattr(state, name))
    assert (int(after.step), int(after.nonfinite_run)) == (1, 1)
    after, _ = step_of(CONFIG)(after, bad, KEY)
    assert (int(after.nonfinite_run), int(after.nonfinite_worst)) == (2, 2)
    after, metrics = step_of(CONFIG)(after, batch, KEY)
    assert (int(after.nonfinite_run), int(after.nonfinite_worst)) == (0, 2)
    assert float(metrics["nonfinite_steps"]) == 0
    assert (np.asarray(after.params["token_in"]["kernel"]) != np.asarray(state.params["token_in"]["kernel"])).any()


def test_the_logged_learning_rate_is_that_of_the_update(monkeypatch):
    """Skipped steps do not count in the schedule: the third step is the first of the warm-up."""
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=10, weight_decay=0.0)
    config = dataclasses.replace(CONFIG, optimizer=optimizer).step
    params = {"w": {"kernel": jnp.ones((2, 2))}}
    zero, moments = jnp.zeros((), jnp.int32), make_optimizer(optimizer, config.total_steps).init(params)
    state, batch = TrainState(zero, params, params, moments, zero, zero), {"label": jnp.zeros(2, jnp.int32)}
    for gradient in (jnp.nan, jnp.nan, 1.0):
        grads = jax.tree.map(lambda leaf, gradient=gradient: gradient * leaf, params)
        monkeypatch.setattr(state_lib, "batch_gradients", lambda *args, grads=grads: (grads, {"loss": jnp.zeros(())}))
        state, metrics = train_step(config, state, batch, KEY)
    np.testing.assert_allclose(metrics["learning_rate"], 1e-3, rtol=1e-6)
    # Adam's first step is the rate itself.
    np.testing.assert_allclose(1.0 - state.params["w"]["kernel"], 1e-3, rtol=1e-3)


def test_binned_errors_add_up():
    state, batch = start()
    _, metrics = step_of(CONFIG)(state, batch, KEY)
    for name in ("mse_by_t", "mse_by_ar_step"):
        assert float(metrics[f"{name}/count"].sum()) == 16 * 16
        mean = metrics[f"{name}/sum"].sum() / metrics[f"{name}/count"].sum()
        np.testing.assert_allclose(mean, metrics["mse"], rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        dict(diffusion=DiffusionConfig(schedule="cosine", target="v", loss_weight="min_snr", t_shared_by="step")),
        dict(diffusion=DiffusionConfig(schedule="flow", target="velocity", t_distribution="logit_normal")),
        pytest.param(dict(diffusion=DiffusionConfig(target="x_0", t_shared_by="token")), marks=pytest.mark.slow),
        dict(factorization=FactorizationConfig(order="square_blocks", order_block=4, steps="block", block_size=4)),
        pytest.param(
            dict(factorization=FactorizationConfig(order="raster", steps="fixed", num_steps=1, weight="none")),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["cosine v by step", "flow", "x_0 by token", "blocks", "diffusion"],
)
def test_other_factorizations_learn(changes):
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(learning_rate=3e-3), **changes)
    state, batch = create_state(config.step, MESH, jax.random.key(0)), make_batch(config, MESH)[0]
    losses = []
    for _ in range(25):
        state, metrics = step_of(config)(state, batch, KEY)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < np.mean(losses[:3])


def test_dropped_classes_see_the_null_row_only():
    config = dataclasses.replace(CONFIG.step.objective, class_dropout=1.0)
    state, batch = start()
    grad_fn = jax.jit(jax.grad(functools.partial(diffusion_loss, config), has_aux=True))
    grads, _ = grad_fn(state.params, batch, example_keys(KEY, 16))
    table = np.asarray(grads["label_table"]["embedding"])
    assert not table[:10].any() and table[10].any()


def test_one_program_that_refuses_other_shapes():
    compiles = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiles.append(event) if "backend_compile" in event else None
    )
    key = jax.device_put(KEY, sharding.replicated(MESH))
    state = create_state(CONFIG.step, MESH, jax.random.key(0))
    batch, shapes = make_batch(CONFIG, MESH)
    step = compile_train_step(CONFIG.step, MESH, shapes, key)
    state, _ = step(state, batch, key)
    before = len(compiles)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, _ = step(state, batch, key)
    assert before > 0 and len(compiles) == before
    with pytest.raises(TypeError):
        step(state, batch | {"label": batch["label"][:8]}, key)


def test_average_is_a_copy():
    state = jax.jit(init_state, static_argnums=0)(CONFIG.step, jax.random.key(0))
    assert_trees_equal(state.params, state.ema)
    donated = compile_train_step(CONFIG.step, MESH, make_batch(CONFIG, MESH)[1], KEY)
    placed = create_state(CONFIG.step, MESH, jax.random.key(0))
    donated(placed, make_batch(CONFIG, MESH)[0], jax.device_put(KEY, sharding.replicated(MESH)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(placed))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.1, 9: 1.0, 10: 1.0, 99: 1.0}),
        ("cosine", {0: 0.1, 10: 1.0, 55: 0.6, 99: 0.2}),
        ("wsd", {0: 0.1, 10: 1.0, 80: 1.0, 90: 0.5**3, 99: 0.5**5.7}),
    ],
)
def test_learning_rates_by_hand(schedule, expected):
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=10, decay_fraction=0.2, final_ratio=0.2)
    rate = learning_rate_schedule(config, 100)
    for step, part in expected.items():
        np.testing.assert_allclose(rate(step), 2.0 * part, rtol=2e-3, err_msg=str(step))


def test_weight_decay_spares_vectors():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    params = random_params(CONFIG.transformer)
    optimizer = make_optimizer(config, 10)

    @jax.jit
    def decay_alone(params):
        return optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]

    updates = decay_alone(params)
    assert np.asarray(updates["blocks"]["mlp_in"]["kernel"]).any()
    for path in (("blocks", "mlp_in", "bias"), ("blocks", "q_norm", "scale"), ("positions",)):
        assert not np.asarray(functools.reduce(lambda tree, name: tree[name], path, updates)).any(), path


@pytest.mark.parametrize("bad", [dict(b2=1.0), dict(learning_rate=0.0), dict(schedule="step"), dict(clip_norm=-1.0)])
def test_bad_settings_are_refused(bad):
    with pytest.raises(InputError):
        OptimizerConfig(**bad)


@pytest.mark.slow
def test_left_out_clean_tokens_change_nothing():
    """Same losses and parameters, whether unattended clean tokens are computed or not."""
    shared = dataclasses.replace(CONFIG.factorization, steps_shared_by="batch")
    config = dataclasses.replace(CONFIG, factorization=shared)
    key = jax.device_put(KEY, jax.devices()[0])
    length_of = LengthOfStep(config.step.objective, 4, key)
    assert length_of.lengths == (4, 8, 12, 16)
    used = [length_of(step) for step in range(400)]
    assert set(used) == {4, 8, 12, 16}
    state, batch = start(config)
    # A step with few attended clean tokens.
    step = next(step for step, length in enumerate(used) if length == 8)
    state = state._replace(step=jnp.int32(step))
    whole, metrics = jax.jit(functools.partial(train_step, config.step))(state, batch, key)
    trimmed_config = with_length(config.step, 8)
    trimmed, trimmed_metrics = jax.jit(functools.partial(train_step, trimmed_config))(state, batch, key)
    np.testing.assert_allclose(trimmed_metrics["loss"], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(trimmed_metrics["grad_norm"], metrics["grad_norm"], rtol=1e-5)
    moments = [s.opt_state[1][0].mu for s in (trimmed, whole)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), *moments)
    assert trimmed_config.objective.flops < 0.8 * config.step.objective.flops
    saved = 1 - expected_flops(config.step.objective, 4, key, 1) / config.step.objective.flops
    at_best = 1 - expected_flops(config.step.objective, 0, key, 1) / config.step.objective.flops
    assert 0.05 < saved < at_best


def test_all_images_of_a_batch_share_their_steps():
    shared = dataclasses.replace(CONFIG.factorization, steps_shared_by="batch")
    keys = jax.random.split(KEY, 6)
    plans = jax.vmap(lambda key: draw_plan(shared, (4, 4), key, KEY))(keys)
    assert (np.asarray(plans.step) == plans.step[0]).all()
    assert len(np.unique(plans.order, axis=0)) == 6
    visible = num_visible_clean_of_batch(shared, 16, KEY)
    assert int(visible) == int((plans.step[0] < plans.step[0, -1]).sum())
