"""Layers, attention, positions, patches, cache: each against a plain definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causalfusion_jax.core.factorization import EMPTY_STEP
from causalfusion_jax.models.attention.dense import KeySegment, dense_attention, mask_bias
from causalfusion_jax.models.kv_cache import KVCache
from causalfusion_jax.models.layers import gelu, normalize
from causalfusion_jax.models.patches import patchify, unpatchify
from causalfusion_jax.models.positions import rope_base, rope_table, rotate, sincos_table, timestep_features


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def layer_norm(x, scale, bias):
    return normalize(x, scale, bias)


def plain_layer_norm(x, scale, bias):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias


def rms_norm(x, scale):
    return normalize(x, scale, None, False, 1e-6)


def plain_rms_norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


@pytest.mark.parametrize(
    ("ours", "plain", "args"),
    [
        (layer_norm, plain_layer_norm, (normal(0, 3, 5, 16), 1 + normal(1, 16), normal(2, 16))),
        (rms_norm, plain_rms_norm, (normal(0, 3, 5, 16), 1 + normal(1, 16))),
        (lambda x: normalize(x, None, None), lambda x: plain_layer_norm(x, 1.0, 0.0), (normal(0, 3, 5, 16),)),
        (gelu, lambda x: jax.nn.gelu(x, approximate=True), (3 * normal(3, 4, 64),)),
    ],
    ids=["layer_norm", "rms_norm", "norm without scale", "gelu"],
)
def test_own_backward_passes(ours, plain, args):
    weights = normal(9, *args[0].shape)

    def total(f):
        return lambda *args: jnp.sum(weights * f(*args))

    np.testing.assert_allclose(ours(*args), plain(*args), rtol=1e-5, atol=1e-6)
    everything = tuple(range(len(args)))
    expected = jax.grad(total(plain), everything)(*args)
    for gradient, known in zip(jax.grad(total(ours), everything)(*args), expected, strict=True):
        np.testing.assert_allclose(gradient, known, rtol=1e-4, atol=1e-5)


def test_attention_over_places_is_attention_over_all():
    q, k, v = normal(0, 2, 5, 3, 8), normal(1, 2, 7, 3, 8), normal(2, 2, 7, 3, 8)
    visible = jax.random.bernoulli(jax.random.key(3), 0.6, (2, 5, 7)).at[..., 0].set(True)
    bias = mask_bias(visible)
    split = dense_attention(
        q, [KeySegment(k[:, :3], v[:, :3], bias[..., :3]), KeySegment(k[:, 3:], v[:, 3:], bias[..., 3:])]
    )
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8)
    weights = np.where(visible[:, None], np.exp(logits), 0.0)
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(split, expected, atol=1e-5)


def test_copies_of_queries_share_their_keys():
    q, k, v = normal(0, 6, 5, 3, 8), normal(1, 2, 7, 3, 8), normal(2, 2, 7, 3, 8)
    own = normal(3, 6, 5, 3, 8), normal(4, 6, 5, 3, 8)
    bias = mask_bias(jax.random.bernoulli(jax.random.key(5), 0.6, (6, 5, 7)))
    own_bias = mask_bias(jnp.ones((6, 5, 5), bool))
    shared = dense_attention(q, [KeySegment(k, v, bias), KeySegment(*own, own_bias)])
    repeated = dense_attention(
        q, [KeySegment(*(jnp.tile(a, (3, 1, 1, 1)) for a in (k, v)), bias), KeySegment(*own, own_bias)]
    )
    np.testing.assert_allclose(shared, repeated, atol=1e-6)


def test_rotary_table_by_hand():
    cos, sin = rope_table((2, 3, 4), 32)
    # Frames, rows, columns have 8, 12, 12 values; base 100, exponents linspace(0, 1, d/2), twice.
    token = 1 * 12 + 2 * 4 + 3
    angles = [position * 100.0 ** -np.linspace(0, 1, n) for position, n in ((1, 4), (2, 6), (3, 6)) for _ in range(2)]
    np.testing.assert_allclose(cos[token], np.cos(np.concatenate(angles)), atol=1e-6)
    np.testing.assert_allclose(sin[token], np.sin(np.concatenate(angles)), atol=1e-6)
    assert [rope_base(length) for length in (4, 16, 32, 39, 40, 400)] == [100, 100, 100, 100, 200, 1100]


def test_rotation_pairs_the_halves_of_the_head():
    x = normal(0, 1, 1, 1, 4)
    cos, sin = normal(1, 4), normal(2, 4)
    a, b, c, d = np.asarray(x).reshape(-1)
    expected = [a * cos[0] - c * sin[0], b * cos[1] - d * sin[1], c * cos[2] + a * sin[2], d * cos[3] + b * sin[3]]
    np.testing.assert_allclose(rotate(x, (cos[None, None], sin[None, None])).reshape(-1), expected, rtol=1e-6)


def test_patches_round_trip_in_raster_order():
    images = normal(0, 2, 4, 6, 3)
    tokens = patchify(images, 2)
    assert tokens.shape == (2, 6, 12)
    np.testing.assert_array_equal(tokens[1, 4], images[1, 2:4, 2:4].reshape(-1))
    np.testing.assert_array_equal(unpatchify(tokens, (2, 3), 2), images)


def test_video_patches_go_frame_by_frame():
    videos = normal(0, 2, 3, 4, 6, 5)
    tokens = patchify(videos, 2)
    assert tokens.shape == (2, 18, 20)
    np.testing.assert_array_equal(tokens[:, 6:12], patchify(videos[:, 1], 2))
    np.testing.assert_array_equal(unpatchify(tokens, (3, 2, 3), 2), videos)


@pytest.mark.parametrize("grid", [(3, 4), (2, 3, 4)])
def test_positions_differ(grid):
    table = sincos_table(grid, 24)
    assert table.shape == (np.prod(grid), 24) and len(np.unique(table.round(5), axis=0)) == len(table)


def test_timestep_features():
    features = np.asarray(timestep_features(jnp.array([[0], [7]]), 8))
    np.testing.assert_array_equal(features[0, 0], [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_allclose(features[1, 0, [0, 4]], [np.cos(7), np.sin(7)], rtol=1e-6)
    np.testing.assert_allclose(features[1, 0, 3], np.cos(7 / 10000**0.75), rtol=1e-6)


def test_cache_overwrites_padding():
    cache = KVCache.empty(1, 1, 5, 1, 2, jnp.float32)
    ones = jnp.ones((1, 1, 3, 1, 2))
    cache = cache.append(ones, ones, jnp.array([[0, 0, EMPTY_STEP]]), 2)
    cache = cache.append(2 * ones, 2 * ones, jnp.array([[1, 1, 1]]), 3)
    np.testing.assert_array_equal(cache.step, [[0, 0, 1, 1, 1]])
    np.testing.assert_array_equal(cache.k[0, 0, :, 0, 0], [1, 1, 2, 2, 2])
    assert int(cache.length) == 5
