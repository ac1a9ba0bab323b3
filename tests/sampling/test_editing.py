"""Masks, what each kind of model can do with them, and that what is kept stays."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, tiny_config

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config import experiment
from causalfusion_jax.config.sampling import SamplerConfig
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.models.patches import patchify
from causalfusion_jax.models.presets import ACDIT
from causalfusion_jax.sampling.editing import (
    MASKS,
    edit_images,
    edit_sampler,
    known_tokens,
    named_mask,
    pixels_of_tokens,
    plan_edit,
    rectangle_mask,
    tokens_of_mask,
)
from causalfusion_jax.sampling.generation import SamplingJob
from causalfusion_jax.sampling.sampler import Given, SamplingSpec, image_keys, sample_tokens

SQUARE_BLOCKS = dict(
    model=ACDIT, factorization=dict(order="square_blocks", order_block=4, steps="block", block_size=4, weight="none"),
    diffusion=dict(t_shared_by="step"),
)  # fmt: skip


def make(**sections):
    return experiment.from_dict(tiny_config(**sections))


def rows(*lines):
    return np.array([[char == "#" for char in line] for line in lines])


def test_named_masks():
    expected = {
        "center": rows("....", ".##.", ".##.", "...."), "outer": rows("####", "#..#", "#..#", "####"),
        "top": rows("####", "####", "....", "...."), "bottom": rows("....", "....", "####", "####"),
        "left": rows("##..", "##..", "##..", "##.."), "right": rows("..##", "..##", "..##", "..##"),
    }  # fmt: skip
    assert set(expected) == set(MASKS)
    for name, mask in expected.items():
        np.testing.assert_array_equal(named_mask(name, 4, 4), mask, err_msg=name)
    # Of an odd side, the middle pixel belongs to either half.
    assert named_mask("top", 5, 2).sum() == named_mask("bottom", 5, 2).sum() == 6
    assert named_mask("center", 5, 4).tolist() == rows("....", ".##.", ".##.", ".##.", "....").tolist()


def test_masks_are_rounded_outward_to_tokens():
    mask = rectangle_mask((3, 0, 5, 1), 8, 8)
    assert mask.sum() == 2
    tokens = tokens_of_mask(mask, 2)
    np.testing.assert_array_equal(tokens, rows(".##.", "....", "....", "...."))
    rounded = pixels_of_tokens(tokens, 2)
    assert rounded.shape == (8, 8) and (rounded & mask).sum() == 2 and rounded.sum() == 8


@pytest.mark.parametrize("box", [(0, 0, 9, 1), (3, 3, 3, 5), (-1, 0, 2, 2), (0, 5, 2, 4)])
def test_rectangles_outside_are_refused(box):
    with pytest.raises(InputError, match="x0 < x1 <= 8"):
        rectangle_mask(box, 8, 8)


def test_random_order_takes_any_mask():
    config = make()
    for name in MASKS:
        hidden = tokens_of_mask(named_mask(name, 8, 8), 2)
        plan = plan_edit(config, hidden)
        np.testing.assert_array_equal(plan.hidden, hidden)
        assert not plan.known_step.any() and len(plan.known_step) == 16 - plan.num_hidden and plan.ar_steps == 0


def test_square_blocks_take_whole_last_blocks():
    """ACDiT: a mask grows to whole blocks, and the blocks kept must come first."""
    config = make(**SQUARE_BLOCKS)
    plan = plan_edit(config, rows("....", "....", "....", "...#"))
    np.testing.assert_array_equal(plan.hidden, rows("....", "....", "..##", "..##"))
    np.testing.assert_array_equal(plan.known_step, np.repeat([0, 1, 2], 4))
    assert plan.ar_steps == 1 and plan_edit(config, rows("....", "....", "####", "####")).ar_steps == 2
    with pytest.raises(InputError, match="8 tokens kept after masked ones.*square_blocks alone"):
        plan_edit(config, rows("####", "####", "....", "...."))
    with pytest.raises(InputError, match="touches all of them"):
        plan_edit(config, rows("....", ".##.", ".##.", "...."))


def test_one_order_takes_suffixes_of_it():
    config = make(factorization=dict(order="raster"))
    hidden = rows("....", "...#", "####", "####")
    plan = plan_edit(config, hidden)
    np.testing.assert_array_equal(plan.hidden, hidden)
    assert plan.ar_steps == 0 and plan.num_hidden == 9
    with pytest.raises(InputError, match="6 tokens kept after masked ones.*raster alone"):
        plan_edit(config, rows("..##", "..##", "..##", "..##"))


def test_random_order_in_fixed_steps():
    config = make(factorization=dict(steps="fixed", num_steps=4))
    plan = plan_edit(config, rows("#.#.", ".#.#", "....", "####"))
    np.testing.assert_array_equal(plan.known_step, np.repeat([0, 1], 4))
    assert plan.ar_steps == 2
    with pytest.raises(InputError, match="4 AR steps, so it can keep 4, 8, 12 tokens"):
        plan_edit(config, rows("#...", "....", "....", "...."))
    with pytest.raises(InputError, match="never seen a clean token"):
        plan_edit(make(factorization=dict(steps="fixed", num_steps=1)), rows("#...", "....", "....", "...."))


def test_all_and_nothing_are_refused():
    for hidden, words in ((np.ones((4, 4), bool), "nothing to keep"), (np.zeros((4, 4), bool), "at least one")):
        with pytest.raises(InputError, match=words):
            plan_edit(make(), hidden)


def test_larger_canvas_where_positions_continue():
    canvas = np.ones((6, 4), bool)
    canvas[:4] = False
    with pytest.raises(InputError, match="positions are learned"):
        plan_edit(make(), canvas)
    for positions in ("sincos", "rope"):
        plan = plan_edit(make(model=dict(positions=positions)), canvas)
        assert plan.model.grid == (6, 4) and plan.model.rope_grid == (4, 4) and plan.num_hidden == 8
    plan = plan_edit(make(**SQUARE_BLOCKS), canvas)
    np.testing.assert_array_equal(plan.known_step, np.repeat([0, 1, 2, 3], 4))
    with pytest.raises(InputError, match="must divide both sides"):
        plan_edit(make(**SQUARE_BLOCKS), np.pad(canvas, ((0, 1), (0, 0)), constant_values=True))


def test_rope_frequencies_stay_those_of_training():
    from causalfusion_jax.models.positions import rope_table

    trained, grown = rope_table((32, 32), 16), rope_table((64, 32), 16, (32, 32))
    np.testing.assert_array_equal(grown[0][: 32 * 32], trained[0])
    assert (rope_table((64, 32), 16)[0][: 32 * 32] != trained[0]).any()


def test_ar_steps_follow_the_mask():
    hidden = rows("....", "....", "..##", "..##")
    free, blocks = plan_edit(make(), hidden), plan_edit(make(**SQUARE_BLOCKS), hidden)
    assert edit_sampler(SamplerConfig(ar_steps=16), free, explicit_steps=False).ar_steps == 4
    assert edit_sampler(SamplerConfig(step_sizes=(8, 8)), free, explicit_steps=False).sizes(4) == (2, 2)
    assert edit_sampler(SamplerConfig(ar_steps=4), blocks, explicit_steps=False).ar_steps == 1
    assert edit_sampler(SamplerConfig(ar_steps=2), blocks, explicit_steps=True).ar_steps == 2
    with pytest.raises(InputError, match="<= 4"):
        edit_sampler(SamplerConfig(ar_steps=16), free, explicit_steps=True)


@pytest.mark.parametrize("order", ["", "raster"])
def test_kept_tokens_come_first_and_the_others_in_order(order):
    config = make()
    images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 1)).astype(np.float32)
    plan = plan_edit(config, rows("#...", ".#..", "..#.", "...#"))
    known = known_tokens(config, SamplerConfig(order=order), plan, images, image_keys(0, range(3)))
    hidden = plan.hidden.reshape(-1)
    assert (hidden[known.order] == [False] * 12 + [True] * 4).all()
    assert (np.sort(known.order, axis=1) == np.arange(16)).all()
    assert (known.order[0] != known.order[1]).any() == (order == "")
    if order:
        assert known.order[0, 12:].tolist() == [0, 5, 10, 15]
    tokens = np.asarray(patchify(images, 2))
    np.testing.assert_array_equal(known.tokens[2, 5], tokens[2, known.order[2, 5]])


@pytest.mark.parametrize(
    ("sections", "hidden"),
    [
        (dict(), rows("####", "#..#", "#..#", "####")),
        (SQUARE_BLOCKS, rows("....", "....", "####", "####")),
        (dict(model=dict(positions="sincos")), rows("......", "..##..", "......", "######", "######", "######")),
    ],
    ids=["causalfusion", "acdit", "canvas"],
)
def test_kept_latents_are_unchanged_and_the_rest_is_new(sections, hidden):
    config = make(**{"data": dict(source="arrays", path="x", latents=True, channels=1), **sections})
    images = np.random.default_rng(0).normal(size=(3, *np.multiply(hidden.shape, 2), 1)).astype(np.float32)
    plan = plan_edit(config, hidden)
    sampler = edit_sampler(SamplerConfig(ar_steps=2, solver_steps=3, cfg_scale=2.0), plan, explicit_steps=True)
    params = random_params(config.transformer, 0.08)
    job = SamplingJob(config, sampler, Condition(np.array([1, 2, 3])), batch_size=2)
    results = edit_images(job, params, plan, images)
    kept = ~pixels_of_tokens(plan.hidden, 2)
    np.testing.assert_array_equal(results[:, kept], images[:, kept])
    assert (results[:, ~kept] != images[:, ~kept]).mean() > 0.99


def test_continuing_is_what_generating_whole_does():
    """Kept blocks enter the cache with their own AR steps, so that the rest follows as if they had been generated."""
    config = make(**SQUARE_BLOCKS)
    model, params = config.transformer, random_params(config.transformer, 0.08)
    plan = plan_edit(config, rows("....", "....", "####", "####"))
    sampler = SamplerConfig(ar_steps=4, solver="ddim", solver_steps=4, cfg_scale=1.5)
    x_T = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 4)), jnp.float32)
    spec = SamplingSpec(model, config.diffusion, config.factorization, sampler)
    keys, condition = image_keys(0, range(2)), Condition(jnp.asarray([3, 4]))
    whole = sample_tokens(spec, params, keys, condition, Given(x_T=x_T))
    images = np.asarray(whole).reshape(2, 4, 4, 2, 2, 1).swapaxes(2, 3).reshape(2, 8, 8, 1)
    known = known_tokens(config, sampler, plan, images, keys)
    spec = dataclasses.replace(spec, sampler=dataclasses.replace(sampler, ar_steps=2))

    def again(known_step):
        given = known._replace(step=known_step, x_T=x_T[:, 8:])
        return sample_tokens(spec, params, keys, condition, given)

    np.testing.assert_allclose(again(known.step), whole, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(again(None)) - whole).max() > 1e-3
