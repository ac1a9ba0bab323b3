"""The autoencoders: released names, micro-batches, tiles, sampling."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDENS

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.models.autoencoder import (
    MAR_VAE,
    SD_VAE,
    AutoencoderConfig,
    abstract_autoencoder,
    decode,
    encode,
    init_autoencoder,
    moments,
    overlapping_tiles,
)
from causalfusion_jax.prepare import names
from causalfusion_jax.prepare.released_autoencoders import (
    ignored_names,
    mar_vae_config,
    mar_vae_table,
    sd_vae_config,
    sd_vae_table,
)

# Every setting differs from the releases', and both sides have attention at a level.
TINY = AutoencoderConfig(
    channels=8,
    channel_multipliers=(1, 2),
    latent_channels=3,
    scaling_factor=0.5,
    residual_blocks=1,
    encoder_attention=(1,),
    decoder_attention=(0,),
    image_channels=2,
    norm_groups=4,
)


def relative_error(ours, golden):
    return np.linalg.norm(np.asarray(ours, np.float64) - golden) / np.linalg.norm(golden)


@functools.cache
def random_params(config):
    """Parameters without a zero among them, so that every one of them matters."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return 1 + 0.1 * rng.standard_normal(leaf.shape, np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 100
        return rng.standard_normal(leaf.shape, np.float32) / np.sqrt(fan_in, dtype=np.float32)

    params = jax.tree_util.tree_map_with_path(draw, abstract_autoencoder(config)[1])
    return jax.tree.map(jnp.asarray, params)


def tiny_params():
    return random_params(TINY)


@functools.cache
def images(size=8):
    return jax.random.uniform(jax.random.key(1), (5, size, size, 2), minval=-1.0)


@functools.cache
def latents():
    return jax.random.normal(jax.random.key(2), (5, 8, 8, 3))


def table_shapes(table):
    return {entry.name: entry.shape for entry in table}


@pytest.mark.parametrize(
    ("config", "count", "downsampling"), [(MAR_VAE, 66_456_019, 16), (SD_VAE, 83_653_863, 8)], ids=["mar", "sd"]
)
def test_published_sizes(config, count, downsampling):
    shapes = abstract_autoencoder(config)[1]
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == count
    assert config.downsampling == downsampling
    image = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    latent = jax.eval_shape(functools.partial(encode, config), shapes, image)
    assert latent.shape == (2, 256 // downsampling, 256 // downsampling, config.latent_channels)
    assert jax.eval_shape(functools.partial(decode, config), shapes, latent).shape == image.shape


def test_full_size_names():
    for config, table, recognize in (
        (MAR_VAE, mar_vae_table(MAR_VAE), mar_vae_config),
        (SD_VAE, sd_vae_table(SD_VAE), sd_vae_config),
    ):
        assert names.unfilled(table, abstract_autoencoder(config)[1]) == []
        assert recognize(table_shapes(table)) == config
    path = GOLDENS / "causalfusion_checkpoint_shapes.json"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    names.check_shapes(mar_vae_table(MAR_VAE), json.loads(path.read_text())["MAR-KL16"])


@pytest.mark.parametrize("make_table", [mar_vae_table, sd_vae_table])
def test_names_round_trip(make_table):
    table, (_, shapes) = make_table(TINY), abstract_autoencoder(TINY)
    assert names.unfilled(table, shapes) == []
    released = names.to_released(table, tiny_params())
    assert {name: array.shape for name, array in released.items()} == table_shapes(table)
    jax.tree.map(np.testing.assert_array_equal, names.from_released(table, released, shapes), tiny_params())


def respelled(released, *, old=False, pointwise=False, prefix=""):
    """Diffusers' arrays under other names and with other shapes of attention's matrices."""
    words = {"to_q": "query", "to_k": "key", "to_v": "value", r"to_out\.0": "proj_attn"} if old else {}
    arrays = {}
    for name, array in released.items():
        if pointwise and "attentions" in name and array.ndim == 2:
            array = array[:, :, None, None]
        for new, other in words.items():
            name = re.sub(new, other, name)
        arrays[prefix + name] = array
    return arrays


@pytest.mark.parametrize(
    "variant",
    [dict(), dict(old=True), dict(pointwise=True), dict(old=True, pointwise=True, prefix="vae."), "ldm"],
    ids=["diffusers", "old", "1x1", "old-1x1-prefixed", "ldm"],
)
def test_spellings_of_stable_diffusion(variant):
    extra = {}
    if variant == "ldm":
        extra = {"first_stage_model.loss.logvar": (), "model.diffusion_model.out.2.bias": (4,), "betas": (1000,)}
        arrays = names.to_released(mar_vae_table(TINY), tiny_params())
        arrays = {f"first_stage_model.{name}": array for name, array in arrays.items()}
    else:
        arrays = respelled(names.to_released(sd_vae_table(TINY), tiny_params()), **variant)
    shapes = {name: array.shape for name, array in arrays.items()} | extra
    config = sd_vae_config(shapes, norm_groups=4, scaling_factor=0.5)
    assert config == TINY
    table = sd_vae_table(config, shapes)
    assert ignored_names(shapes) == list(extra)
    names.check_shapes(table, shapes, ignored_names(shapes))
    params = names.from_released(table, arrays, abstract_autoencoder(config)[1])
    jax.tree.map(np.testing.assert_array_equal, params, tiny_params())


def test_other_checkpoints_are_refused():
    ldm, diffusers = (table_shapes(table(TINY)) for table in (mar_vae_table, sd_vae_table))
    with pytest.raises(InputError, match=r"encoder\.conv_in\.weight.*not the checkpoint of one autoencoder"):
        mar_vae_config({"blocks.0.attn.qkv.weight": (96, 32)})
    with pytest.raises(InputError, match=r"encoder\.down\.0\.block\.0\.conv1\.weight.*missing"):
        mar_vae_config(diffusers, norm_groups=4)
    decoder_less = {name: shape for name, shape in ldm.items() if not name.startswith("decoder.")}
    with pytest.raises(InputError, match=r"decoder\.conv_in\.weight.*missing"):
        mar_vae_config(decoder_less, norm_groups=4)
    with pytest.raises(InputError, match="norm_groups=32"):
        mar_vae_config(ldm)
    uneven = {**ldm, "encoder.down.1.block.0.conv1.weight": (12, 8, 3, 3)}
    with pytest.raises(InputError, match="has 12 channels, must be a multiple of 8"):
        mar_vae_config(uneven, norm_groups=4)


def test_fresh_parameters():
    params = init_autoencoder(TINY, jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract_autoencoder(TINY)[1]
    )
    block = params["decoder"]["levels"][0]["blocks"][0]
    assert not block["conv_1"]["bias"].any() and (block["norm_1"]["scale"] == 1).all()
    for kernel in (block["conv_1"]["kernel"], block["conv_2"]["kernel"]):
        assert abs(kernel.std() * 12 - 1) < 0.1
    assert not np.allclose(block["conv_1"]["kernel"], block["conv_2"]["kernel"])


def test_micro_batches_change_nothing():
    whole = moments(TINY, tiny_params(), images())
    in_parts = moments(TINY, tiny_params(), images(), micro_batch=2)
    for ours, expected in zip(in_parts, whole, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    whole = decode(TINY, tiny_params(), latents())
    np.testing.assert_allclose(decode(TINY, tiny_params(), latents(), micro_batch=2), whole, rtol=1e-5, atol=1e-5)


def test_encode_is_the_scaled_mean_or_a_sample():
    key = jax.random.key(3)
    mean, log_variance = moments(TINY, tiny_params(), images())
    np.testing.assert_allclose(encode(TINY, tiny_params(), images()), 0.5 * mean, rtol=1e-6)
    sample = encode(TINY, tiny_params(), images(), key)
    noise = (sample / 0.5 - mean) / jnp.exp(0.5 * log_variance)
    assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.2
    assert np.unique(noise.round(4)).size > 0.9 * noise.size
    in_parts = encode(TINY, tiny_params(), images(), key, micro_batch=2)
    np.testing.assert_allclose(in_parts, sample, rtol=1e-5, atol=1e-5)


def test_log_variance_is_clipped():
    bias = jnp.array([0.0, 0.0, 0.0, 1e4, -1e4, 0.0])
    params = tiny_params() | {"quant_conv": tiny_params()["quant_conv"] | {"bias": bias}}
    _, log_variance = moments(TINY, params, images())
    np.testing.assert_array_equal(log_variance[..., 0], 20.0)
    np.testing.assert_array_equal(log_variance[..., 1], -30.0)


def test_one_tile_is_no_tile():
    whole = decode(TINY, tiny_params(), latents())
    for tile in (8, 100):
        np.testing.assert_array_equal(decode(TINY, tiny_params(), latents(), tile=tile), whole)


def test_two_tiles_by_hand():
    wide = jax.random.normal(jax.random.key(4), (5, 8, 14, 3))
    left, right = (decode(TINY, tiny_params(), part) for part in (wide[:, :, :8], wide[:, :, 6:]))
    # Latent columns 6 and 7, image columns 12 to 15, are in both.
    of_right = ((jnp.arange(4) + 0.5) / 4)[:, None]
    blended = (1 - of_right) * left[:, :, 12:] + of_right * right[:, :, :4]
    expected = jnp.concatenate([left[:, :, :12], blended, right[:, :, 4:]], axis=2)
    tiled = decode(TINY, tiny_params(), wide, tile=8)
    np.testing.assert_allclose(tiled, expected, rtol=1e-5, atol=1e-5)


def test_tiles_are_close_and_without_seams():
    # Attention of the image's own resolution takes too long here.
    config, shape = dataclasses.replace(TINY, decoder_attention=()), (40, 32, 3)
    z = jnp.stack([jax.random.normal(jax.random.key(4), shape), jnp.full(shape, 0.7)])
    whole, tiled = (np.asarray(decode(config, random_params(config), z, tile=tile)) for tile in (None, 24))
    assert tiled.shape == whole.shape == (2, 80, 64, 2)
    assert relative_error(tiled[0], whole[0]) < 0.25 and relative_error(tiled[1], whole[1]) < 1
    for axis in (1, 2):
        steepest_tiled, steepest = (np.abs(np.diff(image, axis=axis)).max((1, 2, 3)) for image in (tiled, whole))
        assert (steepest_tiled < 1.1 * steepest).all()


@pytest.mark.parametrize(("length", "tile"), [(8, 8), (9, 8), (20, 12), (64, 16), (5, 2), (23, 3)])
def test_tiles_cover_every_row_once(length, tile):
    starts, weights = overlapping_tiles(length, tile, 2)
    total = np.zeros(length * 2)
    for start, weight in zip(starts, weights, strict=True):
        total[2 * start : 2 * (start + tile)] += weight
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert (weights > 0).all() and starts[-1] == length - tile
    # Linear: within a tile of rows, weights change by at most a ramp's step.
    assert np.abs(np.diff(weights, axis=1)).max(initial=0) <= 0.5 / max(1, tile // 4) + 1e-6


def test_bfloat16_is_close():
    half = dataclasses.replace(TINY, dtype="bfloat16")
    decoded = decode(half, tiny_params(), latents())
    assert decoded.dtype == jnp.float32
    assert relative_error(decoded, decode(TINY, tiny_params(), latents())) < 0.05


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: moments(TINY, tiny_params(), jnp.zeros((1, 8, 8, 3))), "images"),
        (lambda: encode(TINY, tiny_params(), jnp.zeros((1, 8, 7, 2))), "images"),
        (lambda: encode(TINY, tiny_params(), jnp.zeros((8, 8, 2))), "images"),
        (lambda: encode(TINY, tiny_params(), jnp.zeros((1, 8, 8, 2), jnp.uint8)), "images"),
        (lambda: encode(TINY, tiny_params(), images(), micro_batch=0), "micro_batch"),
        (lambda: decode(TINY, tiny_params(), jnp.zeros((1, 4, 4, 4))), "latents"),
        (lambda: decode(TINY, tiny_params(), latents(), tile=1), "tile"),
        (lambda: dataclasses.replace(TINY, norm_groups=3), "norm_groups"),
        (lambda: dataclasses.replace(TINY, channel_multipliers=()), "channel_multipliers"),
        (lambda: dataclasses.replace(TINY, decoder_attention=(2,)), "decoder_attention"),
        (lambda: dataclasses.replace(TINY, scaling_factor=0.0), "scaling_factor"),
        (lambda: dataclasses.replace(TINY, dtype="float16"), "dtype"),
    ],
)
def test_bad_inputs_are_refused(call, field):
    with pytest.raises(InputError) as error:
        call()
    assert error.value.field == field
