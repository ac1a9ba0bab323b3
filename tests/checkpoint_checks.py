"""What tests of released checkpoints share: small weights, and how reading ends."""

import numpy as np
import pytest

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.prepare.tensors import open_checkpoint


def state(seed=0):
    rng = np.random.default_rng(seed)
    return {"a.weight": rng.standard_normal((4, 3)).astype(np.float32), "a.bias": np.arange(4.0, dtype=np.float32)}


def check_equal(checkpoint, expected):
    assert checkpoint.shapes == {name: array.shape for name, array in expected.items()}
    assert list(checkpoint) == list(expected) and len(checkpoint) == len(expected)
    for name, array in expected.items():
        found = checkpoint[name]
        assert found.dtype == array.dtype and found.flags.c_contiguous and found.flags.writeable
        np.testing.assert_array_equal(found, array)


def error_of(path, weights="ema"):
    with pytest.raises(InputError) as caught, open_checkpoint(path, weights) as checkpoint:
        dict(checkpoint)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return caught.value


def error_of_reading(checkpoint, name):
    with pytest.raises(InputError) as caught:
        checkpoint[name]
    return caught.value
