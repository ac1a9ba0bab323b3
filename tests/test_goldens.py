"""The released models' outputs, reproduced (float32, relative error <= 1e-4)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from released import causalfusion_params

from causalfusion_jax import diffusion as noise_axis
from causalfusion_jax.diffusion import DiffusionConfig
from causalfusion_jax.factorization import (
    CONDITION_STEP,
    FactorizationConfig,
    Role,
    ar_weights,
    attends,
    step_sizes_to_step,
    training_layout,
)
from causalfusion_jax.models.kv_cache import KVCache
from causalfusion_jax.models.patches import patchify
from causalfusion_jax.models.transformer import TransformerConfig, abstract_model
from causalfusion_jax.sampling.sampler import SamplerConfig, _Denoiser, guidance_scales
from causalfusion_jax.sampling.solvers import SolverConfig, solver_table

GOLDENS = pathlib.Path(__file__).parent / "goldens"
LINEAR = DiffusionConfig()


def relative_error(ours, golden):
    return np.linalg.norm(np.asarray(ours, np.float64) - golden) / np.linalg.norm(golden)


def nhwc(images):
    return jnp.asarray(np.moveaxis(images, 1, -1))


@pytest.fixture(scope="module")
def released():
    golden = np.load(GOLDENS / "causalfusion_tiny.npz")
    meta = json.loads(str(golden["meta"]))
    side = meta["input_size"] // meta["patch_size"]
    config = TransformerConfig(
        hidden=meta["hidden_size"], heads=meta["num_heads"], layers=meta["depth"], grid=(side, side),
        token_dim=meta["patch_size"] ** 2 * meta["latent_channels"], num_classes=meta["num_classes"],
        num_condition_tokens=meta["num_cond_tokens"],
    )
    prefix = "state_dict/"
    weights = {k.removeprefix(prefix): golden[k].astype(np.float32) for k in golden if k.startswith(prefix)}
    return golden, config, jax.tree.map(jnp.asarray, causalfusion_params(weights, config))


def test_training_mask(released):
    golden, config, _ = released
    step = step_sizes_to_step(golden["train/step_sizes"])
    role, step = training_layout(config.num_condition_tokens, step)
    visible = np.asarray(attends(role, step, role, step))
    # The release drops the clean tokens of the last step: nobody looks at them.
    last = golden["train/step_sizes"][-1]
    clean_end = config.num_condition_tokens + config.num_tokens
    kept = np.r_[0 : clean_end - last, clean_end : len(role)]
    np.testing.assert_array_equal(visible[np.ix_(kept, kept)], ~golden["train/attention_blocked"])


@pytest.mark.parametrize("weight", ["linear", "cosine"])
def test_ar_weights(released, weight):
    golden, _, _ = released
    step = step_sizes_to_step(golden["train/step_sizes"])
    ours = ar_weights(FactorizationConfig(weight=weight), step)
    np.testing.assert_allclose(ours, golden[f"train/ar_weights_{weight}"], rtol=1e-6)


def training_loss(params, golden, config):
    x_0, eps = (patchify(nhwc(golden[f"train/{name}"]), 1) for name in ("x", "noise"))
    t = jnp.asarray(golden["train/t"])[:, None]
    x_t = noise_axis.add_noise(x_0, eps, *noise_axis.alpha_sigma(LINEAR, t))
    order = jnp.asarray(golden["train/order"], jnp.int32)
    step = jnp.broadcast_to(step_sizes_to_step(golden["train/step_sizes"]), order.shape)
    x_0, x_t, eps = (jnp.take_along_axis(a, order[..., None], axis=1) for a in (x_0, x_t, eps))
    model = nnx.merge(abstract_model(config)[0], params)
    prediction = model(jnp.asarray(golden["train/y"]), x_0, x_t, t, order, step)
    weight = ar_weights(FactorizationConfig(), step)
    return jnp.mean(weight * jnp.mean(jnp.square(prediction - eps), axis=-1)), prediction


def test_training_forward_and_gradients(released):
    golden, config, params = released
    loss_and_grads = jax.jit(lambda params: jax.value_and_grad(training_loss, has_aux=True)(params, golden, config))
    (loss, prediction), grads = loss_and_grads(params)
    assert relative_error(prediction, golden["train/pred_eps_in_order"]) < 1e-4
    assert abs(loss - golden["train/loss"]) < 1e-5 * golden["train/loss"]
    block = grads["blocks"]["qkv"]["kernel"][0].reshape(config.hidden, -1)
    ours = {
        "x_proj.weight": grads["token_in"]["kernel"].T,
        "blocks.0.attn.qkv.weight": block.T,
        "pos_embed": grads["positions"][None],
        "t_embedder.mlp.0.weight": grads["timestep_in"]["kernel"].T,
        "y_embedder.embedding_table.weight": grads["label_table"]["embedding"],
    }
    for name, gradient in ours.items():
        assert relative_error(gradient, golden[f"train/grad/{name}"]) < 1e-4, name


@pytest.mark.parametrize(
    ("interval", "name"), [((0, 1000), "eps_cfg2.5"), ((400, 1000), "eps_cfg2.5_outside_interval_400_1000")]
)
def test_cached_guided_inference(released, interval, name):
    golden, config, params = released
    model = nnx.merge(abstract_model(config)[0], params)
    labels = jnp.asarray(golden["sample/y"])
    labels = jnp.concatenate([labels, jnp.full_like(labels, config.num_classes)])
    ids_1, ids_2 = (jnp.asarray(golden[f"sample/ids_step{i}"], jnp.int32) for i in (1, 2))
    cache = KVCache.empty(config.layers, 6, 16, config.heads, config.head_dim, jnp.float32)

    def commit(cache, h, role, step):
        role, step = (jnp.full(h.shape[:2], int(value), jnp.int32) for value in (role, step))
        _, (k, v) = model.trunk(h, role, step, cache)
        return cache.append(k, v, step, h.shape[1])

    cache = commit(cache, model.embed_condition(labels), Role.CONDITION, CONDITION_STEP)
    clean = jnp.tile(jnp.asarray(golden["sample/clean_step1"]), (2, 1, 1))
    cache = commit(cache, model.embed_tokens(clean, jnp.tile(ids_1, (2, 1))), Role.CLEAN, 0)
    t = golden["sample/t"][:1]
    sampler = SamplerConfig(cfg_scale=2.5, cfg_interval=interval)
    scale = guidance_scales(sampler, t, 1000, (1,))[0, 0]
    denoise = _Denoiser(
        model, LINEAR, cache, ids_2, jnp.ones(4, bool), jnp.int32(1), guided=True, unguided=True
    )
    eps = denoise(jnp.asarray(golden["sample/z_step2"]), jnp.asarray(t[0]), scale)
    assert relative_error(eps, golden[f"sample/{name}"]) < 1e-4


@pytest.mark.parametrize("steps", [1000, 250, 50, 10])
def test_ddpm(steps):
    golden = np.load(GOLDENS / "ddpm_linear.npz")
    golden = {key.removeprefix(f"{steps}/"): golden[key] for key in golden if key.startswith(f"{steps}/")}
    table = solver_table(SolverConfig("ddpm", steps), LINEAR)
    # Rows run from the noisiest level down.
    np.testing.assert_array_equal(table.t[::-1], golden["timestep_map"])
    np.testing.assert_allclose(table.alpha[::-1] ** 2, golden["alphas_cumprod"], rtol=2e-6)
    row = steps - 1 - golden["t_index"]
    x_t, eps = golden["x_t"], golden["eps"]
    x_0, _ = noise_axis.to_x_0_and_eps("eps", eps, x_t, table.alpha[row][:, None], table.sigma[row][:, None])
    assert relative_error(x_0, golden["pred_x0"]) < 1e-4
    mean = table.c_x[row][:, None, None] * x_t + table.c_x_0[row][:, None, None] * np.asarray(x_0)
    assert relative_error(mean, golden["mean"]) < 1e-4
    noise = np.exp(0.5 * golden["log_variance_fixed_large"][:, 0, 0]) * (golden["t_index"] > 0)
    np.testing.assert_allclose(table.c_noise[row], noise, rtol=1e-4)


@pytest.mark.parametrize("steps", [5, 25])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ddim", dict(name="ddim", spacing="leading")),
        ("dpmpp_2m_acdit", dict(name="dpmpp_2m")),
    ],
)
def test_solver_trajectories(name, config, steps):
    golden = np.load(GOLDENS / "solvers.npz")
    table = solver_table(SolverConfig(steps=steps, **config), LINEAR)
    np.testing.assert_array_equal(table.t, golden[f"{name}/{steps}/timesteps"])
    x, previous = jnp.asarray(golden["x_T"]), 0.0
    for row in range(steps):
        eps = 0.5 * x * jnp.cos(table.t[row] / 300) + 0.1
        x_0, _ = noise_axis.to_x_0_and_eps("eps", eps, x, table.alpha[row], table.sigma[row])
        x = table.c_x[row] * x + table.c_x_0[row] * x_0 + table.c_previous[row] * previous
        previous = x_0
        assert relative_error(x, golden[f"{name}/{steps}/trajectory"][row]) < 1e-4, row
