"""Pointwise layers with backward passes of their own.

Both keep only their input for the backward pass and recompute the rest there, in one
pass over it. Autodiff would keep several arrays of the input's size: on a CPU, and on any
device bound by memory, reading them back costs more than computing them again.
"""

import jax
import jax.numpy as jnp
from flax import nnx

GELU_SCALE = 0.7978845608028654  # sqrt(2 / pi)
GELU_CUBIC = 0.044715


def _mean(x: jax.Array) -> jax.Array:
    """Mean over the last axis, kept; [..., dim] to [..., 1]."""

    def by_product(x):
        # XLA:CPU reduces short rows slower than it multiplies (launch/bench/RESULTS.md).
        dim = x.shape[-1]
        return (x.reshape(-1, dim) @ jnp.full((dim, 1), 1.0 / dim)).reshape(*x.shape[:-1], 1)

    return jax.lax.platform_dependent(x, cpu=by_product, default=lambda x: jnp.mean(x, axis=-1, keepdims=True))


def _sum_of_rows(x: jax.Array) -> jax.Array:
    """Sum over all axes but the last; [..., dim] to [dim]."""
    x = x.reshape(-1, x.shape[-1])
    return jax.lax.platform_dependent(
        x, cpu=lambda x: (jnp.ones((1, x.shape[0])) @ x)[0], default=lambda x: jnp.sum(x, axis=0)
    )


def _statistics(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Normalized x and 1 / standard deviation over the last axis, float32."""
    x = x.astype(jnp.float32)
    centred = x - _mean(x)
    inverse = jax.lax.rsqrt(_mean(jnp.square(centred)) + eps)
    return centred * inverse, inverse


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Affine LayerNorm over the last axis, eps 1e-5, statistics in float32.

    Args:
      x: [..., dim], of the compute type, which the result has too.
      scale, bias: float32 [dim].
    """
    normalized, _ = _statistics(x, 1e-5)
    return (normalized * scale + bias).astype(x.dtype)


def _layer_norm_forward(x, scale, bias):
    return layer_norm(x, scale, bias), (x, scale)


def _layer_norm_backward(saved, d_out):
    x, scale = saved
    normalized, inverse = _statistics(x, 1e-5)
    d_out = d_out.astype(jnp.float32)
    d_normalized = d_out * scale
    along_x = _mean(d_normalized * normalized)
    d_x = inverse * (d_normalized - _mean(d_normalized) - normalized * along_x)
    return d_x.astype(x.dtype), _sum_of_rows(d_out * normalized), _sum_of_rows(d_out)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nnx.Module):
    """`layer_norm` with its parameters.

    Args:
      dim: size of the normalized axis.
      axis: its logical axis.
    """

    def __init__(self, dim: int, axis: str):
        self.scale = nnx.Param(jnp.ones(dim), out_sharding=(axis,))
        self.bias = nnx.Param(jnp.zeros(dim), out_sharding=(axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale[...], self.bias[...])


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Gaussian error linear unit, tanh approximation; any shape."""
    return 0.5 * x * (1.0 + jnp.tanh(GELU_SCALE * (x + GELU_CUBIC * x**3)))


def _gelu_backward(x, d_out):
    square = jnp.square(x)
    tanh = jnp.tanh(GELU_SCALE * x * (1.0 + GELU_CUBIC * square))
    slope = GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * square)
    return (d_out * 0.5 * (1.0 + tanh + x * (1.0 - jnp.square(tanh)) * slope),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
