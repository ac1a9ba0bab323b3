"""Softmax attention over keys that lie in several places."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Keys(NamedTuple):
    """Keys and values of one place (the cache, or the new tokens).

    Attributes:
      k, v: [batch / copies, keys, heads, head_dim]. The queries' batch may be several
        copies of the keys', one after the other, which then share the keys.
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
    q_scaled = q * q.shape[-1] ** -0.5

    def by_copy(a, keys):
        """[batch, ...] to [copies, batch / copies, ...]."""
        return a.reshape(a.shape[0] // keys.k.shape[0], keys.k.shape[0], *a.shape[1:])

    def logits_of(keys):
        logits = jnp.einsum(
            "cbqhd,bkhd->cbhqk", by_copy(q_scaled, keys), keys.k, preferred_element_type=jnp.float32
        )
        return logits.reshape(q.shape[0], *logits.shape[2:]) + keys.bias

    logits = [logits_of(keys) for keys in places]
    ends = np.cumsum([part.shape[-1] for part in logits])[:-1].tolist()
    weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1).astype(q.dtype)
    parts = jnp.split(weights, ends, axis=-1)
    outs = [
        jnp.einsum("cbhqk,bkhd->cbqhd", by_copy(part, keys), keys.v).reshape(q.shape)
        for part, keys in zip(parts, places, strict=True)
    ]
    return sum(outs[1:], outs[0])
