"""Attention in tiles (the kernel interpreted and in plain JAX) and head by head against one dense softmax."""

import functools
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causalfusion_jax.common import sharding
from causalfusion_jax.core import factorization
from causalfusion_jax.core.factorization import EMPTY_STEP, FactorizationConfig, Role, attends, training_layout
from causalfusion_jax.models.attention.cpu import BY_HEAD_FROM, attend_by_head
from causalfusion_jax.models.attention.dense import mask_bias
from causalfusion_jax.models.attention.flash import (
    attended_fraction,
    blockwise_attention,
    computed_fraction,
    flash_attention,
)
from causalfusion_jax.models.attention.kernel import mask_from_codes, rule_codes
from causalfusion_jax.models.attention.mask import attention_mask
from causalfusion_jax.models.attention.tiles import FULL, SKIP, AttentionLayout, tile_plans

IMPLEMENTATIONS = {
    "kernel": functools.partial(flash_attention, interpret=True),
    "blockwise": blockwise_attention,
    "by_platform": flash_attention,
}
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}


def normal(seed, shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def attended_pairs(layout):
    """Pairs without padding that the rule does not mask; bool [batch, queries, keys]."""
    q_role, _, k_role, _ = layout
    return attends(*layout) & (q_role != Role.PAD)[..., :, None] & (k_role != Role.PAD)[..., None, :]


def dense(q, k, v, layout):
    """The definition, in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    mask = attended_pairs(layout)[:, None]
    logits = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5, -1e30)
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.where(mask, jax.nn.softmax(logits), 0.0), v)


@functools.partial(jax.jit, static_argnums=(0, 1))
def output_and_gradients(attend, one_by_one, arrays, layout):
    """Output and gradients of q, k and v, with traced roles and steps.

    Args:
      attend: an attention.
      one_by_one: run each sample by itself, because interpreting is fast on small arrays only.
      arrays: q, k, v and the gradient of the output.
      layout: roles and steps.
    """

    def run(arrays, layout):
        q, k, v, d_out = arrays
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, layout), q, k, v)
        return out, *vjp(d_out.astype(out.dtype))

    if not one_by_one:
        return run(arrays, layout)
    args = jax.tree.map(lambda x: x[:, None], (arrays, layout))
    return jax.tree.map(lambda x: x[:, 0], jax.lax.map(lambda sample: run(*sample), args))


def check(attend, layout, heads=2, head_dim=64, dtype="float32", one_by_one=False):
    """Compares output and gradients with the dense ones on random inputs."""
    layout = AttentionLayout(*layout).as_arrays()
    q_shape, k_shape = ((*role.shape, heads, head_dim) for role in (layout.q_role, layout.k_role))
    arrays = tuple(normal(i, shape, dtype) for i, shape in enumerate((q_shape, k_shape, k_shape, q_shape)))
    expected = output_and_gradients(dense, False, arrays, layout)
    actual = output_and_gradients(attend, one_by_one, arrays, layout)
    for name, a, b in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(
            a.astype(np.float32), b.astype(np.float32), atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype], err_msg=name
        )
    for gradient, role in zip(actual, (layout.q_role, layout.q_role, layout.k_role, layout.k_role), strict=True):
        assert not np.any(np.asarray(gradient)[np.asarray(role) == Role.PAD])


def to_itself(role, step):
    return role, step, role, step


@functools.cache
def random_plans(count, num_tokens, num_condition):
    """CausalFusion training layouts, each with steps of its own."""
    draw = functools.partial(factorization.ar_steps, FactorizationConfig(gamma=0.95), num_tokens)
    step = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), count))
    return to_itself(*training_layout(num_condition, step))


def scam(num_tokens, block):
    return training_layout(0, np.arange(num_tokens) // block)


def text_and_image(num_text, num_image):
    """A causal text, an image that attends to it, and text that attends to both, as in training Transfusion."""
    text = np.arange(num_text)
    image = np.full(num_image, num_text)
    parts = [(Role.CLEAN, text), (Role.CLEAN, image), (Role.NOISY, image), (Role.CLEAN, num_text + 1 + text)]
    return np.repeat([int(r) for r, _ in parts], [len(s) for _, s in parts]), np.concatenate([s for _, s in parts])


def several_layouts(length=44):
    """SCAM, text and image, and padding at several positions, as samples of one batch."""

    def at(role, step, positions):
        filled = np.full(length, Role.PAD), np.full(length, EMPTY_STEP)
        filled[0][positions], filled[1][positions] = role, step
        return filled

    everywhere = np.arange(length)
    rows = [
        at(*scam(20, 5), everywhere[:40]),
        at(*text_and_image(7, 10), everywhere[:34]),
        at(*text_and_image(7, 10), np.delete(everywhere, np.arange(12, 12 + length - 34))),
        at(*scam(16, 8), everywhere[-32:]),
        at(*scam(length // 2, length // 2), everywhere),
        at([], [], everywhere[:0]),
    ]
    return to_itself(*(np.stack(a) for a in zip(*rows, strict=True)))


def cached_sampling(batch=2):
    """Two noisy and a clean query of each step against a cache with empty slots, then the new tokens."""
    q_role = np.tile([Role.NOISY] * 9 + [Role.CLEAN] * 3, (batch, 1))
    q_step = np.tile([3] * 12, (batch, 1)) + np.arange(batch)[:, None]
    cached = np.tile([-1] * 3 + [0] * 6 + [2] * 5 + [3] * 6 + [EMPTY_STEP] * 9, (batch, 1))
    k_role = np.concatenate([np.full_like(cached, Role.CLEAN), q_role], axis=1)
    return q_role, q_step, k_role, np.concatenate([cached, q_step], axis=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["kernel", "blockwise"])
def test_200_random_plans(name, dtype):
    attend = functools.partial(IMPLEMENTATIONS[name], q_tile=16, k_tile=8)
    check(attend, random_plans(200, 12, 3), heads=1, dtype=dtype, one_by_one=name == "kernel")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_layouts_with_padding_anywhere(name):
    check(functools.partial(IMPLEMENTATIONS[name], q_tile=16, k_tile=8), several_layouts(), head_dim=72)


@pytest.mark.parametrize("name", ["kernel", "blockwise"])
def test_copies_of_queries_share_cached_keys(name, head_dim=128):
    attend = functools.partial(IMPLEMENTATIONS[name], q_tile=8, k_tile=8)
    q_role, q_step, k_role, k_step = cached_sampling()
    q_step = np.concatenate([q_step, q_step, q_step - 1])
    layout = AttentionLayout(np.tile(q_role, (3, 1)), q_step, k_role, k_step)
    q, k, v = (normal(i, (batch, n, 2, head_dim)) for i, (batch, n) in enumerate([(6, 12), (2, 41), (2, 41)]))

    def repeated(q, k, v, layout):
        k, v = (jnp.tile(x, (3, 1, 1, 1)) for x in (k, v))
        k_role, k_step = (jnp.tile(x, (3, 1)) for x in (layout.k_role, layout.k_step))
        return dense(q, k, v, layout._replace(k_role=k_role, k_step=k_step))

    expected = output_and_gradients(repeated, False, (q, k, v, q), layout)
    for a, b in zip(output_and_gradients(attend, False, (q, k, v, q), layout), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_by_head(dtype):
    def by_head(q, k, v, layout):
        return attend_by_head(q, k, v, mask_bias(attends(*layout)))

    check(by_head, random_plans(20, 12, 3), heads=3, dtype=dtype)


@pytest.mark.parametrize("n", [BY_HEAD_FROM - 1, BY_HEAD_FROM])
def test_cached_keys_joined_or_not(n, copies=2, slots=9):
    cached_step = np.tile([-1] * 3 + [0] * 4 + [EMPTY_STEP] * 2, (copies, 1))
    role, step = np.full((copies, n), Role.NOISY), np.full((copies, n), 1)
    shapes = [(copies, n, 2, 8)] * 3 + [(1, slots, 2, 8)] * 2
    q, k, v, *cached = (normal(i, shape) for i, shape in enumerate(shapes))
    actual = attention_mask(role, step, cached_step, flash=False).attend(q, k, v, cached)
    keys, values = (
        jnp.concatenate([jnp.tile(old, (copies, 1, 1, 1)), new], axis=1)
        for old, new in zip(cached, (k, v), strict=True)
    )
    k_role = np.concatenate([np.full_like(cached_step, Role.CLEAN), role], axis=1)
    layout = AttentionLayout(role, step, k_role, np.concatenate([cached_step, step], axis=1))
    expected = dense(q, keys, values, layout)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_split_over_devices_with_default_tiles():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        check(IMPLEMENTATIONS["kernel"], random_plans(2, 15, 3), head_dim=88)


def test_mask_from_codes_is_that_of_the_rule():
    tokens = np.array(list(itertools.product(Role, [-1, 0, 1, 2, 7, EMPTY_STEP - 1, EMPTY_STEP])), np.int32).T

    @jax.jit
    def both(layout):
        layout = layout.padded(1, 1)
        q_codes, k_codes = rule_codes(layout)
        return mask_from_codes(q_codes[0], k_codes[0]), attends(*layout)[0]

    np.testing.assert_array_equal(*both(AttentionLayout(*to_itself(*tokens[:, None]))))


@pytest.mark.parametrize("layouts", [several_layouts, functools.partial(random_plans, 200, 12, 3)])
def test_full_tiles_are_unmasked_and_skipped_tiles_fully_masked(layouts, q_tile=4, k_tile=8):
    @jax.jit
    def plan_and_share(layout):
        layout = layout.padded(q_tile, k_tile)
        pairs = attends(*layout)
        tiled = pairs.reshape(len(pairs), pairs.shape[1] // q_tile, q_tile, pairs.shape[2] // k_tile, k_tile)
        return tile_plans(layout, q_tile, k_tile)[0], tiled.mean(axis=(2, 4))

    (index, kind), attended = jax.tree.map(np.asarray, plan_and_share(AttentionLayout(*layouts())))
    assert np.any(kind == FULL) and np.all(np.take_along_axis(attended, index, -1)[kind == FULL] == 1.0)
    visits = np.where(kind != SKIP, index, -1)
    visited = (visits[..., None] == np.arange(attended.shape[-1])).sum(axis=-2)
    assert np.all(visited <= 1) and np.all(attended[visited == 0] == 0.0)
    # A slot that is skipped repeats the tile that was just there.
    assert np.all((index[..., 1:] == index[..., :-1]) | (kind[..., 1:] != SKIP))


def test_few_more_tiles_are_computed_than_pairs_attended():
    role, step = scam(4096, 1024)
    assert computed_fraction(AttentionLayout(*to_itself(role[None], step[None]))) <= 1.15 * 0.3125
    for layout, fraction in ((to_itself(*(a[None] for a in scam(16, 4))), 0.3125), (several_layouts(), None)):
        fraction = attended_pairs(layout).mean() if fraction is None else fraction
        np.testing.assert_allclose(attended_fraction(AttentionLayout(*layout)), fraction, rtol=1e-6)


COMPILE = """
import itertools, sys
import jax, jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from causalfusion_jax.common import sharding
from causalfusion_jax.models.attention.flash import flash_attention
from causalfusion_jax.models.attention.tiles import AttentionLayout

devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices

def gradients(q, k, v, d_out, role, step):
    out, vjp = jax.vjp(lambda q, k, v: flash_attention(q, k, v, AttentionLayout(role, step, role, step)), q, k, v)
    return out, *vjp(d_out)

def compiled(tokens, head_dim, dtype, mesh):
    heads = sharding.sharding(mesh, ("batch", None, "heads"))
    x = jax.ShapeDtypeStruct((2, tokens, 4, head_dim), dtype, sharding=heads)
    ids = jax.ShapeDtypeStruct((2, tokens), jnp.int32, sharding=sharding.sharding(mesh, ("batch",)))
    with jax.set_mesh(mesh):
        text = jax.jit(gradients).lower(x, x, x, x, ids, ids).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3, "forward, dq, dkv"
    assert "all-gather" not in text
    assert "%d,%d]" % (tokens, tokens) not in text, "an array of [queries, keys]"
    print("compiled", tokens, head_dim, dtype)

one = sharding.make_mesh(sharding.MeshConfig(), devices[:1])
four = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=2), devices)
for tokens, head_dim, dtype in itertools.product(*map(eval, sys.argv[1:])):
    compiled(tokens, head_dim, dtype, one)
compiled(576, 72, "bfloat16", four)
"""


@pytest.mark.parametrize(
    ("tokens", "head_dims", "dtypes"),
    [([], [], []), pytest.param([576, 8192], [64, 72, 88, 128], ["float32", "bfloat16"], marks=pytest.mark.slow)],
    ids=["four_devices", "all"],
)
def test_compiles_for_tpu(tokens, head_dims, dtypes):
    pytest.importorskip("libtpu")
    root = pathlib.Path(__file__).parents[2]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": str(root),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *map(repr, (tokens, head_dims, dtypes))],
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled") == len(tokens) * len(head_dims) * len(dtypes) + 1
