"""Orders, AR steps, weights, and the one rule against a dense definition."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.core.factorization import (
    CONDITION_STEP,
    EMPTY_STEP,
    FactorizationConfig,
    Role,
    ar_steps,
    ar_weights,
    attends,
    block_raster_order,
    dilated_order,
    draw_plan,
    equal_steps,
    num_steps_probabilities,
    step_sizes_to_step,
    step_start,
    tile_may_attend,
    token_order,
    training_layout,
)


def dense_rule(q_role, q_step, k_role, k_step):
    """The rule in words, one pair at a time."""
    if Role.PAD in (q_role, k_role):
        return q_role == k_role
    if k_role == Role.NOISY:
        return q_role == Role.NOISY and q_step == k_step
    return k_step < q_step or (k_step == q_step and q_role != Role.NOISY)


def random_tokens(rng, length):
    role = rng.integers(0, 4, length)
    step = np.where(role == Role.CONDITION, CONDITION_STEP, rng.integers(0, 5, length))
    return role.astype(np.int32), step.astype(np.int32)


def test_rule_on_random_tokens():
    rng = np.random.default_rng(0)
    for _ in range(20):
        (q_role, q_step), (k_role, k_step) = random_tokens(rng, 9), random_tokens(rng, 13)
        expected = [
            [dense_rule(*q, *k) for k in zip(k_role, k_step, strict=True)] for q in zip(q_role, q_step, strict=True)
        ]
        np.testing.assert_array_equal(attends(q_role, q_step, k_role, k_step), expected)


def test_packed_documents_are_blind_to_each_other():
    rng = np.random.default_rng(2)
    (role, step), document = random_tokens(rng, 12), rng.integers(0, 3, 12)
    packed = np.asarray(attends(role, step, role, step, document, document))
    whole = np.asarray(attends(role, step, role, step))
    np.testing.assert_array_equal(packed, whole & (document[:, None] == document))


def test_rule_is_each_papers_mask():
    """Special cases written out by hand."""
    ones = np.ones((4, 4), bool)
    role, step = np.full(4, Role.NOISY), np.zeros(4, int)
    np.testing.assert_array_equal(attends(role, step, role, step), ones)  # diffusion
    role, step = np.full(4, Role.CLEAN), np.arange(4)
    np.testing.assert_array_equal(attends(role, step, role, step), np.tril(ones))  # language model
    # ACDiT's SCAM, two blocks of two: clean i sees clean <= i, noisy i sees clean < i and itself.
    role, step = training_layout(0, np.array([0, 0, 1, 1]))
    blocks = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]], bool)
    np.testing.assert_array_equal(attends(role, step, role, step), np.kron(blocks, np.ones((2, 2), bool)))
    # CausalFusion: condition sees condition, everybody sees condition.
    role, step = training_layout(1, np.array([0, 1]))
    expected = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 1, 0, 0, 1]], bool)
    np.testing.assert_array_equal(attends(role, step, role, step), expected)


def test_every_row_sees_something_and_empty_slots_are_unseen():
    role, step = training_layout(2, equal_steps(6, 3))
    assert np.asarray(attends(role, step, role, step)).any(axis=-1).all()
    clean = np.full(3, Role.CLEAN)
    assert not np.asarray(attends(role, step, clean, np.full(3, EMPTY_STEP))).any()


def test_tiles_never_hide_a_visible_pair():
    rng = np.random.default_rng(1)
    for _ in range(50):
        q, k = random_tokens(rng, 12), random_tokens(rng, 8)
        visible = np.asarray(attends(*q, *k)).reshape(4, 3, 2, 4).any(axis=(1, 3))
        bound = np.asarray(tile_may_attend(*q, *k, q_tile=3, k_tile=4))
        assert (bound | ~visible).all()


def test_tiles_are_tight_on_scam():
    role, step = training_layout(0, equal_steps(32, 4))
    visible = np.asarray(attends(role, step, role, step)).reshape(16, 4, 16, 4)
    np.testing.assert_array_equal(tile_may_attend(role, step, role, step, 4, 4), visible.any(axis=(1, 3)))


@pytest.mark.parametrize(
    "config",
    [
        FactorizationConfig(order="raster"),
        FactorizationConfig(order="random"),
        FactorizationConfig(order="block_raster", order_block=2),
        FactorizationConfig(order="dilated", order_block=3),
        FactorizationConfig(order="square_blocks", order_block=4),
    ],
    ids=lambda config: config.order,
)
def test_orders_are_permutations(config):
    order = np.asarray(token_order(config, (4, 6), jax.random.key(0)))
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(24))


def test_orders_by_hand():
    np.testing.assert_array_equal(block_raster_order((2, 4), 2), [0, 1, 4, 5, 2, 3, 6, 7])
    np.testing.assert_array_equal(dilated_order((2, 4), 2), [0, 2, 1, 3, 4, 6, 5, 7])
    square = token_order(FactorizationConfig(order="square_blocks", order_block=4), (2, 4))
    np.testing.assert_array_equal(square, block_raster_order((2, 4), 2))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (dict(order="block_raster", order_block=3), "order_block"),
        (dict(order="square_blocks", order_block=8), "order_block"),
        (dict(order="dilated", order_block=5), "order_block"),
        (dict(steps="fixed", num_steps=17), "num_steps"),
        (dict(steps="block", block_size=5), "block_size"),
    ],
)
def test_what_does_not_fit_the_grid_is_refused(config, field):
    with pytest.raises(InputError) as error:
        FactorizationConfig(**config).check_grid((4, 4))
    assert error.value.field == field


@pytest.mark.parametrize(
    "bad",
    [dict(order="spiral"), dict(order="raster", order_block=2), dict(gamma=0.0), dict(gamma=1.5), dict(weight_max=0.5)],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(InputError):
        FactorizationConfig(**bad)


def draws(config, num_tokens, count):
    keys = jax.random.split(jax.random.key(3), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: jnp.asarray(ar_steps(config, num_tokens, key))))(keys))


@pytest.mark.parametrize("gamma", [0.5, 0.9, 1.0])
def test_decay_draws_the_stated_distribution(gamma):
    count, L = 20000, 6
    steps = draws(FactorizationConfig(steps="decay", gamma=gamma), L, count)
    assert (steps[:, 0] == 0).all() and (np.isin(np.diff(steps), (0, 1))).all()
    observed = np.bincount(steps[:, -1], minlength=L) / count
    np.testing.assert_allclose(observed, num_steps_probabilities(L, gamma), atol=0.012)
    # Given S, every choice of cut points is equally likely.
    for S in (2, 3):
        given = steps[steps[:, -1] == S - 1]
        cuts, counts = np.unique(np.diff(given), axis=0, return_counts=True)
        assert len(cuts) == math.comb(L - 1, S - 1)
        np.testing.assert_allclose(counts / len(given), 1 / len(cuts), atol=0.03)


def test_uniform_is_decay_without_decay():
    uniform = draws(FactorizationConfig(steps="uniform"), 6, 50)
    np.testing.assert_array_equal(uniform, draws(FactorizationConfig(steps="decay", gamma=1.0), 6, 50))


def test_fixed_and_block():
    key = jax.random.key(0)
    fixed = ar_steps(FactorizationConfig(steps="fixed", num_steps=3), 8, key)
    assert sorted(np.bincount(fixed)) == [2, 3, 3] and (np.diff(fixed) >= 0).all()
    np.testing.assert_array_equal(
        ar_steps(FactorizationConfig(steps="block", block_size=4), 8, key), [0, 0, 0, 0, 1, 1, 1, 1]
    )
    np.testing.assert_array_equal(step_sizes_to_step((1, 3, 2)), [0, 1, 1, 1, 2, 2])


@pytest.mark.parametrize("L", range(1, 9))
def test_equal_steps_differ_by_at_most_one(L):
    for S in range(1, L + 1):
        sizes = np.bincount(equal_steps(L, S), minlength=S)
        assert sizes.sum() == L and sizes.max() - sizes.min() <= 1 and sizes.min() >= 1


def test_weights_by_hand():
    step = np.array([[0, 0, 1, 1, 1, 2, 2, 2]])
    np.testing.assert_array_equal(step_start(step), [[0, 0, 2, 2, 2, 5, 5, 5]])
    linear = ar_weights(FactorizationConfig(weight="linear", weight_max=2, weight_min=1), step)
    np.testing.assert_allclose(linear[0, [0, 2, 5]], [2.0, 1.75, 1.375])
    cosine = ar_weights(FactorizationConfig(weight="cosine", weight_max=3, weight_min=1), step)
    np.testing.assert_allclose(cosine[0, 2], 1 + 2 * 0.5 * (1 + np.cos(np.pi / 4)), rtol=1e-6)
    np.testing.assert_array_equal(ar_weights(FactorizationConfig(weight="none"), step), np.ones((1, 8)))


def test_plans_differ_by_sample_and_repeat_by_key():
    config = FactorizationConfig()
    keys = jax.random.split(jax.random.key(0), 8)
    draw = jax.jit(jax.vmap(lambda key: draw_plan(config, (4, 4), key)))
    plan, again = draw(keys), draw(keys)
    jax.tree.map(np.testing.assert_array_equal, plan, again)
    assert all((a != b).any() for a, b in itertools.combinations(np.asarray(plan.order), 2))
