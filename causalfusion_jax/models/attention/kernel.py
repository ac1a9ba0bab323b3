"""Pallas TPU kernels of attention in tiles: the output, and gradients by recomputation.

The grid of each kernel is [batch, heads, tiles, slots]: each slot of a tile of queries (or, for
the gradients of keys and values, of keys) visits one of the tiles of the other side that a
TilePlan lists. A tile that the plan skips is neither computed nor fetched.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from causalfusion_jax.common import sharding
from causalfusion_jax.core.factorization import CONDITION_STEP, Role
from causalfusion_jax.models.attention.tiles import (
    FULL,
    LEAST_MAXIMUM,
    MASKED_LOGIT,
    MIXED,
    AttentionLayout,
    TilePlan,
    pad,
    tile_plans,
)

LANES = 128
"""Lanes of a TPU vector register: tiles and head dimensions are padded to a multiple."""

TILE = 512
"""Largest tile of a long sequence: float32 tiles and their temporaries fit in 16 MiB of VMEM."""


class ForwardInputs(NamedTuple):
    """Inputs of the forward pass.

    Attributes:
      q: scaled queries, [batch, queries, heads, head_dim].
      k, v: [batch, keys, heads, head_dim].
      layout: roles and steps.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    layout: AttentionLayout


class BackwardInputs(NamedTuple):
    """Inputs of the backward pass.

    Attributes:
      forward: inputs of the forward pass.
      lse: log-sum-exp of the logits of each query, float32 [batch, heads, queries].
      dot: inner product of the output of each query and its gradient, float32 [batch, heads, queries].
      d_out: gradient of the output.
    """

    forward: ForwardInputs
    lse: jax.Array
    dot: jax.Array
    d_out: jax.Array


def default_tile(tokens: int) -> int:
    """Tokens in a tile of the kernels: all of a short sequence, else TILE."""
    padded = pl.cdiv(tokens, LANES) * LANES
    return padded if padded <= TILE + LANES else TILE


# --- The rule in a kernel ---------------------------------------------------------


def _query_codes(role, step):
    """Two numbers a query, int32 [batch, 2, n]: an upper bound for keys that are not noisy, and the step of noisy keys.

    With `_key_codes` this expresses `attends` as two comparisons, see `mask_from_codes`: a tile
    of pairs costs three vector operations, and selections between booleans, which the rule has, do
    not compile for a TPU. Steps are shifted down by one, so that the greatest integer is left for
    keys that no query attends to.
    """
    noisy = role == Role.NOISY
    bound, noisy_step = step - jnp.where(noisy, 2, 1), jnp.where(noisy, step, CONDITION_STEP - 1)
    return jnp.stack([bound, noisy_step], axis=-2).astype(jnp.int32)


def _key_codes(role, step):
    """Two numbers a key, int32 [batch, 2, n]: its step if it is not noisy, and its step if it is."""
    noisy = role == Role.NOISY
    other = jnp.where(noisy | (role == Role.PAD), np.iinfo(np.int32).max, step - 1)
    return jnp.stack([other, jnp.where(noisy, step, CONDITION_STEP - 2)], axis=-2).astype(jnp.int32)


def rule_codes(layout: AttentionLayout) -> tuple[jax.Array, jax.Array]:
    """Codes of the queries and of the keys, int32 [batch, 2, n], for `mask_from_codes`."""
    return _query_codes(layout.q_role, layout.q_step), _key_codes(layout.k_role, layout.k_step)


def _columns(rows):
    """[2, n] to two columns [n, 1]."""
    columns = rows.T
    return columns[:, 0:1], columns[:, 1:2]


def mask_from_codes(q_codes, k_codes):
    """The mask of `attends`, bool [q, k], from the codes [2, q] and [2, k]; no query may be padding."""
    bound, noisy_step = _columns(q_codes)
    return (k_codes[0:1] <= bound) | (k_codes[1:2] == noisy_step)


# --- Pallas kernels ---------------------------------------------------------------


def _product(a, b, a_axis: int, b_axis: int):
    """Matrix product over one axis of each, accumulated in float32."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _each_kind(kind_ref, update: Callable):
    """Runs `update(mixed)` for the tile that this slot visits, unless it is skipped."""
    batch, tile, slot = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    kind = kind_ref[(batch * pl.num_programs(2) + tile) * pl.num_programs(3) + slot]
    pl.when(kind == FULL)(lambda: update(False))
    pl.when(kind == MIXED)(lambda: update(True))


def _is_first_slot():
    return pl.program_id(3) == 0


def _is_last_slot():
    return pl.program_id(3) == pl.num_programs(3) - 1


def _logits(q_ref, k_ref, q_codes_ref, k_codes_ref, mixed: bool):
    logits = _product(q_ref[...], k_ref[...], 1, 1)
    return jnp.where(mask_from_codes(q_codes_ref[...], k_codes_ref[...]), logits, MASKED_LOGIT) if mixed else logits


def _forward_kernel(
    index_ref, kind_ref, q_codes_ref, k_codes_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, maximum_ref, sum_ref, acc_ref
):
    """Output and log-sum-exp of a tile of queries; the grid's last axis runs over its keys."""
    del index_ref

    @pl.when(_is_first_slot())
    def _():
        maximum_ref[...] = jnp.full_like(maximum_ref, LEAST_MAXIMUM)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def update(mixed):
        logits = _logits(q_ref, k_ref, q_codes_ref, k_codes_ref, mixed)
        maximum = jnp.maximum(maximum_ref[...], logits.max(axis=1, keepdims=True))
        weights = jnp.exp(logits - maximum)
        shrink = jnp.exp(maximum_ref[...] - maximum)
        maximum_ref[...] = maximum
        sum_ref[...] = sum_ref[...] * shrink + weights.sum(axis=1, keepdims=True)
        acc_ref[...] = acc_ref[...] * shrink + _product(weights.astype(v_ref.dtype), v_ref[...], 1, 0)

    _each_kind(kind_ref, update)

    @pl.when(_is_last_slot())
    def _():
        total = sum_ref[...]
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        out_ref[...] = (acc_ref[...] / total).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(empty, 0.0, maximum_ref[...] + jnp.log(total)).T


class _GradientRefs(NamedTuple):
    """Blocks of the inputs of a backward kernel; `sums` are `lse` and `dot` of BackwardInputs."""

    q_codes: jax.Array
    k_codes: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    sums: jax.Array


def _weights_and_gradient(refs: _GradientRefs, mixed: bool):
    """Softmax weights of a tile, and the gradient of its logits; float32 [q_tile, k_tile]."""
    logits = _logits(refs.q, refs.k, refs.q_codes, refs.k_codes, mixed)
    lse, dot = _columns(refs.sums[...])
    weights = jnp.exp(logits - lse)
    d_weights = _product(refs.d_out[...], refs.v[...], 1, 1)
    return weights, weights * (d_weights - dot)


def _dq_kernel(index_ref, kind_ref, *refs):
    """Gradient of a tile of queries; the grid's last axis runs over its keys."""
    del index_ref
    *inputs, dq_ref, acc_ref = refs
    inputs = _GradientRefs(*inputs)

    @pl.when(_is_first_slot())
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def update(mixed):
        _, d_logits = _weights_and_gradient(inputs, mixed)
        acc_ref[...] += _product(d_logits.astype(inputs.k.dtype), inputs.k[...], 1, 0)

    _each_kind(kind_ref, update)

    @pl.when(_is_last_slot())
    def _():
        dq_ref[...] = acc_ref[...].astype(dq_ref.dtype)


def _dkv_kernel(index_ref, kind_ref, *refs):
    """Gradients of a tile of keys and values; the grid's last axis runs over its queries."""
    del index_ref
    *inputs, dk_ref, dv_ref, dk_acc_ref, dv_acc_ref = refs
    inputs = _GradientRefs(*inputs)

    @pl.when(_is_first_slot())
    def _():
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    def update(mixed):
        weights, d_logits = _weights_and_gradient(inputs, mixed)
        dv_acc_ref[...] += _product(weights.astype(inputs.d_out.dtype), inputs.d_out[...], 0, 0)
        dk_acc_ref[...] += _product(d_logits.astype(inputs.q.dtype), inputs.q[...], 0, 0)

    _each_kind(kind_ref, update)

    @pl.when(_is_last_slot())
    def _():
        dk_ref[...] = dk_acc_ref[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)


class _Specs:
    """Block specifications of the arrays of a grid [batch, heads, tiles, slots] over a TilePlan.

    An `own` block is that of the tile itself, any other one that of the tile which the slot visits.
    """

    def __init__(self, plan: TilePlan, width: int):
        self.width = width
        _, self.tiles, self.slots = plan.index.shape

    def _spec(self, shape, own, block_index):
        def index_map(b, h, i, j, index, kind):
            del kind
            return block_index(b, h, i if own else index[(b * self.tiles + i) * self.slots + j])

        return pl.BlockSpec(shape, index_map)

    def tokens(self, tile: int, own: bool):
        """For [batch, n, heads * width]."""
        return self._spec((None, tile, self.width), own, lambda b, h, i: (b, i, h))

    def codes(self, tile: int, own: bool):
        """For [batch, 2, n]."""
        return self._spec((None, 2, tile), own, lambda b, h, i: (b, 0, i))

    def sums(self, rows: int, tile: int, own: bool):
        """For [batch, heads, rows, n]."""
        return self._spec((None, None, rows, tile), own, lambda b, h, i: (b, h, 0, i))


def _pallas_call(
    kernel,
    plan: TilePlan,
    heads: int,
    in_specs,
    out_specs,
    scratch_shapes,
    out_shape,
    interpret,
    inputs,
    products: int,
    pairs: int,
):
    """Runs a kernel on the grid of a plan, whose lists are in scalar memory.

    `products` and `pairs` are for the cost estimate: the number of matrix products, and of pairs of
    query and key in each sample and head, if no tile were skipped.
    """
    batch, tiles, slots = plan.index.shape
    width, pairs = scratch_shapes[-1][1], batch * heads * pairs
    moved = sum(x.size * x.dtype.itemsize for x in (*inputs, *out_shape))
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, tiles, slots),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch_shapes],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=2 * products * pairs * width, transcendentals=pairs, bytes_accessed=moved),
        interpret=interpret,
    )
    # Flattened, because scalar memory pads the last axis of an array to 128.
    return call(plan.index.reshape(-1), plan.kind.reshape(-1), *inputs)


def _flat(x, tile: int):
    """[batch, n, heads, head_dim] to [batch, n, heads * width], n and width padded."""
    x = pad(pad(x, LANES, 3), tile, 1)
    return x.reshape(*x.shape[:2], -1)


def _unflat(x, like):
    """Inverse of `_flat`: an array of the shape of `like`."""
    heads, head_dim = like.shape[2:]
    return x.reshape(*x.shape[:2], heads, -1)[:, : like.shape[1], :, :head_dim]


def _forward(inputs: ForwardInputs, q_tile: int, k_tile: int, interpret: bool):
    q, k, v, layout = inputs
    batch, queries, heads, _ = q.shape
    layout = layout.padded(q_tile, k_tile)
    plan, _ = tile_plans(layout, q_tile, k_tile)
    flat = _flat(q, q_tile), _flat(k, k_tile), _flat(v, k_tile)
    width = flat[0].shape[-1] // heads
    specs = _Specs(plan, width)
    out, lse = _pallas_call(
        _forward_kernel,
        plan,
        heads,
        in_specs=[
            specs.codes(q_tile, True),
            specs.codes(k_tile, False),
            specs.tokens(q_tile, True),
            specs.tokens(k_tile, False),
            specs.tokens(k_tile, False),
        ],
        out_specs=[specs.tokens(q_tile, True), specs.sums(1, q_tile, True)],
        scratch_shapes=[(q_tile, 1), (q_tile, 1), (q_tile, width)],
        out_shape=[
            jax.ShapeDtypeStruct(flat[0].shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, flat[0].shape[1]), jnp.float32),
        ],
        interpret=interpret,
        inputs=[*rule_codes(layout), *flat],
        products=2,
        pairs=flat[0].shape[1] * flat[1].shape[1],
    )
    return _unflat(out, q), lse[:, :, 0, :queries]


def _backward(inputs: BackwardInputs, q_tile: int, k_tile: int, interpret: bool):
    (q, k, v, layout), lse, dot, d_out = inputs
    heads, layout = q.shape[2], layout.padded(q_tile, k_tile)
    q_plan, k_plan = tile_plans(layout, q_tile, k_tile)
    flat = _flat(q, q_tile), _flat(k, k_tile), _flat(v, k_tile), _flat(d_out, q_tile)
    width = flat[0].shape[-1] // heads
    sums = pad(jnp.stack([lse, dot], axis=2), q_tile, 3)

    def run(kernel, plan, of_queries, num_outputs, products):
        specs, tile = _Specs(plan, width), q_tile if of_queries else k_tile
        queries, keys = specs.tokens(q_tile, of_queries), specs.tokens(k_tile, not of_queries)
        out = jax.ShapeDtypeStruct(flat[0 if of_queries else 1].shape, (q if of_queries else k).dtype)
        return _pallas_call(
            kernel,
            plan,
            heads,
            in_specs=[
                specs.codes(q_tile, of_queries),
                specs.codes(k_tile, not of_queries),
                queries,
                keys,
                keys,
                queries,
                specs.sums(2, q_tile, of_queries),
            ],
            out_specs=[specs.tokens(tile, True)] * num_outputs,
            scratch_shapes=[(tile, width)] * num_outputs,
            out_shape=[out] * num_outputs,
            interpret=interpret,
            inputs=[*rule_codes(layout), *flat, sums],
            products=products,
            pairs=flat[0].shape[1] * flat[1].shape[1],
        )

    (dq,), (dk, dv) = run(_dq_kernel, q_plan, True, 1, 3), run(_dkv_kernel, k_plan, False, 2, 4)
    return _unflat(dq, q), _unflat(dk, k), _unflat(dv, v)


# --- On every device ------------------------------------------------------------------


def _on_each_device(function: Callable, outputs: tuple, inputs: ForwardInputs | BackwardInputs):
    """Runs a kernel on each device's part of the batch and the heads, because the compiler cannot split a kernel.

    The mesh is that of `jax.set_mesh`. Inside a `shard_map` the arrays are one device's parts already.

    Args:
      function: from `inputs` to arrays like `outputs`; all are [batch, n], [batch, heads, n] or
        [batch, n, heads, head_dim].
      outputs: shapes of the results.
      inputs: its argument.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return function(inputs)

    def spec(x):
        axes = {2: ("batch", None), 3: ("batch", "heads", None), 4: ("batch", None, "heads", None)}[len(x.shape)]
        return sharding.sharding(mesh, axes, x.shape).spec

    in_specs, out_specs = jax.tree.map(spec, ((inputs,), outputs))
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(inputs)


def _with_tiles(function: Callable, inputs: ForwardInputs, q_tile: int | None, k_tile: int | None, interpret: bool):
    """`function` with the settings of a kernel."""
    q_tile, k_tile = q_tile or default_tile(inputs.q.shape[1]), k_tile or default_tile(inputs.k.shape[1])
    return functools.partial(function, q_tile=q_tile, k_tile=k_tile, interpret=interpret)


def pallas_forward(inputs: ForwardInputs, q_tile: int | None, k_tile: int | None, interpret: bool):
    """Attention of scaled queries.

    Args:
      inputs: see `ForwardInputs`.
      q_tile, k_tile: tokens in a tile; None: `default_tile`.
      interpret: run the kernel as plain JAX, on any platform.

    Returns:
      Output like q, and log-sum-exp of the logits, float32 [batch, heads, queries].
    """
    batch, queries, heads, _ = inputs.q.shape
    lse = jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)
    run = _with_tiles(_forward, inputs, q_tile, k_tile, interpret)
    return _on_each_device(run, (inputs.q, lse), inputs)


def pallas_backward(inputs: BackwardInputs, q_tile: int | None, k_tile: int | None, interpret: bool):
    """Gradients of q, k and v.

    Args:
      inputs: see `BackwardInputs`.
      q_tile, k_tile, interpret: see `pallas_forward`.
    """
    run = _with_tiles(_backward, inputs.forward, q_tile, k_tile, interpret)
    return _on_each_device(run, inputs.forward[:3], inputs)
