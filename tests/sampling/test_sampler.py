"""The cached sampler against an uncached, plain Python loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_params

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config.sampling import SamplerConfig
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.core.diffusion import DiffusionConfig, to_x_0_and_eps
from causalfusion_jax.core.factorization import CONDITION_STEP, FactorizationConfig, Role
from causalfusion_jax.core.solvers import solver_table
from causalfusion_jax.models.config import TransformerConfig
from causalfusion_jax.models.flops import forward_flops
from causalfusion_jax.models.presets import ACDIT
from causalfusion_jax.models.sequence import ImageTokens
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.sampling.sampler import (
    Given,
    SamplingSpec,
    guidance_scales,
    image_keys,
    sample_tokens,
    sampling_flops,
)

MODEL = TransformerConfig(hidden=32, heads=2, layers=2, grid=(4, 4), token_dim=4, num_classes=5)
ADALN = dataclasses.replace(MODEL, **ACDIT)
LINEAR = DiffusionConfig()
FLOW = DiffusionConfig(schedule="flow", target="velocity")
TRAINED = FactorizationConfig()
LABELS = np.array([0, 3, 4])
CONDITION = Condition(jnp.asarray(LABELS))


@functools.cache
def params(config=MODEL):
    return random_params(config, 0.08)


def spec(sampler, config=MODEL):
    return SamplingSpec(config, LINEAR, TRAINED, sampler)


@functools.cache
def network(config):
    """The whole sequence through the model, nothing cached; compiled per length."""
    weights = params(config)

    @jax.jit
    def run(labels, clean, noisy, ids, t, role, step):
        model = nnx.merge(abstract_model(config)[0], weights)
        known = clean.shape[1]
        clean, noisy = ImageTokens(clean, ids[:, :known]), ImageTokens(noisy, ids[:, known:], t)
        return model.sequence(Condition(labels), clean, noisy, role, step)[0]

    return run


def uncached(config, sampler, diffusion, order, noise, known=None):
    """Samples with a Python loop over AR steps and solver rows.

    `noise(index, row)` [batch, tokens, dim] is the noise of a solver row, -1 the first.
    """
    batch = len(LABELS)
    clean = np.zeros((batch, 0, MODEL.token_dim), np.float32) if known is None else np.asarray(known)
    sizes = sampler.sizes(MODEL.num_tokens - clean.shape[1])
    table = solver_table(sampler, diffusion)
    scales = guidance_scales(sampler, table.t, diffusion.num_timesteps, sizes)
    first_step = 1 if clean.shape[1] else 0
    step_of_clean = [0] * clean.shape[1]
    for index, size in enumerate(sizes):
        ids = order[:, : clean.shape[1] + size]
        role = [Role.CONDITION] * config.num_condition_tokens + [Role.CLEAN] * clean.shape[1] + [Role.NOISY] * size
        step = [CONDITION_STEP] * config.num_condition_tokens + step_of_clean + [index + first_step] * size
        role, step = (jnp.broadcast_to(jnp.array(a, jnp.int32), (batch, len(a))) for a in (role, step))
        x = begin = noise(index, -1)[:, :size]
        previous = np.zeros_like(x)
        for row in range(len(table.t)):

            def predict(labels, x=x, row=row, ids=ids, role=role, step=step, clean=clean):
                return network(config)(labels, clean, x, ids, jnp.full((batch, 1), table.t[row]), role, step)

            prediction = predict(jnp.asarray(LABELS))
            w = scales[index, row]
            if w != 1.0:
                null = predict(jnp.full_like(jnp.asarray(LABELS), MODEL.num_classes))
                prediction = null + w * (prediction - null)
            x_0, _ = to_x_0_and_eps(diffusion.target, prediction, x, table.alpha[row], table.sigma[row])
            x_0 = np.asarray(x_0)
            if sampler.clip_x_0:
                x_0 = np.clip(x_0, -sampler.clip_x_0, sampler.clip_x_0)
            begin = x if table.begins[row] else begin
            x = (
                table.c_x[row] * x
                + table.c_begin[row] * begin
                + table.c_x_0[row] * x_0
                + table.c_previous[row] * previous
                + sampler.temperature * table.c_noise[row] * noise(index, row)[:, :size]
            )
            previous = x_0
        clean = np.concatenate([clean, x], axis=1)
        step_of_clean += [index + first_step] * size
    raster = np.zeros_like(clean)
    np.put_along_axis(raster, np.asarray(order)[..., None], clean, axis=1)
    return raster


def check(sampler, diffusion=LINEAR, known=None, order=None, config=MODEL):
    keys = image_keys(5, np.arange(len(LABELS)))
    order_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    if order is None:
        order = jax.vmap(lambda key: jax.random.permutation(key, 16))(order_keys)
    size = max(sampler.sizes(16 - (0 if known is None else known.shape[1])))

    def noise(index, row):
        def draw(key):
            key = jax.random.fold_in(jax.random.fold_in(key, index), row + 1)
            return jax.random.normal(key, (size, MODEL.token_dim))

        return np.asarray(jax.vmap(draw)(noise_keys))

    expected = uncached(config, sampler, diffusion, order, noise, known)
    given = Given(None if sampler.order == "" and known is None else order, known)
    actual = sample_tokens(SamplingSpec(config, diffusion, TRAINED, sampler), params(config), keys, CONDITION, given)
    np.testing.assert_allclose(actual, expected, atol=2e-3, rtol=2e-3)
    assert np.std(expected) > 0.1


@pytest.mark.parametrize("ar_steps", [1, 2, 4, 16])
def test_cached_equals_uncached(ar_steps):
    check(SamplerConfig(ar_steps=ar_steps, solver_steps=6))


@pytest.mark.parametrize(("ar_steps", "cfg_scale"), [(1, 1.0), (4, 2.0)])
def test_shared_cache_equals_uncached(ar_steps, cfg_scale):
    """adaLN on the noisy tokens only: both halves of guidance share the clean keys and values."""
    check(SamplerConfig(ar_steps=ar_steps, solver_steps=5, cfg_scale=cfg_scale), config=ADALN)


@pytest.mark.parametrize("config", [MODEL, ADALN], ids=["in_context", "adaln"])
def test_attention_in_tiles_samples_the_same(config):
    sampler = SamplerConfig(step_sizes=(3, 13), solver_steps=3, cfg_scale=2.0)
    dense, tiled = (
        sample_tokens(spec(sampler, model), params(config), image_keys(0, range(3)), CONDITION)
        for model in (dataclasses.replace(config, attention=kind) for kind in ("dense", "flash"))
    )
    np.testing.assert_allclose(tiled, dense, rtol=1e-5, atol=1e-5 * np.abs(dense).max())


def test_known_tokens_with_shared_cache():
    known = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 4)), jnp.float32)
    order = jnp.asarray(np.random.default_rng(1).permuted(np.tile(np.arange(16), (3, 1)), axis=1))
    check(SamplerConfig(step_sizes=(3, 7), solver_steps=4, cfg_scale=1.5), known=known, order=order, config=ADALN)


@pytest.mark.parametrize(
    "sampler",
    [
        SamplerConfig(step_sizes=(1, 3, 12), solver_steps=5),
        pytest.param(SamplerConfig(ar_steps=3, solver_steps=5, cfg_scale=2.0), marks=pytest.mark.slow),
        SamplerConfig(ar_steps=3, solver_steps=6, cfg_scale=2.0, cfg_interval=(300, 700)),
        pytest.param(
            SamplerConfig(ar_steps=4, solver_steps=5, cfg_scale=1.7, cfg_schedule="linear"), marks=pytest.mark.slow
        ),
        SamplerConfig(ar_steps=4, solver_steps=5, cfg_scale=1.7, cfg_schedule="ar_linear"),
        SamplerConfig(ar_steps=2, solver_steps=5, variance="small", temperature=0.7),
        pytest.param(SamplerConfig(ar_steps=2, solver_steps=5, solver="ddim"), marks=pytest.mark.slow),
        SamplerConfig(ar_steps=2, solver_steps=5, solver="ddim", eta=0.5, clip_x_0=1.0),
        SamplerConfig(ar_steps=2, solver_steps=5, solver="dpmpp_2m"),
    ],
    ids=lambda s: f"{s.solver}-{s.cfg_scale}-{s.cfg_schedule}-{s.step_sizes or s.ar_steps}-{s.eta}-{s.temperature}",
)
def test_every_setting(sampler):
    check(sampler)


@pytest.mark.parametrize(
    "solver", ["heun", *(pytest.param(name, marks=pytest.mark.slow) for name in ("euler", "ddpm", "ddim", "dpmpp_2m"))]
)
def test_flow_solvers(solver):
    check(SamplerConfig(ar_steps=2, solver_steps=5, solver=solver), FLOW)


def test_known_tokens_are_context_and_stay():
    known = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32)
    order = jnp.asarray(np.random.default_rng(1).permuted(np.tile(np.arange(16), (3, 1)), axis=1))
    sampler = SamplerConfig(ar_steps=3, solver_steps=4, cfg_scale=1.5)
    check(sampler, known=jnp.asarray(known), order=order)
    tokens = sample_tokens(spec(sampler), params(), image_keys(0, range(3)), CONDITION, Given(order, known))
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(tokens), np.asarray(order)[:, :6, None], 1), known)


@pytest.mark.parametrize(
    "order",
    ["block_raster", *(pytest.param(o, marks=pytest.mark.slow) for o in ("raster", "dilated", "square_blocks"))],
)
def test_every_order(order):
    from causalfusion_jax.core.factorization import token_order

    block = {"raster": 0, "square_blocks": 4}.get(order, 2)
    order_of_grid = token_order(FactorizationConfig(order=order, order_block=block), (4, 4))
    sampler = SamplerConfig(ar_steps=4, solver_steps=3, order=order, order_block=block)
    check(sampler, order=jnp.tile(order_of_grid, (3, 1)))
    run = functools.partial(sample_tokens, spec(sampler), params(), image_keys(5, range(3)), CONDITION)
    drawn, given = run(), run(Given(jnp.tile(order_of_grid, (3, 1))))
    np.testing.assert_allclose(drawn, given, rtol=1e-4, atol=1e-4)


def test_an_image_does_not_depend_on_its_batch():
    sampler = SamplerConfig(ar_steps=2, solver_steps=3)
    run = functools.partial(sample_tokens, spec(sampler), params())
    together = run(image_keys(1, range(3)), CONDITION)
    alone = run(image_keys(1, [2]), CONDITION.select(slice(2, None)))
    np.testing.assert_allclose(together[2:], alone, rtol=1e-4, atol=1e-5)


def test_given_noise_is_where_sampling_starts():
    x_T = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16, 4)), jnp.float32)
    sampler = SamplerConfig(step_sizes=(5, 11), solver="ddim", solver_steps=3)
    run = functools.partial(sample_tokens, spec(sampler), params())
    given = Given(jnp.tile(jnp.arange(16), (3, 1)), x_T=x_T)
    one, other = (run(image_keys(seed, range(3)), CONDITION, given) for seed in (1, 2))
    np.testing.assert_array_equal(one, other)
    changed = run(image_keys(1, range(3)), CONDITION, given._replace(x_T=x_T.at[:, 5].add(1.0)))
    differs = (np.asarray(changed) != one).any(axis=-1)
    assert differs[:, 5:].all() and not differs[:, :5].any()


def test_guidance_scales_by_hand():
    t, sizes = np.array([900, 500, 100]), (2, 6)
    constant = guidance_scales(SamplerConfig(cfg_scale=3.0, cfg_interval=(200, 600)), t, 1000, sizes)
    np.testing.assert_allclose(constant, [[1, 3, 1]] * 2)
    linear = guidance_scales(SamplerConfig(cfg_scale=3.0, cfg_schedule="linear"), t, 1000, sizes)
    np.testing.assert_allclose(linear, [[1.2, 2.0, 2.8]] * 2, rtol=1e-6)
    ar_linear = guidance_scales(SamplerConfig(cfg_scale=3.0, cfg_schedule="ar_linear"), t, 1000, sizes)
    np.testing.assert_allclose(ar_linear, [[1.5] * 3, [3.0] * 3])


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (dict(ar_steps=17), "ar_steps"),
        (dict(ar_steps=0), "ar_steps"),
        (dict(step_sizes=(4, 4)), "step_sizes"),
        (dict(step_sizes=(0, 16)), "step_sizes"),
        (dict(order="zigzag"), "order"),
        (dict(order="block_raster", order_block=3), "order_block"),
        (dict(solver="rk4"), "solver"),
        (dict(solver="euler"), "solver"),
        (dict(solver_steps=1001), "solver_steps"),
        (dict(solver="ddim", temperature=0.5), "temperature"),
        (dict(eta=0.5), "eta"),
        (dict(cfg_scale=-1.0), "cfg_scale"),
        (dict(cfg_interval=(5.0, 1.0)), "cfg_interval"),
    ],
)
def test_bad_settings_are_refused(bad, field):
    with pytest.raises(InputError) as error:
        dataclasses.replace(SamplerConfig(), **bad).check(MODEL, LINEAR)
    assert error.value.field == field


@pytest.mark.parametrize("config", [MODEL, ADALN], ids=["in_context", "adaln"])
def test_model_flops(config):
    def flops(**changes):
        return sampling_flops(config, LINEAR, SamplerConfig(**dict(solver_steps=4) | changes))

    c = config.num_condition_tokens
    prefix = forward_flops(config, c, noise_levels=0) if c else 0
    copies = 2 if config.clean_depends_on_class else 1
    commit = forward_flops(config, 8, c + 8, noise_levels=0)
    assert flops() == prefix + 4 * forward_flops(config, 16, c + 16)
    assert flops(cfg_scale=2.0) == copies * prefix + 8 * forward_flops(config, 16, c + 16)
    levels = 4 * (forward_flops(config, 8, c + 8) + forward_flops(config, 8, c + 16))
    assert flops(ar_steps=2) == prefix + commit + levels
    assert flops(ar_steps=2, cfg_scale=2.0) == copies * (prefix + commit) + 2 * levels
    assert flops() < flops(cfg_scale=2.0, cfg_interval=(500.0, 1000.0)) < flops(cfg_scale=2.0)
