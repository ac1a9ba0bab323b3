"""Attention by the attention rule in tiles: no array of [queries, keys], and no work for fully masked tiles.

Queries and keys are cut into tiles, and the softmax is taken tile by tile as in FlashAttention
(arXiv 2205.14135); tiles in which the rule masks every pair are skipped. On a TPU this is a
Pallas kernel; on other platforms `blockwise_attention` does the same in plain JAX. Both keep of
the softmax one number for each query, the logarithm of its denominator, and recompute the rest
for the gradient.

A query that attends to no key, and every padding token, gets zeros. Roles and steps may be
traced and may differ between samples.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from causalfusion_jax.core.factorization import attends, tile_may_attend
from causalfusion_jax.models.attention.kernel import (
    TILE,
    BackwardInputs,
    ForwardInputs,
    default_tile,
    pallas_backward,
    pallas_forward,
)
from causalfusion_jax.models.attention.tiles import LEAST_MAXIMUM, MASKED_LOGIT, AttentionLayout, pad

# --- Statistics of a layout ----------------------------------------------------------


def computed_fraction(layout: AttentionLayout, q_tile: int | None = None, k_tile: int | None = None) -> jax.Array:
    """Fraction of the tiles that is computed, float32 []; 1 for dense attention.

    Args:
      layout: roles and steps.
      q_tile, k_tile: tokens in a tile; default: those of the Pallas kernel.
    """
    q_tile = q_tile or default_tile(layout.q_role.shape[-1])
    k_tile = k_tile or default_tile(layout.k_role.shape[-1])
    padded = layout.as_arrays().padded(q_tile, k_tile)
    return tile_may_attend(*padded, q_tile, k_tile).mean()


def attended_fraction(layout: AttentionLayout) -> jax.Array:
    """Fraction of the pairs of query and key that the rule does not mask, float32 []; padding tokens have none."""
    padded = layout.as_arrays().padded(1, 1)

    def attended_by(query):
        role, step = query
        return attends(role[:, None], step[:, None], padded.k_role, padded.k_step).mean(dtype=jnp.float32)

    # A part of the queries at a time: there is no array of [queries, keys] here either.
    return jax.lax.map(attended_by, (padded.q_role.T, padded.q_step.T), batch_size=256).mean()


# --- Plain JAX --------------------------------------------------------------------


def _balanced_tile(tokens: int) -> int:
    """Smallest tile that cuts the tokens into no more tiles than TILE does."""
    return -(-tokens // -(-tokens // TILE))


def _cut(x, tile: int):
    """[batch, n, heads, head_dim] to [tiles, batch, heads, tile, head_dim]."""
    x = pad(x, tile, 1)
    return x.reshape(x.shape[0], -1, tile, *x.shape[2:]).transpose(1, 0, 3, 2, 4)


def _join(x, like):
    """Inverse of `_cut`: an array of the shape and type of `like`."""
    x = x.transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : like.shape[1]].astype(like.dtype)


def _cut_layout(layout: AttentionLayout, q_tile: int, k_tile: int):
    """Cuts roles and steps into tiles, and lists the key tiles that each query tile visits.

    The whole batch shares one list: a tile is visited where any sample needs it.

    Returns:
      Role and step of the queries, each [tiles, batch, q_tile]; of the keys, likewise; and of each
      query tile the key tiles in the order of visits, int [q_tiles, k_tiles], with their number, int [q_tiles].
    """
    layout = layout.padded(q_tile, k_tile)
    may = tile_may_attend(*layout, q_tile, k_tile).any(axis=0)
    order, count = jnp.argsort(~may, axis=-1, stable=True), may.sum(axis=-1)
    batch = layout.q_role.shape[0]

    def cut(x, tile):
        return x.reshape(batch, -1, tile).swapaxes(0, 1)

    q_tokens = cut(layout.q_role, q_tile), cut(layout.q_step, q_tile)
    k_tokens = cut(layout.k_role, k_tile), cut(layout.k_step, k_tile)
    return q_tokens, k_tokens, (order, count)


def _tile_logits(q, k, q_tokens, k_tokens):
    """float32 [batch, heads, q_tile, k_tile]."""
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    return jnp.where(attends(*q_tokens, *k_tokens)[:, None], logits, MASKED_LOGIT)


def _blockwise_forward(inputs: ForwardInputs, q_tile: int | None, k_tile: int | None):
    """`pallas_forward` in plain JAX."""
    q, k, v, layout = inputs
    batch, queries, heads, head_dim = q.shape
    q_tile, k_tile = q_tile or _balanced_tile(queries), k_tile or _balanced_tile(k.shape[1])
    q_tokens, k_tokens, visits = _cut_layout(layout, q_tile, k_tile)
    keys = _cut(k, k_tile), _cut(v, k_tile), k_tokens

    def attend_tile(tile):
        q_i, q_tokens_i, (order, count) = tile

        def visit(j, carry):
            maximum, total, acc = carry
            k_j, v_j, k_tokens_j = jax.tree.map(lambda a: a[order[j]], keys)
            logits = _tile_logits(q_i, k_j, q_tokens_i, k_tokens_j)
            new_maximum = jnp.maximum(maximum, logits.max(axis=-1))
            weights = jnp.exp(logits - new_maximum[..., None])
            shrink = jnp.exp(maximum - new_maximum)
            product = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v_j.dtype), v_j, preferred_element_type=jnp.float32)
            return new_maximum, total * shrink + weights.sum(axis=-1), acc * shrink[..., None] + product

        zeros = jnp.zeros((batch, heads, q_tile), jnp.float32)
        start = jnp.full_like(zeros, LEAST_MAXIMUM), zeros, jnp.zeros((*zeros.shape, head_dim), jnp.float32)
        maximum, total, acc = jax.lax.fori_loop(0, count, visit, start)
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        return acc / total[..., None], jnp.where(empty, 0.0, maximum + jnp.log(total))

    out, lse = jax.lax.map(attend_tile, (_cut(q, q_tile), q_tokens, visits))
    return _join(out, q), jnp.moveaxis(lse, 0, 2).reshape(batch, heads, -1)[..., :queries]


def _blockwise_backward(inputs: BackwardInputs, q_tile: int | None, k_tile: int | None):
    """`pallas_backward` in plain JAX."""
    (q, k, v, layout), lse, dot, d_out = inputs
    batch, queries, heads, _ = q.shape
    q_tile, k_tile = q_tile or _balanced_tile(queries), k_tile or _balanced_tile(k.shape[1])
    q_tokens, k_tokens, visits = _cut_layout(layout, q_tile, k_tile)
    keys = _cut(k, k_tile), _cut(v, k_tile), k_tokens

    def cut_sums(x):
        """[batch, heads, queries] to [tiles, batch, heads, q_tile]."""
        return jnp.moveaxis(pad(x, q_tile, 2).reshape(batch, heads, -1, q_tile), 2, 0)

    def differentiate_tile(gradients, tile):
        q_i, d_out_i, lse_i, dot_i, q_tokens_i, (order, count) = tile

        def visit(j, carry):
            dq_i, dk, dv = carry
            k_j, v_j, k_tokens_j = jax.tree.map(lambda a: a[order[j]], keys)
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            weights = jnp.exp(_tile_logits(q_i, k_j, q_tokens_i, k_tokens_j) - lse_i[..., None])
            d_weights = product("bhqd,bhkd->bhqk", d_out_i, v_j)
            d_logits = (weights * (d_weights - dot_i[..., None])).astype(q.dtype)
            dv = dv.at[order[j]].add(product("bhqk,bhqd->bhkd", weights.astype(q.dtype), d_out_i))
            dk = dk.at[order[j]].add(product("bhqk,bhqd->bhkd", d_logits, q_i))
            return dq_i + product("bhqk,bhkd->bhqd", d_logits, k_j), dk, dv

        dq_i, dk, dv = jax.lax.fori_loop(0, count, visit, (jnp.zeros(q_i.shape, jnp.float32), *gradients))
        return (dk, dv), dq_i

    xs = (_cut(q, q_tile), _cut(d_out, q_tile), cut_sums(lse), cut_sums(dot))
    zeros = jnp.zeros(keys[0].shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(differentiate_tile, (zeros, zeros), (*xs, q_tokens, visits))
    return _join(dq, q), _join(dk, k), _join(dv, v)


# --- Choice of an implementation ------------------------------------------------------


class _Choice(NamedTuple):
    """Static settings: `pallas`, `interpret`, `blockwise` or, by platform, `auto`; tile sizes."""

    implementation: str
    q_tile: int | None
    k_tile: int | None


def _run(choice: _Choice, pallas: Callable, blockwise: Callable, inputs: ForwardInputs | BackwardInputs):
    """Calls the chosen implementation; `auto` is decided when the computation is lowered."""
    tiles = {"q_tile": choice.q_tile, "k_tile": choice.k_tile}
    kernel = functools.partial(pallas, interpret=choice.implementation == "interpret", **tiles)
    plain = functools.partial(blockwise, **tiles)
    if choice.implementation == "auto":
        return jax.lax.platform_dependent(inputs, tpu=kernel, default=plain)
    return plain(inputs) if choice.implementation == "blockwise" else kernel(inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(choice, q, k, v, layout):
    """Attention of queries that are already scaled."""
    return _attention_forward(choice, q, k, v, layout)[0]


def _attention_forward(choice, q, k, v, layout):
    inputs = ForwardInputs(q, k, v, layout)
    out, lse = _run(choice, pallas_forward, _blockwise_forward, inputs)
    return out, (inputs, out, lse)


def _attention_backward(choice, saved, d_out):
    inputs, out, lse = saved
    # The normalization of the softmax subtracts this from the gradient of each logit of a query.
    dot = jnp.einsum("bqhd,bqhd->bhq", out.astype(jnp.float32), d_out.astype(jnp.float32))
    gradients = _run(choice, pallas_backward, _blockwise_backward, BackwardInputs(inputs, lse, dot, d_out))
    return *gradients, None


_attention.defvjp(_attention_forward, _attention_backward)


def _attend(choice: _Choice, q, k, v, layout: AttentionLayout):
    """See `flash_attention`."""
    batch, queries, copies = k.shape[0], q.shape[1], q.shape[0] // k.shape[0]

    def fold(x):
        """[copies * batch, n, ...] to [batch, copies * n, ...]: copies become more queries."""
        if copies == 1:
            return x
        return x.reshape(copies, batch, *x.shape[1:]).swapaxes(0, 1).reshape(batch, -1, *x.shape[2:])

    layout = layout.as_arrays()
    layout = layout._replace(q_role=fold(layout.q_role), q_step=fold(layout.q_step))
    out = _attention(choice, fold(q * q.shape[-1] ** -0.5), k, v, layout)
    if copies == 1:
        return out
    return out.reshape(batch, copies, queries, *q.shape[2:]).swapaxes(0, 1).reshape(q.shape)


def flash_attention(
    q,
    k,
    v,
    layout: AttentionLayout,
    *,
    q_tile: int | None = None,
    k_tile: int | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """Softmax attention with the mask `factorization.attends`, differentiable in q, k and v.

    The batch of the queries may be several copies of the batch of the keys, one after the other,
    which then share the keys. Products take the type of the inputs and accumulate in float32.

    Args:
      q: [copies * batch, queries, heads, head_dim].
      k, v: [batch, keys, heads, head_dim].
      layout: roles and steps of the queries [copies * batch, queries] and the keys [batch, keys].
      q_tile, k_tile: tokens in a tile; on a TPU multiples of 128.
      interpret: None: the Pallas kernel where the computation is lowered for a TPU, else
        `blockwise_attention`; False: the kernel; True: the kernel, interpreted, on any platform.

    Returns:
      [copies * batch, queries, heads, head_dim], of q's type.
    """
    implementation = {None: "auto", False: "pallas", True: "interpret"}[interpret]
    return _attend(_Choice(implementation, q_tile, k_tile), q, k, v, layout)


def blockwise_attention(
    q, k, v, layout: AttentionLayout, *, q_tile: int | None = None, k_tile: int | None = None
) -> jax.Array:
    """`flash_attention` in plain JAX, for every platform.

    A tile is skipped where it is fully masked in all samples of the batch.
    """
    return _attend(_Choice("blockwise", q_tile, k_tile), q, k, v, layout)
