"""The released models' outputs, reproduced (float32, relative error <= 1e-4).

Every file of the folder that GOLDENS_DIR names (default: tests/goldens) is read by the
prefix of its name and its `meta`; see `CHECKS` below.
"""

import functools
import json
import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import inception_weights

from causalfusion_jax.config.sampling import SamplerConfig
from causalfusion_jax.core import diffusion as noise_axis
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.core.diffusion import DiffusionConfig
from causalfusion_jax.core.factorization import (
    FactorizationConfig,
    Role,
    ar_weights,
    attends,
    static_steps,
    step_sizes_to_step,
    token_order,
    training_layout,
)
from causalfusion_jax.core.solvers import SolverConfig, solver_table
from causalfusion_jax.metrics.distribution import (
    FeatureStatistics,
    frechet_from_statistics,
    inception_score,
    precision_recall,
)
from causalfusion_jax.models.autoencoder import abstract_autoencoder, decode, moments
from causalfusion_jax.models.inception import SIDE, abstract_inception, inception_features, resize_tf1
from causalfusion_jax.models.kv_cache import KVCache
from causalfusion_jax.models.patches import patchify
from causalfusion_jax.models.positions import coordinates, rope_base, rope_dims, rope_table
from causalfusion_jax.models.presets import ACDIT
from causalfusion_jax.models.sequence import ImageTokens, repeat_batch
from causalfusion_jax.models.transformer import TransformerConfig, abstract_model
from causalfusion_jax.prepare.names import check_shapes, from_released, to_released
from causalfusion_jax.prepare.released_autoencoders import mar_vae_config, mar_vae_table, sd_vae_config, sd_vae_table
from causalfusion_jax.prepare.released_inception import inception_table
from causalfusion_jax.prepare.released_transformers import acdit_table, causalfusion_table
from causalfusion_jax.sampling.sampler import Denoiser, Given, SamplingSpec, guidance_scales, image_keys, sample_tokens

GOLDENS = pathlib.Path(os.environ.get("GOLDENS_DIR") or pathlib.Path(__file__).parent / "goldens")
LINEAR = DiffusionConfig()


def relative_error(ours, golden):
    golden = np.asarray(golden, np.float64)
    return np.linalg.norm(np.asarray(ours, np.float64) - golden) / np.linalg.norm(golden)


def assert_close(ours, golden, name, limit=1e-4):
    assert np.shape(ours) == np.shape(golden), name
    error = relative_error(ours, golden)
    print(f"{name}: relative error {error:.1e}")
    assert error <= limit, f"{name}: relative error {error:.1e} > {limit:.0e}"


def nhwc(images):
    return jnp.asarray(np.moveaxis(images, 1, -1))


def weights_of(golden):
    prefix = "state_dict/"
    return {name.removeprefix(prefix): golden[name].astype(np.float32) for name in golden if name.startswith(prefix)}


def assert_gradients(grads, table, golden):
    """Every gradient in the golden, by its released name."""
    ours = to_released(table, grads)
    names = [name.removeprefix("train/grad/") for name in golden if name.startswith("train/grad/")]
    assert names
    for name in names:
        assert_close(ours[name], golden[f"train/grad/{name}"], f"gradient of {name}")


# --- CausalFusion -----------------------------------------------------------------


@functools.cache
def causalfusion(path):
    """The golden, the network's configuration, its parameters, and the patch size."""
    golden = np.load(path)
    meta = json.loads(str(golden["meta"]))
    side, patch = meta["input_size"] // meta["patch_size"], meta["patch_size"]
    config = TransformerConfig(
        hidden=meta["hidden_size"],
        heads=meta["num_heads"],
        layers=meta["depth"],
        grid=(side, side),
        token_dim=patch**2 * meta["latent_channels"],
        num_classes=meta["num_classes"],
        num_condition_tokens=meta["num_cond_tokens"],
    )
    params = from_released(causalfusion_table(config), weights_of(golden), abstract_model(config)[1])
    return golden, config, jax.tree.map(jnp.asarray, params), patch


def causalfusion_mask(path):
    golden, config, _, _ = causalfusion(path)
    step = step_sizes_to_step(golden["train/step_sizes"])
    # The release drops the clean tokens of the last step, which are unattended.
    role, step = training_layout(config.num_condition_tokens, step, len(step) - int(golden["train/step_sizes"][-1]))
    np.testing.assert_array_equal(attends(role, step, role, step), ~golden["train/attention_blocked"])


def causalfusion_ar_weights(path):
    golden = causalfusion(path)[0]
    step = step_sizes_to_step(golden["train/step_sizes"])
    for weight in ("linear", "cosine"):
        assert_close(ar_weights(FactorizationConfig(weight=weight), step), golden[f"train/ar_weights_{weight}"], weight)


def causalfusion_training(path):
    golden, config, params, patch = causalfusion(path)
    order = jnp.asarray(golden["train/order"], jnp.int32)
    step = jnp.broadcast_to(step_sizes_to_step(golden["train/step_sizes"]), order.shape)
    t = jnp.asarray(golden["train/t"])[:, None]

    def in_order(name):
        return jnp.take_along_axis(patchify(nhwc(golden[f"train/{name}"]), patch), order[..., None], axis=1)

    x_0, eps = in_order("x"), in_order("noise")
    x_t = noise_axis.add_noise(x_0, eps, *noise_axis.alpha_sigma(LINEAR, t))
    assert_close(x_t, in_order("x_t"), "x_t")
    # As released, without the clean tokens of the last step.
    clean = x_0[:, : -int(golden["train/step_sizes"][-1])]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_of(params):
        model = nnx.merge(abstract_model(config)[0], params)
        prediction = model(Condition(jnp.asarray(golden["train/y"])), clean, x_t, t, order, step)
        weight = ar_weights(FactorizationConfig(), step)
        return jnp.mean(weight * jnp.mean(jnp.square(prediction - eps), axis=-1)), prediction

    (loss, prediction), grads = loss_of(params)
    assert_close(prediction, golden["train/pred_eps_in_order"], "prediction")
    assert_close(loss, golden["train/loss"], "loss")
    assert_gradients(grads, causalfusion_table(config), golden)


def causalfusion_cached_inference(path):
    golden, config, params, _ = causalfusion(path)
    model = nnx.merge(abstract_model(config)[0], params)
    condition = Condition(jnp.asarray(golden["sample/y"])).with_unconditional(config.num_classes)
    ids_1, ids_2 = (jnp.asarray(golden[f"sample/ids_step{i}"], jnp.int32) for i in (1, 2))
    cache = KVCache.empty(
        config.layers,
        condition.batch,
        config.num_condition_tokens + config.num_tokens,
        config.heads,
        config.head_dim,
        jnp.float32,
    )

    def commit(cache, tokens):
        _, (k, v) = model.trunk(tokens, cache)
        return cache.append(k, v, tokens.step, tokens.h.shape[1])

    (tokens,) = model.condition_tokens(condition)
    cache = commit(cache, tokens)
    clean = repeat_batch(ImageTokens(jnp.asarray(golden["sample/clean_step1"]), ids_1), 2)
    cache = commit(cache, model.image_tokens(clean, Role.CLEAN))
    t = golden["sample/t"][:1]
    valid = jnp.ones(ids_2.shape[1], bool)
    denoise = Denoiser(model, cache, condition, ids_2, valid, jnp.int32(1), guided=True, unguided=True)
    compared = 0
    for name in golden:
        match = re.fullmatch(r"sample/eps_cfg([\d.]+)(?:_(?:in|out)side_interval_(\d+)_(\d+))?", name)
        if match is None:
            continue
        interval = (float(match[2]), float(match[3])) if match[2] else (0.0, math.inf)
        sampler = SamplerConfig(cfg_scale=float(match[1]), cfg_interval=interval)
        scale = guidance_scales(sampler, t, 1000, (1,))[0, 0]
        eps = denoise(jnp.asarray(golden["sample/z_step2"]), jnp.asarray(t[0]), scale)
        assert_close(eps, golden[name], name)
        compared += 1
    assert compared


# --- ACDiT ------------------------------------------------------------------------


@functools.cache
def acdit(path):
    """The golden, its meta, the network's configuration, its parameters, factorization."""
    golden = np.load(path)
    meta = json.loads(str(golden["meta"]))
    side = math.isqrt(meta["spatial_len"])
    frames = (meta["temporal_len"],) if meta["temporal_len"] > 1 else ()
    config = TransformerConfig(
        hidden=meta["hidden_size"],
        heads=meta["num_heads"],
        layers=meta["depth"],
        grid=(*frames, side, side),
        token_dim=meta["latent_size"],
        num_classes=meta["num_classes"],
        **ACDIT,
    )
    block = meta["block_size"]
    order = dict(order="square_blocks", order_block=block) if meta["square_block"] else dict(order="raster")
    factorization = FactorizationConfig(**order, steps="block", block_size=block, weight="none")
    factorization.check_grid(config.grid)
    assert static_steps(factorization, config.num_tokens)[-1] + 1 == meta["ar_len"]
    params = from_released(acdit_table(config), weights_of(golden), abstract_model(config)[1])
    return golden, meta, config, jax.tree.map(jnp.asarray, params), factorization


def acdit_mask(path):
    golden, _, config, _, factorization = acdit(path)
    role, step = training_layout(0, static_steps(factorization, config.num_tokens))
    np.testing.assert_array_equal(attends(role, step, role, step), golden["train/attention_allowed"])


def acdit_rope(path):
    golden, _, config, _, factorization = acdit(path)
    order = token_order(factorization, config.grid)
    np.testing.assert_array_equal(coordinates(config.grid)[:, order], golden["train/position_ids"])
    assert [rope_base(length) for length in config.grid] == golden["train/rope_bases"].tolist()
    assert list(rope_dims(len(config.grid), config.head_dim)) == golden["train/rope_split_dims"].tolist()
    for ours, name in zip(rope_table(config.grid, config.head_dim), ("rope_cos", "rope_sin"), strict=True):
        assert_close(ours[order], golden[f"train/{name}"], name)


def acdit_training(path):
    golden, _, config, params, factorization = acdit(path)
    # All arrays of the release are in the order of the blocks already.
    x_0, eps, x_t = (
        jnp.asarray(golden[f"train/{name}"]).reshape(-1, config.num_tokens, config.token_dim)
        for name in ("x", "noise", "x_t")
    )
    t, labels = jnp.asarray(golden["train/t"]), jnp.asarray(golden["train/y"])
    place_t = jnp.repeat(t, config.num_tokens // t.shape[1], axis=1)
    assert_close(noise_axis.add_noise(x_0, eps, *noise_axis.alpha_sigma(LINEAR, place_t)), x_t, "x_t")
    order, step = (
        jnp.broadcast_to(a, x_t.shape[:2])
        for a in (token_order(factorization, config.grid), static_steps(factorization, config.num_tokens))
    )

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_of(params):
        prediction = nnx.merge(abstract_model(config)[0], params)(Condition(labels), x_0, x_t, t, order, step)
        return jnp.mean(jnp.square(prediction - eps)), prediction

    (loss, prediction), grads = loss_of(params)
    assert_close(prediction, golden["train/pred_eps"], "prediction")
    assert_close(loss, golden["train/loss"], "loss")
    assert_gradients(grads, acdit_table(config), golden)


def acdit_sampler(path):
    golden, meta, config, params, factorization = acdit(path)
    sampler = SamplerConfig(
        ar_steps=meta["ar_len"], solver="dpmpp_2m", solver_steps=meta["num_inference_steps"], cfg_scale=meta["cfg"]
    )
    np.testing.assert_array_equal(solver_table(sampler.solver_config, LINEAR).t, golden["sample/timesteps"])
    labels = jnp.asarray(golden["sample/y"])
    x_T = jnp.asarray(golden["sample/noise"]).reshape(len(labels), config.num_tokens, -1)
    spec, keys = SamplingSpec(config, LINEAR, factorization, sampler), image_keys(0, range(len(labels)))
    out = sample_tokens(spec, params, keys, Condition(labels), Given(x_T=x_T))
    in_order = out[:, token_order(factorization, config.grid)]
    assert_close(in_order, golden["sample/out"].reshape(in_order.shape), "samples", limit=1e-3)


# --- Noise schedules and solvers --------------------------------------------------


def ddpm(path):
    golden = np.load(path)
    lengths = sorted({int(name.split("/")[0]) for name in golden if "/" in name})
    assert lengths
    for steps in lengths:
        of = {name.removeprefix(f"{steps}/"): golden[name] for name in golden if name.startswith(f"{steps}/")}
        table = solver_table(SolverConfig("ddpm", steps), LINEAR)
        # Rows run from the noisiest level down.
        np.testing.assert_array_equal(table.t[::-1], of["timestep_map"])
        assert_close(table.alpha[::-1] ** 2, of["alphas_cumprod"], f"{steps} steps, alphas_cumprod")
        row = steps - 1 - of["t_index"]
        x_t, eps = of["x_t"], of["eps"]
        x_0, _ = noise_axis.to_x_0_and_eps("eps", eps, x_t, table.alpha[row][:, None], table.sigma[row][:, None])
        assert_close(x_0, of["pred_x0"], f"{steps} steps, x_0")
        mean = table.c_x[row][:, None, None] * x_t + table.c_x_0[row][:, None, None] * np.asarray(x_0)
        assert_close(mean, of["mean"], f"{steps} steps, mean")
        noise = np.exp(0.5 * of["log_variance_fixed_large"][:, 0, 0]) * (of["t_index"] > 0)
        assert_close(table.c_noise[row], noise, f"{steps} steps, noise")


SOLVERS = {"ddim": dict(name="ddim", spacing="leading"), "dpmpp_2m_acdit": dict(name="dpmpp_2m")}


def solvers(path):
    golden = np.load(path)
    runs = sorted({tuple(name.split("/")[:2]) for name in golden if name.endswith("/trajectory")})
    assert runs
    for name, steps in runs:
        table = solver_table(SolverConfig(steps=int(steps), **SOLVERS[name]), LINEAR)
        np.testing.assert_array_equal(table.t, golden[f"{name}/{steps}/timesteps"])
        x, previous = jnp.asarray(golden["x_T"]), 0.0
        for row, expected in enumerate(golden[f"{name}/{steps}/trajectory"]):
            eps = 0.5 * x * jnp.cos(table.t[row] / 300) + 0.1
            x_0, _ = noise_axis.to_x_0_and_eps("eps", eps, x, table.alpha[row], table.sigma[row])
            x = table.c_x[row] * x + table.c_x_0[row] * x_0 + table.c_previous[row] * previous
            previous = x_0
            assert_close(x, expected, f"{name}, {steps} steps, row {row}")


# --- Autoencoders, Inception, metrics ---------------------------------------------


def autoencoder(path):
    """Moments of the encoder, and the decoder, of either family of names."""
    golden = np.load(path)
    meta, weights = json.loads(str(golden["meta"])), weights_of(golden)
    shapes = {name: array.shape for name, array in weights.items()}
    if path.name.startswith("mar_vae_"):
        config = mar_vae_config(shapes, meta.get("norm_num_groups", 32))
        table = mar_vae_table(config, shapes)
        assert (config.channels, config.channel_multipliers) == (meta["ch"], tuple(meta["ch_mult"]))
        assert config.latent_channels == meta["z_channels"]
    else:
        config = sd_vae_config(shapes, meta["norm_num_groups"], meta["scaling_factor"])
        table = sd_vae_table(config, shapes)
        assert config.widths == tuple(meta["block_out_channels"])
        assert config.residual_blocks == meta["layers_per_block"]
        assert config.latent_channels == meta["latent_channels"]
    check_shapes(table, shapes)
    params = from_released(table, weights, abstract_autoencoder(config)[1])
    mean, log_variance = moments(config, params, nhwc(golden["images"]))
    assert_close(mean, nhwc(golden["moments_mean"]), "mean")
    assert_close(log_variance, nhwc(golden["moments_logvar"]), "log variance")
    # The goldens' latents are random numbers, and what the decoder itself takes: not scaled.
    decoded = decode(config, params, config.scaling_factor * nhwc(golden["latents"]))
    assert_close(decoded, nhwc(golden["decoded"]), "decoded")


def inception(path):
    """Every feature of every set of images; the weights are made from their names."""
    golden = np.load(path)
    weights = inception_weights(json.loads(str(golden["names_json"])))
    params = jax.tree.map(jnp.asarray, from_released(inception_table(), weights, abstract_inception()[1]))
    sets = sorted(name.split("/")[0] for name in golden if name.endswith("/images_nchw_uint8"))
    assert sets
    for which in sets:
        images = nhwc(golden[f"{which}/images_nchw_uint8"])
        ours = inception_features(params, images)
        corner = golden[f"{which}/resized_299_corner"]
        resized = jnp.moveaxis(resize_tf1(images, (SIDE, SIDE)), -1, 1)
        ours["resized_299_corner"] = resized[:, :, : corner.shape[2], : corner.shape[3]]
        names = [name.split("/")[1] for name in golden if name.startswith(f"{which}/")]
        for name in sorted(set(names) - {"images_nchw_uint8"}):
            assert_close(ours[name], golden[f"{which}/{name}"], f"{which}/{name}")


def metrics(path):
    golden = np.load(path)
    expected = json.loads(str(golden["expected"]))
    generated, reference = (golden[f"features_{name}"] for name in ("generated", "reference"))
    a, b = FeatureStatistics.of(generated), FeatureStatistics.of(reference)
    mean, std = inception_score(golden["logits"], splits=10)
    ours = {
        "frechet_inception_distance": frechet_from_statistics(a.mean, a.cov, b.mean, b.cov),
        "inception_score_mean": mean,
        "inception_score_std": std,
        **precision_recall(reference, generated, k=3),
    }
    assert set(expected) <= set(ours)
    for name, value in expected.items():
        assert_close(ours[name], value, name)


CHECKS = {
    "causalfusion_": (causalfusion_mask, causalfusion_ar_weights, causalfusion_training, causalfusion_cached_inference),
    "acdit_": (acdit_mask, acdit_rope, acdit_training, acdit_sampler),
    "ddpm_": (ddpm,),
    "solvers": (solvers,),
    "mar_vae_": (autoencoder,),
    "sd_vae_": (autoencoder,),
    "inception_": (inception,),
    "metrics": (metrics,),
}
"""What is compared, by the prefix of a file's name."""


def cases():
    for path in sorted(GOLDENS.glob("*.npz")):
        for prefix, checks in CHECKS.items():
            if path.name.startswith(prefix):
                yield from (pytest.param(check, path, id=f"{path.name}-{check.__name__}") for check in checks)


def test_there_are_goldens():
    assert list(cases()), f"no goldens in {GOLDENS}"
    known = [path for path in GOLDENS.glob("*.npz") if path.name.startswith(tuple(CHECKS))]
    assert len(known) == len(list(GOLDENS.glob("*.npz"))), "a golden of unknown kind"


@pytest.mark.parametrize(("check", "path"), list(cases()))
def test_golden(check, path):
    check(path)
