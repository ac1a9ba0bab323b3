"""Dense attention of one head of one example at a time, which is faster on a CPU only.

XLA:CPU multiplies one pair of matrices about twice as fast as a batch of small ones, and the
logits of a head stay in a core's cache from one product to the next (launch/bench/RESULTS.md).
The backward pass keeps no logits. It computes them again, transposed, because XLA:CPU is slow
in products with a transposed left factor.
"""

import math

import jax
import jax.numpy as jnp

from causalfusion_jax.common.sharding import platform

BY_HEAD_FROM = 128
"""Least number of queries for which this is faster (launch/bench/RESULTS.md)."""
HEADS_AT_ONCE = 4
"""Upper bound on the heads unrolled in an iteration: more make the program larger and not faster."""


def prefers_by_head(queries: int) -> bool:
    """Whether `attend_by_head` is the dense attention to take for a number of queries: on a CPU, from BY_HEAD_FROM."""
    return platform() == "cpu" and queries >= BY_HEAD_FROM


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _map_heads(compute, bias: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Runs `compute` for every head of every example.

    Args:
      compute: from a bias and one matrix [tokens, dim] of each array to a tuple of such matrices.
      bias: [batch, 1, ...].
      arrays: each [batch, tokens, heads, dim].

    Returns:
      The results, each [batch, tokens, heads, dim].
    """
    batch, _, heads, _ = arrays[0].shape
    at_once = math.gcd(heads, HEADS_AT_ONCE)

    def take(array, example, head):
        sizes = (1, array.shape[1], 1, array.shape[3])
        return jax.lax.dynamic_slice(array, (example, 0, head, 0), sizes)[0, :, 0]

    def put(array, matrix, example, head):
        return jax.lax.dynamic_update_slice(array, matrix[None, :, None], (example, 0, head, 0))

    def compute_heads(results, index):
        example, first = index // (heads // at_once), index % (heads // at_once) * at_once
        for head in (first + i for i in range(at_once)):
            matrices = compute(bias[example, 0], *(take(array, example, head) for array in arrays))
            results = tuple(put(*pair, example, head) for pair in zip(results, matrices, strict=True))
        return results, None

    shapes = jax.eval_shape(compute, bias[0, 0], *(array[0, :, 0] for array in arrays))
    results = tuple(jnp.zeros((batch, shape.shape[0], heads, shape.shape[1]), shape.dtype) for shape in shapes)
    return jax.lax.scan(compute_heads, results, jnp.arange(batch * heads // at_once))[0]


@jax.custom_vjp
def attend_by_head(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """Softmax attention, one head of one example at a time; logits and softmax are float32.

    Args:
      q: [batch, queries, heads, head_dim].
      k, v: [batch, keys, heads, head_dim].
      bias: added to the logits, float32 [batch, 1, queries, keys] (`dense.mask_bias`); it has no gradient.

    Returns:
      [batch, queries, heads, head_dim], of q's type.
    """
    return _forward(q, k, v, bias)[0]


def _forward(q, k, v, bias):
    def head(bias, q, k, v):
        logits = _product(q, k.T) + bias
        largest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        # The sum of each row as a product, which is faster than a reduction on XLA:CPU.
        total = weights @ jnp.ones((weights.shape[1], 1))
        return (_product(weights.astype(v.dtype), v) / total).astype(q.dtype), largest + jnp.log(total)

    scaled = q * q.shape[-1] ** -0.5
    out, logsumexp = _map_heads(head, bias, (scaled, k, v))
    return out, (scaled, k, v, bias, out, logsumexp)


def _backward(saved, d_out):
    scaled, k, v, bias, out, logsumexp = saved

    def head(bias, q, k, v, d_out, logsumexp, delta):
        # The matrices of weights and logits are transposed: [keys, queries].
        weights = jnp.exp(_product(k, q.T) + bias - logsumexp.T)
        d_logits = (weights * (_product(v, d_out.T) - delta.T)).astype(q.dtype)
        d_q, d_k, d_v = _product(k.T, d_logits).T, _product(d_logits, q), _product(weights.astype(v.dtype), d_out)
        return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)

    delta = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True)
    transposed_bias = jnp.swapaxes(bias, -1, -2)
    d_q, d_k, d_v = _map_heads(head, transposed_bias, (scaled, k, v, d_out, logsumexp, delta))
    return d_q * d_out.shape[-1] ** -0.5, d_k, d_v, None


attend_by_head.defvjp(_forward, _backward)
