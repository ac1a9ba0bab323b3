"""What is read of a network: against the definition in numpy, and what must not be read."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_params, tiny_config

from causalfusion_jax.common import sharding
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config import experiment
from causalfusion_jax.config.probe import ProbeConfig
from causalfusion_jax.core import diffusion as noise_axis
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.digits import digits
from causalfusion_jax.data.records import CorruptRecord
from causalfusion_jax.data.registry import make_held_out_source
from causalfusion_jax.evaluation import features
from causalfusion_jax.models.layers import drop_path_scale
from causalfusion_jax.models.patches import patchify
from causalfusion_jax.models.presets import ACDIT, DIT
from causalfusion_jax.models.transformer import abstract_model

ONE_STEP = dict(order="raster", steps="fixed", num_steps=1, weight="none")
BLOCKS = dict(order="square_blocks", order_block=4, steps="block", block_size=4, weight="none")
CAUSALFUSION = experiment.from_dict(tiny_config())
PLAIN = experiment.from_dict(tiny_config(model=DIT, factorization=ONE_STEP))
BLOCKWISE = experiment.from_dict(tiny_config(model=ACDIT | dict(heads=2), factorization=BLOCKS))
KEYS = jax.random.split(jax.random.key(3), 5)


@functools.cache
def images():
    return jnp.asarray(digits("held_out").images[:5])


@functools.cache
def params_of(config):
    return random_params(config.transformer)


@functools.partial(jax.jit, static_argnums=0)
def states(reading, params, images):
    return features.hidden_states(reading, params, images, KEYS, layer_output=lambda h: h)


# --- Against the definition -------------------------------------------------------


def dense(params, model, images):
    """Every layer's clean tokens in numpy: all see the condition and each other; the condition sees itself."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, at):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * at["scale"] + at["bias"]

    def product(x, at):
        return x @ at["kernel"] + at.get("bias", 0.0)

    count = model.num_condition_tokens
    null = p["label_table"]["embedding"][model.num_classes].reshape(count, -1) + p["condition_positions"]
    outs = []
    for tokens in np.asarray(patchify(images, 2), np.float64):
        h, each = np.concatenate([null, product(tokens, p["token_in"]) + p["positions"]]), []
        hidden = np.zeros((len(h), len(h)))
        hidden[:count, count:] = -np.inf
        for i in range(model.layers):
            b = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
            qkv = np.einsum("td,dchk->cthk", norm(h, b["attention_norm"]), b["qkv"]["kernel"])
            q, k, v = norm(qkv[0], b["q_norm"]), norm(qkv[1], b["k_norm"]), qkv[2]
            logits = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(model.head_dim) + hidden
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            h = h + product(np.einsum("hqk,khd->qhd", weights, v).reshape(len(h), -1), b["attention_out"])
            x = product(norm(h, b["mlp_norm"]), b["mlp_in"])
            x = 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))
            h = h + product(x, b["mlp_out"])
            each.append(h[count:])
        outs.append(each)
    return np.array(outs).swapaxes(0, 1)


def test_clean_pass_is_a_dense_computation():
    reading, params = features.make_reading(CAUSALFUSION, ProbeConfig()), params_of(CAUSALFUSION)
    assert (reading.tokens, reading.ar_steps) == ("clean", "one")
    expected = dense(params, reading.model, images())
    last, each = states(reading, params, images())
    np.testing.assert_allclose(each, expected, rtol=2e-4, atol=2e-4)
    np.testing.assert_array_equal(last, each[-1])
    means = features.pooled(reading, True, params, images(), KEYS)
    np.testing.assert_allclose(means, expected.mean(axis=2), rtol=2e-4, atol=2e-4)
    for layers in (1, 2):
        cut, fewer = features.first_layers(reading, params, layers)
        (alone,) = features.pooled(cut, False, fewer, images(), KEYS)
        np.testing.assert_allclose(alone, means[layers - 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [CAUSALFUSION, PLAIN], ids=["in_context", "adaln"])
def test_noisy_pass_is_that_of_training(config):
    settings = ProbeConfig(tokens="noisy", noise_level=0.25)
    reading, params = features.make_reading(config, settings), params_of(config)
    assert reading.t == 250
    x_0 = patchify(images(), 2)
    eps = jnp.stack([jax.random.normal(key, x_0.shape[1:]) for key in KEYS])
    t = jnp.full((5, 1), 250)
    x_t = noise_axis.add_noise(x_0, eps, *noise_axis.alpha_sigma(config.diffusion, t))
    order = jnp.broadcast_to(jnp.arange(16), (5, 16))
    model = nnx.merge(abstract_model(reading.model)[0], params)
    null = Condition(jnp.full(5, 10))
    expected = model(null, x_0[:, :0], x_t, t, order, jnp.zeros((5, 16), jnp.int32))
    h, _ = states(reading, params, images())
    np.testing.assert_allclose(model.head(h, model.embed_noise(null, t)), expected, rtol=1e-4, atol=1e-4)


# --- What must not be seen --------------------------------------------------------


def pairs(image_tokens, **joint):
    """A model of digit pairs and their captions, its images one AR step."""
    return experiment.from_dict(
        tiny_config(
            data=dict(source="digit_pairs", image_width=16, num_classes=100),
            text=dict(tokenizer="bytes", max_tokens=13),
            joint=dict(image_tokens=image_tokens) | joint,
            factorization=ONE_STEP,
        )
    )


def test_clean_tokens_of_a_text_model_are_read_only_where_they_were_trained():
    """Transfusion's images are noisy tokens alone; without captions nothing attends to clean ones in one AR step."""
    no_captions = dict(text_to_image=0.9, image_to_text=0.0)
    for config, tokens in (
        (pairs("clean_and_noisy"), "clean"), (pairs("noisy"), "noisy"),
        (pairs("clean_and_noisy", **no_captions), "noisy"),
    ):  # fmt: skip
        assert features.make_reading(config, ProbeConfig()).tokens == tokens
        assert features.has_clean_tokens(config) == (tokens == "clean")
    with pytest.raises(InputError, match="config.probe.tokens='clean'"):
        features.make_reading(pairs("noisy"), ProbeConfig(tokens="clean"))


@pytest.mark.parametrize(("class_dropout", "label"), [(0.1, 1), (1.0, 1), (0.0, 0)])
def test_a_model_of_one_class_is_read_by_the_row_that_was_trained_without_it(class_dropout, label):
    single = experiment.from_dict(
        tiny_config(data=dict(source="arrays", path="x", num_classes=1), model=dict(class_dropout=class_dropout))
    )
    reading, params = features.make_reading(single, ProbeConfig()), params_of(single)
    assert reading.label == label
    table = params["label_table"]["embedding"]
    for row in (0, 1):
        other = params | {"label_table": {"embedding": table.at[row].set(7.0)}}
        same = np.array_equal(*(states(reading, p, images())[0] for p in (params, other)))
        assert same == (row != label)


@pytest.mark.parametrize("config", [CAUSALFUSION, PLAIN, BLOCKWISE], ids=["in_context", "dit", "acdit"])
def test_no_class_is_ever_read(config):
    """The table of classes may hold anything but for its last row, that of no class."""
    params = params_of(config)
    table = params["label_table"]["embedding"]
    for tokens in ("clean", "noisy") if features.has_clean_tokens(config) else ("noisy",):
        reading = features.make_reading(config, ProbeConfig(tokens=tokens))
        other = params | {"label_table": {"embedding": table.at[:-1].set(7.0)}}
        expected = np.asarray(states(reading, params, images())[0])
        np.testing.assert_array_equal(states(reading, other, images())[0], expected)
        # Clean tokens of adaln know nothing of a class at all.
        knows = config.model.conditioning == "in_context" or tokens == "noisy"
        other = params | {"label_table": {"embedding": table.at[-1].set(7.0)}}
        assert (np.asarray(states(reading, other, images())[0]) != expected).any() == knows


def test_ar_steps_as_trained_hide_what_comes_later():
    params = params_of(BLOCKWISE)
    changed = images().at[:, 4:].add(1.0)
    for ar_steps, same in (("trained", True), ("one", False)):
        reading = features.make_reading(BLOCKWISE, ProbeConfig(ar_steps=ar_steps))
        before, after = (np.asarray(states(reading, params, x)[0]) for x in (images(), changed))
        # The upper half is the first two blocks of four tokens, in that order; by raster the first eight.
        assert (before[:, :8] == after[:, :8]).all() == same
        assert (before[:, 8:] != after[:, 8:]).any()
    drawn = features.make_reading(CAUSALFUSION, ProbeConfig(ar_steps="trained"))
    one = features.make_reading(CAUSALFUSION, ProbeConfig())
    params = params_of(CAUSALFUSION)
    assert not np.allclose(*(states(r, params, images())[0].mean(1) for r in (drawn, one)), atol=1e-3)


@pytest.mark.parametrize(
    ("config", "settings", "field"),
    [
        (PLAIN, dict(tokens="clean"), "config.probe.tokens"),
        (experiment.from_dict(tiny_config(model=dict(class_dropout=0.0))), {}, "config.model.class_dropout"),
    ],
)  # fmt: skip
def test_what_was_never_trained_is_refused(config, settings, field):
    assert features.make_reading(PLAIN, ProbeConfig()).tokens == "noisy"
    with pytest.raises(InputError) as error:
        features.make_reading(config, ProbeConfig(**settings))
    assert error.value.field == field


def test_layer_to_read():
    model = dataclasses.replace(CAUSALFUSION.transformer, layers=32)
    assert features.layer_to_read(model, 0) == 16 and features.layer_to_read(model, 32) == 32
    with pytest.raises(InputError, match="config.probe.layer=33"):
        features.layer_to_read(model, 33)


# --- Drop path --------------------------------------------------------------------


def test_drop_path_of_rate_zero_adds_nothing_to_the_program():
    reading, params = features.make_reading(PLAIN, ProbeConfig()), params_of(PLAIN)
    assert drop_path_scale(0.0, 2, KEYS) is None

    def trace(scale):
        run = jax.make_jaxpr(lambda p, x: features.hidden_states(reading, p, x, KEYS, scale))
        return re.sub("0x[0-9a-f]+", "", str(run(params, images())))

    assert trace(None) != trace(drop_path_scale(0.5, 2, KEYS))


def test_drop_path_leaves_out_branches():
    reading, params = features.make_reading(CAUSALFUSION, ProbeConfig()), params_of(CAUSALFUSION)
    run = jax.jit(lambda scale: features.hidden_states(reading, params, images(), KEYS, scale, lambda h: h)[1])
    ones = jnp.ones((2, 2, 5))
    first, second = run(ones)
    np.testing.assert_allclose(states(reading, params, images())[1], [first, second], rtol=1e-5, atol=1e-5)
    dropped = run(ones.at[1, :, 2].set(0.0))
    np.testing.assert_allclose(dropped[1, 2], first[2], rtol=1e-6)
    others = np.array([0, 1, 3, 4])
    np.testing.assert_allclose(dropped[1, others], second[others], rtol=1e-5, atol=1e-5)


def test_drop_path_has_the_expectation_of_all():
    keys = jax.random.split(jax.random.key(0), 20_000)
    scale = np.asarray(jax.jit(drop_path_scale, static_argnums=(0, 1))(0.4, 3, keys))
    assert scale.shape == (3, 2, 20_000) and (scale[0] == 1).all()
    np.testing.assert_allclose(scale.mean(-1), 1.0, atol=0.03)
    np.testing.assert_allclose((scale == 0).mean(-1), [[0.0] * 2, [0.2] * 2, [0.4] * 2], atol=0.02)
    assert abs(np.corrcoef(scale[2])[0, 1]) < 0.05


# --- A pass over a data set -------------------------------------------------------


class Damaged:
    """A source of which some records cannot be read."""

    def __init__(self, corrupt):
        self.corrupt = corrupt

    def __len__(self):
        return 23

    def name(self, index):
        return f"record {index}"

    def __getitem__(self, index):
        if index in self.corrupt:
            raise CorruptRecord("path", f"record {index}", "damaged")
        return {"image": np.full((8, 8, 1), index, np.float32), "label": np.int32(index % 10)}


def reads_files(max_corrupt=0):
    return DataConfig(source="image_folder", path="somewhere", workers=0, max_corrupt=max_corrupt)


def test_every_example_comes_once_in_order(capsys):
    batches = list(features.images_in_order(Damaged({3, 8, 9, 10, 11}), reads_files(5), 4))
    index = np.concatenate([batch.index for batch in batches])
    assert index.tolist() == [i for i in range(23) if i not in (3, 8, 9, 10, 11)]
    np.testing.assert_array_equal(np.concatenate([batch.image for batch in batches])[:, 0, 0, 0], index)
    np.testing.assert_array_equal(np.concatenate([batch.label for batch in batches]), index % 10)
    assert "record 10" in capsys.readouterr().err
    with pytest.raises(InputError, match="5 corrupt records"):
        list(features.images_in_order(Damaged({3, 8, 9, 10, 11}), reads_files(4), 4))
    some = features.random_subset(23, 7, 0)
    assert len(set(some)) == 7 and (np.diff(some) > 0).all() and len(features.random_subset(23, 0, 0)) == 23
    (batch,) = features.images_in_order(Damaged(()), reads_files(), 32, some)
    np.testing.assert_array_equal(batch.index, some)


def test_batches_and_devices_change_nothing():
    reading, params = features.make_reading(PLAIN, ProbeConfig()), params_of(PLAIN)
    results = []
    for devices, size in ((1, 23), (2, 5)):
        mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1), jax.devices()[:devices])
        compute = functools.partial(features.pooled, reading, True, features.place_params(params, reading.model, mesh))
        source = features.images_in_order(Damaged(()), reads_files(), size)
        results.append(features.over_images(compute, mesh, source, size, seed=4, batch_axis=1))
    (whole, labels), (parts, same) = results
    assert whole.shape == (2, 23, 32) and labels.tolist() == same.tolist() == [i % 10 for i in range(23)]
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-4)


def test_held_out_images_are_others():
    held_out = make_held_out_source(CAUSALFUSION.data)
    assert len(held_out) == 899 and held_out is not digits("train")
    for data, match in (
        (dict(source="arrays", path="x"), "held_out_path"),
        (dict(source="image_folder", path="/x"), "held_out_path"),
        (dict(source="tfds", name="cifar10", split="validation"), "held_out_split"),
    ):
        with pytest.raises(InputError, match=f"config.probe.{match}.*not trained on"):
            make_held_out_source(dataclasses.replace(CAUSALFUSION.data, **data), data.get("path", "")[:2])
    with pytest.raises(InputError, match="has its own"):
        make_held_out_source(CAUSALFUSION.data, "x")
