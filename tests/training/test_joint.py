"""The joint loss: the mixture, its parts, and what carries no loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import make_batch, random_params, tiny_config

from causalfusion_jax.common import sharding
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config import experiment
from causalfusion_jax.config.training import JointConfig
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.core.layouts import NO_TOKEN, TASKS, Task
from causalfusion_jax.data.tokenizers import BEGIN, END
from causalfusion_jax.models.sequence import ImageTokens
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.training.draws import draw, example_keys
from causalfusion_jax.training.joint import blank_words, draw_tasks, noise_to_read
from causalfusion_jax.training.objective import training_loss
from causalfusion_jax.training.state import create_state, train_step

MESH = sharding.make_mesh(experiment.from_dict(tiny_config()).mesh, jax.devices()[:1])
KEY = jax.random.key(1)


def config_of(**joint):
    return experiment.from_dict(tiny_config(
        data=dict(source="digit_pairs", image_width=16, num_classes=100), text=dict(tokenizer="bytes", max_tokens=8),
        model=dict(hidden=32, heads=2, layers=2, num_condition_tokens=1), joint=joint,
    ))  # fmt: skip


CONFIG = config_of()


def alone(layout, **joint):
    """A mixture of one layout."""
    return dict.fromkeys(TASKS, 0.0) | {layout: 1.0} | joint


@functools.cache
def batch_of(config):
    batch = dict(make_batch(config, MESH)[0])
    text = np.full((16, 8), NO_TOKEN, np.int32)
    rng = np.random.default_rng(1)
    for row in range(16):
        length = int(rng.integers(1, 7))
        text[row, : length + 2] = [BEGIN, *rng.integers(2, 258, length), END]
    return batch | {"text": jnp.asarray(text)}


@functools.partial(jax.jit, static_argnums=0)
def loss_of(objective, params, batch):
    return training_loss(objective, params, batch, example_keys(KEY, 16))


def test_the_mixture_is_drawn_as_stated():
    keys = jax.random.split(KEY, 20000)
    config = JointConfig(prompt_dropout=0.2, class_dropout=0.7)
    layout, drop_class = (np.asarray(a) for a in jax.jit(draw_tasks, static_argnums=0)(config, keys))
    observed = np.bincount(layout, minlength=4) / len(keys)
    np.testing.assert_allclose(observed, [0.4, 0.4, 0.05, 0.15], atol=0.012)
    assert abs(drop_class[layout == Task.IMAGE_TO_TEXT].mean() - 0.7) < 0.02
    # An image alone keeps its class unless it is a dropped prompt, two thirds of them here, which drop it.
    assert abs(drop_class[layout == Task.IMAGE].mean() - 0.7 * 2 / 3) < 0.03


@pytest.mark.parametrize("layout", ["text_to_image", "image_to_text", pytest.param("text", marks=pytest.mark.slow)])
def test_only_what_is_generated_carries_loss(layout):
    """The loss of one layout is diffusion, or cross-entropy, of what the model says, by hand."""
    config = config_of(**alone(layout, prompt_dropout=0.0))
    params, batch = random_params(config.transformer), batch_of(config)
    loss, metrics = loss_of(config.step.objective, params, batch)
    objective = config.step.objective
    drawn = draw(objective, batch["image"], example_keys(KEY, 16), None)
    model = nnx.merge(abstract_model(config.transformer)[0], params)
    text, order = batch["text"], drawn.plan.order
    used, length = np.asarray(text) != NO_TOKEN, config.transformer.num_tokens
    # Roles and steps, written out: roles 0 condition, 1 clean, 2 noisy, 3 padding.
    read = layout == "image_to_text"
    text_role, image_role = np.where(used, 1, 3), np.full((16, length), 3 if layout == "text" else 1)
    noisy_role = np.full((16, length), 2 if layout == "text_to_image" else 3)
    image_step = np.zeros((16, length), int) if read else 8 + np.asarray(drawn.plan.step)
    text_step = np.broadcast_to(np.arange(8) + (length if read else 0), (16, 8))
    role = np.concatenate([np.zeros((16, 1)), text_role, image_role, noisy_role], axis=1).astype(np.int32)
    step = np.concatenate([np.full((16, 1), -1), text_step, image_step, image_step], axis=1).astype(np.int32)
    prediction, hidden = jax.jit(lambda *args: model.sequence(*args))(
        Condition(np.full(16, 100), text),
        ImageTokens(drawn.x_0, order),
        ImageTokens(drawn.x_t, order, drawn.t),
        role,
        step,
    )
    if layout == "text_to_image":
        error = np.mean(np.square(prediction - drawn.target), axis=-1)
        expected = np.mean(np.asarray(drawn.weight) * error)
        np.testing.assert_allclose(metrics["diffusion"], loss, rtol=1e-6)
        np.testing.assert_allclose(metrics["mse/text_to_image/sum"], error.sum(), rtol=1e-4)
    else:
        log_probs = np.asarray(jax.nn.log_softmax(model.text_logits(hidden)))[:, :-1]
        targets = np.asarray(text)[:, 1:]
        ce = -np.take_along_axis(log_probs, np.maximum(targets, 0)[..., None], axis=2)[..., 0]
        counted = targets != NO_TOKEN
        expected = np.mean((ce * counted).sum(axis=1) / counted.sum(axis=1))
        np.testing.assert_allclose(metrics[f"ce/{layout}/sum"], (ce * counted).sum(), rtol=1e-4)
        assert float(metrics[f"ce/{layout}/count"]) == counted.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_parts_are_logged_apart_and_add_up():
    config = config_of(text_weight=0.3)
    params = random_params(config.transformer)
    loss, metrics = loss_of(config.step.objective, params, batch_of(config))
    np.testing.assert_allclose(loss, metrics["diffusion"] + 0.3 * metrics["cross_entropy"], rtol=1e-6)
    names = {"ce/image_to_text", "ce/text", "mse/text_to_image", "mse/image"}
    assert {f"{name}/{part}" for name in names for part in ("sum", "count")} <= set(metrics)
    assert float(metrics["mse_by_t/count"].sum()) == sum(
        float(metrics[f"mse/{name}/count"]) for name in ("text_to_image", "image")
    )


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_batch():
    state, batch = create_state(CONFIG.step, MESH, jax.random.key(0)), batch_of(CONFIG)
    state = state._replace(params=random_params(CONFIG.transformer))
    split = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, grad_accum_steps=2))
    (whole, metrics), (parts, split_metrics) = (
        jax.jit(functools.partial(train_step, config.step))(state, batch, KEY) for config in (CONFIG, split)
    )
    for name in metrics:
        np.testing.assert_allclose(metrics[name], split_metrics[name], rtol=1e-4, err_msg=name)
    moments = [s.opt_state[1][0].mu for s in (whole, parts)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), *moments)
    # Every parameter of the text is reached.
    for name in ("table", "positions"):
        leaf = jax.tree.leaves(whole.opt_state[1][0].mu["text"][name])[0]
        assert (np.abs(np.asarray(leaf)).sum(axis=-1) > 0).any()


def test_transfusion_has_one_copy_of_the_image():
    config = experiment.from_dict(experiment.to_dict(config_of(**alone("image_to_text"))) | {
        "factorization": dict(order="raster", steps="fixed", num_steps=1, weight="none"),
        "joint": alone("image_to_text", image_tokens="noisy", read_noise=0.5),
    })  # fmt: skip
    assert config.step.objective.num_clean == 0
    params, batch = random_params(config.transformer), batch_of(config)
    _, metrics = loss_of(config.step.objective, params, batch)
    other = batch | {"image": batch["image"] + 0.5}
    _, changed = loss_of(config.step.objective, params, other)
    assert float(metrics["cross_entropy"]) != float(changed["cross_entropy"]), "texts depend on the image"
    assert float(metrics["diffusion"]) == 0.0


def test_blanked_words():
    text = jnp.asarray(np.tile([BEGIN, 5, 6, 7, END, NO_TOKEN], (2000, 1)))
    keys, layout = jax.random.split(KEY, 2000), jnp.arange(2000) % 4
    seen = np.asarray(blank_words(JointConfig(word_dropout=0.3), layout, text, keys))
    generated = np.isin(layout, (Task.IMAGE_TO_TEXT, Task.TEXT))
    np.testing.assert_array_equal(seen[~generated], text[~generated])
    np.testing.assert_array_equal(seen[:, [0, 4, 5]], text[:, [0, 4, 5]])
    assert abs((seen[generated][:, 1:4] == BEGIN).mean() - 0.3) < 0.03


def test_noise_on_images_that_are_read():
    x_0, keys = jnp.ones((64, 8, 4)), jax.random.split(KEY, 64)
    same, t = noise_to_read(JointConfig(), CONFIG.diffusion, x_0, keys)
    assert (np.asarray(same) == 1).all() and not np.asarray(t).any()
    x_t, t = noise_to_read(JointConfig(read_noise=0.5), CONFIG.diffusion, x_0, keys)
    assert int(t.min()) >= 0 and 400 < int(t.max()) < 500
    assert np.corrcoef(np.asarray(t)[:, 0], np.asarray(x_t).std(axis=(1, 2)))[0, 1] > 0.9


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        (dict(joint=dict(text=0.2)), "config.joint.text_to_image"),
        (dict(joint=dict(image_tokens="noisy")), "config.joint.image_tokens"),
        (dict(train=dict(length_buckets=2), factorization=dict(steps_shared_by="batch")),
         "config.train.length_buckets"),
        (dict(joint=dict(text_to_image=0.55, image=0.0, prompt_dropout=0.0), sampling=dict(cfg_scale=2.0)),
         "config.sampling.cfg_scale"),
        (dict(text=dict(tokenizer="sentencepiece")), "config.text.path"),
        (dict(data=dict(image_width=15)), "config.data.image_width"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(sections, field):
    values = experiment.to_dict(CONFIG)
    for section, changes in sections.items():
        values[section] |= changes
    with pytest.raises(InputError) as error:
        experiment.from_dict(values)
    assert error.value.field == field
