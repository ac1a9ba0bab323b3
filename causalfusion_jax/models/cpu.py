"""What the model computes in another way on a CPU because XLA:CPU is faster so; see launch/bench/RESULTS.md.

Attention has its own such form, `attention.cpu`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from causalfusion_jax.common.sharding import is_split, platform


def mean_of_rows(x: jax.Array) -> jax.Array:
    """Mean over the last axis, which is kept; [..., dim] to [..., 1]."""

    def by_product(x):
        # XLA:CPU reduces short rows slower than it multiplies.
        dim = x.shape[-1]
        return (x.reshape(-1, dim) @ jnp.full((dim, 1), 1.0 / dim)).reshape(*x.shape[:-1], 1)

    return jax.lax.platform_dependent(x, cpu=by_product, default=lambda x: jnp.mean(x, axis=-1, keepdims=True))


def sum_over_rows(x: jax.Array) -> jax.Array:
    """Sum over all axes but the last; [..., dim] to [dim]."""
    x = x.reshape(-1, x.shape[-1])
    return jax.lax.platform_dependent(
        x, cpu=lambda x: (jnp.ones((1, x.shape[0])) @ x)[0], default=lambda x: jnp.sum(x, axis=0)
    )


def on_rows(layers: Callable, x: jax.Array):
    """`layers(x)` for layers that act on the last axis of x, [batch, tokens, dim]; returns arrays [batch, tokens, ...].

    On a CPU the layers get x as a matrix [batch * tokens, dim]: the gradient of their weights
    contracts one axis then, and XLA:CPU is far slower where it contracts two.
    """
    # The axes of split tokens cannot be merged.
    if platform() != "cpu" or is_split("sequence"):
        return layers(x)
    return jax.tree.map(lambda y: y.reshape(*x.shape[:-1], *y.shape[1:]), layers(x.reshape(-1, x.shape[-1])))
