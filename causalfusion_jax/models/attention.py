"""Softmax attention over keys that lie in several places."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Keys(NamedTuple):
    """Keys and values of one place (the cache, or the new tokens).

    Attributes:
      k, v: [batch, keys, heads, head_dim].
      bias: float32 [batch, 1, queries, keys], 0 where visible, else very negative.
    """

    k: jax.Array
    v: jax.Array
    bias: jax.Array


def visibility_bias(visible: jax.Array) -> jax.Array:
    """bool [batch, queries, keys] to the additive bias of `Keys`."""
    # Finite, so that a row without any visible key cannot make a NaN.
    return jnp.where(visible, 0.0, np.float32(-1e30))[:, None]


def attend(q: jax.Array, places: Sequence[Keys]) -> jax.Array:
    """One softmax over the keys of all places, which are never copied together.

    Logits and softmax are float32 whatever the inputs' type.

    Args:
      q: [batch, queries, heads, head_dim].
      places: where the keys lie.

    Returns:
      [batch, queries, heads, head_dim], of q's type.
    """
    scale = q.shape[-1] ** -0.5
    logits = [
        jnp.einsum("bqhd,bkhd->bhqk", q * scale, keys.k, preferred_element_type=jnp.float32) + keys.bias
        for keys in places
    ]
    ends = np.cumsum([part.shape[-1] for part in logits])[:-1].tolist()
    weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1).astype(q.dtype)
    parts = jnp.split(weights, ends, axis=-1)
    outs = [jnp.einsum("bhqk,bkhd->bqhd", part, keys.v) for part, keys in zip(parts, places, strict=True)]
    return sum(outs[1:], outs[0])
