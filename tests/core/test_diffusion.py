"""Schedules, targets and their conversions, loss weights, noise levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.core.diffusion import (
    TARGETS,
    DiffusionConfig,
    add_noise,
    alpha_bar_table,
    alpha_sigma,
    loss_weight,
    make_target,
    sample_t,
    to_x_0_and_eps,
)

SCHEDULES = {
    "linear": DiffusionConfig(),
    "cosine": DiffusionConfig(schedule="cosine"),
    "flow": DiffusionConfig(schedule="flow", target="velocity"),
}


@pytest.fixture
def x_0_and_eps():
    keys = jax.random.split(jax.random.key(0))
    return tuple(jax.random.normal(key, (5, 3, 2)) for key in keys)


def noise_levels(config):
    """Five levels strictly inside the schedule."""
    return jnp.array([1.5, 200.0, 500.0, 800.0, 990.0]) if config.is_continuous else jnp.array([0, 200, 500, 800, 960])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_conversions_invert_targets(schedule, target, x_0_and_eps):
    config = SCHEDULES[schedule]
    alpha, sigma = (a[:, None] for a in alpha_sigma(config, noise_levels(config)))
    x_0, eps = x_0_and_eps
    x_t = add_noise(x_0, eps, alpha, sigma)
    back = to_x_0_and_eps(target, make_target(target, x_0, eps, alpha, sigma), x_t, alpha, sigma)
    np.testing.assert_allclose(back[0], x_0, atol=2e-3)
    np.testing.assert_allclose(back[1], eps, atol=2e-3)


def test_targets_by_hand(x_0_and_eps):
    x_0, eps = x_0_and_eps
    alpha, sigma = jnp.full((5, 3), 0.6), jnp.full((5, 3), 0.8)
    expected = {"eps": eps, "x_0": x_0, "v": 0.6 * eps - 0.8 * x_0, "velocity": eps - x_0}
    for target, value in expected.items():
        np.testing.assert_allclose(make_target(target, x_0, eps, alpha, sigma), value, rtol=1e-6)


def test_schedules_by_hand():
    linear = alpha_bar_table(SCHEDULES["linear"])
    np.testing.assert_allclose(linear[:2], [1 - 1e-4, (1 - 1e-4) * (1 - 1e-4 - 0.0199 / 999)], rtol=1e-12)
    cosine = alpha_bar_table(SCHEDULES["cosine"])
    expected = np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine[499], expected, rtol=1e-9)
    for name in ("linear", "cosine"):
        alpha, sigma = alpha_sigma(SCHEDULES[name], jnp.arange(1000))
        np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-5)
        assert (np.diff(alpha) < 0).all()
    alpha, sigma = alpha_sigma(SCHEDULES["flow"], jnp.array([0.0, 250.0, 1000.0]))
    np.testing.assert_allclose(alpha, [1, 0.75, 0])
    np.testing.assert_allclose(sigma, [0, 0.25, 1])


def test_min_snr_is_the_known_weight_of_each_target():
    t = jnp.array([3, 300, 700, 990])
    alpha, sigma = alpha_sigma(DiffusionConfig(), t)
    snr = np.asarray(alpha / sigma, np.float64) ** 2
    expected = {"eps": np.minimum(snr, 5) / snr, "x_0": np.minimum(snr, 5), "v": np.minimum(snr, 5) / (snr + 1)}
    for target, weight in expected.items():
        ours = loss_weight(DiffusionConfig(target=target, loss_weight="min_snr"), alpha, sigma)
        np.testing.assert_allclose(ours, weight, rtol=1e-4)
    np.testing.assert_array_equal(loss_weight(DiffusionConfig(), alpha, sigma), np.ones(4))


def test_min_snr_of_x_0_is_finite_without_noise():
    """SNR is infinite at t=0 of the flow, and the weight gamma."""
    config = DiffusionConfig(schedule="flow", target="x_0", loss_weight="min_snr")
    weight = loss_weight(config, *alpha_sigma(config, jnp.array([0.0, 1e-30, 250.0, 500.0, 1000.0])))
    np.testing.assert_allclose(weight, [5, 5, 5, 1, 0], rtol=1e-6)


def test_t_is_shared_as_configured():
    step = jnp.array([0, 0, 0, 1, 1, 2, 3, 3])
    image = sample_t(DiffusionConfig(t_shared_by="image"), jax.random.key(0), step)
    assert image.shape == (1,)
    by_step = np.asarray(sample_t(DiffusionConfig(t_shared_by="step"), jax.random.key(0), step))
    assert by_step.shape == (8,) and len(set(by_step)) == 4
    assert (by_step[1:] == by_step[:-1]).tolist() == (np.diff(step) == 0).tolist()
    by_token = np.asarray(sample_t(DiffusionConfig(t_shared_by="token"), jax.random.key(0), step))
    assert len(set(by_token)) == 8
    in_turn = np.asarray(sample_t(DiffusionConfig(t_shared_by="step", t_draws=3), jax.random.key(0), step))
    # The fourth step has the first one's.
    assert len(set(in_turn)) == 3
    np.testing.assert_array_equal(in_turn, np.where(step == 3, in_turn[0], by_step))


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_flow_times(distribution):
    config = DiffusionConfig(schedule="flow", target="velocity", t_distribution=distribution, t_shared_by="token")
    t = np.asarray(sample_t(config, jax.random.key(0), jnp.zeros(4000, jnp.int32)))
    assert t.dtype == np.float32 and t.min() >= 0 and t.max() <= 1000
    spread = {"uniform": 1000 / np.sqrt(12), "logit_normal": 208.0}[distribution]
    np.testing.assert_allclose([t.mean(), t.std()], [500, spread], rtol=0.05)


def test_discrete_times_cover_all_timesteps():
    config = DiffusionConfig(num_timesteps=30, t_shared_by="token")
    t = np.asarray(sample_t(config, jax.random.key(0), jnp.zeros(2000, jnp.int32)))
    assert set(t) == set(range(30))


@pytest.mark.parametrize(
    "bad",
    [
        dict(schedule="sigmoid"),
        dict(target="noise"),
        dict(schedule="flow", target="eps"),
        dict(t_distribution="logit_normal"),
        dict(num_timesteps=1),
        dict(beta_start=0.0),
        dict(num_timesteps=10),
        dict(t_shared_by="step", t_draws=-1),
        dict(t_shared_by="image", t_draws=4),
        dict(t_shared_by="token", t_draws=4),
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(InputError):
        DiffusionConfig(**bad)
