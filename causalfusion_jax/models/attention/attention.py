"""Softmax attention by the one rule, over keys that lie in several places."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from causalfusion_jax.common.sharding import is_split, partition, platform
from causalfusion_jax.core.factorization import Role, attends
from causalfusion_jax.models.attention.by_head import attend_by_head
from causalfusion_jax.models.attention.flash import flash_attention

BY_HEAD_FROM = 128
"""New tokens from which a CPU attends head by head (launch/bench/RESULTS.md)."""


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
        logits = jnp.einsum("cbqhd,bkhd->cbhqk", by_copy(q_scaled, keys), keys.k, preferred_element_type=jnp.float32)
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


class Visibility(NamedTuple):
    """Who sees whom among new tokens and cached ones, ready for all layers.

    Attributes:
      layout: roles and steps of the new tokens, then of all keys, cached ones first; int32
        [batch, n]. None where the biases are made of them instead.
      bias: visibility of the new tokens to each other, [batch, 1, n, n], or None; or of the
        cache and them, [batch, 1, n, slots + n], where the keys are joined.
      cached_bias: visibility of the cache to them, [batch, 1, n, slots], or None.
    """

    layout: tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None
    bias: jax.Array | None
    cached_bias: jax.Array | None

    @staticmethod
    def of(role, step, cached_step: jax.Array | None, flash: bool, document=None) -> "Visibility":
        """By the one rule.

        Args:
          role, step: int32 [batch, n], of the new tokens.
          cached_step: int32 [batch, slots] of the cache, or None.
          flash: attend in tiles rather than to all keys at once.
          document: int [batch, n], where the new tokens are several sequences packed into one,
            all of which see the cache; then not in tiles.
        """
        # Condition tokens in the cache are before all others, as clean ones of their step.
        cached_role = None if cached_step is None else jnp.full_like(cached_step, Role.CLEAN)
        joined, documents = (role, step), (() if document is None else (document, document))
        if cached_step is not None:
            joined = jnp.concatenate([cached_role, role], axis=1), jnp.concatenate([cached_step, step], axis=1)
        if flash and document is None:
            return Visibility((role, step, *joined), None, None)
        if by_head(role.shape[1]) and (document is None or cached_step is None):
            return Visibility(None, visibility_bias(attends(role, step, *joined, *documents)), None)
        bias = visibility_bias(attends(role, step, role, step, *documents))
        cached_bias = None
        if cached_step is not None:
            cached_bias = visibility_bias(attends(role, step, cached_role, cached_step))
        return Visibility(None, bias, cached_bias)

    def attend(self, q, k, v, cached: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        """Attention of the new tokens.

        Args:
          q, k, v: [batch, n, heads, head_dim].
          cached: keys and values [batch / copies, slots, heads, head_dim], or None.

        Returns:
          [batch, n, heads, head_dim].
        """
        if self.cached_bias is not None:
            return attend(q, [Keys(*cached, self.cached_bias), Keys(k, v, self.bias)])
        if cached is not None:
            copies = q.shape[0] // cached[0].shape[0]
            k, v = (
                jnp.concatenate([jnp.tile(old, (copies, 1, 1, 1)).astype(new.dtype), new], axis=1)
                for old, new in zip(cached, (k, v), strict=True)
            )
        queries, keys = (partition(("batch", tokens, "heads", "head_dim")) for tokens in ("sequence", None))
        if self.layout is not None:
            q_tokens, k_tokens = (partition(("batch", tokens)) for tokens in ("sequence", None))
            specs = queries, keys, keys, q_tokens, q_tokens, k_tokens, k_tokens
            return _each_device(flash_attention, specs, q, k, v, *self.layout)
        if by_head(q.shape[1]):
            specs = queries, keys, keys, partition(("batch", None, "sequence", None))
            return _each_device(attend_by_head, specs, q, k, v, self.bias)
        return attend(q, [Keys(k, v, self.bias)])


def by_head(queries: int) -> bool:
    """Whether dense attention of so many new tokens runs head by head."""
    return platform() == "cpu" and queries >= BY_HEAD_FROM


def _each_device(compute, specs, *arrays) -> jax.Array:
    """`compute(*arrays)`; each device computes its share of batch, heads and queries."""
    if not is_split():
        return compute(*arrays)
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(compute, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)
