"""Pointwise layers with custom backward passes, and drop path.

Norm and GELU save only their input for the backward pass and recompute the rest in one pass
over it. Autodiff would save several arrays of the input's size: on a CPU, and on any device
bound by memory, reading them costs more than computing them again.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causalfusion_jax.models.cpu import mean_of_rows, sum_over_rows

GELU_SCALE = 0.7978845608028654  # sqrt(2 / pi)
GELU_CUBIC = 0.044715


def _statistics(x: jax.Array, centred: bool, eps: float) -> tuple[jax.Array, jax.Array]:
    """Normalized x and 1 / its scale over the last axis, float32."""
    x = x.astype(jnp.float32)
    x = x - mean_of_rows(x) if centred else x
    inverse = jax.lax.rsqrt(mean_of_rows(jnp.square(x)) + eps)
    return x * inverse, inverse


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(x: jax.Array, scale, bias, centred: bool = True, eps: float = 1e-5) -> jax.Array:
    """LayerNorm, or RMSNorm where not `centred`, over the last axis; statistics in float32.

    Args:
      x: [..., dim], of the compute type, which the result has too.
      scale, bias: float32 [dim], or None.
      centred: subtract the mean.
      eps: added to the variance (mean square).
    """
    normalized, _ = _statistics(x, centred, eps)
    normalized = normalized if scale is None else normalized * scale
    return (normalized if bias is None else normalized + bias).astype(x.dtype)


def _normalize_forward(x, scale, bias, centred, eps):
    return normalize(x, scale, bias, centred, eps), (x, scale, bias)


def _normalize_backward(centred, eps, saved, d_out):
    x, scale, bias = saved
    normalized, inverse = _statistics(x, centred, eps)
    d_out = d_out.astype(jnp.float32)
    d_normalized = d_out if scale is None else d_out * scale
    d_x = d_normalized - normalized * mean_of_rows(d_normalized * normalized)
    d_x = inverse * (d_x - mean_of_rows(d_normalized) if centred else d_x)
    d_scale = None if scale is None else sum_over_rows(d_out * normalized)
    return d_x.astype(x.dtype), d_scale, None if bias is None else sum_over_rows(d_out)


normalize.defvjp(_normalize_forward, _normalize_backward)

NORMS = {
    # name: has a bias, has a scale, centred, eps
    "layer": (True, True, True, 1e-5),  # CausalFusion
    "rms": (False, True, False, 1e-6),  # ACDiT
    "plain": (False, False, True, 1e-6),  # DiT: scale and shift are adaLN's
}


class Norm(nnx.Module):
    """`normalize` with its parameters.

    Args:
      kind: one of NORMS.
      dim: size of the normalized axis.
      axis: its logical axis.
    """

    def __init__(self, kind: str, dim: int, axis: str):
        has_bias, has_scale, self.centred, self.eps = NORMS[kind]
        self.scale = nnx.Param(jnp.ones(dim), out_sharding=(axis,)) if has_scale else None
        self.bias = nnx.Param(jnp.zeros(dim), out_sharding=(axis,)) if has_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        return normalize(x, scale, bias, self.centred, self.eps)


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


def drop_path_scale(rate: float, layers: int, keys: jax.Array) -> jax.Array | None:
    """Drop path (Huang et al. 2016, arXiv 1603.09382): drops residual branches of single examples.

    The rate rises linearly over the layers from 0 to `rate`. Branches that are kept are divided by
    the probability of keeping them, so that the expectation does not change.

    Args:
      rate: probability of dropping a branch of the last layer, >= 0 and < 1.
      layers: number of layers.
      keys: one PRNG key an example, [batch].

    Returns:
      float32 [layers, 2, batch], for `Transformer.trunk`; None where the rate is 0.
    """
    if rate == 0.0:
        return None
    keep = 1.0 - rate * np.arange(layers) / max(layers - 1, 1)
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep[:, None], (layers, 2)))(keys)
    return jnp.moveaxis(kept / jnp.asarray(keep[:, None], jnp.float32), 0, -1)
