"""The attention mask of new tokens over the cache and each other, and the choice of an attention for it."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from causalfusion_jax.common.sharding import is_split, partition
from causalfusion_jax.core.factorization import Role, attends
from causalfusion_jax.models.attention.cpu import attend_by_head, prefers_by_head
from causalfusion_jax.models.attention.dense import KeySegment, dense_attention, mask_bias
from causalfusion_jax.models.attention.flash import flash_attention
from causalfusion_jax.models.attention.tiles import AttentionLayout


class AttentionMask(Protocol):
    """Which cached and new tokens each new token attends to, prepared once for all layers."""

    def attend(self, q, k, v, cached: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        """Attention of the new tokens.

        Args:
          q, k, v: [batch, n, heads, head_dim].
          cached: keys and values [batch / copies, slots, heads, head_dim], or None.

        Returns:
          [batch, n, heads, head_dim].
        """


class SegmentMask(NamedTuple):
    """The mask of a dense attention that leaves cached and new keys in arrays of their own.

    Attributes:
      bias: `mask_bias` of the new tokens over each other, [batch, 1, n, n].
      cached_bias: of the new tokens over the cache, [batch, 1, n, slots], or None.
    """

    bias: jax.Array
    cached_bias: jax.Array | None

    def attend(self, q, k, v, cached: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        """See `AttentionMask`."""
        segments = [KeySegment(k, v, self.bias)]
        return dense_attention(q, segments if cached is None else [KeySegment(*cached, self.cached_bias), *segments])


class JoinedMask(NamedTuple):
    """The mask of an attention that takes cached and new keys as one array, and runs on each device by itself.

    Attributes:
      attention: from q, k, v and `operand` to the output.
      operand: what says which keys, cached ones first, each query attends to.
      axes: logical axes of the arrays of `operand`.
    """

    attention: Callable
    operand: Any
    axes: Any

    def attend(self, q, k, v, cached: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        """See `AttentionMask`."""
        if cached is not None:
            copies = q.shape[0] // cached[0].shape[0]
            k, v = (
                jnp.concatenate([jnp.tile(old, (copies, 1, 1, 1)).astype(new.dtype), new], axis=1)
                for old, new in zip(cached, (k, v), strict=True)
            )
        if not is_split():
            return self.attention(q, k, v, self.operand)
        # Each device computes its part of the batch, the heads and the queries, with all keys.
        queries, keys = (partition(("batch", tokens, "heads", "head_dim")) for tokens in ("sequence", None))
        operand_specs = jax.tree.map(partition, self.axes, is_leaf=_is_axes)
        attention = jax.shard_map(
            self.attention,
            mesh=jax.sharding.get_abstract_mesh(),
            in_specs=(queries, keys, keys, operand_specs),
            out_specs=queries,
            check_vma=False,
        )
        return attention(q, k, v, self.operand)


def _is_axes(node) -> bool:
    """Whether a node of a tree is a tuple of logical axes."""
    return type(node) is tuple


def attention_mask(role, step, cached_step: jax.Array | None, flash: bool, document=None) -> AttentionMask:
    """Applies the attention rule (`factorization.attends`), and chooses the attention that takes its mask.

    Args:
      role, step: int32 [batch, n], of the new tokens.
      cached_step: int32 [batch, slots] of the cache, or None.
      flash: attend in tiles rather than to all keys at once.
      document: int [batch, n], where the new tokens are several sequences packed into one,
        all of which attend to the cache; the attention is then dense.
    """
    # Every cached token counts as a clean one. Condition tokens have a step before all others.
    cached_role = None if cached_step is None else jnp.full_like(cached_step, Role.CLEAN)
    k_role, k_step, documents = role, step, () if document is None else (document, document)
    if cached_step is not None:
        k_role = jnp.concatenate([cached_role, role], axis=1)
        k_step = jnp.concatenate([cached_step, step], axis=1)
    if flash and document is None:
        axes = AttentionLayout(*[("batch", "sequence")] * 2, *[("batch", None)] * 2)
        return JoinedMask(flash_attention, AttentionLayout(role, step, k_role, k_step), axes)
    if prefers_by_head(role.shape[1]) and (document is None or cached_step is None):
        bias = mask_bias(attends(role, step, k_role, k_step, *documents))
        return JoinedMask(attend_by_head, bias, ("batch", None, "sequence", None))
    bias = mask_bias(attends(role, step, role, step, *documents))
    cached_bias = None if cached_step is None else mask_bias(attends(role, step, cached_role, cached_step))
    return SegmentMask(bias, cached_bias)
