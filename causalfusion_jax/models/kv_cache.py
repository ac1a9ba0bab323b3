"""Keys and values of condition and clean tokens."""

import dataclasses

import jax
import jax.numpy as jnp

from causalfusion_jax.core.factorization import EMPTY_STEP


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A preallocated, append-only cache, scanned with the layers.

    Every slot holds a condition or clean token, so its AR step alone decides which queries
    attend to it; the step of an empty slot is EMPTY_STEP, to which none does.

    Attributes:
      k, v: [layers, batch, slots, heads, head_dim].
      step: int32 [batch, slots].
      length: int32 [], number of slots in use; the next append begins there.
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

        The rest are padding, which is masked, and which the next append overwrites.
        The caller leaves room for n slots.

        Args:
          k, v: [layers, batch, n, heads, head_dim].
          step: int32 [batch, n]; EMPTY_STEP for padding.
          count: int32 [], at most n.
        """
        begin = self.length
        return KVCache(
            k=jax.lax.dynamic_update_slice_in_dim(self.k, k.astype(self.k.dtype), begin, axis=2),
            v=jax.lax.dynamic_update_slice_in_dim(self.v, v.astype(self.v.dtype), begin, axis=2),
            step=jax.lax.dynamic_update_slice_in_dim(self.step, step, begin, axis=1),
            length=begin + count,
        )

    def select(self, examples) -> "KVCache":
        """The cache of some examples; `examples` is a slice, or int [num]."""
        return KVCache(self.k[:, examples], self.v[:, examples], self.step[examples], self.length)

    def repeat_examples(self, times: int) -> "KVCache":
        """A cache in which every example follows itself, `times` in all; [times * batch]."""
        k, v = (jnp.repeat(a, times, axis=1) for a in (self.k, self.v))
        return KVCache(k, v, jnp.repeat(self.step, times, axis=0), self.length)
