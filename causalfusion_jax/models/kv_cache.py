"""Keys and values of the tokens that are already clean."""

import dataclasses

import jax
import jax.numpy as jnp

from causalfusion_jax.core.factorization import EMPTY_STEP


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A preallocated, append-only cache, scanned with the layers.

    Every slot holds a condition or clean token, so its AR step alone decides who sees
    it; an empty slot carries EMPTY_STEP and is seen by nobody.

    Attributes:
      k, v: [layers, batch, slots, heads, head_dim].
      step: int32 [batch, slots].
      length: int32 [], number of slots in use; where the next append writes.
    """

    k: jax.Array
    v: jax.Array
    step: jax.Array
    length: jax.Array

    @staticmethod
    def empty(layers: int, batch: int, slots: int, heads: int, head_dim: int, dtype) -> "KVCache":
        """A cache of `slots` empty slots."""
        kv = jnp.zeros((layers, batch, slots, heads, head_dim), dtype)
        return KVCache(kv, kv, jnp.full((batch, slots), EMPTY_STEP, jnp.int32), jnp.zeros((), jnp.int32))

    def append(self, k, v, step, count) -> "KVCache":
        """Writes n tokens at `length`, of which the first `count` are kept.

        The rest are padding: they stay invisible and the next append overwrites them.
        The caller leaves room for n slots.

        Args:
          k, v: [layers, batch, n, heads, head_dim].
          step: int32 [batch, n]; EMPTY_STEP for padding.
          count: int32 [], at most n.
        """
        at = self.length
        return KVCache(
            k=jax.lax.dynamic_update_slice_in_dim(self.k, k.astype(self.k.dtype), at, axis=2),
            v=jax.lax.dynamic_update_slice_in_dim(self.v, v.astype(self.v.dtype), at, axis=2),
            step=jax.lax.dynamic_update_slice_in_dim(self.step, step, at, axis=1),
            length=at + count,
        )
