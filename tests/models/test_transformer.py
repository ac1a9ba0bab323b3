"""The trunk: sizes, initialization, leaks, and settings that must not change the result."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_params

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.core.factorization import FactorizationConfig, draw_plan
from causalfusion_jax.models.config import TransformerConfig
from causalfusion_jax.models.flops import forward_flops, training_flops
from causalfusion_jax.models.positions import sincos_table
from causalfusion_jax.models.presets import ACDIT, PRESETS, preset
from causalfusion_jax.models.transformer import abstract_model, count_params, init_params

TINY = TransformerConfig(hidden=32, heads=2, layers=2, grid=(3, 3), token_dim=4, num_classes=5)
ADALN = dataclasses.replace(TINY, **ACDIT)


@functools.cache
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    plan = jax.vmap(lambda key: draw_plan(FactorizationConfig(gamma=0.99), (3, 3), key))(jax.random.split(keys[0], 6))
    clean, noisy = (jax.random.normal(key, (6, 9, 4)) for key in keys[1:3])
    t = jax.random.randint(keys[3], (6, 1), 0, 1000)
    return Condition(jnp.arange(6) % 5), clean, noisy, t, plan.order, plan.step


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, args):
    return nnx.merge(abstract_model(config)[0], params)(*args)


@pytest.mark.parametrize(
    ("name", "count", "millions"),
    [
        ("L", 369_519_632, 369.5),
        ("XL", 713_988_368, 714.0),
        ("H", 1_235_635_088, 1235.6),
        ("H40", 1_045_203_856, 1045.2),
    ],
)
def test_published_parameter_counts(name, count, millions):
    config = TransformerConfig(**preset(name), grid=(16, 16), token_dim=16, num_classes=1000, num_condition_tokens=64)
    assert count_params(config) == count
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(("name", "millions"), [("B", 130.3), ("L", 457.9), ("XL", 674.9), ("H", 951.0)])
def test_published_acdit_parameter_counts(name, millions):
    config = TransformerConfig(**preset(f"acdit_{name}"), grid=(32, 32), token_dim=4, num_classes=1000, **ACDIT)
    assert round(count_params(config) / 1e6, 1) == millions


def test_unknown_preset():
    with pytest.raises(InputError, match="did you mean XL"):
        preset("XXL")
    assert all(set(sizes) == {"hidden", "heads", "layers"} for sizes in PRESETS.values())


def test_fresh_model_predicts_zero_and_starts_from_sines():
    params = jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0))
    assert not np.asarray(forward(TINY, params, inputs())).any()
    positions = np.asarray(params["positions"]).reshape(3, 3, 32)
    # The column is in the first half, the row in the second.
    np.testing.assert_array_equal(positions[:, 1, :16], positions[[0, 0, 0], 1, :16])
    np.testing.assert_array_equal(positions[1, :, 16:], positions[1, [0, 0, 0], 16:])
    assert 0.015 < float(params["label_table"]["embedding"].std()) < 0.025


def test_repeated_condition_tokens_are_those_of_a_table_that_repeats_them():
    config, whole = (dataclasses.replace(TINY, num_condition_tokens=6, condition_repeats=n) for n in (3, 1))
    params = random_params(config)
    table = params["label_table"]["embedding"]
    assert table.shape == (6, 2 * 32) and count_params(whole) - count_params(config) == 6 * 4 * 32
    repeated = params | {"label_table": {"embedding": jnp.concatenate([table] * 3, axis=1)}}
    np.testing.assert_array_equal(forward(config, params, inputs()), forward(whole, repeated, inputs()))


def test_layers_are_initialized_independently():
    kernels = np.asarray(jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0))["blocks"]["mlp_in"]["kernel"])
    assert not np.allclose(kernels[0], kernels[1])
    bound = np.sqrt(6 / (32 + 128))
    assert np.abs(kernels).max() <= bound and np.abs(kernels).max() > 0.95 * bound


@pytest.mark.parametrize("config", [TINY, ADALN], ids=["in_context", "adaln"])
def test_nothing_leaks(config):
    """Changing a token leaves every prediction that must not depend on it bit-identical."""
    params = random_params(config)
    condition, clean, noisy, t, order, step = inputs()
    before = np.asarray(forward(config, params, inputs()))
    rng, attended = np.random.default_rng(0), 0
    for position in rng.choice(9, 4, replace=False):
        changed = np.asarray(
            forward(config, params, (condition, clean.at[:, position].add(1.0), noisy, t, order, step))
        )
        attends = np.asarray(step) > np.asarray(step)[:, position, None]
        attended += attends.sum()
        np.testing.assert_array_equal(changed[~attends], before[~attends])
        assert (changed[attends] != before[attends]).any(axis=-1).all()
        changed = np.asarray(
            forward(config, params, (condition, clean, noisy.at[:, position].add(1.0), t, order, step))
        )
        attends = np.asarray(step) == np.asarray(step)[:, position, None]
        np.testing.assert_array_equal(changed[~attends], before[~attends])
        assert (changed[attends] != before[attends]).any(axis=-1).all()
    assert attended > 0
    changed = np.asarray(forward(config, params, (Condition(condition.labels + 1), clean, noisy, t, order, step)))
    assert (changed != before).any(axis=-1).all()


@pytest.mark.parametrize(
    "setting",
    [
        dict(remat="dots"),
        dict(scan_unroll=2),
        dict(attention="flash"),
        pytest.param(dict(remat="full"), marks=pytest.mark.slow),
    ],
    ids=lambda setting: str(*setting.values()),
)
def test_settings_that_change_nothing(setting):
    params = random_params(TINY)

    def loss(params, config):
        return jnp.mean(jnp.square(forward(config, params, inputs())))

    other = dataclasses.replace(TINY, **setting)
    expected, actual = (jax.value_and_grad(loss)(params, config) for config in (TINY, other))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), actual, expected)


def test_bfloat16_is_close_and_finite():
    params = random_params(TINY)
    exact = forward(TINY, params, inputs())
    half = forward(dataclasses.replace(TINY, dtype="bfloat16"), params, inputs())
    assert half.dtype == jnp.float32
    assert np.linalg.norm(half - exact) / np.linalg.norm(exact) < 0.03


def test_fixed_positions_are_no_parameters():
    fixed = dataclasses.replace(TINY, positions="sincos")
    assert count_params(TINY) - count_params(fixed) == 9 * 32
    params = random_params(fixed)
    positions = jnp.asarray(sincos_table((3, 3), 32))
    np.testing.assert_allclose(
        forward(fixed, params, inputs()), forward(TINY, params | {"positions": positions}, inputs()), rtol=1e-5
    )


def test_clean_tokens_of_the_last_step_change_nothing():
    params = random_params(ADALN)
    condition, clean, noisy, t, order, _ = inputs()
    step = jnp.broadcast_to(jnp.arange(9) // 3, (6, 9))
    whole = forward(ADALN, params, (condition, clean, noisy, t, order, step))
    trimmed = forward(ADALN, params, (condition, clean[:, :6], noisy, t, order, step))
    np.testing.assert_allclose(whole, trimmed, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, ADALN], ids=["in_context", "adaln"])
def test_levels_by_group_are_levels_by_token(config):
    params = random_params(config)
    condition, clean, noisy, _, order, _ = inputs()
    step = jnp.broadcast_to(jnp.arange(9) // 3, (6, 9))
    t = jax.random.randint(jax.random.key(5), (6, 3), 0, 1000)
    by_group = forward(config, params, (condition, clean, noisy, t, order, step))
    by_token = forward(config, params, (condition, clean, noisy, jnp.repeat(t, 3, axis=1), order, step))
    np.testing.assert_allclose(by_group, by_token, atol=1e-5)
    other = forward(config, params, (condition, clean, noisy, t.at[:, 1].add(-300), order, step))
    changed = (np.asarray(other) != by_group).any(axis=(0, 2))
    np.testing.assert_array_equal(changed, [False] * 3 + [True] * 3 + [False] * 3)


def test_adaln_starts_as_if_every_block_were_skipped():
    params = jax.jit(init_params, static_argnums=0)(ADALN, jax.random.key(0))
    assert not np.asarray(params["blocks"]["modulation"]["kernel"]).any()
    # A head of ones shows what the trunk leaves of the noisy tokens.
    params["token_out"]["kernel"] = jnp.ones_like(params["token_out"]["kernel"])
    noisy = inputs()[2]
    h = noisy @ params["token_in"]["kernel"]
    expected = (h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)).sum(-1)
    np.testing.assert_allclose(forward(ADALN, params, inputs())[..., 0], expected, rtol=1e-4, atol=1e-4)


def test_without_qk_norm():
    plain = dataclasses.replace(TINY, qk_norm=False)
    params = random_params(plain)
    assert "q_norm" not in params["blocks"]
    assert np.isfinite(forward(plain, params, inputs())).all()


def test_flops_by_hand():
    # Per layer and token: qkv and out 4 D^2, MLP 8 D^2, and two products with every key.
    per_token = 2 * (12 * 32**2 + 2 * 10 * 32) + 2 * 2 * 32 * 4 / 2
    assert forward_flops(TINY, 10) == 10 * 2 * per_token
    assert training_flops(TINY) == 3 * forward_flops(TINY, 4 + 18)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (dict(heads=3), "heads"),
        (dict(hidden=30, heads=2), "hidden"),
        (dict(layers=0), "layers"),
        (dict(dtype="float16"), "dtype"),
        (dict(remat="some"), "remat"),
        (dict(attention="sparse"), "attention"),
        (dict(scan_unroll=3), "scan_unroll"),
        (dict(conditioning="adaln"), "num_condition_tokens"),
        (dict(num_condition_tokens=0), "num_condition_tokens"),
        (dict(condition_repeats=0), "condition_repeats"),
        (dict(num_condition_tokens=4, condition_repeats=3), "condition_repeats"),
        (dict(conditioning="adaln", num_condition_tokens=0, condition_repeats=2), "condition_repeats"),
        (dict(norm="batch"), "norm"),
        (dict(positions="rope", grid=(2, 3, 3), hidden=48), "heads"),
    ],
)
def test_bad_settings_are_refused(bad, field):
    with pytest.raises(InputError) as error:
        dataclasses.replace(TINY, **bad)
    assert error.value.field == field
