"""Shared by tests of released checkpoints: small weights, and assertions on reading them."""

import numpy as np
import pytest

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.prepare.tensors import open_checkpoint


def state(seed=0):
    """Weights of a layer, by released name."""
    rng = np.random.default_rng(seed)
    return {"a.weight": rng.standard_normal((4, 3)).astype(np.float32), "a.bias": np.arange(4.0, dtype=np.float32)}


def assert_checkpoint_equals(checkpoint, expected):
    """Asserts that a checkpoint holds these arrays, in order and ready for use."""
    assert checkpoint.shapes == {name: array.shape for name, array in expected.items()}
    assert list(checkpoint) == list(expected) and len(checkpoint) == len(expected)
    for name, array in expected.items():
        read = checkpoint[name]
        assert read.dtype == array.dtype and read.flags.c_contiguous and read.flags.writeable
        np.testing.assert_array_equal(read, array)


def assert_refused(path, weights="ema"):
    """Asserts that reading a file fails with a short error of one line; returns the error."""
    with pytest.raises(InputError) as caught, open_checkpoint(path, weights) as checkpoint:
        dict(checkpoint)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return caught.value


def assert_array_refused(checkpoint, name):
    """Asserts that reading one array fails; returns the error."""
    with pytest.raises(InputError) as caught:
        checkpoint[name]
    return caught.value
