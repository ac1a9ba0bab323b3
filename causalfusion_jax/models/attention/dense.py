"""Dense softmax attention: all logits of queries and keys at once."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class KeySegment(NamedTuple):
    """Keys and values that lie in one array: those of the cache, or of the new tokens.

    Attributes:
      k, v: [batch / copies, keys, heads, head_dim]. The batch of the queries may be several
        copies of the batch of the keys, one after the other, which then share the keys.
      bias: float32 [batch, 1, queries, keys]; see `mask_bias`.
    """

    k: jax.Array
    v: jax.Array
    bias: jax.Array


def mask_bias(mask: jax.Array) -> jax.Array:
    """Turns an attention mask, bool [batch, queries, keys], into an additive bias of the logits.

    Returns:
      float32 [batch, 1, queries, keys]: 0 where a query attends to a key, else very negative.
    """
    # Finite, so that a row without any attended key does not make a NaN.
    return jnp.where(mask, 0.0, np.float32(-1e30))[:, None]


def dense_attention(q: jax.Array, segments: Sequence[KeySegment]) -> jax.Array:
    """Takes one softmax over the keys of all segments, without copying them into one array.

    Logits and softmax are float32 whatever the type of the inputs.

    Args:
      q: [batch, queries, heads, head_dim].
      segments: the keys and values.

    Returns:
      [batch, queries, heads, head_dim], of q's type.
    """
    q_scaled = q * q.shape[-1] ** -0.5

    def by_copy(x, segment):
        """[batch, ...] to [copies, batch / copies, ...]."""
        return x.reshape(x.shape[0] // segment.k.shape[0], segment.k.shape[0], *x.shape[1:])

    def segment_logits(segment):
        logits = jnp.einsum(
            "cbqhd,bkhd->cbhqk", by_copy(q_scaled, segment), segment.k, preferred_element_type=jnp.float32
        )
        return logits.reshape(q.shape[0], *logits.shape[2:]) + segment.bias

    logits = [segment_logits(segment) for segment in segments]
    ends = np.cumsum([part.shape[-1] for part in logits])[:-1].tolist()
    weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1).astype(q.dtype)
    outputs = [
        jnp.einsum("cbhqk,bkhd->cbqhd", by_copy(part, segment), segment.v).reshape(q.shape)
        for part, segment in zip(jnp.split(weights, ends, axis=-1), segments, strict=True)
    ]
    return sum(outputs[1:], outputs[0])
