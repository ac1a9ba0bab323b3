"""The FID Inception-v3: its table of names, its resize, its spatial features."""

import json

import jax
import numpy as np
import pytest
from helpers import GOLDENS, inception_weights

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.models.inception import abstract_inception, inception_features, init_inception, resize_tf1
from causalfusion_jax.prepare import names
from causalfusion_jax.prepare.released_inception import ignored_names, inception_table

GOLDEN = GOLDENS / "inception_fid.npz"


def relative_error(ours, golden):
    return np.linalg.norm(np.asarray(ours, np.float64) - golden) / np.linalg.norm(golden)


def golden_shapes(path):
    return json.loads(str(np.load(path)["names_json"]))


@pytest.fixture(scope="module")
def weights():
    return inception_weights(golden_shapes(GOLDEN))


@pytest.fixture(scope="module")
def params(weights):
    return names.from_released(inception_table(), weights, abstract_inception()[1])


def test_spatial_features_are_seven_channels_after_relu(params):
    # A first 1x1 convolution whose output is its bias, whatever the image.
    bias = np.linspace(-1, 1, 192, dtype=np.float32)[::-1] - 0.975
    mixed = params["Mixed_6d"]
    unit = mixed["branch1x1"] | {"scale": np.zeros(192, np.float32), "bias": bias}
    changed = params | {"Mixed_6d": mixed | {"branch1x1": unit}}
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8)
    before, after = inception_features(params, images), inception_features(changed, images)
    expected = np.maximum(bias[:7], 0.0)
    assert 0 < np.count_nonzero(expected) < 7
    np.testing.assert_array_equal(after["spatial"].reshape(2, 17 * 17, 7), np.broadcast_to(expected, (2, 17 * 17, 7)))
    assert relative_error(before["spatial"], np.asarray(after["spatial"])) > 0.1
    np.testing.assert_array_equal(before["192"], after["192"])


def test_table_is_complete_and_has_the_released_shapes():
    table, shapes = inception_table(), abstract_inception()[1]
    released = {name: tuple(shape) for name, shape in golden_shapes(GOLDEN).items()}
    assert names.unfilled(table, shapes) == []
    names.check_shapes(table, released, ignored_names())
    assert {entry.name for entry in table} | set(ignored_names()) == set(released)
    assert len({entry.name for entry in table}) == len(table)


def test_round_trip_is_exact(weights, params):
    back = names.to_released(inception_table(), params)
    assert set(back) == set(weights)
    for name, weight in weights.items():
        np.testing.assert_array_equal(back[name], weight, err_msg=name)


def test_fresh_parameters_have_the_released_shapes():
    fresh = jax.eval_shape(init_inception, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_inception()[1]
    )
    released = golden_shapes(GOLDEN)
    total = sum(int(np.prod(released[name])) for name in set(released) - set(ignored_names()))
    assert sum(x.size for x in jax.tree.leaves(fresh)) == total


def plain_resize(image, size):
    out = np.zeros((*size, image.shape[-1]))
    for row in range(size[0]):
        for column in range(size[1]):
            y, x = row * image.shape[0] / size[0], column * image.shape[1] / size[1]
            y_low, x_low = int(y), int(x)
            y_high, x_high = min(y_low + 1, image.shape[0] - 1), min(x_low + 1, image.shape[1] - 1)
            top = image[y_low, x_low] + (image[y_low, x_high] - image[y_low, x_low]) * (x - x_low)
            bottom = image[y_high, x_low] + (image[y_high, x_high] - image[y_high, x_low]) * (x - x_low)
            out[row, column] = top + (bottom - top) * (y - y_low)
    return out


@pytest.mark.parametrize("size", [(13, 9), (5, 7), (9, 4), (6, 8)], ids=str)
def test_resize(size):
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), np.uint8)
    resized = resize_tf1(images, size)
    assert resized.shape == (2, *size, 3) and resized.dtype == np.float32
    for ours, image in zip(resized, images, strict=True):
        np.testing.assert_allclose(ours, plain_resize(image.astype(np.float64), size), atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 8, 8, 3), np.float32), ((8, 8, 3), np.uint8), ((2, 3, 8, 8), np.uint8)],
    ids=["not_uint8", "no_batch", "channels_first"],
)
def test_other_images_are_refused(shape, dtype):
    with pytest.raises(InputError, match="images_uint8"):
        inception_features({}, np.zeros(shape, dtype))
