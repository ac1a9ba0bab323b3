"""Conditions: guidance pairs, class dropout, and selection."""

import jax.numpy as jnp
import numpy as np

from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.core.layouts import NO_TOKEN

TEXT = np.array([[1, 5, NO_TOKEN], [1, 6, 7]], np.int32)


def test_guidance_pairs_are_followed_by_no_class_and_no_text():
    pairs = Condition(np.array([3, 4]), TEXT).with_unconditional(10)
    np.testing.assert_array_equal(pairs.labels, [3, 4, 10, 10])
    np.testing.assert_array_equal(pairs.text, [*TEXT, [NO_TOKEN] * 3, [NO_TOKEN] * 3])
    assert (pairs.batch, pairs.num_steps) == (4, 3)
    assert Condition(np.array([3, 4])).with_unconditional(10).text is None


def test_dropout_and_selection():
    condition = Condition(jnp.array([3, 4]), TEXT).without_class(jnp.array([True, False]), 10)
    np.testing.assert_array_equal(condition.labels, [10, 4])
    selected = condition.select(np.array([1, 1]))
    np.testing.assert_array_equal(selected.labels, [4, 4])
    np.testing.assert_array_equal(selected.text, TEXT[[1, 1]])
    assert Condition(jnp.array([3, 4])).num_steps == 0
